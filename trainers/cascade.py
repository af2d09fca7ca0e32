"""Composes trained drafters into a cascade, of which one part drafts in each round; nothing is trained."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.batches import Example
from draftsmith import Target
from draftsmith.drafters.cascade import Config, Drafter
from draftsmith.parts.composites import part_config
from trainers.corpora import evaluation
from trainers.parts import composites
from trainers.training.run_settings import RunSettings

NOTHING_TO_ESTIMATE = "nothing is trained: it combines drafters that exist"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Parts of the cascade and the order in which they are tried."""

    parts: tuple[str, ...] = ()
    """Folders of the parts' artifacts."""
    config: Config = field(default=Config(parts=composites.PLACEHOLDERS), metadata={"omit": ("parts",)})


check, prior_train_s = composites.check, composites.prior_train_s
needs, evaluate = evaluation.needs, evaluation.evaluate


def fit(settings: Settings, target: Target, rows: Sequence[Example], run: RunSettings, output: Path) -> Drafter:
    """Returns the drafter composed of the artifacts."""
    parts = composites.load_parts(settings.parts, target)
    names = tuple(part_config(part.drafter) for part in parts)
    return Drafter(dataclasses.replace(settings.config, parts=names), target, parts)
