"""Files of artifacts and exports: `inside` checks names read from other files, `atomic_folder` writes whole folders."""

import ctypes
import errno
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from draftsmith.loading.text_files import kind_of

LOCK = ".lock"
"""Name of the lock file in a folder that a run is writing to."""
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)
CLOSED_OUTPUT = 128 + 13
"""Exit status of a process whose standard output was closed, as if the signal SIGPIPE had ended it."""
MIN_FREE_BYTES = 1_000_000
"""Free space below which an error counts as one of a full disk: torch.save and safetensors hide its number."""
EXCHANGE, AT_WORKING_DIRECTORY = 2, -100
"""Linux's RENAME_EXCHANGE and AT_FDCWD."""


def plain_name(name: Any, source: str | Path) -> str:
    """Returns `name`, which was read from `source`; raises ValueError unless it is a relative path without `..`."""
    is_plain = isinstance(name, str) and re.match(r"[\\/]|[A-Za-z]:", name) is None and "\0" not in name
    if not is_plain or {"", ".", ".."} & {*re.split(r"[\\/]", name)}:
        raise ValueError(f"{source} names the file {name!r}; it must be a relative path without '..'")
    return name


def inside(folder: Path, name: Any) -> Path:
    """Returns the path of `name` in `folder`; raises ValueError if it is not a plain name or a link leads out of there.

    In the hub's cache every file of a snapshot is a link into the folder `blobs` of its repository.
    """
    path = folder / plain_name(name, folder)
    try:
        root, found = folder.resolve(), path.resolve()
        path.exists()
    except (OSError, RuntimeError) as error:  # a name that is too long, or links in a circle
        reason = error.strerror if isinstance(error, OSError) else "links in a circle"
        raise ValueError(f"{folder} has no file {name[:40]!r}... ({reason})") from None
    snapshots = [parent for parent in (root, *root.parents) if parent.name == "snapshots"]
    if not any(found.is_relative_to(one) for one in (root, *(parent.parent / "blobs" for parent in snapshots))):
        raise ValueError(f"{path} is a link that leads out of {folder}; replace it with a copy of its target")
    return path


@contextmanager
def atomic_folder(path: Path, *, marker: str) -> Iterator[Path]:
    """Yields an empty folder beside `path` that replaces `path` when the block ends without an error.

    A folder at `path` is replaced only if it is empty or contains the file `marker`. Raises ValueError otherwise;
    nothing is written then. Leftovers of killed processes beside `path` are removed, or moved back to `path` if it is
    missing.
    """
    check_replaceable(path, marker=marker)
    if path.is_symlink():
        path = path.resolve()
    staging = path.with_name(f".{path.name}.staging-{os.getpid()}")
    try:
        _recover(path)
        shutil.rmtree(staging, ignore_errors=True)
        make_folder(staging)
        yield staging
        # safetensors writes files that only their owner can read; servers often run as another user.
        mode = staging.stat().st_mode & 0o666
        for file in staging.rglob("*"):
            if file.is_file():
                file.chmod(mode)
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        if not path.exists():
            staging.rename(path)
        elif not _exchange(staging, path):
            retired = path.with_name(f".{path.name}.retired-{os.getpid()}")
            path.rename(retired)
            try:
                staging.rename(path)
            except BaseException:
                retired.rename(path)
                raise
            shutil.rmtree(retired)
    except ValueError:
        raise
    except Exception as error:
        if fault := storage_fault(error, path.parent):
            raise ValueError(fault) from error
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_replaceable(path: Path, *, marker: str) -> None:
    """Raises ValueError if `path` is no folder, or one that is not empty and does not contain `marker`.

    An incomplete `marker` or a lock that a killed process has left is not counted.
    """
    check_folder(path)
    if not path.is_dir() or (path / marker).exists():
        return
    if any(file.name != LOCK and not file.name.startswith(f".{marker}.part-") for file in path.iterdir()):
        raise ValueError(f"{path} contains other files (no {marker} among them); name a new or empty folder")


def check_folder(path: Path) -> None:
    """Raises ValueError if something that is no folder is at `path`, or nothing of that name can be."""
    if (kind := kind_of(path)) not in ("folder", None):
        raise ValueError(f"{path} is a {kind}; name a folder to write to")


def make_folder(path: Path) -> None:
    """Makes a folder and those above it; raises ValueError if that cannot be, as below a file or without rights."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fault = storage_fault(error, path.parent)
        raise ValueError(fault or f"{path.parent} cannot hold a folder ({error.strerror}); name another one") from error


def storage_fault(error: Exception, folder: Path | None = None) -> str | None:
    """Returns a sentence for an error of a full disk or of missing permissions, None for any other error."""
    number = error.errno if isinstance(error, OSError) else None
    where = f"{folder}: " if folder else ""
    reason = " ".join(str(error).split())
    is_full = number in NO_SPACE or "No space left" in reason or "quota exceeded" in reason
    if is_full or (number is None and folder and folder.exists() and shutil.disk_usage(folder).free < MIN_FREE_BYTES):
        return f"{where}no space left to write ({reason}); free some and run the same command again, which continues"
    if number in NOT_WRITABLE:
        return f"{where}cannot be written to ({reason}); name another folder or change its permissions"
    return None


def system_fault(error: OSError) -> str:
    """Returns a sentence for any error of the operating system, as for a name that is too long."""
    named = "" if error.filename is None else f": {str(error.filename)[:80]}"
    return storage_fault(error) or f"{error.strerror or error}{named}"


def end_quietly() -> NoReturn:
    """Ends the process after its standard output was closed, as by `| head`, without Python's message about that."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(CLOSED_OUTPUT)


def _recover(path: Path) -> None:
    """Removes the staging folders of dead processes, or moves back the folder that one of them was replacing."""
    for folder in sorted(path.parent.iterdir()) if path.parent.is_dir() else ():
        kind, _, process = folder.name.removeprefix(f".{path.name}.").partition("-")
        is_leftover = kind in ("retired", "staging") and folder.name == f".{path.name}.{kind}-{process}"
        if not is_leftover or not process.isdecimal() or _is_another_process(int(process)):
            continue
        if kind == "retired" and not path.exists():
            folder.rename(path)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _is_another_process(number: int) -> bool:
    """Returns whether `number` is the id of another running process."""
    with suppress(ProcessLookupError, OverflowError):
        with suppress(PermissionError):
            os.kill(number, 0)
        return number != os.getpid()
    return False


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two folders in one operation; returns False where the system or the file system cannot."""
    if sys.platform != "linux":
        return False
    with suppress(AttributeError, OSError):
        rename = ctypes.CDLL(None).renameat2
        return rename(AT_WORKING_DIRECTORY, os.fsencode(one), AT_WORKING_DIRECTORY, os.fsencode(other), EXCHANGE) == 0
    return False
