"""Counts the tri-grams of the target's text and builds the tri-gram table of ADED (2407.12021).

Shape suffixes: T tokens of a text, N tri-grams in ascending order, K pairs of tokens, S successors kept of all pairs,
M counts of a pair.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import safe_open

from data.batches import Example
from draftsmith import Target
from draftsmith.drafters.trigram import Config, Drafter
from draftsmith.drafters.trigram.compiled import Table
from draftsmith.parts.checks import check_at_least
from trainers.corpora import corpus, evaluation
from trainers.training.run_settings import RunSettings

LARGEST_VOCABULARY = 2**21
"""Three tokens must fit into one int64."""
KEY_BYTES, SUCCESSOR_BYTES = 16, 8
MERGE_SIZE = 2**23
"""Number of tri-grams, of all chunks together, that are merged in memory at a time."""
LARGEST_COUNT = 2**16
"""Larger counts are treated as equal when pairs are dropped for the budget."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The size of the table, and how drafts are searched."""

    config: Config = field(default_factory=Config)
    num_successors: int = 12
    """Number of successors kept of each pair of tokens, the most frequent ones."""
    budget_mb: float = 0.0
    """Largest size of the table in megabytes, 0 for no limit; the least frequent pairs of tokens are dropped first."""
    part_documents: int = 20_000
    """Number of documents counted at a time; a killed build continues after the last such chunk."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "num_successors", "part_documents")
        check_at_least(self, 0, "budget_mb")


needs, evaluate = evaluation.needs, evaluation.evaluate


def fit(settings: Settings, target: Target, rows: Sequence[Example], run: RunSettings, output: Path) -> Drafter:
    """Returns the drafter with the tri-grams of all supervised text, each text counted once."""
    if target.vocab_size > LARGEST_VOCABULARY:
        raise ValueError(f"the target has {target.vocab_size} tokens; at most {LARGEST_VOCABULARY} are supported")
    texts = list(corpus.documents(rows, context=2))
    files = corpus.build_chunks(texts, output, settings.part_documents, partial(count, vocab_size=target.vocab_size))
    table = build(files, target.vocab_size, settings.num_successors, int(settings.budget_mb * 1e6))
    return Drafter(settings.config, target, table)


def count(texts: Sequence[np.ndarray], *, vocab_size: int) -> dict[str, np.ndarray]:
    """Returns the texts' tri-grams, ascending, each coded as first * V^2 + second * V + third, and their counts."""
    codes = [np.zeros(0, np.int64)]
    for index in range(len(texts)):
        ids_T = texts[index]
        codes.append((ids_T[:-2] * vocab_size + ids_T[1:-1]) * vocab_size + ids_T[2:])
    codes_N, counts_N = np.unique(np.concatenate(codes), return_counts=True)
    return {"codes": codes_N, "counts": counts_N}


def build(files: Sequence[Path], vocab_size: int, num_successors: int, budget: int = 0) -> Table:
    """Returns the table of the counts in these files, within `budget` bytes if that is not 0.

    Files are read block by block, so that memory holds one block and the result. Of equally frequent pairs, those with
    smaller ids are kept, which are more frequent tokens in most vocabularies.
    """
    threshold, left = _threshold(_pairs(files, vocab_size, num_successors), budget) if budget else (0, 0)
    kept = [_Pairs(*(np.zeros(0, dtype) for dtype in (np.int64, np.int64, np.int64, np.int32, np.float32)))]
    num_pairs, most_dropped = 0, 0
    for block in _pairs(files, vocab_size, num_successors):
        is_tie_K = block.clipped_K == threshold - 1
        is_kept_K = (block.clipped_K >= threshold) | (is_tie_K & ((block.bytes_K * is_tie_K).cumsum() <= left))
        # Once a tied pair does not fit, no later one is kept.
        left = left - int(block.bytes_K[is_tie_K & is_kept_K].sum()) if is_kept_K[is_tie_K].all() else 0
        num_pairs += len(is_kept_K)
        most_dropped = max(most_dropped, int(block.totals_K[~is_kept_K].max(initial=0)))
        kept.append(block.select(is_kept_K))
    keys_K, _, sizes_K, tokens_S, weights_S = map(np.concatenate, zip(*kept, strict=True))
    if len(keys_K) < num_pairs:
        print(
            f"the budget keeps {len(keys_K):,} of {num_pairs:,} pairs of tokens, with {len(tokens_S):,} successors;"
            f" dropped pairs occurred at most {most_dropped} times"
        )
    begins_K = np.concatenate([[0], sizes_K.cumsum()])
    return Table(keys_K=keys_K, begins_K=begins_K, tokens_S=tokens_S, weights_S=weights_S)


def merge_counts(files: Sequence[Path], vocab_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields blocks of codes, ascending, and their total counts over all files; no block splits a pair's successors."""
    unread = [reader for reader in map(_Reader, files) if reader.num_left]
    while unread:
        # A pair has at most V successors, so that V + 1 codes contain a complete pair.
        size = max(MERGE_SIZE // len(unread), vocab_size + 1)
        heads = [reader.head(size) for reader in unread]
        # The last pair of a head that is not a file's end may be incomplete.
        cut = [head[-1] // vocab_size for one, head in zip(unread, heads, strict=True) if len(head) < one.num_left]
        if cut:
            heads = [head[: np.searchsorted(head, min(cut) * vocab_size)] for head in heads]
        counts = [reader.take(len(head)) for reader, head in zip(unread, heads, strict=True)]
        unread = [reader for reader in unread if reader.num_left]
        codes_N, counts_N = np.concatenate(heads), np.concatenate(counts)
        order_N = np.argsort(codes_N, kind="stable")
        begins_N = np.flatnonzero(np.diff(codes_N[order_N], prepend=-1))
        yield codes_N[order_N][begins_N], np.add.reduceat(counts_N[order_N], begins_N)


class _Reader:
    """Reads a file written by `count` from beginning to end."""

    def __init__(self, file: Path) -> None:
        opened = safe_open(file, "numpy")
        self._codes, self._counts = opened.get_slice("codes"), opened.get_slice("counts")
        self._begin = 0

    @property
    def num_left(self) -> int:
        return self._codes.get_shape()[0] - self._begin

    def head(self, size: int) -> np.ndarray:
        """Returns the next codes, at most `size`."""
        return self._codes[self._begin : self._begin + min(size, self.num_left)]

    def take(self, size: int) -> np.ndarray:
        """Returns the next `size` counts and advances past them."""
        counts_N = self._counts[self._begin : self._begin + size]
        self._begin += size
        return counts_N


class _Pairs(NamedTuple):
    """Pairs of tokens, ascending, and their successors, the most frequent first."""

    keys_K: np.ndarray
    totals_K: np.ndarray
    """Count of each pair."""
    sizes_K: np.ndarray
    """Number of successors kept of each pair."""
    tokens_S: np.ndarray
    weights_S: np.ndarray

    @property
    def clipped_K(self) -> np.ndarray:
        """Counts, clipped to `LARGEST_COUNT`."""
        return self.totals_K.clip(max=LARGEST_COUNT)

    @property
    def bytes_K(self) -> np.ndarray:
        """Size of each pair and its successors in the table."""
        return KEY_BYTES + SUCCESSOR_BYTES * self.sizes_K

    def select(self, is_kept_K: np.ndarray) -> "_Pairs":
        """Returns these pairs only."""
        is_kept_S = is_kept_K.repeat(self.sizes_K)
        pairs = (self.keys_K[is_kept_K], self.totals_K[is_kept_K], self.sizes_K[is_kept_K])
        return _Pairs(*pairs, self.tokens_S[is_kept_S], self.weights_S[is_kept_S])


def _pairs(files: Sequence[Path], vocab_size: int, num_successors: int) -> Iterator[_Pairs]:
    """Yields the files' pairs with their most frequent successors, weighted by relative frequency."""
    for codes_N, counts_N in merge_counts(files, vocab_size):
        keys_N, tokens_N = np.divmod(codes_N, vocab_size)
        begins_K = np.flatnonzero(np.diff(keys_N, prepend=-1))
        sizes_K, totals_K = np.diff(begins_K, append=len(keys_N)), np.add.reduceat(counts_N, begins_K)
        order_N = np.lexsort((tokens_N, -counts_N, keys_N))
        rank_N = np.arange(len(keys_N)) - begins_K.repeat(sizes_K)
        order_S = order_N[rank_N < num_successors]
        sizes_K = sizes_K.clip(max=num_successors)
        yield _Pairs(
            keys_K=keys_N[begins_K],
            totals_K=totals_K,
            sizes_K=sizes_K,
            tokens_S=tokens_N[order_S].astype(np.int32),
            weights_S=(counts_N[order_S] / totals_K.repeat(sizes_K)).astype(np.float32),
        )


def _threshold(blocks: Iterable[_Pairs], budget: int) -> tuple[int, int]:
    """Returns the smallest count whose pairs are all kept, and the bytes left for pairs with a count one less."""
    bytes_M = np.zeros(LARGEST_COUNT + 2, np.int64)
    for block in blocks:
        bytes_M += np.bincount(block.clipped_K, block.bytes_K, len(bytes_M)).astype(np.int64)
    # The last entry is 0, as no clipped count is that large, so that a threshold is always found.
    total_M = bytes_M[::-1].cumsum()[::-1]
    threshold = int((total_M <= budget).argmax())
    return threshold, budget - int(total_M[threshold])
