"""Sweeps without a server: the YAML of `wandb sweep`, parameters drawn by wandb's own sampler, one trial after another.

Which parameters come next follows from the seed and the trials so far alone, and each trial's run is continued where it
was killed, so that a sweep that was killed goes on as if it had not been.
"""

import fcntl
import importlib.util
import json
import math
import os
import random
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tqdm import tqdm

from data.shards import open_folder, write_whole
from trainers.training import jsonl

ROOT = Path(__file__).resolve().parents[2]
MARKER, TRIALS, TABLE, LOCK = "sweep.json", "trials.jsonl", "sweep.md", ".lock"
METHODS = ("random", "grid", "bayes")
MOST_FAILURES = 3
"""Trials that fail one after another before the sweep ends: what they have in common is wrong then."""

Parameters = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep's file, checked, with what is the same in every trial."""

    config: dict[str, Any]

    @property
    def metric(self) -> str:
        return self.config["metric"]["name"]

    @property
    def varied(self) -> list[str]:
        """The names of what is drawn."""
        return [name for name, one in self.config["parameters"].items() if "value" not in one]

    def best(self, trials: list[dict[str, Any]]) -> dict[str, Any] | None:
        """Returns the trial with the best metric, the first of several, None if none has one."""
        sign = 1 if self.config["metric"].get("goal") == "maximize" else -1
        return max(
            (one for one in trials if one["value"] is not None), key=lambda one: sign * one["value"], default=None
        )


def read_sweep(path: Path, fixed: Parameters) -> Sweep:
    """Returns the sweep in a YAML file, with the parameters in `fixed` given those values.

    Raises ValueError, all faults in one sentence, if wandb would refuse it, or only its server could run it.
    """
    if importlib.util.find_spec("sweeps") is None:
        raise ValueError("a sweep needs wandb's sampler, which is not installed: pip install --no-deps sweeps")
    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"sweep {path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict) or not isinstance(config.get("parameters"), dict):
        raise ValueError(f"sweep {path} has no parameters; see recipes/sweeps for examples")
    config["parameters"] |= {name: {"value": value} for name, value in fixed.items()}
    if config.get("method") not in METHODS:
        raise ValueError(f"sweep {path}: without a server, method is one of {', '.join(METHODS)}")
    if "early_terminate" in config:
        raise ValueError(f"sweep {path}: early_terminate is the server's; leave it out")
    if "output" in config["parameters"]:
        raise ValueError(f"sweep {path}: each trial has an output of its own; leave that parameter out")
    if not isinstance(config.get("metric"), dict) or not config["metric"].get("name"):
        raise ValueError(f"sweep {path} names no metric, without which there is no best trial")
    if faults := _faults(config):
        raise ValueError(f"sweep {path}: {'; '.join(faults)}")
    if not _program(config).is_file():
        raise ValueError(f"sweep {path}: there is no program {config.get('program')}")
    sweep = Sweep(config=config)
    try:
        draw(sweep, [], seed=0)
    except ValueError as error:  # what this method cannot draw
        raise ValueError(f"sweep {path}: {error}") from None
    return sweep


def run_sweep(sweep: Sweep, output: Path, *, num_trials: int, seed: int) -> list[dict[str, Any]]:
    """Returns the trials, those already in `output` among them, and writes them as a table.

    Each is a dictionary of `trial`, `parameters`, `value` of the metric (None if it failed) and `seconds`. Raises
    ValueError if three fail one after another, or if the sweep is being run elsewhere.
    """
    open_folder(output, MARKER, {"sweep": sweep.config, "seed": seed}, notes={"command": sys.argv})
    trials, num_failures = jsonl.whole(output / TRIALS), 0
    with (
        _locked(output) as lock,
        tqdm(total=num_trials, initial=min(len(trials), num_trials), desc="sweep", unit="trial") as bar,
    ):
        while len(trials) < num_trials and (drawn := draw(sweep, trials, seed=seed)) is not None:
            trial = _run(sweep, drawn, output, len(trials) + 1, lock)
            jsonl.append(output / TRIALS, trial)
            trials.append(trial)
            write_whole(output / TABLE, lambda path: path.write_text("\n".join(table(sweep, trials)) + "\n"))
            value = "failed" if trial["value"] is None else f"{sweep.metric} {trial['value']:.4g}"
            bar.write(f"trial {trial['trial']}: {shown(sweep, trial)}: {value}", file=sys.stderr)
            bar.update()
            num_failures = num_failures + 1 if trial["value"] is None else 0
            if num_failures == MOST_FAILURES:
                log = _log(output, trial["trial"])
                raise ValueError(f"{num_failures} trials failed, one after another; {log} ends: {_last_line(log)}")
    return trials


def table(sweep: Sweep, trials: list[dict[str, Any]]) -> list[str]:
    """Returns the lines of a Markdown table of all trials, the best one marked."""
    best = sweep.best(trials)
    rows = [["trial", *sweep.varied, sweep.metric, "seconds", ""], ["---"] * (len(sweep.varied) + 4)]
    for one in trials:
        value = "failed" if one["value"] is None else f"{one['value']:.5g}"
        drawn = [_text(one["parameters"][name]) for name in sweep.varied]
        rows.append([str(one["trial"]), *drawn, value, f"{one['seconds']:.0f}", "best" if one is best else ""])
    return [f"| {' | '.join(row)} |" for row in rows]


def shown(sweep: Sweep, trial: dict[str, Any]) -> str:
    """Returns what was drawn for a trial, as text."""
    return ", ".join(f"{name} {_text(trial['parameters'][name])}" for name in sweep.varied)


def trial_folder(output: Path, number: int) -> Path:
    return output / f"trial-{number:03d}"


def command(sweep: Sweep, parameters: Parameters) -> list[str]:
    """Returns the words of the sweep's command, filled in by wandb's own functions as its agent does."""
    from wandb.sdk.launch.sweeps import utils

    given = utils.create_sweep_command_args({"args": {name: {"value": value} for name, value in parameters.items()}})
    given |= {"env": ["/usr/bin/env"], "interpreter": ["python"], "program": [str(_program(sweep.config))]}
    words: list[str] = []
    for word in map(str, utils.create_sweep_command(list(sweep.config.get("command") or []))):
        words += given.get(word[2:-1], []) if word.startswith("${") and word.endswith("}") else [word]
    return words


def _faults(config: dict[str, Any]) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the sampler's own, of other versions of what it uses
        from sweeps.config import schema_violations_from_proposed_config

        try:
            return schema_violations_from_proposed_config(config)
        except ValueError as error:
            return [str(error)]


def draw(sweep: Sweep, trials: list[dict[str, Any]], *, seed: int) -> Parameters | None:
    """Returns the parameters of the next trial, None if a grid has no more."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sweeps import SweepConfig, SweepRun, next_run

        runs = [
            SweepRun(
                config={name: {"value": value} for name, value in one["parameters"].items()},
                state="failed" if one["value"] is None else "finished",
                summary_metrics={} if one["value"] is None else {sweep.metric: one["value"]},
            )
            for one in trials
        ]
        # It draws from the two global generators.
        np.random.seed([seed, len(trials)])
        random.seed(f"{seed} {len(trials)}")
        found = next_run(SweepConfig(sweep.config), runs)
    if found is None:
        return None
    values = {name: one["value"] for name, one in found.config.items()}
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in values.items()}


def _run(sweep: Sweep, drawn: Parameters, output: Path, number: int, lock: int) -> dict[str, Any]:
    folder, began = trial_folder(output, number), time.perf_counter()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    kept = {key: value for key, value in os.environ.items() if key not in ("WANDB_SWEEP_ID", "WANDB_RUN_ID")}
    environment = {"WANDB_MODE": "offline", "WANDB_RUN_GROUP": output.name} | kept | {"PATH": path}
    with _log(output, number).open("w") as log:
        # A trial that outlives a killed sweep holds its lock.
        status = subprocess.run(
            command(sweep, drawn | {"output": str(folder)}),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=(lock,),
        ).returncode
    value = None if status else _metric(folder / jsonl.LOG, sweep.metric)
    if value is None:
        told = f"status {status}" if status else f"no {sweep.metric} in {folder / jsonl.LOG}"
        print(f"trial {number} failed ({told}); {_log(output, number)} holds what it said", file=sys.stderr)
    seconds = _metric(folder / jsonl.LOG, "train/seconds") or time.perf_counter() - began
    return {"trial": number, "parameters": drawn, "value": value, "seconds": round(seconds, 1)}


def _metric(log: Path, name: str) -> float | None:
    """Returns the last value that a run has told, under wandb's name for it; None if there is none, or no number."""
    told = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    found = [value for line in told for key, value in line.items() if jsonl.wandb_name(key) == name]
    return float(found[-1]) if found and isinstance(found[-1], int | float) and math.isfinite(found[-1]) else None


@contextmanager
def _locked(output: Path) -> Iterator[int]:
    """Yields a descriptor that locks the folder for as long as any process holds it."""
    lock = os.open(output / LOCK, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise ValueError(f"a trial of {output} is still running; wait for its end, or end it") from None
    try:
        yield lock
    finally:
        os.close(lock)


def _program(config: dict[str, Any]) -> Path:
    """Returns the program, by a path from here or from the repository's root."""
    program = Path(str(config.get("program")))
    return program if program.is_file() else ROOT / program


def _log(output: Path, number: int) -> Path:
    return output / f"{trial_folder(output, number).name}.log"


def _last_line(log: Path) -> str:
    told = log.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(told) if line.strip()), "with nothing")


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
