"""What transformers runs for `model.generate(custom_generate=FOLDER, trust_remote_code=True)`: drafts of draftsmith.

It stands in FOLDER as custom_generate/generate.py, the artifact beside it in FOLDER/artifact.
"""

import inspect
from pathlib import Path
from typing import Any

import draftsmith

ARTIFACT = "artifact"
_latest: tuple[Any, Path, Any] | None = None


def generate(model: Any, artifact: str | Path | None = None, **arguments: Any) -> Any:
    """Returns what `model.generate` returns, drafted by the artifact in FOLDER, or in the folder `artifact`."""
    if artifact is None:
        artifact = _folder_of_the_call() / ARTIFACT
    drafter = _load(model, Path(artifact).resolve())
    # One that has changed its target drafts for that.
    return drafter.target.model.generate(**arguments, custom_generate=draftsmith.custom_generate, drafter=drafter)


def _load(model: Any, path: Path) -> Any:
    """Returns the drafter, which stays loaded until another one is asked for."""
    global _latest
    if _latest is None or _latest[0] is not model or _latest[1] != path:
        _latest = (model, path, draftsmith.load(path, draftsmith.Target(model)))
    return _latest[2]


def _folder_of_the_call() -> Path:
    """Returns the FOLDER that `model.generate` was called with, of which transformers tells nothing.

    This file runs as a copy in transformers' cache.
    """
    folder = inspect.stack()[2].frame.f_locals.get("custom_generate")
    if not isinstance(folder, str) or not Path(folder, ARTIFACT).is_dir():
        raise ValueError(f"{folder!r} is no local folder with an artifact; name one by artifact=PATH")
    return Path(folder)
