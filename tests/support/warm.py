"""Starts recipes in forks of one process that has imported what they need, which takes each 7 s otherwise."""

import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

PRELOADED = ("trainers.training.loop", "eval.compare", "matplotlib.pyplot")
"""What most recipes import."""
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(list(PRELOADED))


class ForkedRun:
    """A Python script, or a module after "-m", that runs in `folder` as another process."""

    def __init__(self, words: list[str], folder: Path, environment: dict[str, str]) -> None:
        self.words = words
        self._output = Path(tempfile.mkdtemp())
        self._files = [self._output / name for name in ("output", "errors")]
        given = (words, str(folder), environment, *map(str, self._files))
        self.process = _CONTEXT.Process(target=_execute, args=given)
        self.process.start()

    def wait(self, timeout_s: float) -> subprocess.CompletedProcess[str]:
        """Returns its output and exit status, as `subprocess.run` would."""
        self.process.join(timeout_s)
        if self.process.is_alive():
            self.process.kill()
            raise subprocess.TimeoutExpired(self.words, timeout_s)
        texts = [file.read_text() for file in self._files]
        shutil.rmtree(self._output)
        assert self.process.exitcode is not None
        return subprocess.CompletedProcess(self.words, self.process.exitcode, *texts)


def _execute(words: list[str], folder: str, environment: dict[str, str], output: str, errors: str) -> None:
    for path, descriptor in ((output, 1), (errors, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.orig_argv = [sys.executable, *words]
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path.insert(0, "")
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")
