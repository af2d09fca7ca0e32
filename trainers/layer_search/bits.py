"""Bit strings, of which a search tries each once."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

Bits = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Space:
    """The bit strings of length `num_bits`, with `num_ones` ones if that is given."""

    num_bits: int
    num_ones: int | None = None
    """None for any number."""

    @property
    def size(self) -> int:
        """Number of strings."""
        return 2**self.num_bits if self.num_ones is None else comb(self.num_bits, self.num_ones)

    def random(self, rng: np.random.Generator) -> Bits:
        """Returns a string with a random number of ones, unless it is given, at random indices."""
        num_ones = int(rng.integers(self.num_bits + 1)) if self.num_ones is None else self.num_ones
        return self.ones(rng.permutation(self.num_bits)[:num_ones].tolist())

    def ones(self, indices: Sequence[int]) -> Bits:
        """Returns the string with ones at these indices."""
        chosen = set(indices)
        return tuple(int(index in chosen) for index in range(self.num_bits))

    def neighbours(self, bits: Bits) -> list[Bits]:
        """Returns the strings with one bit flipped or, if the number of ones is fixed, a one and a zero swapped."""
        if self.num_ones is None:
            return [(*bits[:index], 1 - bits[index], *bits[index + 1 :]) for index in range(self.num_bits)]
        ones = [index for index, bit in enumerate(bits) if bit]
        zeros = [index for index, bit in enumerate(bits) if not bit]
        return [self.ones([*(one for one in ones if one != out), new]) for out in ones for new in zeros]


def untried_neighbours(space: Space, scores: dict[Bits, float]) -> list[Bits]:
    """Returns the neighbours without a score of the best string that has any."""
    for bits in sorted(scores, key=scores.__getitem__, reverse=True):
        untried = [one for one in space.neighbours(bits) if one not in scores]
        if untried:
            return untried
    return []
