"""Composes trained drafters into one of which a part drafts at each step; nothing is learnt beforehand."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.batches import Batch, Example
from draftsmith import Target
from draftsmith.core.model_info import TargetFacts
from draftsmith.drafters.cascade import Config, Drafter
from draftsmith.parts.composites import named
from trainers import Metrics, Needs
from trainers.corpora import corpus
from trainers.parts import composites
from trainers.training.run_settings import RunSettings
from trainers.training.settings import part_of


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What it is composed of, and in which order its parts are asked."""

    parts: tuple[str, ...] = ()
    """Folders of the parts' artifacts."""
    adaptive: bool = True
    """Whether the part that has brought most tokens a millisecond is asked first, or the first in `parts`."""
    min_tokens: int = 1
    """A part has found something if its draft is at least so many tokens deep."""

    def __post_init__(self) -> None:
        if self.min_tokens < 1:
            raise ValueError(f"min_tokens is {self.min_tokens}; it must be at least 1")


def check(settings: Settings, facts: TargetFacts) -> None:
    composites.check_parts(settings.parts, facts)


def needs(settings: Settings, target: Target) -> Needs:
    return Needs()


def fit(settings: Settings, target: Target, rows: Sequence[Example], run: RunSettings, output: Path) -> Drafter:
    """Returns the drafter composed of the artifacts."""
    parts = composites.load_parts(settings.parts, target)
    names = tuple(named(part.drafter) for part in parts)
    return Drafter(part_of(Config, settings, parts=names), target, parts)


def prior_train_s(settings: Settings) -> float:
    return composites.prior_train_s(settings.parts)


def evaluate(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> Metrics:
    return corpus.evaluate(drafter, batch, target)
