"""A run's folder: what it was told (`run.json`), its checkpoints, and which of them are whole.

A checkpoint counts only once `whole.json` in it lists every file with its size, so that one cut short by `kill -9`, or
truncated since, is passed over.
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
    """Returns whether the run's artifact is there; it is moved in last."""
    return (output / ARTIFACT).is_file()


def folder(output: Path, step: int) -> Path:
    return output / "checkpoints" / f"checkpoint-{step}"


def mark_whole(checkpoint: Path, facts: dict[str, Any]) -> None:
    """Declares a checkpoint whole and writes down what must be the same when it is resumed from."""
    sizes = {str(path.relative_to(checkpoint)): path.stat().st_size for path in _files(checkpoint)}
    text = json.dumps({"files": sizes, **facts}, indent=1)
    write_whole(checkpoint / WHOLE, lambda path: path.write_text(text))


def keep_only(output: Path, steps: set[int]) -> None:
    """Removes all other checkpoints, whole or not."""
    kept = {folder(output, step) for step in steps}
    for checkpoint in (output / "checkpoints").glob("checkpoint-*"):
        if checkpoint not in kept:
            shutil.rmtree(checkpoint)


def newest_whole(output: Path) -> tuple[int, dict[str, Any]] | None:
    """Returns (step, facts) of the newest checkpoint that is whole, None if there is none."""
    found = sorted(
        (int(path.name.rpartition("-")[2]) for path in (output / "checkpoints").glob("checkpoint-*")), reverse=True
    )
    for step in found:
        facts = _facts(folder(output, step))
        if facts is not None:
            return step, facts
    return None


def _facts(checkpoint: Path) -> dict[str, Any] | None:
    if not (checkpoint / WHOLE).is_file():
        return None
    facts = json.loads((checkpoint / WHOLE).read_text())
    sizes = facts.pop("files")
    found = {str(path.relative_to(checkpoint)): path.stat().st_size for path in _files(checkpoint)}
    return facts if sizes.items() <= found.items() else None


def _files(checkpoint: Path) -> list[Path]:
    return [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != WHOLE]


def publish(staging: Path, output: Path) -> None:
    """Moves a finished artifact into the run's folder, its manifest last, and removes what training left behind."""
    warn_of_kept(output, keep_edited(output, output))
    for path in sorted(staging.iterdir(), key=lambda path: path.name == ARTIFACT):
        if path.is_dir():
            # What a run killed right here had moved already.
            shutil.rmtree(output / path.name, ignore_errors=True)
        path.replace(output / path.name)
    staging.rmdir()
    clear(output)


def clear(output: Path) -> None:
    """Removes a finished run's checkpoints, and the parts of its store."""
    for name in ("checkpoints", "parts"):
        shutil.rmtree(output / name, ignore_errors=True)
