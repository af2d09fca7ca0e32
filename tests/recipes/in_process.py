"""Runs a recipe's command line in the test's own process, for faults that are reported before anything is loaded."""

import runpy
from typing import Any

import pytest

from tests.support.runs import ROOT


def fault_of(
    recipe: str, flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[Any, str]:
    """Returns the exit status of a recipe that does not run, and what it writes to standard error."""
    monkeypatch.setattr("sys.argv", [f"{recipe}.py", *flags])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "recipes" / f"{recipe}.py"), run_name="__main__")
    return stop.value.code, capsys.readouterr().err
