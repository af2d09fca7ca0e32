"""Logs of one JSON object a line, and the names in them."""

import json
import os
from pathlib import Path
from typing import Any

LOG, HELD_OUT = "log.jsonl", "eval_"


def wandb_name(name: str) -> str:
    """Returns the name under which wandb shows what a log calls `name`."""
    return f"eval/{name.removeprefix(HELD_OUT)}" if name.startswith(HELD_OUT) else f"train/{name}"


def append(path: Path, line: dict[str, Any]) -> None:
    """Adds a line; it is on disk when this returns."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def whole(path: Path) -> list[dict[str, Any]]:
    """Returns the log's lines, a last one that was cut short taken off the file as well."""
    if not path.exists():
        return []
    text = path.read_text()
    kept = text[: text.rfind("\n") + 1]
    if kept != text:
        os.truncate(path, len(kept.encode()))
    return [json.loads(line) for line in kept.splitlines()]
