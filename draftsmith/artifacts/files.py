"""Writes folders atomically: `atomic_folder`."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_folder(path: Path, *, marker: str) -> Iterator[Path]:
    """Yields an empty folder beside `path` that replaces `path` when the block ends without an error.

    A folder at `path` is replaced only if it is empty or contains the file `marker`. Raises ValueError otherwise;
    nothing is written then.
    """
    check_replaceable(path, marker=marker)
    staging = path.with_name(f".{path.name}.staging-{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        # safetensors writes files that only their owner can read; servers often run as another user.
        mode = staging.stat().st_mode & 0o666
        for file in staging.rglob("*"):
            if file.is_file():
                file.chmod(mode)
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        if path.exists():
            retired = path.with_name(f".{path.name}.retired-{os.getpid()}")
            path.rename(retired)
            try:
                staging.rename(path)
            except BaseException:
                retired.rename(path)
                raise
            shutil.rmtree(retired)
        else:
            staging.rename(path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_replaceable(path: Path, *, marker: str) -> None:
    """Raises ValueError if `path` is a file, or a folder that is not empty and does not contain `marker`."""
    if path.is_file():
        raise ValueError(f"{path} is a file; name a folder to write to")
    if path.is_dir() and any(path.iterdir()) and not (path / marker).exists():
        raise ValueError(f"{path} contains other files (no {marker} among them); name a new or empty folder")
