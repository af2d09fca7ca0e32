"""Exports any family as a folder for transformers' `model.generate(custom_generate=..., trust_remote_code=True)`."""

import inspect
from pathlib import Path

from draftsmith.export import remote
from draftsmith.export.launch import Launch, python_launch
from draftsmith.export.source import ExportSource


def write(source: ExportSource, folder: Path) -> Launch:
    """Writes a copy of the artifact and the `generate` function that transformers calls."""
    source.copy_artifact(folder / remote.ARTIFACT)
    code = folder / "custom_generate"
    code.mkdir()
    (code / "generate.py").write_text(inspect.getsource(remote))
    (code / "requirements.txt").write_text("draftsmith\n")
    call = f"custom_generate={str(source.output)!r}, trust_remote_code=True"
    fine_tuned = ("The output is that of the target as fine-tuned by the drafter.",)
    return python_launch(
        source,
        f"model.generate(**inputs, {call}, max_new_tokens=64, do_sample=False)",
        target=source.target_name,
        notes=fine_tuned if source.manifest.get("tunes_target") else (),
        custom_generate=str(source.output),
    )
