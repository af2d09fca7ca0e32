"""Builds a Kneser-Ney store: n-grams counted part by part, then made into laws range by range of their last token.

An n-gram is a row of a matrix, its context read backwards and then its token: (h_1, h_2, ..., w), h_1 being the token
just before w. In the order of these rows all that follows one h_1 lies together and makes contexts of its own, so that
no more than the n-grams of some range of h_1 need be in memory. V stands for what precedes a text.

Shape suffixes: E n-grams, or pairs of a context and a token met after it; C contexts; O orders; V vocabulary; X others.
"""

import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from safetensors import safe_open

from draftsmith.drafters.ngram.kneser_ney import KneserNey, discounted, discounts

Range = tuple[np.ndarray, list["Level"]]
"""What a range of h_1 adds to the counts of single tokens [V], and its contexts of 1, 2, ... tokens."""
NGRAMS_AT_ONCE = 2**22
"""N-grams in memory at most, unless more than that follow a single token."""
NUM_BINS, BINS_A_DOUBLING = 1024, 16
"""How finely pairs are told apart by what the law would lose with them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Level:
    """Contexts of one length, those of some range of h_1, and what was met after them."""

    parents_C: np.ndarray
    """Number, in the level above, of the context without its farthest token."""
    farthest_C: np.ndarray
    totals_C: np.ndarray
    contexts_E: np.ndarray
    """Ascending, and within a context so are the tokens."""
    tokens_E: np.ndarray
    counts_E: np.ndarray
    shorter_E: np.ndarray
    """Number, in the level above, of the parent's pair with this token; below the first level the token itself."""

    def kept(self, is_kept_E: np.ndarray) -> "Level":
        """Returns the level with some of its pairs only, totals as they were; contexts without any go."""
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
    """Returns a part: the n-grams of `texts` in order, how often each came, and where those of each h_1 begin [V + 2].

    With `order` 1 there is no h_1, and w itself takes its place.
    """
    gap_X = np.full(order - 1, vocab_size)
    joined_X = np.concatenate([[vocab_size], gap_X, *(piece for text in texts for piece in (text, gap_X))])
    windows_EO = np.lib.stride_tricks.sliding_window_view(joined_X.astype(np.uint32), order)
    windows_EO = windows_EO[windows_EO[:, -1] != vocab_size]
    ngrams_EO, counts_E = _summed(windows_EO[:, [*range(order - 2, -1, -1), order - 1]], np.ones(len(windows_EO), int))
    begins_X = ngrams_EO[:, 0].searchsorted(np.arange(vocab_size + 2))
    return {"ngrams": ngrams_EO, "counts": counts_E, "begins": begins_X}


def build(
    parts: Sequence[Path],
    order: int,
    vocab_size: int,
    folder: Path,
    *,
    budget_mb: float = 0,
    at_once: int = NGRAMS_AT_ONCE,
) -> KneserNey:
    """Returns the store of all n-grams in `parts`, whose arrays are files of `folder` mapped into memory.

    If it would be larger than `budget_mb`, of the longest n-grams those go that are worth least: c(hw) times the log of
    P(w | h) over what would be left of it (weighted differences, Seymore & Rosenfeld 1996). What they had goes to
    shorter contexts, and a whole order goes before any of the next. Raises ValueError if the budget is below the rest.
    """

    def ranges() -> Iterator[Range]:
        return (_levels(*ngrams, vocab_size) for ngrams in _sorted(parts, vocab_size, at_once))

    met_OX, single_V, most = np.zeros((order, 4), int), np.zeros(vocab_size, int), 0
    contexts_O, pairs_O = np.zeros(order, int), np.zeros(order, int)
    for own_V, levels in ranges():
        single_V += own_V
        for depth, level in enumerate(levels, start=1):
            met_OX[depth] += _met(level.counts_E)
            contexts_O[depth] += len(level.totals_C)
            pairs_O[depth] += len(level.tokens_E)
            most = max(most, int(level.totals_C.max()))
    met_OX[0], contexts_O[0], pairs_O[0] = _met(single_V), 1, np.count_nonzero(single_V)
    root = _root(single_V, np.array([discounts(met_X) for met_X in met_OX.tolist()]))
    if not single_V.any():
        return root
    kinds = _kinds(vocab_size, max(most, int(single_V.sum())), int(pairs_O.sum()))
    least_O = np.zeros(order, int)
    if budget_mb:
        held_OXX = np.zeros((order, 2, NUM_BINS), int)
        for _, levels in ranges():
            held_OXX += _worth(levels, root)
        room = budget_mb * 1e6 - root.discounts_OX.nbytes - kinds["begins_X"].itemsize
        least_O, contexts_O, pairs_O = _least(held_OXX, contexts_O, pairs_O, kinds, room)

    _write(folder, ranges(), root, least_O, contexts_O, pairs_O, kinds)
    return KneserNey.load(folder, vocab_size)


def _write(
    folder: Path,
    ranges: Iterator[Range],
    root: KneserNey,
    least_O: np.ndarray,
    contexts_O: np.ndarray,
    pairs_O: np.ndarray,
    kinds: dict[str, np.dtype],
) -> None:
    """Writes the store's arrays, each range's share of every level to its place."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    sizes = {"C": contexts_O.sum(), "E": pairs_O.sum(), "X": contexts_O.sum() + 1}
    store = {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", kind, (int(sizes[name[-1]]),))
        for name, kind in kinds.items()
    }
    for name, array in store.items():
        array[: len(getattr(root, name))] = getattr(root, name)
    context_at_O, pair_at_O = contexts_O.cumsum() - contexts_O, pairs_O.cumsum() - pairs_O
    for _, levels in ranges:
        parents_at = 0
        for depth, (level, law) in enumerate(_laws(levels, root, least_O), start=1):
            context_at, pair_at = int(context_at_O[depth]), int(pair_at_O[depth])
            new = {
                "keys_C": (parents_at + level.parents_C) * (root.vocab_size + 1) + level.farthest_C,
                "begins_X": pair_at + _begins(level.contexts_E),
                "totals_C": level.totals_C,
                "weights_C": law.weights_C,
                "best_C": law.best_C,
                "chances_C": law.best_chances_C,
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


def _kinds(vocab_size: int, most: int, num_pairs: int) -> dict[str, np.dtype]:
    """Returns the smallest types for the store's arrays; no count or total is above `most`."""
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


def _met(counts_E: np.ndarray) -> np.ndarray:
    """Returns how many counts are 1, 2, 3 and 4 [4]."""
    return np.bincount(counts_E.clip(max=5), minlength=6)[1:5]


def _begins(contexts_E: np.ndarray) -> np.ndarray:
    """Returns where each context's pairs begin [C]."""
    return np.flatnonzero(np.diff(contexts_E, prepend=-1))


def _sorted(parts: Sequence[Path], vocab_size: int, at_once: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the n-grams of all parts together, in order, with their counts, a range of first columns at a time."""
    files = [safe_open(file, "numpy") for file in parts]
    begins_PX = np.array([file.get_tensor("begins") for file in files]).reshape(len(files), vocab_size + 2)
    edges, held = [0], 0
    for first, size in enumerate(np.diff(begins_PX).sum(0).tolist()):
        if held and held + size > at_once:
            edges.append(first)
            held = 0
        held += size
    for low, high in pairwise([*edges, vocab_size + 1]):
        spans = zip(files, begins_PX[:, low].tolist(), begins_PX[:, high].tolist(), strict=True)
        found = [
            [file.get_slice(name)[begin:end] for name in ("ngrams", "counts")]
            for file, begin, end in spans
            if begin < end
        ]
        if found:
            yield _summed(*map(np.concatenate, zip(*found, strict=True)))


def _summed(ngrams_EO: np.ndarray, counts_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns each n-gram once, in order, and the sum of its counts."""
    if not len(ngrams_EO):
        return ngrams_EO, counts_E
    order_E = np.lexsort(ngrams_EO.T[::-1])
    ngrams_EO = ngrams_EO[order_E]
    firsts_E = np.flatnonzero(np.append(True, (ngrams_EO[1:] != ngrams_EO[:-1]).any(1)))
    return ngrams_EO[firsts_E], np.add.reduceat(counts_E[order_E], firsts_E)


def _levels(ngrams_EO: np.ndarray, counts_E: np.ndarray, vocab_size: int) -> Range:
    """Returns the contexts of every length in a range of n-grams, and the counts of single tokens in it [V]."""
    is_new_EX = np.ones((len(ngrams_EO), ngrams_EO.shape[1] - 1), bool)
    is_new_EX[1:] = np.logical_or.accumulate(ngrams_EO[1:, :-1] != ngrams_EO[:-1, :-1], axis=1)
    numbers_EX = is_new_EX.cumsum(0) - 1
    levels: list[Level] = []
    tokens_E, contexts_E = ngrams_EO[:, -1].astype(int), numbers_EX[:, -1:].ravel()
    for depth in range(ngrams_EO.shape[1] - 1, 0, -1):
        firsts_C = np.flatnonzero(is_new_EX[:, depth - 1])
        parents_C = numbers_EX[firsts_C, depth - 2] if depth > 1 else np.zeros(len(firsts_C), int)
        # What was met after the shorter context, and after how many of its longer ones.
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
    """Returns the store of the empty context alone."""
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
    best = int(root.flat_V.argmax())
    chances_C = root.flat_V[best : best + 1].astype(np.float16)
    return dataclasses.replace(root, best_C=np.array([best], np.uint64), chances_C=chances_C)


@dataclass(frozen=True, kw_only=True, eq=False)
class Law:
    """What the contexts of a level make of the law of the level above."""

    weights_C: np.ndarray
    """What is left to the shorter context."""
    chances_E: np.ndarray
    """P(w | h)."""
    worth_E: np.ndarray
    """What the text would lose in nats if each pair were left to the shorter context."""
    best_C: np.ndarray
    """The likeliest token, and its probability."""
    best_chances_C: np.ndarray


def _law(level: Level, discounts_X: np.ndarray, shorter_E: np.ndarray, above: tuple[np.ndarray, np.ndarray]) -> Law:
    """Returns the law of a level, given P(w | h') of its pairs and the likeliest tokens of the level above.

    The likeliest token after h is one that was met after it, or the likeliest after h': to no other does h give
    anything.
    """
    masses_E = discounted(level.counts_E, discounts_X) / level.totals_C[level.contexts_E]
    weights_C = 1 - np.bincount(level.contexts_E, masses_E)
    left_E = weights_C[level.contexts_E] * shorter_E
    chances_E = masses_E + left_E
    begins_C = _begins(level.contexts_E)
    most_C = np.maximum.reduceat(chances_E, begins_C)
    most_E = np.flatnonzero(chances_E == most_C[level.contexts_E])
    met_C = level.tokens_E[most_E[_begins(level.contexts_E[most_E])]]
    above_C, above_chances_C = above[0][level.parents_C], weights_C * above[1][level.parents_C]
    return Law(
        weights_C=weights_C,
        chances_E=chances_E,
        worth_E=level.counts_E * np.log(chances_E / left_E),
        best_C=np.where(above_chances_C > most_C, above_C, met_C),
        best_chances_C=np.maximum(above_chances_C, most_C),
    )


def _laws(levels: list[Level], root: KneserNey, least_O: np.ndarray) -> Iterator[tuple[Level, Law]]:
    """Yields each level, from that of single tokens on, with its law, less the pairs worth less than a bin."""
    shorter_X = root.flat_V
    best = root.best_C.astype(int), root.flat_V[root.best_C]
    for level, discounts_X, least in zip(levels, root.discounts_OX[1:], least_O[1:], strict=True):
        if least == NUM_BINS:
            return
        law = _law(level, discounts_X, shorter_X[level.shorter_E], best)
        if least:
            level = level.kept(_bins(law.worth_E) >= least)
            if not len(level.tokens_E):
                return
            law = _law(level, discounts_X, shorter_X[level.shorter_E], best)
        yield level, law
        shorter_X, best = law.chances_E, (law.best_C, law.best_chances_C)


def _bins(worth_E: np.ndarray) -> np.ndarray:
    """Returns what pairs are worth as whole numbers, from 0 up, on a scale of logarithms."""
    return (BINS_A_DOUBLING * (np.log2(worth_E) + 24)).clip(0, NUM_BINS - 1).astype(int)


def _worth(levels: list[Level], root: KneserNey) -> np.ndarray:
    """Returns how many contexts and pairs [O, 2, bins] each bin holds, a context going by its pair worth most."""
    held_OXX = np.zeros((len(root.discounts_OX), 2, NUM_BINS), int)
    whole_O = np.zeros(len(held_OXX), int)
    for held_XX, (level, law) in zip(held_OXX[1:], _laws(levels, root, whole_O), strict=True):
        bins_E = _bins(law.worth_E)
        held_XX[0] = np.bincount(np.maximum.reduceat(bins_E, _begins(level.contexts_E)), minlength=NUM_BINS)
        held_XX[1] = np.bincount(bins_E, minlength=NUM_BINS)
    return held_OXX


def _least(
    held_OXX: np.ndarray, contexts_O: np.ndarray, pairs_O: np.ndarray, kinds: dict[str, np.dtype], budget: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the least bin that stays of each order for `budget` bytes, and how many contexts and pairs then do."""
    per_pair = sum(kind.itemsize for name, kind in kinds.items() if name[-1] == "E")
    per_context = sum(kind.itemsize for kind in kinds.values()) - per_pair
    bytes_O = contexts_O * per_context + pairs_O * per_pair
    least_O, contexts_O, pairs_O = np.zeros_like(contexts_O), contexts_O.copy(), pairs_O.copy()
    for depth in range(len(bytes_O) - 1, 0, -1):
        room = budget - bytes_O[:depth].sum()
        if bytes_O[depth] <= room:
            break
        # What stays if bins from 0, 1, ... on do; past the last one nothing does.
        stays_XX = np.append(held_OXX[depth, :, ::-1].cumsum(1)[:, ::-1], [[0], [0]], axis=1)
        fits_X = stays_XX[0] * per_context + stays_XX[1] * per_pair <= room
        least_O[depth] = fits_X.argmax() if fits_X.any() else NUM_BINS
        num_pairs = pairs_O[depth]
        contexts_O[depth], pairs_O[depth] = stays_XX[:, least_O[depth]]
        print(f"the budget keeps {pairs_O[depth]:,} of {num_pairs:,} n-grams of {depth + 1} tokens")
    if bytes_O[0] > budget:
        raise ValueError(f"budget_mb does not hold even the {pairs_O[0]:,} single tokens; give a larger one")
    return least_O, contexts_O, pairs_O
