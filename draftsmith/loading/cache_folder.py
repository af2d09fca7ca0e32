"""draftsmith's cache folder: models fetched or converted once, each folder whole or not there at all."""

import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HOME = "DRAFTSMITH_HOME"
"""Environment variable that names the cache folder."""


def home() -> Path:
    """Returns the cache folder: `$DRAFTSMITH_HOME`, `$XDG_CACHE_HOME/draftsmith`, or `~/.cache/draftsmith`."""
    if named := os.environ.get(HOME):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "draftsmith"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Waits until no other process makes `folder`, and keeps others from making it while the block runs.

    The operating system releases the lock when its process ends, however it ends. Raises ValueError if the cache folder
    cannot be written to.
    """
    path = folder.with_name(f".{folder.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ValueError(
            f"{path.parent}: the cache folder cannot be written to ({error.strerror}); set {HOME} to another folder"
        ) from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"draftsmith: waiting for another process that makes {folder}", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


@contextmanager
def temporary_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder beside `folder` for files that are moved there when complete; removes it at the end.

    The caller holds the lock of `folder`. What a killed process left is removed first. Raises ValueError in place of
    errors of a full disk or missing permissions.
    """
    prefix = f".{folder.name}.part-"
    for left in folder.parent.glob(f"{prefix}*"):
        shutil.rmtree(left, ignore_errors=True)
    try:
        with tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent) as temporary:
            yield Path(temporary)
    except OSError as error:
        raise ValueError(f"{folder} cannot be made: {error}; free some space or set {HOME} to another folder") from None
