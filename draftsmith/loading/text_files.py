"""Reads what users give by name: what is at a path, and YAML, each with one sentence for what cannot be read."""

import stat
from pathlib import Path
from typing import Any


def kind_of(path: Path) -> str | None:
    """Returns what is at a path, links followed: "folder", "file" or "device", None for nothing.

    Raises ValueError for a name that the system does not allow.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ValueError(f"{str(path)[:40]!r} cannot be the name of a file or folder: {reason}") from None
    return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "device"


def parse_yaml(text: str) -> Any:
    """Returns the value of a YAML text; raises ValueError, with the reason in one line, if it is invalid."""
    import yaml  # installed with transformers

    try:
        return yaml.safe_load(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # ValueError: a date that does not exist
        raise ValueError(" ".join(str(error).split())) from None


def read_yaml(path: Path) -> Any:
    """Returns the value of a YAML file; raises ValueError, naming the file, if it cannot be read."""
    try:
        return parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"no such file: {path}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
