"""Locks of output folders: one run at a time, stale locks, and the sentences for interruptions and full disks."""

import errno
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from data.folder_lock import locked, storage_fault
from data.shards import open_folder
from draftsmith.artifacts.files import LOCK, check_replaceable
from tests.support.runs import ROOT

HOLD = """
import sys, time
from pathlib import Path
from data.folder_lock import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(300)
"""


def test_lock_excludes_other_processes_until_they_are_killed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = [sys.executable, "-c", HOLD, str(folder)]
    holder = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        with (
            pytest.raises(ValueError, match=rf"run is in use by another run \(process {holder.pid} on"),
            locked(folder),
        ):
            pass
        assert (folder / LOCK).exists()
    finally:
        holder.kill()
        holder.wait()
    check_replaceable(folder, marker="run.json")
    with locked(folder):
        (folder / "result").touch()
    assert [path.name for path in folder.iterdir()] == ["result"]


def test_thread_may_lock_twice_and_another_may_not(tmp_path: Path) -> None:
    faults = []

    def lock_elsewhere() -> None:
        try:
            with locked(tmp_path):
                pass
        except ValueError as error:
            faults.append(str(error))

    with locked(tmp_path) as outer:
        with locked(tmp_path / "." / "") as inner:
            assert inner == outer
        thread = threading.Thread(target=lock_elsewhere)
        thread.start()
        thread.join()
    assert len(faults) == 1 and "in use by another run" in faults[0]
    lock_elsewhere()
    assert len(faults) == 1


def test_rejected_run_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wrong"), locked(tmp_path / "new"):
        raise ValueError("wrong")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file"), locked(tmp_path / "file"):
        pass


def test_interruption_says_what_is_kept(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt) as raised, locked(tmp_path, kept=lambda: "3 of 7 shards"):
        raise KeyboardInterrupt
    assert raised.value.__notes__ == [f"{tmp_path} keeps 3 of 7 shards; the same command continues the run"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space left to write .*; free some and run the same"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "no space left to write"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "no space left to write"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "cannot be written to .*; name another folder"),
        (OSError(errno.EROFS, "Read-only file system", "x"), "cannot be written to"),
    ],
)
def test_storage_errors_become_one_sentence(tmp_path: Path, error: Exception, message: str) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path}: {message}"), locked(tmp_path):
        raise error


def test_other_errors_are_not_storage_errors(tmp_path: Path) -> None:
    assert storage_fault(RuntimeError("shapes differ"), tmp_path) is None
    with pytest.raises(RuntimeError, match="shapes differ"), locked(tmp_path):
        raise RuntimeError("shapes differ")


def test_open_folder_starts_over_where_nothing_was_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    open_folder(folder, "run.json", {"seed": 0}, notes={})
    (folder / "log.jsonl").write_text("a line of the first run")
    open_folder(folder, "run.json", {"seed": 1}, notes={}, disposable=["log.jsonl", "checkpoints"])
    assert "starting over" in capsys.readouterr().out
    assert [path.name for path in folder.iterdir()] == ["run.json"]
    (folder / "part-0").touch()
    with pytest.raises(ValueError, match=r"made with other settings \(seed was 1, is 2\)"):
        open_folder(folder, "run.json", {"seed": 2}, notes={}, disposable=["log.jsonl"])
    open_folder(folder, "run.json", {"seed": 1}, notes={})
