"""Composes trained drafters into one whose trees are joined, and learns what each part's guesses are worth."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from data.batches import Batch, Example, collate, order
from draftsmith import Target
from draftsmith.core.model_info import TargetFacts
from draftsmith.drafters.merge import Config, Drafter
from draftsmith.parts.composites import named
from trainers import Metrics, Needs
from trainers.corpora import corpus
from trainers.parts import composites
from trainers.training.run_settings import RunSettings
from trainers.training.settings import part_of


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What it is composed of, how much of the trees is kept, and how much text the parts' guesses are judged on."""

    parts: tuple[str, ...] = ()
    """Folders of the parts' artifacts."""
    num_nodes: int = 16
    """Most nodes of the joined tree."""
    least_chance: float = 0.0
    """A node less likely than this is left out: what it takes to verify it is more than it brings."""
    num_texts: int = 24
    """Rows of the data of which the second halves are decoded to learn what guesses are worth."""

    def __post_init__(self) -> None:
        for name, least in (("num_nodes", 1), ("num_texts", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if not 0 <= self.least_chance < 1:
            raise ValueError(f"least_chance is {self.least_chance}; it must be at least 0 and below 1")


def check(settings: Settings, facts: TargetFacts) -> None:
    composites.check_parts(settings.parts, facts)


def needs(settings: Settings, target: Target) -> Needs:
    return Needs()


def fit(settings: Settings, target: Target, rows: Sequence[Example], run: RunSettings, output: Path) -> Drafter:
    """Returns the drafter composed of the artifacts, which has counted how often the parts were right."""
    parts = composites.load_parts(settings.parts, target)
    names = tuple(named(part.drafter) for part in parts)
    config = part_of(Config, settings, parts=names)
    drafter = Drafter(config, target, parts)
    most = min(run.max_length, target.context_length)
    for index in tqdm(order(len(rows), seed=run.seed, epoch=0)[: settings.num_texts], desc="learning", unit="text"):
        row = rows[index]
        batch = collate([Example(tokens_T=row.tokens_T[:most], loss_mask_T=row.loss_mask_T[:most], key=row.key)])
        with torch.no_grad():
            corpus.evaluate(drafter, batch, target)
        drafter.keep()
    return drafter


def prior_train_s(settings: Settings) -> float:
    return composites.prior_train_s(settings.parts)


def evaluate(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> Metrics:
    return corpus.evaluate(drafter, batch, target)
