"""Line-ups: several drafters trained in turn for one target, with the same data, seed and budget.

A line-up is a YAML file. `all` holds the settings of every run; `drafters` maps the name of each drafter to its own
settings, with its `trainer` if that differs from the name. `parts` names drafters listed before it. The number of steps
may differ, because a step of one family takes many times as long as another's; the table shows each one's time.
`not_applicable` gives the reason for each trainer that the line-up leaves out.
"""

import contextlib
import difflib
import importlib
import pkgutil
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import trainers
from draftsmith import Target
from draftsmith.artifacts.artifact import MANIFEST, read_manifest
from draftsmith.artifacts.files import plain_name
from draftsmith.loading.model_info import TargetInfo
from draftsmith.loading.text_files import read_yaml
from trainers import Needs
from trainers.training.evaluation import shown
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings
from trainers.training.settings import parse_settings

SHARED = ("target", "data", "seed", "batch_size", "gradient_accumulation", "max_length", "output")
"""Settings that must be the same for all drafters, so that their comparison is fair."""

OF_STEPS = {"compile", "group_by_length"}
"""Settings of `all` that drafters built without gradient, which refuse them, are left without."""


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
        table = read_yaml(path)
    except ValueError as error:
        raise ValueError(f"{error}; recipes/configs/bakeoff.yaml is an example of a line-up") from None
    keys = {"all", "drafters", "not_applicable"}
    if not isinstance(table, dict) or not table.get("drafters") or set(table) - keys:
        raise ValueError(
            f"{path} must contain `drafters`, and may contain `all` and `not_applicable`, but nothing else"
        )
    for key, value in [*table.items(), *(table["drafters"].items() if isinstance(table["drafters"], dict) else ())]:
        if not isinstance(value, dict | None):
            raise ValueError(f"{path}: {key} is {value!r:.40}; it must hold settings, as `name: value` lines")
    specs: list[DrafterSpec] = []
    for name, given in table["drafters"].items():
        settings = (table.get("all") or {}) | (given or {})
        if not isinstance(parts := settings.get("parts", []), list) or not all(isinstance(part, str) for part in parts):
            raise ValueError(f"{path}: {name} has the parts {parts!r:.40}; they must be a list of drafters' names")
        spec = DrafterSpec(name=str(name), trainer=str(settings.pop("trainer", name)), settings=settings)
        _check(spec, given or {}, [other.name for other in specs], path)
        if hasattr(_module(spec), "fit"):
            for key in OF_STEPS - (given or {}).keys():
                settings.pop(key, None)
        _settings(spec, path.parent, {})
        specs.append(spec)
    return specs


def _check(spec: DrafterSpec, given: Mapping[str, Any], before: list[str], path: Path) -> None:
    plain_name(spec.name, path)  # it is the folder of the drafter's run
    if spec.trainer not in (known := trainer_names()):
        near = difflib.get_close_matches(spec.trainer, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "set `trainer`"
        raise ValueError(f"{path}: {spec.name} has the unknown trainer {spec.trainer!r}; {hint}")
    own = sorted(set(given) & set(SHARED))
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


def needs(line_up: Sequence[DrafterSpec], target: Target | TargetInfo) -> Needs:
    """Returns the target outputs that the drafters of a line-up read together, in training or on held-out rows."""
    layers, top_k = set[int](), 0
    for spec in line_up:
        own = _module(spec).needs(_settings(spec, Path(), {})[0], target)
        layers |= {*own.layers, *own.held_out_layers}
        top_k = max(top_k, own.top_k)
    return Needs(layers=tuple(sorted(layers)), top_k=top_k)


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
        except Exception as error:  # one drafter that fails must not cost the others their training
            traceback.print_exc()
            return TrainingResult(spec=spec, reason=f"failed with {type(error).__name__}: {error}")


def _settings(spec: DrafterSpec, output: Path, overrides: Mapping[str, Any]) -> tuple[Any, RunSettings]:
    """Returns the family's settings and the run's."""
    settings = spec.settings | dict(overrides) | {"output": str(output / spec.name)}
    if spec.parts:
        settings["parts"] = [str(output / part) for part in spec.parts]
    with tempfile.TemporaryDirectory() as folder:
        preset = Path(folder) / f"{spec.name}.yaml"
        preset.write_text(yaml.safe_dump(settings))
        return parse_settings(_module(spec).Settings, RunSettings, description=None, argv=["--config", str(preset)])


def unused_trainers(path: Path) -> dict[str, str]:
    """Returns what a line-up, accepted by `read`, leaves out: unused trainers and those it gives a reason for."""
    table = read_yaml(path)
    used = {(given or {}).get("trainer", name) for name, given in table["drafters"].items()}
    given = table.get("not_applicable") or {}
    return {name: "not in the line-up" for name in trainer_names() if name not in used} | given


def trainer_names() -> list[str]:
    """Returns the trainers that can stand in a line-up: those of drafters."""
    names = [info.name for info in pkgutil.iter_modules(trainers.__path__) if not info.ispkg]
    return [name for name in names if hasattr(importlib.import_module(f"trainers.{name}"), "needs")]


def _module(spec: DrafterSpec) -> Any:
    return importlib.import_module(f"trainers.{spec.trainer}")


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        yield


def report(results: Iterator[TrainingResult], total: int) -> tuple[list[Path], dict[str, str]]:
    """Prints a line for each result as it arrives; returns the artifacts, and why each other drafter was skipped."""
    artifacts, skipped = [], {}
    for number in range(1, total + 1):
        started = time.perf_counter()
        result = next(results)
        if result.artifact is None:
            status = f"skipped: {result.reason}"
            skipped[result.spec.name] = result.reason
        else:
            acceptance = shown(read_manifest(result.artifact)["measured_acceptance"])
            duration = "already trained" if result.existed else f"{time.perf_counter() - started:.0f} s"
            status = f"{duration}, held-out acceptance {acceptance}"
            artifacts.append(result.artifact)
        print(f"{number:>3} of {total}  {result.spec.name:<20}{status}", flush=True)
    return artifacts, skipped
