"""Exclusive use of an output folder by one run, with a message to its user if the run is interrupted: `locked`."""

import fcntl
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from draftsmith.artifacts.files import LOCK, check_folder, make_folder, storage_fault

_held: dict[tuple[Path, int], int] = {}
"""Descriptors of the locks that threads of this process hold, by (folder, thread)."""


@contextmanager
def locked(folder: Path, *, kept: Callable[[], str] | None = None) -> Iterator[int]:
    """Locks `folder` while the block runs and yields the lock's descriptor; a subprocess that inherits it locks it too.

    The operating system releases the lock when the last process that has it ends, by `kill -9` too. A missing folder is
    created, and removed again if it is still empty at the end. A thread may lock a folder that it has locked. Raises
    ValueError if another run uses the folder, and in place of errors of a full disk or missing permissions. `kept`
    returns what an interrupted run can continue from; it is added to a KeyboardInterrupt as a note.
    """
    holder = (folder.resolve(), threading.get_ident())
    if holder in _held:
        yield _held[holder]
        return
    check_folder(folder)
    try:
        is_new = not folder.exists()
        make_folder(folder)
        lock = _acquire(folder)
        _held[holder] = lock
        try:
            yield lock
        finally:
            del _held[holder]
            with suppress(OSError):
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


def _acquire(folder: Path) -> int:
    """Returns a descriptor of the folder's lock file that holds the lock."""
    path = folder / LOCK
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            by = os.pread(lock, 200, 0).decode(errors="replace").strip() or "unknown"
            os.close(lock)
            raise ValueError(
                f"{folder} is in use by another run (process {by}, or one that it started); wait until it ends, "
                "stop it, or name another folder"
            ) from None
        except OSError as error:
            print(f"{folder}: this file system has no locks ({error}); start no second run in it", file=sys.stderr)
        if path.exists() and os.path.samestat(os.fstat(lock), path.stat()):
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            return lock
        os.close(lock)  # the run that held it has removed the file in the meantime
