"""Interpolated modified Kneser-Ney smoothing (Chen & Goodman 1999) on sorted arrays.

    P(w | h) = (c(hw) - D(c(hw))) / c(h) + (1 - sum of these over w) P(w | h')

h' is the context h without its farthest token; the empty context backs off to the uniform distribution 1 / V. c is the
number of occurrences of hw if h is as long as the order allows, and otherwise the number of different tokens before hw
(continuation count).

Contexts are the nodes of a trie read backwards from the last token, numbered level by level from the empty one, 0. A
node's key is its parent's number times V + 1 plus its farthest token, so that all keys are in ascending order; V itself
stands for the positions before a text.

Shape suffixes: C contexts, E pairs of a context and a token after it, O orders, V vocabulary, S tokens, X others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from draftsmith.parts.retrieval import load_array

FALLBACK = (0.5, 1.0, 1.5)
"""Discounts for counts from which they cannot be estimated, as in KenLM (Heafield et al. 2013)."""
TOLERANCE = 1e-3
"""Largest excess of a stored probability over 1 that is taken for rounding."""
KINDS = {
    "keys_C": "i",
    "begins_X": "u",
    "totals_C": "u",
    "weights_C": "f",
    "best_C": "u",
    "chances_C": "f",
    "tokens_E": "u",
    "counts_E": "u",
    "discounts_OX": "f",
}
"""The model's arrays, each a file of that name, and the numpy kind of their numbers."""


def discounts(num_X: Sequence[int]) -> tuple[float, float, float, float]:
    """Returns D(0) = 0, D(1), D(2) and D(3 and more), given the numbers n of pairs with count 1, 2, 3 and 4.

    With Y = n1 / (n1 + 2 n2), D(k) = k - (k + 1) Y n(k+1) / n(k). If some n is 0 or some D is not in (0, k], all
    three are `FALLBACK`.
    """
    if min(num_X) > 0:
        share = num_X[0] / (num_X[0] + 2 * num_X[1])
        found = [k - (k + 1) * share * num_X[k] / num_X[k - 1] for k in (1, 2, 3)]
        if min(found) > 0:
            return 0.0, found[0], found[1], found[2]
    return 0.0, *FALLBACK


def discounted(counts_S: np.ndarray, discounts_X: np.ndarray) -> np.ndarray:
    """Returns c - D(c) [S]."""
    return counts_S - discounts_X[np.minimum(counts_S, len(discounts_X) - 1)]


@dataclass(frozen=True, kw_only=True, eq=False)
class KneserNey:
    """The distribution of the next token after any context."""

    vocab_size: int
    """Vocabulary size V."""
    keys_C: np.ndarray
    """Keys of the contexts, ascending; that of the empty context is -1."""
    begins_X: np.ndarray
    """Index of each context's first pair, and at the end the number of pairs [C + 1]."""
    totals_C: np.ndarray
    """c(h), including pruned pairs."""
    weights_C: np.ndarray
    """Weight of the shorter context, 1 - sum of (c(hw) - D(c(hw))) / c(h) (float64)."""
    best_C: np.ndarray
    """The likeliest token after each context."""
    chances_C: np.ndarray
    """Its probability, rounded (float16)."""
    tokens_E: np.ndarray
    """The token of each pair, ascending within a context."""
    counts_E: np.ndarray
    """c(hw)."""
    discounts_OX: np.ndarray
    """D(0), D(1), D(2), D(3 and more) of contexts of 0, 1, ... tokens [O, 4] (float64)."""

    @staticmethod
    def empty(vocab_size: int) -> "KneserNey":
        """Returns the model of no text, the uniform distribution."""
        return KneserNey(
            vocab_size=vocab_size,
            keys_C=np.array([-1]),
            begins_X=np.zeros(2, np.uint8),
            totals_C=np.zeros(1, np.uint8),
            weights_C=np.ones(1),
            best_C=np.zeros(1, np.uint8),
            chances_C=np.array([1 / vocab_size], np.float16),
            tokens_E=np.zeros(0, np.uint8),
            counts_E=np.zeros(0, np.uint8),
            discounts_OX=np.array([discounts([0])]),
        )

    @property
    def num_bytes(self) -> int:
        return sum(getattr(self, name).nbytes for name in KINDS)

    @cached_property
    def unigram_V(self) -> np.ndarray:
        """The distribution after the empty context."""
        probs_V = np.full(self.vocab_size, self.weights_C[0] / self.vocab_size)
        if len(tokens_S := self.tokens_E[self._pairs(0)]):
            probs_V[tokens_S] += self._masses(self.counts_E[self._pairs(0)], 0, 0)
        return probs_V

    def path(self, text: Sequence[int]) -> list[int]:
        """Returns the contexts that end `text`, from the empty one to the longest known one."""
        path, node, outside = [0], 0, self.vocab_size
        for back in range(1, len(self.discounts_OX)):
            key = node * (outside + 1) + (text[-back] if back <= len(text) else outside)
            node = int(self.keys_C.searchsorted(key))
            if node == len(self.keys_C) or self.keys_C[node] != key:
                break
            path.append(node)
        return path

    def best(self, path: list[int]) -> tuple[int, float]:
        """Returns the likeliest token after a context given by its path, and its probability to three digits.

        They are stored, because the distribution after any text is that after its longest known context.
        """
        return self.best_C.item(path[-1]), self.chances_C.item(path[-1])

    def probs(self, path: list[int]) -> np.ndarray:
        """Returns P [V] (float64) after a context given by its path."""
        weights = self._weights(path)
        probs_V = weights[0] * self.unigram_V
        for depth in range(1, len(path)):
            pairs = self._pairs(path[depth])
            probs_V[self.tokens_E[pairs]] += weights[depth] * self._masses(self.counts_E[pairs], path[depth], depth)
        return probs_V

    def token_probs(self, path: list[int], tokens_S: np.ndarray) -> np.ndarray:
        """Returns the probabilities [S] of some tokens, at a cost independent of the vocabulary size."""
        weights = self._weights(path)
        probs_S = weights[0] * self.unigram_V[tokens_S]
        # Otherwise each search would convert the whole array that it searches.
        tokens_S = tokens_S.astype(self.tokens_E.dtype)
        for depth in range(1, len(path)):
            pairs = self._pairs(path[depth])
            known_X = self.tokens_E[pairs]
            index_S = np.minimum(known_X.searchsorted(tokens_S), len(known_X) - 1)
            counts_S = self.counts_E[pairs][index_S] * (known_X[index_S] == tokens_S)
            probs_S += weights[depth] * self._masses(counts_S, path[depth], depth)
        return probs_S

    def save(self, folder: Path) -> None:
        """Writes each array to a file of its name."""
        for name in KINDS:
            np.save(folder / f"{name}.npy", getattr(self, name), allow_pickle=False)

    @staticmethod
    def load(folder: Path, vocab_size: int) -> "KneserNey":
        """Returns the memory-mapped model that `save` wrote; raises ValueError for a missing or invalid file."""
        arrays = {}
        for name, kind in KINDS.items():
            file = folder / f"{name}.npy"
            # A plain view: each operation on a memmap makes another memmap, which takes longer than the operation.
            arrays[name] = np.asarray(load_array(file, mmap=True))
            if arrays[name].dtype.kind != kind:
                raise ValueError(f"{file} holds {arrays[name].dtype}; the artifact must be made again")
        num_contexts, num_pairs = len(arrays["keys_C"]), len(arrays["tokens_E"])
        shapes = {"X": (num_contexts + 1,), "C": (num_contexts,), "E": (num_pairs,), "OX": arrays["discounts_OX"].shape}
        for name, array in arrays.items():
            if array.shape != shapes[name.rpartition("_")[2]]:
                raise ValueError(
                    f"{folder / name}.npy has shape {array.shape}, which does not fit the other files; the artifact"
                    " must be made again"
                )
        if num_contexts == 0 or arrays["begins_X"][-1] != num_pairs or arrays["discounts_OX"].shape[1:] != (4,):
            raise ValueError(f"{folder}: the arrays do not fit each other; the artifact must be made again")
        for name, in_range in _ranges(arrays, vocab_size).items():
            if not in_range.all():
                raise ValueError(f"{folder / name}.npy holds values out of range; the artifact must be made again")
        return KneserNey(vocab_size=vocab_size, **arrays)

    def _weights(self, path: list[int]) -> list[float]:
        """Returns, for each context, the product of the weights that longer contexts leave to it."""
        weights = [1.0]
        for node in path[:0:-1]:
            weights.append(weights[-1] * self.weights_C.item(node))
        return weights[::-1]

    def _pairs(self, node: int) -> slice:
        return slice(self.begins_X.item(node), self.begins_X.item(node + 1))

    def _masses(self, counts_S: np.ndarray, node: int, depth: int) -> np.ndarray:
        """Returns (c(hw) - D(c(hw))) / c(h) after a context of `depth` tokens."""
        return discounted(counts_S, self.discounts_OX[depth]) / self.totals_C.item(node)


def _ranges(arrays: dict[str, np.ndarray], vocab_size: int) -> dict[str, np.ndarray]:
    """Returns, by name, whether each value of a model's arrays is in its range; NaN is in none."""
    keys_C, begins_X, discounts_OX = arrays["keys_C"], arrays["begins_X"], arrays["discounts_OX"]
    weights_C, chances_C = arrays["weights_C"], arrays["chances_C"]
    return {
        "keys_C": keys_C[1:] > keys_C[:-1],
        "begins_X": begins_X[1:] >= begins_X[:-1],
        "totals_C": arrays["totals_C"][1:] > 0,
        "weights_C": (weights_C >= 0) & (weights_C <= 1 + TOLERANCE),
        "best_C": arrays["best_C"] < vocab_size,
        "chances_C": (chances_C >= 0) & (chances_C <= 1 + TOLERANCE),
        "tokens_E": arrays["tokens_E"] < vocab_size,
        "counts_E": arrays["counts_E"] > 0,
        "discounts_OX": (discounts_OX >= 0) & (discounts_OX <= np.array([0.0, 1.0, 2.0, 3.0])),
    }
