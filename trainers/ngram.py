"""Counts n-grams of the target's text and builds the Kneser-Ney model of their distribution."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from data.batches import Batch, Example
from draftsmith import Target
from draftsmith.drafters.ngram import Config, Drafter
from draftsmith.parts.checks import check_at_least
from trainers import Metrics
from trainers.corpora import corpus, evaluation
from trainers.corpora.kneser_ney import build, count_ngrams
from trainers.training.run_settings import RunSettings

ROWS_PER_CHUNK = 8192


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The n-grams, the size of their model, and how drafts are made."""

    config: Config = field(default_factory=Config)
    budget_mb: float = 0.0
    """Largest size of the model in megabytes, 0 for no limit; the longest n-grams that change the distribution least
    are dropped first."""

    def __post_init__(self) -> None:
        check_at_least(self, 0, "budget_mb")


needs = evaluation.needs


def fit(settings: Settings, target: Target, rows: Sequence[Example], run: RunSettings, output: Path) -> Drafter:
    """Returns the drafter of the n-grams in `rows`."""
    order, vocab_size = settings.config.order, target.vocab_size

    def count(chunk: Sequence[Example]) -> dict[str, np.ndarray]:
        return count_ngrams([*corpus.documents(chunk, context=order - 1)], order, vocab_size)

    chunks = corpus.build_chunks(rows, output, ROWS_PER_CHUNK, count)
    # In the chunks' folder, which is removed once the artifact has its copy.
    model = build(chunks, order, vocab_size, output / "parts" / "store", budget_mb=settings.budget_mb)
    print(f"{len(model.tokens_E):,} pairs after {len(model.keys_C):,} contexts, {model.num_bytes / 1e6:.1f} MB")
    return Drafter(settings.config, target, model)


def evaluate(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> Metrics:
    """Returns the accepted tokens per round in greedy decoding, and the model's cross-entropy on these rows in nats."""
    nats, num_tokens, model = 0.0, 0, drafter.model
    for ids, mask in zip(batch.tokens_BT.tolist(), batch.loss_mask_BT.tolist(), strict=True):
        for position in range(1, len(ids)):
            if mask[position]:
                path = model.path(ids[max(0, position - settings.config.order) : position])
                nats -= float(np.log(model.token_probs(path, np.array([ids[position]]))[0]))
                num_tokens += 1
    return evaluation.evaluate(drafter, batch, settings, target) | {"nats": (torch.tensor(nats), num_tokens)}
