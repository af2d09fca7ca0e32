"""A run's folder: its settings (`run.json`), its checkpoints and which of them are complete.

A checkpoint is complete once its `whole.json` lists every file with its size; those interrupted by `kill -9` or
truncated later are skipped.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from data.shards import write_whole
from draftsmith.artifacts.model_card import keep_edited, warn_of_kept

MARKER = "run.json"
ARTIFACT = "draft_config.json"
WHOLE = "whole.json"
WEIGHTS = "model.safetensors"


def is_finished(output: Path) -> bool:
    """Returns whether the run is finished: the manifest of its artifact is moved into the folder last."""
    return (output / ARTIFACT).is_file()


def folder(output: Path, step: int) -> Path:
    return output / "checkpoints" / f"checkpoint-{step}"


def mark_complete(checkpoint: Path, facts: dict[str, Any]) -> None:
    """Marks a checkpoint as complete and records `facts`, which must be the same when a run resumes from it."""
    sizes = {str(path.relative_to(checkpoint)): path.stat().st_size for path in _files(checkpoint)}
    text = json.dumps({"files": sizes, **facts}, indent=1)
    write_whole(checkpoint / WHOLE, lambda path: path.write_text(text))


def keep_only(output: Path, steps: set[int]) -> None:
    """Removes the checkpoints of all other steps."""
    kept = {folder(output, step) for step in steps}
    for checkpoint in (output / "checkpoints").glob("checkpoint-*"):
        if checkpoint not in kept:
            shutil.rmtree(checkpoint)


def newest_complete(output: Path) -> tuple[int, dict[str, Any]] | None:
    """Returns (step, facts) of the newest complete checkpoint, None without one."""
    steps = (int(path.name.rpartition("-")[2]) for path in (output / "checkpoints").glob("checkpoint-*"))
    for step in sorted(steps, reverse=True):
        facts = _facts(folder(output, step))
        if facts is not None:
            return step, facts
    return None


def _facts(checkpoint: Path) -> dict[str, Any] | None:
    """Returns the facts recorded in a checkpoint, None if it is not complete."""
    if not (checkpoint / WHOLE).is_file():
        return None
    facts = json.loads((checkpoint / WHOLE).read_text())
    sizes = facts.pop("files")
    found = {str(path.relative_to(checkpoint)): path.stat().st_size for path in _files(checkpoint)}
    return facts if sizes.items() <= found.items() else None


def _files(checkpoint: Path) -> list[Path]:
    return [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != WHOLE]


def publish(staging: Path, output: Path) -> None:
    """Moves a finished artifact into the run's folder, its manifest last, and removes the training files."""
    warn_of_kept(output, keep_edited(output, output))
    for path in sorted(staging.iterdir(), key=lambda path: path.name == ARTIFACT):
        if path.is_dir():
            # A run killed at this point may have moved it already.
            shutil.rmtree(output / path.name, ignore_errors=True)
        path.replace(output / path.name)
    staging.rmdir()
    clear(output)


def clear(output: Path) -> None:
    """Removes a finished run's checkpoints and the parts of its datastore."""
    for name in ("checkpoints", "parts"):
        shutil.rmtree(output / name, ignore_errors=True)
