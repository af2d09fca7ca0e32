"""Counts n-grams of what the target writes and leaves the store of their Kneser-Ney law."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data.batches import Batch, Example
from draftsmith import Target
from draftsmith.drafters.ngram import Config, Drafter
from trainers import Metrics, Needs
from trainers.corpora import corpus
from trainers.corpora.kneser_ney import build, count_ngrams
from trainers.training.run_settings import RunSettings
from trainers.training.settings import part_of

ROWS_A_PART = 8192


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is counted, how large the store may be, and how the drafter drafts."""

    order: int = 5
    """Tokens of the longest n-gram, 1 to 5."""
    budget_mb: float = 0.0
    """Most megabytes of the store, 0 for any: of the longest n-grams those go that the law misses least."""
    num_draft: int = Config.num_draft
    """Most tokens drafted at a time."""
    length: str = Config.length
    """How long its chains are: a policy of draftsmith/length/policies.py, and its number."""
    sampled: bool = Config.sampled
    """Whether, at a temperature, tokens are drawn from the law; else they are the likeliest, as when greedy."""
    cache: float = Config.cache
    """Weight of what followed the same tokens earlier in the row, or in an encoder's text; 0 for none."""

    def __post_init__(self) -> None:
        self.config()
        if self.budget_mb < 0:
            raise ValueError(f"budget_mb is {self.budget_mb}; it must be 0 (none) or positive")

    def config(self) -> Config:
        """Returns how the drafter drafts."""
        return part_of(Config, self)


def needs(settings: Settings, target: Target) -> Needs:
    return Needs()


def fit(settings: Settings, target: Target, rows: Sequence[Example], run: RunSettings, output: Path) -> Drafter:
    """Returns the drafter of the n-grams in `rows`."""
    order, vocab_size = settings.order, target.vocab_size

    def make(part: Sequence[Example]) -> dict[str, np.ndarray]:
        return count_ngrams([*corpus.documents(part, context=order - 1)], order, vocab_size)

    parts = corpus.build_chunks(rows, output, ROWS_A_PART, make)
    # Beside the parts, with which it goes once the artifact holds its copy.
    model = build(parts, order, vocab_size, output / "parts" / "store", budget_mb=settings.budget_mb)
    print(f"{len(model.tokens_E):,} pairs after {len(model.keys_C):,} contexts, {model.num_bytes / 1e6:.1f} MB")
    return Drafter(settings.config(), target, model)


def evaluate(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> Metrics:
    """Returns the tokens accepted a round in greedy decoding, and the nats a token of the store's law on these rows."""
    nats, num_tokens, model = 0.0, 0, drafter.model
    for ids, mask in zip(batch.tokens_BT.tolist(), batch.loss_mask_BT.tolist(), strict=True):
        for place in range(1, len(ids)):
            if mask[place]:
                path = model.path(ids[max(0, place - settings.order) : place])
                nats -= float(np.log(model.chances(path, np.array([ids[place]]))[0]))
                num_tokens += 1
    return corpus.evaluate(drafter, batch, target) | {"nats": (torch.tensor(nats), num_tokens)}
