"""The speed-up to expect of a chain drafter, before it is timed (2211.17192, theorem 3.8 and corollary 3.9)."""

from collections.abc import Sequence

MAX_DRAFT = 64
"""Longest chains that are thought of."""


def tokens(acceptance: float, num_draft: int) -> float:
    """Returns the tokens a round of `num_draft` drafted ones yields: (1 - a^(n + 1)) / (1 - a), each accepted alike."""
    return sum(acceptance**depth for depth in range(num_draft + 1))


def tokens_by_depth(reached: Sequence[float]) -> float:
    """Returns the tokens a round yields, given the share of rounds whose draft was accepted to depth 1, 2, ..."""
    return 1 + sum(reached)


def speedup(tokens: float, num_draft: int, cost_ratio: float, verify_ratio: float = 1.0) -> float:
    """Returns tokens a round over its cost in plain steps, `num_draft` cost_ratio + verify_ratio.

    `cost_ratio` is the time of a drafted token and `verify_ratio` that of verifying them all, each over a plain step's.
    """
    return tokens / (num_draft * cost_ratio + verify_ratio)


def best(acceptance: float, cost_ratio: float) -> tuple[int, float]:
    """Returns the length of chains that pays most and its speed-up, (0, 1) where none does, all verified at no cost."""
    found = {n: speedup(tokens(acceptance, n), n, cost_ratio) for n in range(MAX_DRAFT + 1)}
    length = max(found, key=found.__getitem__)
    return length, found[length]


def best_by_depth(reached: Sequence[float], cost_ratio: float) -> tuple[int, float]:
    """Returns the same from the share of rounds whose draft is accepted to depth 1, 2, ..., no longer than those."""
    found = {n: speedup(tokens_by_depth(reached[:n]), n, cost_ratio) for n in range(len(reached) + 1)}
    length = max(found, key=found.__getitem__)
    return length, found[length]
