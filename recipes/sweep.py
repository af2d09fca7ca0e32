"""Runs a wandb sweep's file without a server: draws parameters, runs a trial with each, names the best.

    ./launch.sh sweep recipes/sweeps/medusa.yaml --trials 12              # into runs/sweeps/medusa
    ./launch.sh sweep recipes/sweeps/distill.yaml --fixed "{target: T, data: runs/mine, max_steps: 1000}"

The same file serves a server, from the repository's root: `wandb sweep recipes/sweeps/medusa.yaml`, then the
`wandb agent` that it names. Here wandb's own sampler draws (methods random, grid and bayes), and each trial is the
file's command, which leaves an artifact in trial-001, trial-002, ... of the output, and what it said beside it. Where
--report-to is wandb, trials report offline unless $WANDB_MODE says otherwise. A sweep that was killed is continued by
the same command, and prolonged by a larger --trials.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainers.sweeps.sweep import read_sweep, run_sweep, shown, table, trial_folder
from trainers.training.settings import parse_settings


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What is swept, and how long."""

    file: Path
    """The sweep's YAML; may stand first, without its flag."""
    trials: int = 10
    """Runs in all; a grid may have fewer."""
    output: str = ""
    """Folder for the trials and their table, runs/sweeps/<file> if empty."""
    fixed: dict[str, Any] = field(default_factory=dict)
    """Parameters with one value in every trial, whatever the file says of them, as {target: T, max_steps: 1000}."""
    seed: int = 0
    """Of what is drawn."""

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise ValueError(f"trials is {self.trials}; it must be at least 1")


def main(run: RunSettings) -> None:
    sweep = read_sweep(run.file, run.fixed)
    output = Path(run.output or f"runs/sweeps/{run.file.stem}")
    trials = run_sweep(sweep, output, num_trials=run.trials, seed=run.seed)
    print("\n".join(table(sweep, trials)))
    best = sweep.best(trials)
    if best is not None:
        folder = trial_folder(output, best["trial"])
        print(
            f"\nbest: trial {best['trial']}, {sweep.metric} {best['value']:.5g} with {shown(sweep, best)}; in {folder}"
        )


if __name__ == "__main__":
    words = sys.argv[1:]
    if words and not words[0].startswith("-"):
        words = ["--file", *words]
    try:
        main(*parse_settings(RunSettings, description=__doc__, argv=words))
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
