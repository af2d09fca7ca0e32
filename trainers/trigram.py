"""Counts which tokens follow which two in the target's own text: the store of ADED (2407.12021).

Shape suffixes: T tokens of a text or times that something was met, N tri-grams in rising order, K pairs of tokens, S
successors kept of all pairs.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import safe_open

from data.batches import Batch, Example
from draftsmith import Target
from draftsmith.drafters.trigram import Config, Drafter
from draftsmith.drafters.trigram.compiled import Table
from trainers import Metrics, Needs
from trainers.corpora import corpus
from trainers.training.run_settings import RunSettings
from trainers.training.settings import part_of

LARGEST_VOCABULARY = 2**21
"""So that three tokens are one int64."""
KEY_BYTES, SUCCESSOR_BYTES = 16, 8
MERGED_AT_A_TIME = 2**23
"""Tri-grams of all parts held in memory."""
MOST_TIMES = 2**16
"""Pairs met more often are all alike to the budget."""


@dataclass(frozen=True, kw_only=True)
class Settings(Config):
    """What is kept of what was counted; the rest is how drafts are searched for."""

    num_successors: int = 12
    """Successors kept of two tokens, the likeliest; their shares are of all that followed."""
    budget_mb: float = 0.0
    """Megabytes that the store may take, 0 for any; what does not fit are the pairs of tokens met most rarely."""
    part_documents: int = 20_000
    """Texts counted at a time; a build that was killed loses no more."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_successors", "part_documents"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.budget_mb < 0:
            raise ValueError(f"budget_mb is {self.budget_mb}; it must not be negative")


def needs(settings: Settings, target: Target) -> Needs:
    return Needs()


def fit(settings: Settings, target: Target, rows: Sequence[Example], run: RunSettings, output: Path) -> Drafter:
    """Returns the drafter with the tri-grams of all supervised text, each text counted once."""
    if target.vocab_size > LARGEST_VOCABULARY:
        raise ValueError(f"a vocabulary of {target.vocab_size} is larger than the {LARGEST_VOCABULARY} it can count")
    texts = list(corpus.documents(rows, context=2))
    files = corpus.build_chunks(texts, output, settings.part_documents, partial(count, vocab_size=target.vocab_size))
    table = build(files, target.vocab_size, settings.num_successors, int(settings.budget_mb * 1e6))
    config = part_of(Config, settings)
    return Drafter(config, target, table)


def evaluate(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> Metrics:
    return corpus.evaluate(drafter, batch, target)


def count(texts: Sequence[np.ndarray], *, vocab_size: int) -> dict[str, np.ndarray]:
    """Returns the texts' tri-grams in rising order, each as the number first * V^2 + second * V + third, and counts."""
    codes = [np.zeros(0, np.int64)]
    for index in range(len(texts)):
        ids_T = texts[index]
        codes.append((ids_T[:-2] * vocab_size + ids_T[1:-1]) * vocab_size + ids_T[2:])
    codes_N, counts_N = np.unique(np.concatenate(codes), return_counts=True)
    return {"codes": codes_N, "counts": counts_N}


def build(files: Sequence[Path], vocab_size: int, num_successors: int, budget: int = 0) -> Table:
    """Returns the table of what `count` wrote to these files, within `budget` bytes if that is not 0.

    Blocks are read one by one, so that memory holds no more than one and what is kept. Of pairs met equally often those
    with the smaller ids are kept, which are the commoner tokens of most vocabularies.
    """
    least, left = _cut(_pairs(files, vocab_size, num_successors), budget) if budget else (0, 0)
    kept = [_Pairs(*(np.zeros(0, dtype) for dtype in (np.int64, np.int64, np.int64, np.int32, np.float32)))]
    num_pairs, most_dropped = 0, 0
    for block in _pairs(files, vocab_size, num_successors):
        is_tie_K = block.times_K == least - 1
        is_kept_K = (block.times_K >= least) | (is_tie_K & ((block.bytes_K * is_tie_K).cumsum() <= left))
        # Once one of them does not fit none does that comes after it.
        left = left - int(block.bytes_K[is_tie_K & is_kept_K].sum()) if is_kept_K[is_tie_K].all() else 0
        num_pairs += len(is_kept_K)
        most_dropped = max(most_dropped, int(block.totals_K[~is_kept_K].max(initial=0)))
        kept.append(block.only(is_kept_K))
    keys_K, _, sizes_K, tokens_S, weights_S = map(np.concatenate, zip(*kept, strict=True))
    if len(keys_K) < num_pairs:
        print(
            f"the budget keeps {len(keys_K):,} of {num_pairs:,} pairs of tokens, with {len(tokens_S):,} successors;"
            f" those dropped were met {most_dropped} times at most"
        )
    begins_K = np.concatenate([[0], sizes_K.cumsum()])
    return Table(keys_K=keys_K, begins_K=begins_K, tokens_S=tokens_S, weights_S=weights_S)


def merge_counts(files: Sequence[Path], vocab_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the codes and counts of all files added up, in rising order; no block ends amid a pair's successors."""
    unread = [part for part in map(_Part, files) if part.num_left]
    while unread:
        # No pair has more successors than there are tokens: so many codes hold a whole one.
        size = max(MERGED_AT_A_TIME // len(unread), vocab_size + 1)
        heads = [part.head(size) for part in unread]
        # Where a head breaks off more of its last pair may come.
        broken = [head[-1] // vocab_size for part, head in zip(unread, heads, strict=True) if len(head) < part.num_left]
        if broken:
            heads = [head[: np.searchsorted(head, min(broken) * vocab_size)] for head in heads]
        counts = [part.take(len(head)) for part, head in zip(unread, heads, strict=True)]
        unread = [part for part in unread if part.num_left]
        codes_N, counts_N = np.concatenate(heads), np.concatenate(counts)
        order_N = np.argsort(codes_N, kind="stable")
        begins_N = np.flatnonzero(np.diff(codes_N[order_N], prepend=-1))
        yield codes_N[order_N][begins_N], np.add.reduceat(counts_N[order_N], begins_N)


class _Part:
    """A file of `count`, read from its beginning to its end."""

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
        """Returns the next counts and goes past them."""
        counts_N = self._counts[self._begin : self._begin + size]
        self._begin += size
        return counts_N


class _Pairs(NamedTuple):
    """Pairs of tokens in rising order and what followed them, the likeliest first."""

    keys_K: np.ndarray
    totals_K: np.ndarray
    """How often each was met."""
    sizes_K: np.ndarray
    """How many successors of each are kept."""
    tokens_S: np.ndarray
    weights_S: np.ndarray

    @property
    def times_K(self) -> np.ndarray:
        return self.totals_K.clip(max=MOST_TIMES)

    @property
    def bytes_K(self) -> np.ndarray:
        return KEY_BYTES + SUCCESSOR_BYTES * self.sizes_K

    def only(self, is_kept_K: np.ndarray) -> "_Pairs":
        is_kept_S = is_kept_K.repeat(self.sizes_K)
        of_pairs = (self.keys_K[is_kept_K], self.totals_K[is_kept_K], self.sizes_K[is_kept_K])
        return _Pairs(*of_pairs, self.tokens_S[is_kept_S], self.weights_S[is_kept_S])


def _pairs(files: Sequence[Path], vocab_size: int, num_successors: int) -> Iterator[_Pairs]:
    """Yields the files' pairs, each successor weighing its share of all that followed; the likeliest are kept."""
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


def _cut(blocks: Iterable[_Pairs], budget: int) -> tuple[int, int]:
    """Returns how often pairs must have been met to be kept, and the bytes left to those met once less."""
    bytes_T = np.zeros(MOST_TIMES + 2, np.int64)
    for block in blocks:
        bytes_T += np.bincount(block.times_K, block.bytes_K, len(bytes_T)).astype(np.int64)
    # The last entry is empty: nobody is met so often.
    taken_T = bytes_T[::-1].cumsum()[::-1]
    least = int((taken_T <= budget).argmax())
    return least, budget - int(taken_T[least])
