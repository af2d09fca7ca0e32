"""Line-ups: several drafters trained in turn for one target, with the same data, seed and budget.

A line-up is a YAML file. `all` holds the settings of every run; `drafters` maps the name of each drafter to its own
settings, with its `trainer` if that differs from the name. `parts` names drafters listed before it.
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
from draftsmith.artifacts.files import plain_name
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings
from trainers.training.settings import parse_settings

BUDGET = ("target", "data", "seed", "max_steps", "batch_size", "gradient_accumulation", "max_length", "output")
"""Settings that must be the same for all drafters, so that their comparison is fair."""


@dataclass(frozen=True, kw_only=True)
class DrafterSpec:
    """A drafter of a line-up."""

    name: str
    trainer: str
    settings: dict[str, Any]
    """Settings of every run, overridden by its own."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the drafters that it is composed of."""
        return tuple(self.settings.get("parts", ()))


def read(path: Path) -> list[DrafterSpec]:
    """Returns the drafters of a line-up in their order.

    Raises ValueError for an invalid file or drafter; exits with status 2, after listing all faults, for invalid
    settings.
    """
    try:
        table = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"no such file: {path}; recipes/configs/bakeoff.yaml is an example of a line-up") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(table, dict) or not table.get("drafters") or set(table) - {"all", "drafters"}:
        raise ValueError(f"{path} must contain `drafters`, and may contain `all`, but nothing else")
    specs: list[DrafterSpec] = []
    for name, given in table["drafters"].items():
        settings = (table.get("all") or {}) | (given or {})
        spec = DrafterSpec(name=str(name), trainer=str(settings.pop("trainer", name)), settings=settings)
        _check(spec, given or {}, [other.name for other in specs], path)
        _settings(spec, path.parent, {})
        specs.append(spec)
    return specs


def _check(spec: DrafterSpec, given: Mapping[str, Any], before: list[str], path: Path) -> None:
    plain_name(spec.name, path)  # it is the folder of the drafter's run
    names = [info.name for info in pkgutil.iter_modules(trainers.__path__) if not info.ispkg]
    if spec.trainer not in names or not hasattr(_module(spec), "needs"):
        near = difflib.get_close_matches(spec.trainer, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "set `trainer`"
        raise ValueError(f"{path}: {spec.name} has the unknown trainer {spec.trainer!r}; {hint}")
    own = sorted(set(given) & set(BUDGET))
    if own:
        raise ValueError(f"{path}: {spec.name} sets {own[0]}, which must be the same for all; set it under `all`")
    unknown = [part for part in spec.parts if part not in before]
    if unknown:
        raise ValueError(f"{path}: {spec.name} has the part {unknown[0]!r}; parts must be drafters listed before it")


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """The artifact of a drafter, or the reason why it was skipped."""

    spec: DrafterSpec
    artifact: Path | None = None
    """None if it was skipped."""
    reason: str = ""
    """Why it was skipped."""
    existed: bool = False
    """The artifact was made by an earlier run."""


def train_all(
    line_up: list[DrafterSpec], output: Path, *, is_quiet: bool, **overrides: Any
) -> Iterator[TrainingResult]:
    """Trains each drafter into `output`/NAME and yields the results; `overrides` replace settings of every run.

    Finished runs are kept and interrupted ones continued. A drafter that does not fit the target or the data is
    skipped, as are those composed of it. If quiet, the output of runs goes to `output`/logs/NAME.log.
    """
    results: dict[str, TrainingResult] = {}
    for spec in line_up:
        missing = [part for part in spec.parts if results[part].artifact is None]
        if missing:
            results[spec.name] = TrainingResult(spec=spec, reason=f"its part {missing[0]} was skipped")
        else:
            results[spec.name] = _train(spec, _settings(spec, output, overrides), output, is_quiet=is_quiet)
        yield results[spec.name]


def _train(spec: DrafterSpec, settings: tuple[Any, RunSettings], output: Path, *, is_quiet: bool) -> TrainingResult:
    existed = (output / spec.name / MANIFEST).exists()
    with _output_to(output / "logs" / f"{spec.name}.log") if is_quiet else contextlib.nullcontext():
        try:
            return TrainingResult(spec=spec, artifact=train(_module(spec), *settings), existed=existed)
        except ValueError as error:
            return TrainingResult(spec=spec, reason=str(error))


def _settings(spec: DrafterSpec, output: Path, overrides: Mapping[str, Any]) -> tuple[Any, RunSettings]:
    """Returns the family's settings and the run's."""
    settings = spec.settings | dict(overrides) | {"output": str(output / spec.name)}
    if spec.parts:
        settings["parts"] = [str(output / part) for part in spec.parts]
    with tempfile.TemporaryDirectory() as folder:
        preset = Path(folder) / f"{spec.name}.yaml"
        preset.write_text(yaml.safe_dump(settings))
        return parse_settings(_module(spec).Settings, RunSettings, description=None, argv=["--config", str(preset)])


def _module(spec: DrafterSpec) -> Any:
    return importlib.import_module(f"trainers.{spec.trainer}")


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        yield


def report(results: Iterator[TrainingResult], total: int) -> list[Path]:
    """Prints a line for each result as it arrives; returns the artifacts."""
    artifacts = []
    for number in range(1, total + 1):
        started = time.perf_counter()
        result = next(results)
        if result.artifact is None:
            status = f"skipped: {result.reason}"
        else:
            acceptance = read_manifest(result.artifact)["measured_acceptance"]["acceptance"]
            duration = "already trained" if result.existed else f"{time.perf_counter() - started:.0f} s"
            status = f"{duration}, held-out acceptance {acceptance:.3f}"
            artifacts.append(result.artifact)
        print(f"{number:>3} of {total}  {result.spec.name:<20}{status}", flush=True)
    return artifacts
