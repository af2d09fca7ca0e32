"""Datastores of documents as suffix arrays, sharded and within a budget.

Shape suffixes: S tokens of a shard, P positions in it, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydivsufsort import divsufsort

from data.batches import Example
from draftsmith.parts.checks import check_at_least
from draftsmith.parts.suffix_array import SuffixArray, token_type
from trainers.corpora import corpus
from trainers.training.run_settings import RunSettings

MEGABYTE = 10**6
LARGEST_SHARD = 2**29 - 1
"""Suffixes are sorted as bytes, up to four for each token, with int32 indices."""


@dataclass(frozen=True, kw_only=True)
class DatastoreSettings:
    """Contents of a datastore; `--max-steps` and the optimiser's settings have no effect."""

    budget_mb: float = 0.0
    """Largest size in megabytes, within which the most useful documents are kept; 0 for no limit."""
    context: int = 24
    """Number of prompt tokens stored before each supervised text, so that its beginning can be matched."""
    shard_tokens: int = 50_000_000
    """Largest number of tokens in a shard, which is sorted in memory."""

    def __post_init__(self) -> None:
        check_at_least(self, 0, "budget_mb", "context")
        if not 2 <= self.shard_tokens <= LARGEST_SHARD:
            raise ValueError(f"shard_tokens is {self.shard_tokens}; it must lie between 2 and {LARGEST_SHARD}")


def build_shards(
    settings: DatastoreSettings, rows: Sequence[Example], vocab_size: int, run: RunSettings, output: Path
) -> tuple[SuffixArray, ...]:
    """Returns the shards of a datastore of the rows' text, which are kept in `output` until the run is finished."""
    bytes_per_token = token_type(vocab_size).itemsize + np.dtype(np.int32).itemsize
    budget = int(settings.budget_mb * MEGABYTE / bytes_per_token) if settings.budget_mb else 2**63
    groups = group_texts(corpus.select_documents(rows, budget, settings.context), settings.shard_tokens)
    if not groups:
        raise ValueError(f"{run.data} has no supervised text to build from")
    files = corpus.build_chunks(groups, output, 1, lambda group: build(group[0], vocab_size).arrays())
    return tuple(SuffixArray.read(file, vocab_size) for file in files)


def group_texts(texts: Sequence[np.ndarray], shard_tokens: int) -> list[list[np.ndarray]]:
    """Returns the texts in groups of at most `shard_tokens`, a separator after each included; longer texts are cut."""
    groups: list[list[np.ndarray]] = []
    num_left = 0
    for text in texts:
        for begin in range(0, len(text), shard_tokens - 1):
            piece = text[begin : begin + shard_tokens - 1]
            if len(piece) >= num_left:
                groups.append([])
                num_left = shard_tokens
            groups[-1].append(piece)
            num_left -= len(piece) + 1
    return groups


def build(texts: Sequence[np.ndarray], vocab_size: int) -> SuffixArray:
    """Returns the suffix array of the texts; raises ValueError for a token outside the vocabulary."""
    highest = max((int(text.max(initial=0)) for text in texts), default=0)
    if highest >= vocab_size:
        raise ValueError(f"token id {highest} is outside the vocabulary of {vocab_size}")
    tokens_S = np.full(sum(len(text) + 1 for text in texts), vocab_size, token_type(vocab_size))
    position = 0
    for text in texts:
        tokens_S[position : position + len(text)] = text
        position += len(text) + 1
    is_text_S = tokens_S < vocab_size
    is_between_S1 = np.zeros(len(tokens_S) + 1, dtype=bool)
    is_between_S1[1:-1] = is_text_S[:-1] & is_text_S[1:]
    # Index i of the reversed text, where a suffix begins, is position S - i of the text, where a prefix ends.

    ends_S = len(tokens_S) - divsufsort(tokens_S[::-1].copy()) if len(tokens_S) else np.zeros(0, int)
    ends_P = ends_S[is_between_S1[ends_S]].astype(np.int32)
    times_V = np.bincount(tokens_S[ends_P - 1], minlength=vocab_size)
    return SuffixArray(tokens_S, ends_P, np.concatenate([[0], np.cumsum(times_V)]))
