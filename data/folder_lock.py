"""Who may write to an output folder: `locked` for a run, `claimed` for one file of a run of several processes.

Both use locks of the operating system, which it releases when their process ends, by `kill -9` too.
"""

import fcntl
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from draftsmith.artifacts.files import LOCK, check_folder, make_folder, storage_fault

CLAIM = ".{}.part-claim"
"""Name of the lock file of a file that one of several processes is to write."""
_held: dict[tuple[Path, int], int] = {}
"""Descriptors of the locks that threads of this process hold, by (folder, thread)."""


@contextmanager
def locked(folder: Path, *, kept: Callable[[], str] | None = None, is_shared: bool = False) -> Iterator[int]:
    """Locks `folder` while the block runs and yields the lock's descriptor; a subprocess that inherits it locks it too.

    Processes with `is_shared` share the folder with each other and with no one else. A missing folder is created, and
    removed again if it is still empty at the end. A thread may lock a folder that it has locked. Raises ValueError if
    another run uses the folder, and in place of errors of a full disk or missing permissions. `kept` returns what an
    interrupted run can continue from; it is added to a KeyboardInterrupt as a note.
    """
    holder = (folder.resolve(), threading.get_ident())
    if holder in _held:
        yield _held[holder]
        return
    check_folder(folder)
    try:
        is_new = not folder.exists()
        make_folder(folder)
        lock = _acquire(folder, is_shared=is_shared)
        _held[holder] = lock
        try:
            yield lock
        finally:
            del _held[holder]
            with suppress(OSError):
                if is_shared:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while others have it
                (folder / LOCK).unlink()
            os.close(lock)
            if is_new:
                with suppress(OSError):  # it is not empty
                    folder.rmdir()
    except KeyboardInterrupt as error:
        error.add_note(f"{folder} keeps {kept() if kept else 'what is complete'}; the same command continues the run")
        raise
    except ValueError:
        raise
    except Exception as error:
        if fault := storage_fault(error, folder):
            raise ValueError(fault) from error
        raise


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Yields whether this process, or this thread of it, is the one to write the file `path` while the block runs."""
    claim = path.with_name(CLAIM.format(path.name))
    lock = _open_locked(claim, fcntl.LOCK_EX)
    if lock is None:
        yield False
        return
    try:
        yield True
    finally:
        with suppress(OSError):
            claim.unlink()
        os.close(lock)


def _acquire(folder: Path, *, is_shared: bool) -> int:
    """Returns a descriptor of the folder's lock file that holds the lock."""
    path = folder / LOCK
    lock = _open_locked(path, fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX)
    if lock is None:
        with suppress(OSError):
            by = path.read_text(errors="replace")[:200].strip()
            raise ValueError(
                f"{folder} is in use by another run (process {by or 'unknown'}, or one that it started); wait until it"
                " ends, stop it, or name another folder"
            )
        return _acquire(folder, is_shared=is_shared)  # it has just ended
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return lock


def _open_locked(path: Path, kind: int) -> int | None:
    """Returns a descriptor of the file `path` that holds a lock of this kind, None if another process holds it."""
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        except OSError as error:
            print(f"{path.parent}: this file system has no locks ({error}); start no second run in it", file=sys.stderr)
        if path.exists() and os.path.samestat(os.fstat(lock), path.stat()):
            return lock
        os.close(lock)  # the process that held it has removed the file in the meantime
