"""Log files with one JSON object per line, and the names of metrics in them."""

import json
import os
from pathlib import Path
from typing import Any

from draftsmith.artifacts import json_text

LOG = "log.jsonl"
HELD_OUT = "eval_"
"""Prefix of metrics on held-out rows."""


def wandb_name(name: str) -> str:
    """Returns wandb's name of the metric that logs call `name`."""
    return f"eval/{name.removeprefix(HELD_OUT)}" if name.startswith(HELD_OUT) else f"train/{name}"


def append(path: Path, line: dict[str, Any]) -> None:
    """Appends a line and waits until it is on disk."""
    with path.open("a") as file:
        file.write(json_text.text_of(json_text.without_nan(line)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """Returns the log's objects; an incomplete last line is removed from the file."""
    if not path.exists():
        return []
    text = path.read_text()
    complete = text[: text.rfind("\n") + 1]
    if complete != text:
        os.truncate(path, len(complete.encode()))
    return [json.loads(line) for line in complete.splitlines()]
