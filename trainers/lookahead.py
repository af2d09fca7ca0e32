"""Lookahead as an artifact: nothing is learnt, and how well it drafts is measured on held-out rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.batches import Batch, Example
from draftsmith import Target
from draftsmith.drafters.lookahead import Config, Drafter
from trainers import Metrics, Needs
from trainers.corpora import corpus
from trainers.training.run_settings import RunSettings
from trainers.training.settings import part_of


@dataclass(frozen=True, kw_only=True)
class Settings(Config):
    """How the drafter drafts: all that there is to settle."""


def needs(settings: Settings, target: Target) -> Needs:
    return Needs()


def fit(settings: Settings, target: Target, rows: Sequence[Example], run: RunSettings, output: Path) -> Drafter:
    """Returns the drafter; the rows are not looked at."""
    return Drafter(part_of(Config, settings), target)


def evaluate(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> Metrics:
    return corpus.evaluate(drafter, batch, target)
