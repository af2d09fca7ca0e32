"""Composes trained drafters into one that merges their trees, and measures the accuracy of each part's tokens."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from data.batches import Example, collate, order
from draftsmith import Target
from draftsmith.drafters.merge import Config, Drafter
from draftsmith.parts.checks import check_at_least
from draftsmith.parts.composites import part_config
from trainers.corpora import evaluation
from trainers.parts import composites
from trainers.training.run_settings import RunSettings

NOTHING_TO_ESTIMATE = "it decodes --num-texts rows with drafters that exist, and trains nothing"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Parts, the size of the merged tree, and the amount of text that the parts' accuracy is measured on."""

    parts: tuple[str, ...] = ()
    """Folders of the parts' artifacts."""
    config: Config = field(default=Config(parts=composites.PLACEHOLDERS), metadata={"omit": ("parts",)})
    num_texts: int = 24
    """Number of rows whose second halves are decoded to measure the accuracy of the parts' tokens."""

    def __post_init__(self) -> None:
        check_at_least(self, 0, "num_texts")


check, prior_train_s = composites.check, composites.prior_train_s
needs, evaluate = evaluation.needs, evaluation.evaluate


def fit(settings: Settings, target: Target, rows: Sequence[Example], run: RunSettings, output: Path) -> Drafter:
    """Returns the drafter composed of the artifacts, with counts of the parts' correct tokens."""
    parts = composites.load_parts(settings.parts, target)
    names = tuple(part_config(part.drafter) for part in parts)
    drafter = Drafter(dataclasses.replace(settings.config, parts=names), target, parts)
    longest = min(run.max_length, target.context_length)
    indices = order(len(rows), seed=run.seed, epoch=0)[: settings.num_texts]
    for index in tqdm(indices, desc="measuring accuracy", unit="text"):
        row = rows[index]
        text = Example(tokens_T=row.tokens_T[:longest], loss_mask_T=row.loss_mask_T[:longest], key=row.key)
        with torch.no_grad():
            evaluate(drafter, collate([text]), settings, target)
        drafter.keep()
    return drafter
