"""Folders for `model.generate(custom_generate=FOLDER, trust_remote_code=True)` of transformers, for any family."""

import inspect
from pathlib import Path

from draftsmith.export import remote
from draftsmith.export.given import Given
from draftsmith.export.launch import Launch, in_python


def write(given: Given, folder: Path) -> Launch:
    """Writes a copy of the artifact and the function that transformers runs with it."""
    given.copy_artifact(folder / remote.ARTIFACT)
    code = folder / "custom_generate"
    code.mkdir()
    (code / "generate.py").write_text(inspect.getsource(remote))
    (code / "requirements.txt").write_text("draftsmith\n")
    call = f"custom_generate={str(given.output)!r}, trust_remote_code=True"
    tunes = ("The text is that of the target as the drafter has changed it.",)
    return in_python(
        given,
        f"model.generate(**inputs, {call}, max_new_tokens=64, do_sample=False)",
        target=given.target_name,
        notes=tunes if given.manifest.get("tunes_target") else (),
        custom_generate=str(given.output),
    )
