"""A run's folder: its settings (`run.json`), its checkpoints and which of them are complete.

A checkpoint is complete once its `whole.json` lists every file with its hash, which is written after the files are on
disk; those interrupted by `kill -9` are skipped, and those damaged later are set aside.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from data.shards import sync, write_atomically
from draftsmith.artifacts.model_card import keep_edited, warn_of_kept
from trainers.training.jsonl import LOG

MARKER = "run.json"
ARTIFACT = "draft_config.json"
COMPLETE = "whole.json"
WEIGHTS = "model.safetensors"


def is_finished(output: Path) -> bool:
    """Returns whether the run is finished: the manifest of its artifact is moved into the folder last."""
    return (output / ARTIFACT).is_file()


def folder(output: Path, step: int) -> Path:
    return output / "checkpoints" / f"checkpoint-{step}"


def mark_complete(checkpoint: Path, facts: dict[str, Any]) -> None:
    """Marks a checkpoint as complete and records `facts`, which must be the same when a run resumes from it."""
    files = _files(checkpoint)
    for path in {*files, *(path.parent for path in files), checkpoint.parent, checkpoint.parent.parent}:
        sync(path)
    hashes = {str(path.relative_to(checkpoint)): _hash(path) for path in files}
    text = json.dumps({"hashes": hashes, **facts}, indent=1)
    write_atomically(checkpoint / COMPLETE, lambda path: path.write_text(text))


def keep_only(output: Path, steps: set[int]) -> None:
    """Removes the checkpoints of all other steps."""
    for checkpoint in (output / "checkpoints").glob("checkpoint-*"):
        if checkpoint not in {folder(output, step) for step in steps}:
            (checkpoint / COMPLETE).unlink(missing_ok=True)  # one that is half removed does not count as damaged
            shutil.rmtree(checkpoint)


def newest_complete(output: Path) -> tuple[int, dict[str, Any]] | None:
    """Returns (step, facts) of the newest complete and undamaged checkpoint, None without one."""
    for checkpoint in _marked(output):
        facts, fault = _read(checkpoint)
        if not fault:
            return _step(checkpoint), facts
    return None


def best_undamaged(output: Path, step: int | None) -> Path:
    """Returns the checkpoint of `step`, the best one, or the newest complete one, with a message, if it is damaged.

    Without a `step` it is the newest, as no held-out row has a value of the metric that checkpoints are compared by.
    """
    newest = newest_complete(output)
    if step is None and newest is not None:
        print(f"{output}: no held-out row says which checkpoint is best; the newest one is used")
        return folder(output, newest[0])
    checkpoint = folder(output, step or 0)
    _, fault = _read(checkpoint)
    if not fault or newest is None:
        return checkpoint
    print(f"{checkpoint}, the best one, is damaged ({fault}); the newest one is used")
    return folder(output, newest[0])


def set_damaged_aside(output: Path) -> None:
    """Renames damaged checkpoints that are marked as complete to `damaged-checkpoint-*`, and names them.

    The caller holds the folder's lock.
    """
    for checkpoint in _marked(output):
        _, fault = _read(checkpoint)
        if fault:
            aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.rename(aside)
            print(f"{checkpoint} is damaged ({fault}); it is now {aside.name}, and the one before it is used")


def kept(output: Path) -> str:
    """Returns what an unfinished run's folder holds for it to continue from, for messages."""
    marked = _marked(output)
    return f"the checkpoint of step {_step(marked[0])}" if marked else "what is complete"


def disposable(output: Path) -> list[str]:
    """Returns the names in the folder of a run that are of no use to continue it: logs, and incomplete checkpoints."""
    return [LOG, "wandb", *([] if _marked(output) else ["checkpoints"])]


def _marked(output: Path) -> list[Path]:
    """Returns the checkpoints that are marked as complete, the newest first."""
    found = [path for path in (output / "checkpoints").glob("checkpoint-*") if (path / COMPLETE).is_file()]
    return sorted(found, key=_step, reverse=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _read(checkpoint: Path) -> tuple[dict[str, Any], str]:
    """Returns the facts recorded in a checkpoint, and its fault in words, "" if it has none."""
    try:
        facts = json.loads((checkpoint / COMPLETE).read_text())
        # Earlier versions recorded the files' sizes alone.
        recorded, measure = (facts.pop("hashes"), _hash) if "hashes" in facts else (facts.pop("files"), _size)
        for name, value in recorded.items():
            if measure(checkpoint / name) != value:
                return {}, f"{name} has changed"
    except (OSError, ValueError, KeyError, AttributeError) as error:
        return {}, " ".join(str(error).split())
    return facts, ""


def _hash(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _size(path: Path) -> int:
    return path.stat().st_size


def _files(checkpoint: Path) -> list[Path]:
    return [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != COMPLETE]


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
    """Removes a finished run's checkpoints, the parts of its datastore and leftovers of an interrupted `publish`."""
    for name in ("checkpoints", "parts", "artifact"):
        shutil.rmtree(output / name, ignore_errors=True)
