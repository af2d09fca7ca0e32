"""A line-up: drafters made one after the other for one target, of the same data, seed and budget, as a table says.

The table is a YAML file: under `all` the settings of every run, under `drafters` a name for each and its own settings,
`trainer` among them where it is not called like one. `parts` name drafters further up.
"""

import contextlib
import difflib
import importlib
import pkgutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import trainers
from draftsmith.artifacts.artifact import MANIFEST, read_manifest
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings
from trainers.training.settings import parse_settings

BUDGET = ("target", "data", "seed", "max_steps", "batch_size", "gradient_accumulation", "max_length", "output")
"""What is the same for all drafters, so that a table of them is fair."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One drafter to be made."""

    name: str
    trainer: str
    settings: dict[str, Any]
    """Those of every run and its own."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The drafters that it is made of."""
        return tuple(self.settings.get("parts", ()))


def read(path: Path) -> list[Entry]:
    """Returns the table's drafters in their order.

    Raises ValueError, naming the drafter, for what cannot be; exits with status 2, all faults listed, if settings are
    wrong.
    """
    try:
        table = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"no such file: {path}; a line-up is a table as recipes/configs/bakeoff.yaml") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(table, dict) or not table.get("drafters") or set(table) - {"all", "drafters"}:
        raise ValueError(f"{path} must hold `drafters` and may hold `all`, and nothing else")
    entries: list[Entry] = []
    for name, given in table["drafters"].items():
        settings = (table.get("all") or {}) | (given or {})
        entry = Entry(name=str(name), trainer=str(settings.pop("trainer", name)), settings=settings)
        _check(entry, given or {}, [other.name for other in entries], path)
        _settings(entry, path.parent, {})
        entries.append(entry)
    return entries


def _check(entry: Entry, given: Mapping[str, Any], before: list[str], path: Path) -> None:
    names = [info.name for info in pkgutil.iter_modules(trainers.__path__) if not info.ispkg]
    if entry.trainer not in names or not hasattr(_module(entry), "needs"):
        near = difflib.get_close_matches(entry.trainer, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "name one by `trainer`"
        raise ValueError(f"{path}: {entry.name} asks for a trainer {entry.trainer!r}, which there is none of; {hint}")
    own = sorted(set(given) & set(BUDGET))
    if own:
        raise ValueError(f"{path}: {entry.name} has a {own[0]} of its own; it is the same for all, or no table is fair")
    unknown = [part for part in entry.parts if part not in before]
    if unknown:
        raise ValueError(f"{path}: {entry.name} is made of {unknown[0]!r}, which is no drafter further up")


@dataclass(frozen=True, kw_only=True)
class Made:
    """What became of an entry."""

    entry: Entry
    artifact: Path | None = None
    """None if it was left out."""
    reason: str = ""
    """Why it was."""
    was_there: bool = False
    """Whether an earlier run had made it."""


def make(line_up: list[Entry], output: Path, *, is_quiet: bool, **given: Any) -> Iterator[Made]:
    """Makes each drafter in `output` by its name; `given` are settings of every run that beat the table's.

    One that is finished there is left as it is, one that was stopped is continued. A drafter that the target is not
    fit for is left out, and so is what is made of it. If quiet, what runs say goes to `output`/logs/NAME.log.
    """
    made: dict[str, Made] = {}
    for entry in line_up:
        missing = [part for part in entry.parts if made[part].artifact is None]
        if missing:
            made[entry.name] = Made(entry=entry, reason=f"it is made of {missing[0]}, which was left out")
        else:
            made[entry.name] = _make(entry, _settings(entry, output, given), output, is_quiet=is_quiet)
        yield made[entry.name]


def _make(entry: Entry, settings: tuple[Any, RunSettings], output: Path, *, is_quiet: bool) -> Made:
    was_there = (output / entry.name / MANIFEST).exists()
    with _told_to(output / "logs" / f"{entry.name}.log") if is_quiet else contextlib.nullcontext():
        try:
            return Made(entry=entry, artifact=train(_module(entry), *settings), was_there=was_there)
        except ValueError as error:
            return Made(entry=entry, reason=str(error))


def _settings(entry: Entry, output: Path, given: Mapping[str, Any]) -> tuple[Any, RunSettings]:
    """Returns the family's settings and the run's."""
    settings = entry.settings | dict(given) | {"output": str(output / entry.name)}
    if entry.parts:
        settings["parts"] = [str(output / part) for part in entry.parts]
    with tempfile.TemporaryDirectory() as folder:
        preset = Path(folder) / f"{entry.name}.yaml"
        preset.write_text(yaml.safe_dump(settings))
        return parse_settings(_module(entry).Settings, RunSettings, description=None, argv=["--config", str(preset)])


def _module(entry: Entry) -> Any:
    return importlib.import_module(f"trainers.{entry.trainer}")


@contextlib.contextmanager
def _told_to(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        yield


def say(found: Iterator[Made], total: int) -> list[Path]:
    """Prints a line for each drafter as it is made; returns the artifacts of those that were."""
    artifacts = []
    for number in range(1, total + 1):
        began = time.perf_counter()
        made = next(found)
        if made.artifact is None:
            told = f"left out: {made.reason}"
        else:
            acceptance = read_manifest(made.artifact)["measured_acceptance"]["acceptance"]
            took = "was there" if made.was_there else f"{time.perf_counter() - began:.0f} s"
            told = f"{took}, held-out acceptance {acceptance:.3f}"
            artifacts.append(made.artifact)
        print(f"{number:>3} of {total}  {made.entry.name:<20}{told}", flush=True)
    return artifacts
