"""Composes trained drafters into one that merges their trees, and measures the accuracy of each part's tokens."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from data.batches import Batch, Example
from draftsmith import Target
from draftsmith.drafters.merge import Config, Drafter
from draftsmith.parts.checks import check_at_least
from draftsmith.parts.composites import part_config
from trainers.corpora import evaluation
from trainers.parts import composites
from trainers.training.run_settings import RunSettings

NOTHING_TO_ESTIMATE = "it decodes held-out rows with drafters that exist, and trains nothing"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Parts, the size of the merged tree, and the amount of text that the parts' accuracy is measured on."""

    parts: tuple[str, ...] = ()
    """Folders of the parts' artifacts."""
    config: Config = field(default=Config(parts=composites.PLACEHOLDERS), metadata={"omit": ("parts",)})
    num_texts: int = 24
    """Least number of held-out rows whose second halves are decoded to measure the accuracy of the parts' tokens."""

    def __post_init__(self) -> None:
        check_at_least(self, 0, "num_texts")


check, prior_train_s = composites.check, composites.prior_train_s
needs, evaluate = evaluation.needs, evaluation.evaluate


def fit(settings: Settings, target: Target, rows: Sequence[Example], run: RunSettings, output: Path) -> Drafter:
    """Returns the drafter composed of the artifacts."""
    parts = composites.load_parts(settings.parts, target)
    names = tuple(part_config(part.drafter) for part in parts)
    return Drafter(dataclasses.replace(settings.config, parts=names), target, parts)


def finish(drafter: Drafter, settings: Settings, target: Target, held_out: list[Batch]) -> Drafter:
    """Returns the drafter with counts of the parts' correct tokens, on rows that the parts were not trained on."""
    num_done = 0
    for batch in tqdm(held_out, desc="measuring accuracy", unit="batch"):
        if num_done < settings.num_texts:
            evaluate(drafter, batch, settings, target)
            drafter.keep()
            num_done += len(batch.tokens_BT)
    return drafter
