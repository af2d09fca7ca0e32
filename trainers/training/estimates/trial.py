"""A short run of a family on some of its rows in a temporary folder, in which the run's own code does all the work."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Subset
from transformers import TrainerCallback

from data.batches import Batch, Example, order
from draftsmith import Target
from trainers.training.run_settings import RunSettings


@dataclass(frozen=True, kw_only=True)
class TrialRun:
    """One short run."""

    run: RunSettings
    rows: Sequence[Example]
    folder: Path
    callbacks: tuple[TrainerCallback, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """Its drafter, saved as `artifact` in the folder."""

    drafter: Any
    finish_s: float
    """Seconds of the family's final step, the evaluation and saving."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A run that is to be estimated."""

    name: str
    """The family's trainer."""
    run: RunSettings
    target: Target
    rows: Sequence[Example]
    """Training rows."""
    held_out: list[Batch]
    output: Path
    """The run's own folder, in which nothing is written."""
    is_by_gradient: bool
    train: Callable[[TrialRun], TrialResult]

    def share_of_rows(self, share: float, *, least: int) -> Sequence[Example]:
        """Returns at least `least` rows, or this share of all if that is more; fewer are always among more."""
        number = min(len(self.rows), max(least, round(share * len(self.rows))))
        indices = order(len(self.rows), seed=self.run.seed, epoch=0)[:number]
        return Subset(self.rows, indices)  # type: ignore[arg-type,return-value]
