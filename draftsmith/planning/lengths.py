"""Computes the draft length of each batch size and context that yields the most tokens per second.

The rounds of a batch kept full are replayed over the recorded positions: in each round every row advances by what its
draft there would have been accepted, cut to the draft length, and one more token; a round costs the drafter's time for
that length and the verification of the longest draft in the batch.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TypeVar

from draftsmith.planning.grid import Grid
from draftsmith.planning.measure import Measured, Position, interpolated

TOLERANCE = 0.01
"""Of lengths that are nearly as fast as the fastest, within this share, the shortest is taken."""
P_MINS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Least probabilities of a drafted token that are tried, for engines that stop drafting there."""
MAX_ROUNDS, TOKENS_PER_PLACE = 2_000, 200
Key = TypeVar("Key", int, tuple[int, float])


@dataclass(frozen=True, kw_only=True)
class Replay:
    """The outcome of decoding the recorded texts with one draft length."""

    tokens: int
    """Tokens of all rows."""
    rounds: Counter[tuple[int, int]]
    """Number of rounds by (tokens that the drafter computed, tokens verified)."""

    def tau(self, batch_size: int) -> float:
        """Returns the mean accepted length, the target's own token included."""
        return self.tokens / (self.rounds.total() * batch_size)

    def tokens_per_s(self, draft_ms: Mapping[int, float], verify_ms: Mapping[int, float]) -> float:
        """Returns the tokens per second of all rows at these costs of a round."""
        times = (
            number * ((interpolated(dict(draft_ms), steps) if steps else 0.0) + interpolated(dict(verify_ms), depth))
            for (steps, depth), number in self.rounds.items()
        )
        return 1e3 * self.tokens / sum(times)


def replay(
    texts: Sequence[Sequence[Position]],
    length: int,
    batch_size: int,
    p_min: float = 0.0,
    *,
    tokens_per_place: int = TOKENS_PER_PLACE,
) -> Replay:
    """Returns the outcome of decoding `texts` with drafts of `length` tokens, a place taking the next where one ends.

    All texts are decoded about once, and some again if that is less than `tokens_per_place` for each row of the batch.
    With `p_min` a row drafts no token whose probability under the draft model is below it.
    """
    texts = [text for text in texts if text]
    at = [place * len(texts) // batch_size % len(texts) for place in range(batch_size)]
    position = [0] * batch_size
    tokens, rounds = 0, Counter[tuple[int, int]]()
    total = sum(map(len, texts))
    while rounds.total() < MAX_ROUNDS and tokens < max(total, tokens_per_place * batch_size):
        steps, depth = 0, 0
        for place in range(batch_size):
            text = texts[at[place]]
            one = text[position[place]]
            drafted = min(length, one.num_drafted)
            computed = length
            if p_min:
                sure = next((n for n, p in enumerate(one.confidences[:drafted]) if p < p_min), drafted)
                drafted, computed = sure, min(sure + 1, length)
            steps, depth = max(steps, computed), max(depth, drafted)
            advance = 1 + min(drafted, one.num_accepted)
            tokens += min(advance, len(text) - position[place])
            position[place] += advance
            if position[place] >= len(text):
                at[place], position[place] = (at[place] + 1) % len(texts), 0
        rounds[steps, depth] += 1
    return Replay(tokens=tokens, rounds=rounds)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One draft length at one batch size and context."""

    length: int
    tau: float
    tokens_per_s: float


class Plan:
    """Expected tokens per second of every draft length, and the lengths to use; 0 is off."""

    def __init__(self, measured: Measured, grid: Grid) -> None:
        self.measured, self.grid = measured, grid

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Returns the lengths that the drafter reaches."""
        return tuple(length for length in self.grid.lengths if length <= self.measured.deepest)

    @cached_property
    def expected(self) -> dict[tuple[int, int], dict[int, Choice]]:
        """Returns the choices by (batch size, context), and by length."""
        found = {}
        for context in self.grid.contexts:
            texts = self.measured.texts[context]
            for size in self.grid.batch_sizes:
                draft_ms, verify_ms = self.measured.draft_ms[size, context], self.measured.verify_ms[size, context]
                choices = {}
                for length in self.lengths:
                    one = replay(texts, length, size)
                    speed = one.tokens_per_s(draft_ms, verify_ms)
                    choices[length] = Choice(length=length, tau=one.tau(size), tokens_per_s=speed)
                found[size, context] = choices
        return found

    def accepted_by_depth(self, context: int) -> list[float]:
        """Returns the shares of positions after such a context whose draft is accepted to depth 1, 2 ..."""
        positions = [one for text in self.measured.texts[context] for one in text]
        depths = range(1, self.grid.lengths[-1] + 1)
        return [sum(one.num_accepted >= depth for one in positions) / max(len(positions), 1) for depth in depths]

    def best(self, batch_size: int, context: int) -> Choice:
        """Returns the choice for one batch size and context."""
        choices = self.expected[batch_size, context]
        return choices[_shortest_near_best({n: one.tokens_per_s for n, one in choices.items()})]

    def speedup(self, batch_size: int, context: int, length: int) -> float:
        """Returns the expected tokens per second relative to plain decoding."""
        choices = self.expected[batch_size, context]
        return choices[length].tokens_per_s / choices[0].tokens_per_s

    def by_batch_size(self) -> dict[int, int]:
        """Returns the length for each batch size, over all contexts, each of which writes as many tokens."""
        found = {}
        for size in self.grid.batch_sizes:
            speeds = {
                length: len(self.grid.contexts)
                / sum(1 / self.expected[size, context][length].tokens_per_s for context in self.grid.contexts)
                for length in self.lengths
            }
            found[size] = _shortest_near_best(speeds)
        return found

    @property
    def has_confidences(self) -> bool:
        """Returns whether the drafter reports the probabilities of its tokens."""
        texts = [text for texts in self.measured.texts.values() for text in texts]
        return any(one.confidences for text in texts for one in islice(text, 8))

    def with_p_min(self) -> tuple[int, float, float]:
        """Returns the length, least probability and speed-up of the smallest batch size, where rows stop by themselves.

        Without probabilities the least one is 0. The length is 0 where nothing pays.
        """
        size = self.grid.batch_sizes[0]
        speeds: dict[tuple[int, float], float] = {}
        for p_min in P_MINS if self.has_confidences else P_MINS[:1]:
            for length in self.lengths:
                seconds = 0.0
                for context in self.grid.contexts:
                    one = replay(self.measured.texts[context], length, size, p_min)
                    cell = size, context
                    seconds += 1 / one.tokens_per_s(self.measured.draft_ms[cell], self.measured.verify_ms[cell])
                speeds[length, p_min] = 1 / seconds
        length, p_min = _shortest_near_best(speeds)
        return length, p_min if length else 0.0, speeds[length, p_min] / speeds[0, 0.0]


def _shortest_near_best(speeds: Mapping[Key, float]) -> Key:
    """Returns the first key, in order, of those whose speed is within `TOLERANCE` of the largest."""
    least = (1 - TOLERANCE) * max(speeds.values())
    return min(key for key, speed in speeds.items() if speed >= least)
