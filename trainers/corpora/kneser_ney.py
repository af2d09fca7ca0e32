"""Builds a Kneser-Ney model: n-grams are counted in chunks, then converted to distributions by ranges of h_1.

An n-gram is a row of a matrix, its context in reverse and then its token: (h_1, h_2, ..., w), h_1 being the token just
before w. In sorted order all n-grams with the same h_1 are adjacent and have contexts of their own, so that only the
n-grams of a range of h_1 are in memory at a time. The id V stands for the beginning of a text.

Shape suffixes: E n-grams, or pairs of a context and a token seen after it; C contexts; O orders; V vocabulary; X other.
"""

import dataclasses
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from safetensors import safe_open

from draftsmith.drafters.ngram.kneser_ney import KneserNey, discounted, discounts

Range = tuple[np.ndarray, list["Level"]]
"""Counts of single tokens [V] that a range of h_1 contributes, and its contexts of 1, 2, ... tokens."""
MAX_NGRAMS = 2**22
"""Largest number of n-grams in memory, unless a single h_1 has more."""
NUM_BINS, BINS_PER_DOUBLING = 1024, 16
"""Resolution of the histogram of the log-likelihood that is lost if a pair is dropped."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Level:
    """Contexts of one length, for a range of h_1, and the tokens seen after them."""

    parents_C: np.ndarray
    """Index, in the level above, of the context without its farthest token."""
    farthest_C: np.ndarray
    """The farthest token."""
    totals_C: np.ndarray
    contexts_E: np.ndarray
    """Context of each pair; ascending, as are the tokens of a context."""
    tokens_E: np.ndarray
    counts_E: np.ndarray
    shorter_E: np.ndarray
    """Index, in the level above, of the parent's pair with this token; in the first level the token itself."""

    def select(self, is_kept_E: np.ndarray) -> "Level":
        """Returns the level with these pairs only, totals unchanged; contexts without pairs are dropped."""
        kept_C, contexts_E = np.unique(self.contexts_E[is_kept_E], return_inverse=True)
        return Level(
            parents_C=self.parents_C[kept_C],
            farthest_C=self.farthest_C[kept_C],
            totals_C=self.totals_C[kept_C],
            contexts_E=contexts_E,
            tokens_E=self.tokens_E[is_kept_E],
            counts_E=self.counts_E[is_kept_E],
            shorter_E=self.shorter_E[is_kept_E],
        )


def count_ngrams(texts: Sequence[np.ndarray], order: int, vocab_size: int) -> dict[str, np.ndarray]:
    """Returns the n-grams of `texts`, sorted, their counts, and the index where those of each h_1 begin [V + 2].

    With `order` 1 there is no h_1, and w itself is used.
    """
    gap_X = np.full(order - 1, vocab_size)
    joined_X = np.concatenate([[vocab_size], gap_X, *(piece for text in texts for piece in (text, gap_X))])
    windows_EO = np.lib.stride_tricks.sliding_window_view(joined_X.astype(np.uint32), order)
    windows_EO = windows_EO[windows_EO[:, -1] != vocab_size]
    ngrams_EO, counts_E = _sum_duplicates(
        windows_EO[:, [*range(order - 2, -1, -1), order - 1]], np.ones(len(windows_EO), int)
    )
    begins_X = ngrams_EO[:, 0].searchsorted(np.arange(vocab_size + 2))
    return {"ngrams": ngrams_EO, "counts": counts_E, "begins": begins_X}


def build(
    chunks: Sequence[Path],
    order: int,
    vocab_size: int,
    folder: Path,
    *,
    budget_mb: float = 0,
    max_ngrams: int = MAX_NGRAMS,
) -> KneserNey:
    """Returns the model of all n-grams in the files `chunks`, whose arrays are memory-mapped files in `folder`.

    If it would be larger than `budget_mb`, the longest n-grams with the smallest log-likelihood loss are dropped:
    c(hw) log(P(w | h) / P'(w | h)), P' without the n-gram (weighted differences, Seymore & Rosenfeld 1996). Their mass
    goes to shorter contexts; a whole order is dropped before any n-gram of the next. Raises ValueError if the budget
    does not hold the single tokens.
    """

    def ranges() -> Iterator[Range]:
        return (_levels(*ngrams, vocab_size) for ngrams in _read_sorted(chunks, vocab_size, max_ngrams))

    # Numbers of n-grams with counts 1, 2, 3 and 4, which determine the discounts.
    num_rare_OX, single_V, most = np.zeros((order, 4), int), np.zeros(vocab_size, int), 0
    contexts_O, pairs_O = np.zeros(order, int), np.zeros(order, int)
    for own_V, levels in ranges():
        single_V += own_V
        for depth, level in enumerate(levels, start=1):
            num_rare_OX[depth] += _num_rare(level.counts_E)
            contexts_O[depth] += len(level.totals_C)
            pairs_O[depth] += len(level.tokens_E)
            most = max(most, int(level.totals_C.max()))
    num_rare_OX[0], contexts_O[0], pairs_O[0] = _num_rare(single_V), 1, np.count_nonzero(single_V)
    root = _root(single_V, np.array([discounts(num_rare_X) for num_rare_X in num_rare_OX.tolist()]))
    if not single_V.any():
        return root
    dtypes = _dtypes(vocab_size, max(most, int(single_V.sum())), int(pairs_O.sum()))
    cutoff_O = np.zeros(order, int)
    if budget_mb:
        histogram_OXX = np.zeros((order, 2, NUM_BINS), int)
        for _, levels in ranges():
            histogram_OXX += _histogram(levels, root)
        room = budget_mb * 1e6 - root.discounts_OX.nbytes - dtypes["begins_X"].itemsize
        cutoff_O, contexts_O, pairs_O = _cutoffs(histogram_OXX, contexts_O, pairs_O, dtypes, room)

    _write(folder, ranges(), root, cutoff_O, contexts_O, pairs_O, dtypes)
    return KneserNey.load(folder, vocab_size)


def _write(
    folder: Path,
    ranges: Iterator[Range],
    root: KneserNey,
    cutoff_O: np.ndarray,
    contexts_O: np.ndarray,
    pairs_O: np.ndarray,
    dtypes: dict[str, np.dtype],
) -> None:
    """Writes the model's arrays, level by level within each range, to their final offsets."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    sizes = {"C": contexts_O.sum(), "E": pairs_O.sum(), "X": contexts_O.sum() + 1}
    store = {name: _new_map(folder / f"{name}.npy", dtype, int(sizes[name[-1]])) for name, dtype in dtypes.items()}
    for name, array in store.items():
        array[: len(getattr(root, name))] = getattr(root, name)
    context_at_O, pair_at_O = contexts_O.cumsum() - contexts_O, pairs_O.cumsum() - pairs_O
    for _, levels in ranges:
        parents_at = 0
        for depth, (level, probs) in enumerate(_all_probs(levels, root, cutoff_O), start=1):
            context_at, pair_at = int(context_at_O[depth]), int(pair_at_O[depth])
            new = {
                "keys_C": (parents_at + level.parents_C) * (root.vocab_size + 1) + level.farthest_C,
                "begins_X": pair_at + _begins(level.contexts_E),
                "totals_C": level.totals_C,
                "weights_C": probs.weights_C,
                "best_C": probs.best_C,
                "chances_C": probs.best_probs_C,
                "tokens_E": level.tokens_E,
                "counts_E": level.counts_E,
            }
            for name, array in new.items():
                at = pair_at if name[-1] == "E" else context_at
                store[name][at : at + len(array)] = array
            context_at_O[depth] += len(level.totals_C)
            pair_at_O[depth] += len(level.tokens_E)
            parents_at = context_at
    store["begins_X"][-1] = len(store["tokens_E"])
    np.save(folder / "discounts_OX.npy", root.discounts_OX, allow_pickle=False)
    for array in store.values():
        array.flush()


def _new_map(file: Path, dtype: np.dtype, length: int) -> np.memmap:
    """Returns a new memory-mapped file of `length` numbers; raises OSError if there is no space left for it.

    Without space reserved before, a process that writes to a map is killed by a bus error when the disk is full.
    """
    array = np.lib.format.open_memmap(file, "w+", dtype, (length,))
    if hasattr(os, "posix_fallocate"):
        with file.open("rb+") as handle:
            os.posix_fallocate(handle.fileno(), 0, file.stat().st_size)
    return array


def _dtypes(vocab_size: int, most: int, num_pairs: int) -> dict[str, np.dtype]:
    """Returns the smallest dtypes for the model's arrays; `most` is the largest count or total."""
    token, count = np.min_scalar_type(vocab_size - 1), np.min_scalar_type(most)
    return {
        "keys_C": np.dtype(np.int64),
        "begins_X": np.min_scalar_type(num_pairs),
        "totals_C": count,
        "weights_C": np.dtype(np.float64),
        "best_C": token,
        "chances_C": np.dtype(np.float16),
        "tokens_E": token,
        "counts_E": count,
    }


def _num_rare(counts_E: np.ndarray) -> np.ndarray:
    """Returns the number of counts that are 1, 2, 3 and 4 [4]."""
    return np.bincount(counts_E.clip(max=5), minlength=6)[1:5]


def _begins(contexts_E: np.ndarray) -> np.ndarray:
    """Returns the index where each context's pairs begin [C]."""
    return np.flatnonzero(np.diff(contexts_E, prepend=-1))


def _read_sorted(chunks: Sequence[Path], vocab_size: int, max_ngrams: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the sorted n-grams of all chunks together and their counts, for one range of h_1 at a time."""
    files = [safe_open(file, "numpy") for file in chunks]
    begins_PX = np.array([file.get_tensor("begins") for file in files]).reshape(len(files), vocab_size + 2)
    edges, held = [0], 0
    for first, size in enumerate(np.diff(begins_PX).sum(0).tolist()):
        if held and held + size > max_ngrams:
            edges.append(first)
            held = 0
        held += size
    for low, high in pairwise([*edges, vocab_size + 1]):
        spans = zip(files, begins_PX[:, low].tolist(), begins_PX[:, high].tolist(), strict=True)
        slices = [
            [file.get_slice(name)[begin:end] for name in ("ngrams", "counts")]
            for file, begin, end in spans
            if begin < end
        ]
        if slices:
            yield _sum_duplicates(*map(np.concatenate, zip(*slices, strict=True)))


def _sum_duplicates(ngrams_EO: np.ndarray, counts_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the distinct n-grams, sorted, and the sum of their counts."""
    if not len(ngrams_EO):
        return ngrams_EO, counts_E
    order_E = np.lexsort(ngrams_EO.T[::-1])
    ngrams_EO = ngrams_EO[order_E]
    firsts_E = np.flatnonzero(np.append(True, (ngrams_EO[1:] != ngrams_EO[:-1]).any(1)))
    return ngrams_EO[firsts_E], np.add.reduceat(counts_E[order_E], firsts_E)


def _levels(ngrams_EO: np.ndarray, counts_E: np.ndarray, vocab_size: int) -> Range:
    """Returns the counts of single tokens in a range of n-grams [V], and its contexts of every length."""
    is_new_EX = np.ones((len(ngrams_EO), ngrams_EO.shape[1] - 1), bool)
    is_new_EX[1:] = np.logical_or.accumulate(ngrams_EO[1:, :-1] != ngrams_EO[:-1, :-1], axis=1)
    numbers_EX = is_new_EX.cumsum(0) - 1
    levels: list[Level] = []
    tokens_E, contexts_E = ngrams_EO[:, -1].astype(int), numbers_EX[:, -1:].ravel()
    for depth in range(ngrams_EO.shape[1] - 1, 0, -1):
        firsts_C = np.flatnonzero(is_new_EX[:, depth - 1])
        parents_C = numbers_EX[firsts_C, depth - 2] if depth > 1 else np.zeros(len(firsts_C), int)
        # The tokens seen after the shorter context, and the number of its longer contexts with each of them.
        keys_E, shorter_E, num_longer_E = np.unique(
            parents_C[contexts_E] * vocab_size + tokens_E, return_inverse=True, return_counts=True
        )
        level = Level(
            parents_C=parents_C,
            farthest_C=ngrams_EO[firsts_C, depth - 1].astype(int),
            totals_C=np.bincount(contexts_E, counts_E).astype(int),
            contexts_E=contexts_E,
            tokens_E=tokens_E,
            counts_E=counts_E,
            shorter_E=shorter_E if depth > 1 else tokens_E,
        )
        levels.append(level)
        contexts_E, tokens_E = np.divmod(keys_E, vocab_size)
        counts_E = num_longer_E
    return np.bincount(tokens_E, counts_E, minlength=vocab_size).astype(int), levels[::-1]


def _root(single_V: np.ndarray, discounts_OX: np.ndarray) -> KneserNey:
    """Returns a model with the empty context only."""
    tokens_E = np.flatnonzero(single_V)
    counts_E, total = single_V[tokens_E], single_V.sum()
    masses_E = discounted(counts_E, discounts_OX[0])
    root = dataclasses.replace(
        KneserNey.empty(len(single_V)),
        begins_X=np.array([0, len(tokens_E)], np.uint64),
        totals_C=np.array([total], np.uint64),
        weights_C=np.array([1 - masses_E.sum() / max(total, 1)]),
        tokens_E=tokens_E.astype(np.uint64),
        counts_E=counts_E.astype(np.uint64),
        discounts_OX=discounts_OX,
    )
    best = int(root.unigram_V.argmax())
    best_probs_C = root.unigram_V[best : best + 1].astype(np.float16)
    return dataclasses.replace(root, best_C=np.array([best], np.uint64), chances_C=best_probs_C)


@dataclass(frozen=True, kw_only=True, eq=False)
class LevelProbs:
    """Next-token distributions of the contexts of a level."""

    weights_C: np.ndarray
    """Backoff weight of the shorter context."""
    probs_E: np.ndarray
    """P(w | h)."""
    losses_E: np.ndarray
    """Log-likelihood that the text loses, in nats, if the pair is left to the shorter context."""
    best_C: np.ndarray
    """Most likely token."""
    best_probs_C: np.ndarray
    """Probability of the most likely token."""


def _level_probs(
    level: Level, discounts_X: np.ndarray, shorter_E: np.ndarray, above: tuple[np.ndarray, np.ndarray]
) -> LevelProbs:
    """Returns the distributions of a level, given P(w | h') of its pairs and the most likely tokens of the level above.

    The most likely token after h was either seen after h or is the most likely after h', as all other tokens keep their
    order under h'.
    """
    masses_E = discounted(level.counts_E, discounts_X) / level.totals_C[level.contexts_E]
    weights_C = 1 - np.bincount(level.contexts_E, masses_E)
    backed_off_E = weights_C[level.contexts_E] * shorter_E
    probs_E = masses_E + backed_off_E
    begins_C = _begins(level.contexts_E)
    most_C = np.maximum.reduceat(probs_E, begins_C)
    most_E = np.flatnonzero(probs_E == most_C[level.contexts_E])
    seen_C = level.tokens_E[most_E[_begins(level.contexts_E[most_E])]]
    above_C, above_probs_C = above[0][level.parents_C], weights_C * above[1][level.parents_C]
    return LevelProbs(
        weights_C=weights_C,
        probs_E=probs_E,
        losses_E=level.counts_E * np.log(probs_E / backed_off_E),
        best_C=np.where(above_probs_C > most_C, above_C, seen_C),
        best_probs_C=np.maximum(above_probs_C, most_C),
    )


def _all_probs(levels: list[Level], root: KneserNey, cutoff_O: np.ndarray) -> Iterator[tuple[Level, LevelProbs]]:
    """Yields the levels without pairs below the cutoff, from contexts of one token on, and their distributions."""
    shorter_X = root.unigram_V
    best = root.best_C.astype(int), root.unigram_V[root.best_C]
    for level, discounts_X, cutoff in zip(levels, root.discounts_OX[1:], cutoff_O[1:], strict=True):
        if cutoff == NUM_BINS:
            return
        probs = _level_probs(level, discounts_X, shorter_X[level.shorter_E], best)
        if cutoff:
            level = level.select(_bins(probs.losses_E) >= cutoff)
            if not len(level.tokens_E):
                return
            probs = _level_probs(level, discounts_X, shorter_X[level.shorter_E], best)
        yield level, probs
        shorter_X, best = probs.probs_E, (probs.best_C, probs.best_probs_C)


def _bins(losses_E: np.ndarray) -> np.ndarray:
    """Returns the bin of each loss, from 0, on a logarithmic scale."""
    return (BINS_PER_DOUBLING * (np.log2(losses_E) + 24)).clip(0, NUM_BINS - 1).astype(int)


def _histogram(levels: list[Level], root: KneserNey) -> np.ndarray:
    """Returns the number of contexts and pairs in each bin [O, 2, bins], contexts by their pair of largest loss."""
    histogram_OXX = np.zeros((len(root.discounts_OX), 2, NUM_BINS), int)
    no_cutoff_O = np.zeros(len(histogram_OXX), int)
    for histogram_XX, (level, probs) in zip(histogram_OXX[1:], _all_probs(levels, root, no_cutoff_O), strict=True):
        bins_E = _bins(probs.losses_E)
        histogram_XX[0] = np.bincount(np.maximum.reduceat(bins_E, _begins(level.contexts_E)), minlength=NUM_BINS)
        histogram_XX[1] = np.bincount(bins_E, minlength=NUM_BINS)
    return histogram_OXX


def _cutoffs(
    histogram_OXX: np.ndarray, contexts_O: np.ndarray, pairs_O: np.ndarray, dtypes: dict[str, np.dtype], budget: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the smallest bin kept of each order within `budget` bytes, and the numbers of contexts and pairs kept."""
    per_pair = sum(dtype.itemsize for name, dtype in dtypes.items() if name[-1] == "E")
    per_context = sum(dtype.itemsize for dtype in dtypes.values()) - per_pair
    bytes_O = contexts_O * per_context + pairs_O * per_pair
    cutoff_O, contexts_O, pairs_O = np.zeros_like(contexts_O), contexts_O.copy(), pairs_O.copy()
    for depth in range(len(bytes_O) - 1, 0, -1):
        room = budget - bytes_O[:depth].sum()
        if bytes_O[depth] <= room:
            break
        # Numbers that are kept with cutoffs 0, 1, ..., NUM_BINS.
        kept_XX = np.append(histogram_OXX[depth, :, ::-1].cumsum(1)[:, ::-1], [[0], [0]], axis=1)
        fits_X = kept_XX[0] * per_context + kept_XX[1] * per_pair <= room
        cutoff_O[depth] = fits_X.argmax() if fits_X.any() else NUM_BINS
        num_pairs = pairs_O[depth]
        contexts_O[depth], pairs_O[depth] = kept_XX[:, cutoff_O[depth]]
        print(f"the budget keeps {pairs_O[depth]:,} of {num_pairs:,} n-grams of {depth + 1} tokens")
    if bytes_O[0] > budget:
        raise ValueError(f"budget_mb is too small for the {pairs_O[0]:,} single tokens alone; give a larger one")
    return cutoff_O, contexts_O, pairs_O
