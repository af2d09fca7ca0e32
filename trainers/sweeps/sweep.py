"""Sweeps without a server: runs the YAML file of `wandb sweep` locally, one trial after another.

An interrupted sweep gives the same trials as an uninterrupted one: the next trial's parameters depend on the seed and
the trials so far alone, and the run of an interrupted trial continues from its checkpoint.
"""

import difflib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.folder_lock import locked
from data.shards import open_folder, write_atomically
from draftsmith.loading.text_files import read_yaml
from trainers.sweeps import sampler
from trainers.training import jsonl

ROOT = Path(__file__).resolve().parents[2]
MARKER, TRIALS, TABLE = "sweep.json", "trials.jsonl", "sweep.md"
USED = ("program", "command", "method", "metric", "parameters")
DESCRIPTIVE = ("apiVersion", "kind", "controller", "name", "description", "entity", "project")
SERVER_ONLY = ("early_terminate", "run_cap", "scheduler", "job", "image_uri")
MAX_FAILURES = 3
"""Consecutive failed trials after which the sweep stops, as their cause is probably the same."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A checked sweep file."""

    config: dict[str, Any]
    """The file's content, with the fixed parameters in it."""

    @property
    def metric(self) -> str:
        return self.config["metric"]["name"]

    @property
    def maximize(self) -> bool:
        return self.config["metric"].get("goal") == "maximize"

    @property
    def varied(self) -> list[str]:
        """The names of the parameters that are not constant."""
        return [name for name, one in self.config["parameters"].items() if "value" not in one]

    def best(self, trials: list[dict[str, Any]]) -> dict[str, Any] | None:
        """Returns the trial with the best metric, the first of equal ones, None if all failed."""
        sign = 1 if self.maximize else -1
        succeeded = (one for one in trials if one["value"] is not None)
        return max(succeeded, key=lambda one: sign * one["value"], default=None)

    def draw(self, trials: list[dict[str, Any]], *, seed: int) -> sampler.Values | None:
        """Returns the parameters of the next trial, None if a grid has no more."""
        space = {name: sampler.read_parameter(one) for name, one in self.config["parameters"].items()}
        return sampler.draw(self.config["method"], space, trials, maximize=self.maximize, seed=seed)


def read_sweep(path: Path, fixed: sampler.Values) -> Sweep:
    """Returns the sweep in a YAML file, with the parameters in `fixed` set to those values.

    Raises ValueError, with all faults in one sentence, for a file that is invalid or that only wandb's server can run.
    """
    try:
        config = read_yaml(path)
    except ValueError as error:
        raise ValueError(f"sweep {path} cannot be read: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("parameters"), dict):
        raise ValueError(f"sweep {path} has no parameters; see recipes/sweeps for examples")
    config["parameters"] |= {name: {"value": value} for name, value in fixed.items()}
    if faults := [*_faults(config), *_parameter_faults(config)]:
        raise ValueError(f"sweep {path}: {'; '.join(faults)}")
    return Sweep(config=config)


def _faults(config: dict[str, Any]) -> Iterator[str]:
    for key in config:
        if key in SERVER_ONLY:
            yield f"{key} needs wandb's server; remove it"
        elif key not in (*USED, *DESCRIPTIVE):
            near = difflib.get_close_matches(str(key), USED, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known keys are {', '.join(USED)}"
            yield f"unknown key {key!r}; {hint}"
    if config.get("method") not in sampler.METHODS:
        yield f"method is {config.get('method')!r}; without a server it is one of {', '.join(sampler.METHODS)}"
    metric = config.get("metric")
    if not isinstance(metric, dict) or not metric.get("name"):
        yield "metric has no name, which is needed to compare trials"
    else:
        if metric.get("goal", "minimize") not in ("minimize", "maximize"):
            yield f"metric has the goal {metric['goal']!r}; it must be minimize or maximize"
        if others := sorted(map(str, set(metric) - {"name", "goal"})):
            yield f"metric has {others[0]!r}, which needs wandb's server; it may hold name and goal"
    if not _program(config).is_file():
        yield f"program {config.get('program')} does not exist"


def _parameter_faults(config: dict[str, Any]) -> Iterator[str]:
    for name, options in config["parameters"].items():
        if name == "output":
            yield "parameter output is set for each trial; remove it"
            continue
        try:
            parameter = sampler.read_parameter(options)
        except ValueError as error:
            yield f"parameter {name} {error}"
            continue
        if config.get("method") == "grid" and parameter.listed is None:
            yield f"parameter {name} is continuous; method grid needs `values`, or whole numbers as min and max"


def run_sweep(sweep: Sweep, output: Path, *, num_trials: int, seed: int) -> list[dict[str, Any]]:
    """Runs trials until `output` holds `num_trials` of them; returns all and writes them as a table.

    Each is a dictionary of `trial`, `parameters`, `value` of the metric (None if it failed) and `seconds`. Raises
    ValueError if three in succession fail, or if this sweep or a trial of it is running elsewhere.
    """
    identity = {"sweep": sweep.config, "seed": seed}
    if sweep.config["method"] == "bayes":
        # Folders without this key hold trials of wandb's sampler, whose choices cannot be continued.
        identity["sampler"] = "bayesian-optimization"
    with locked(output, kept=lambda: f"{len(jsonl.read(output / TRIALS))} trials") as lock:
        open_folder(output, MARKER, identity, notes={"command": sys.argv}, disposable=_disposable(output))
        return _run_trials(sweep, output, lock, num_trials=num_trials, seed=seed)


def _run_trials(sweep: Sweep, output: Path, lock: int, *, num_trials: int, seed: int) -> list[dict[str, Any]]:
    trials, num_failures = jsonl.read(output / TRIALS), 0
    with tqdm(total=num_trials, initial=min(len(trials), num_trials), desc="sweep", unit="trial") as bar:
        while len(trials) < num_trials and (parameters := sweep.draw(trials, seed=seed)) is not None:
            trial = _run(sweep, parameters, output, len(trials) + 1, lock)
            jsonl.append(output / TRIALS, trial)
            trials.append(trial)
            write_atomically(output / TABLE, lambda path: path.write_text("\n".join(table(sweep, trials)) + "\n"))
            value = "failed" if trial["value"] is None else f"{sweep.metric} {trial['value']:.4g}"
            bar.write(f"trial {trial['trial']}: {describe(sweep, trial)}: {value}", file=sys.stderr)
            bar.update()
            num_failures = num_failures + 1 if trial["value"] is None else 0
            if num_failures == MAX_FAILURES:
                log = _log(output, trial["trial"])
                raise ValueError(f"{num_failures} trials in succession failed; last line of {log}: {_last_line(log)}")
    return trials


def table(sweep: Sweep, trials: list[dict[str, Any]]) -> list[str]:
    """Returns the lines of a Markdown table of all trials, with the best one marked."""
    best = sweep.best(trials)
    rows = [["trial", *sweep.varied, sweep.metric, "seconds", ""], ["---"] * (len(sweep.varied) + 4)]
    for one in trials:
        value = "failed" if one["value"] is None else f"{one['value']:.5g}"
        parameters = [_text(one["parameters"][name]) for name in sweep.varied]
        rows.append([str(one["trial"]), *parameters, value, f"{one['seconds']:.0f}", "best" if one is best else ""])
    return [f"| {' | '.join(row)} |" for row in rows]


def describe(sweep: Sweep, trial: dict[str, Any]) -> str:
    """Returns the varied parameters of a trial as text."""
    return ", ".join(f"{name} {_text(trial['parameters'][name])}" for name in sweep.varied)


def trial_folder(output: Path, number: int) -> Path:
    return output / f"trial-{number:03d}"


def command(sweep: Sweep, parameters: sampler.Values) -> list[str]:
    """Returns the words of a trial's command, made by wandb's own functions as its agent does."""
    from wandb.sdk.launch.sweeps import utils

    macros = utils.create_sweep_command_args({"args": {name: {"value": value} for name, value in parameters.items()}})
    macros |= {"env": ["/usr/bin/env"], "interpreter": ["python"], "program": [str(_program(sweep.config))]}
    words: list[str] = []
    for word in map(str, utils.create_sweep_command(list(sweep.config.get("command") or []))):
        words += macros.get(word[2:-1], []) if word.startswith("${") and word.endswith("}") else [word]
    return words


def _run(sweep: Sweep, parameters: sampler.Values, output: Path, number: int, lock: int) -> dict[str, Any]:
    """Runs one trial and returns its record; its standard output and errors go to the trial's log."""
    folder, started = trial_folder(output, number), time.perf_counter()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    inherited = {key: value for key, value in os.environ.items() if key not in ("WANDB_SWEEP_ID", "WANDB_RUN_ID")}
    environment = {"WANDB_MODE": "offline", "WANDB_RUN_GROUP": output.name} | inherited | {"PATH": path}
    with _log(output, number).open("w") as log:
        # The trial inherits the lock and holds it even if the sweep is killed.
        status = subprocess.run(
            command(sweep, parameters | {"output": str(folder)}),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=(lock,),
        ).returncode
    value = None if status else _last_value(folder / jsonl.LOG, sweep.metric)
    if value is None:
        reason = f"exit status {status}" if status else f"no {sweep.metric} in {folder / jsonl.LOG}"
        print(f"trial {number} failed ({reason}); its output is in {_log(output, number)}", file=sys.stderr)
    seconds = _last_value(folder / jsonl.LOG, "train/seconds") or time.perf_counter() - started
    return {"trial": number, "parameters": parameters, "value": value, "seconds": round(seconds, 1)}


def _disposable(output: Path) -> list[str]:
    """Returns the names in the sweep's folder that are of no use to continue it: all records, if every trial failed."""
    if any(trial["value"] is not None for trial in jsonl.read(output / TRIALS)):
        return []
    return [TRIALS, TABLE, *(path.name for path in output.glob("trial-*.log"))]


def _last_value(log: Path, name: str) -> float | None:
    """Returns the last value logged under wandb's name of a metric; None without one, or if it is not finite."""
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    values = [value for line in lines for key, value in line.items() if jsonl.wandb_name(key) == name]
    return float(values[-1]) if values and isinstance(values[-1], int | float) and math.isfinite(values[-1]) else None


def _program(config: dict[str, Any]) -> Path:
    """Returns the path of the program, which is relative to the working directory or to the repository's root."""
    program = Path(str(config.get("program")))
    return program if program.is_file() else ROOT / program


def _log(output: Path, number: int) -> Path:
    return output / f"{trial_folder(output, number).name}.log"


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "(empty)")


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
