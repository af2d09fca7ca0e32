"""Predicts the speed-up of a chain drafter before it is timed (2211.17192, theorem 3.8 and corollary 3.9)."""

from collections.abc import Sequence

MAX_DRAFT = 64
"""Longest chain considered."""


def tokens(acceptance: float, num_draft: int) -> float:
    """Returns the mean tokens per round, (1 - a^(n + 1)) / (1 - a), for `num_draft` tokens of equal acceptance rate."""
    return sum(acceptance**depth for depth in range(num_draft + 1))


def tokens_by_depth(reached: Sequence[float]) -> float:
    """Returns the mean tokens per round, given the share of rounds whose draft is accepted to depth 1, 2, ..."""
    return 1 + sum(reached)


def speedup(tokens: float, num_draft: int, cost_ratio: float, verify_ratio: float = 1.0) -> float:
    """Returns tokens per round over the round's cost in plain steps, `num_draft` cost_ratio + verify_ratio.

    `cost_ratio` is the time of one drafted token and `verify_ratio` that of verification, each over a plain step's.
    """
    return tokens / (num_draft * cost_ratio + verify_ratio)


def best(acceptance: float, cost_ratio: float) -> tuple[int, float]:
    """Returns the best chain length and its speed-up if verification costs nothing; (0, 1) if no length helps."""
    found = {n: speedup(tokens(acceptance, n), n, cost_ratio) for n in range(MAX_DRAFT + 1)}
    length = max(found, key=found.__getitem__)
    return length, found[length]


def best_by_depth(reached: Sequence[float], cost_ratio: float) -> tuple[int, float]:
    """Returns the same from the share of rounds accepted to depth 1, 2, ..., for lengths up to the number of depths."""
    found = {n: speedup(tokens_by_depth(reached[:n]), n, cost_ratio) for n in range(len(reached) + 1)}
    length = max(found, key=found.__getitem__)
    return length, found[length]
