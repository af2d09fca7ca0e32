"""Code that transformers runs for `model.generate(custom_generate=FOLDER, trust_remote_code=True)`.

It is copied to FOLDER/custom_generate/generate.py; the artifact is in FOLDER/artifact.
"""

import inspect
from pathlib import Path
from typing import Any

import draftsmith

ARTIFACT = "artifact"
_latest: tuple[Any, Path, Any] | None = None


def generate(model: Any, artifact: str | Path | None = None, streamer: Any = None, **arguments: Any) -> Any:
    """Returns the output of `model.generate`, drafted by the artifact in FOLDER, or in the folder `artifact`."""
    if artifact is None:
        artifact = _custom_generate_folder() / ARTIFACT
    drafter = _load(model, Path(artifact).resolve())
    if streamer is not None:
        arguments["stream_to"] = streamer  # transformers hands its own streamer to folders, not to functions
    # The drafter's target is a fine-tuned copy of `model` if it fine-tunes its target.
    return drafter.target.model.generate(**arguments, custom_generate=draftsmith.custom_generate, drafter=drafter)


def _load(model: Any, path: Path) -> Any:
    """Returns the drafter; the latest one stays loaded."""
    global _latest
    latest = _latest  # other threads may replace it
    if latest is None or latest[0] is not model or latest[1] != path:
        _latest = latest = (model, path, draftsmith.load(path, draftsmith.Target(model)))
    return latest[2]


def _custom_generate_folder() -> Path:
    """Returns the FOLDER that `model.generate` was called with, from the caller's frame.

    transformers runs a copy of this file from its cache and does not pass the folder.
    """
    folder = inspect.stack()[2].frame.f_locals.get("custom_generate")
    if not isinstance(folder, str) or not Path(folder, ARTIFACT).is_dir():
        raise ValueError(f"{folder!r} is not a local folder with an artifact; pass artifact=PATH")
    return Path(folder)
