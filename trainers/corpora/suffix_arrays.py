"""Stores of sorted text: documents, as many as a budget holds, in suffix arrays of so many tokens each.

Shape suffixes: S tokens of a shard, P places in it, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydivsufsort import divsufsort

from data.batches import Example
from draftsmith.parts.suffix_array import SuffixArray, token_type
from trainers.corpora import corpus
from trainers.training.run_settings import RunSettings

MEGABYTE = 10**6
LARGEST_SHARD = 2**29 - 1
"""Places are sorted by bytes, up to four of a token, whose number is an int32."""


@dataclass(frozen=True, kw_only=True)
class StoreSettings:
    """What goes into a store; `--max-steps` and the optimiser's settings mean nothing."""

    budget_mb: float = 0.0
    """Megabytes that it may take: the most useful documents are kept; 0 for any."""
    context: int = 24
    """Tokens of a prompt that are stored before what is learnt, so that its beginning is found too."""
    shard_tokens: int = 50_000_000
    """Most tokens of a file, which are sorted at once."""

    def __post_init__(self) -> None:
        for name in ("budget_mb", "context"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        if not 2 <= self.shard_tokens <= LARGEST_SHARD:
            raise ValueError(f"shard_tokens is {self.shard_tokens}; it must lie between 2 and {LARGEST_SHARD}")


def build_shards(
    store: StoreSettings, rows: Sequence[Example], vocab_size: int, run: RunSettings, output: Path
) -> tuple[SuffixArray, ...]:
    """Returns the shards of a store of the rows' text, kept in `output` until the run is finished."""
    bytes_per_token = token_type(vocab_size).itemsize + np.dtype(np.int32).itemsize
    budget = int(store.budget_mb * MEGABYTE / bytes_per_token) if store.budget_mb else 2**63
    groups = group_texts(corpus.select_documents(rows, budget, store.context), store.shard_tokens)
    if not groups:
        raise ValueError(f"{run.data} holds nothing to learn from")
    files = corpus.build_chunks(groups, output, 1, lambda group: build(group[0], vocab_size).arrays())
    return tuple(SuffixArray.read(file, vocab_size) for file in files)


def group_texts(texts: Sequence[np.ndarray], shard_tokens: int) -> list[list[np.ndarray]]:
    """Returns the texts in turn, as many to a group as it holds with a separator after each; longer ones are cut."""
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
    """Returns the texts sorted; raises ValueError for a token outside the vocabulary."""
    highest = max((int(text.max(initial=0)) for text in texts), default=0)
    if highest >= vocab_size:
        raise ValueError(f"token id {highest} is outside the vocabulary of {vocab_size}")
    tokens_S = np.full(sum(len(text) + 1 for text in texts), vocab_size, token_type(vocab_size))
    place = 0
    for text in texts:
        tokens_S[place : place + len(text)] = text
        place += len(text) + 1
    is_text_S = tokens_S < vocab_size
    is_between_S1 = np.zeros(len(tokens_S) + 1, dtype=bool)
    is_between_S1[1:-1] = is_text_S[:-1] & is_text_S[1:]
    # A place of the reversed text, from which it is sorted on, is as far from its end as from the text's beginning.
    ends_S = len(tokens_S) - divsufsort(tokens_S[::-1].copy()) if len(tokens_S) else np.zeros(0, int)
    ends_P = ends_S[is_between_S1[ends_S]].astype(np.int32)
    times_V = np.bincount(tokens_S[ends_P - 1], minlength=vocab_size)
    return SuffixArray(tokens_S, ends_P, np.concatenate([[0], np.cumsum(times_V)]))
