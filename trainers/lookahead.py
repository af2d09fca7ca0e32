"""Lookahead decoding as an artifact: nothing is trained, and acceptance is measured on held-out rows."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.batches import Example
from draftsmith import Target
from draftsmith.drafters.lookahead import Config, Drafter
from trainers.corpora import evaluation
from trainers.training.run_settings import RunSettings

NOTHING_TO_ESTIMATE = "nothing is trained: it drafts with the target itself"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the drafter."""

    config: Config = field(default_factory=Config)


needs, evaluate = evaluation.needs, evaluation.evaluate


def fit(settings: Settings, target: Target, rows: Sequence[Example], run: RunSettings, output: Path) -> Drafter:
    """Returns the drafter; the rows are not read."""
    return Drafter(settings.config, target)
