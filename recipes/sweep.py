"""Runs the file of a wandb sweep without a server: draws parameters, runs a trial with each, reports the best.

    ./launch.sh sweep recipes/sweeps/medusa.yaml --trials 12              # into runs/sweeps/medusa
    ./launch.sh sweep recipes/sweeps/distill.yaml --fixed "{target: T, data: runs/mine, max_steps: 1000}"

The same file works with wandb's server, from the repository's root: `wandb sweep recipes/sweeps/medusa.yaml`, then the
`wandb agent` command that it prints. Here the methods are random, grid and bayes (a Gaussian process, by
bayesian-optimization). Each trial runs the file's command, leaves its artifact in trial-001, trial-002, ... of the
output folder and its terminal output in trial-001.log. With --report-to wandb, trials log offline unless $WANDB_MODE
is set. The same command continues an interrupted sweep; a larger --trials adds trials to it.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainers.sweeps.sweep import describe, read_sweep, run_sweep, table, trial_folder
from trainers.training import launchers
from trainers.training.settings import parse_settings


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """The sweep's file and the number of trials."""

    file: Path
    """YAML file of the sweep; may come first, without its flag."""
    trials: int = 10
    """Number of trials in total; a grid may have fewer."""
    output: str = ""
    """Folder for the trials and their table; runs/sweeps/<file> if empty."""
    fixed: dict[str, Any] = field(default_factory=dict)
    """Parameters with the same value in every trial, in place of the file's, such as {target: T, max_steps: 1000}."""
    seed: int = 0
    """Random seed of the drawn parameters."""

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise ValueError(f"trials is {self.trials}; it must be at least 1")


def main(settings: SweepSettings) -> None:
    sweep = read_sweep(settings.file, settings.fixed)
    output = Path(settings.output or f"runs/sweeps/{settings.file.stem}")
    trials = run_sweep(sweep, output, num_trials=settings.trials, seed=settings.seed)
    print("\n".join(table(sweep, trials)))
    best = sweep.best(trials)
    if best is not None:
        print(
            f"\nbest: trial {best['trial']}, {sweep.metric} {best['value']:.5g} with {describe(sweep, best)}; "
            f"in {trial_folder(output, best['trial'])}"
        )


if __name__ == "__main__":
    words = sys.argv[1:]
    if words and not words[0].startswith("-"):
        words = ["--file", *words]
    with launchers.user_errors():
        main(*parse_settings(SweepSettings, description=__doc__, argv=words))
