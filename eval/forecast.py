"""What a drafter's speed-up should be by its parts, and the batch size at which it stops paying.

What was counted (tokens a round, nodes verified) and the drafter's own time are those of the comparison; the target's
forwards over drafts are put in at what they cost alone, measured apart for each batch size and number of nodes.
"""

from collections.abc import Mapping
from functools import cache
from statistics import median

import numpy as np

from draftsmith import Target
from draftsmith.costs import verify_ms
from eval.measure import Tally

NUM_NODES = (0, 1, 2, 4, 8, 16, 32, 63)


class Costs:
    """What forwards of the target take, for any batch size and number of nodes; measured when first asked for."""

    def __init__(self, target: Target) -> None:
        self._curve = cache(lambda size, layer: verify_ms(target, NUM_NODES, batch_size=size, layer=layer))

    def step_ms(self, batch_size: int) -> float:
        """Returns the milliseconds of a forward over the pending tokens alone."""
        return self._curve(batch_size, 0)[0]

    def ratio(self, batch_size: int, num_nodes: float, layer: int) -> float:
        """Returns the time of a forward over so many nodes from a block on, over that of a pending token alone.

        Between numbers of nodes that were measured, and beyond, in proportion.
        """
        curve = self._curve(batch_size, layer)
        beyond = max(1.0, (num_nodes + 1) / (NUM_NODES[-1] + 1))
        return beyond * float(np.interp(num_nodes, list(curve), list(curve.values()))) / self.step_ms(batch_size)

    def mean_ratio(self, batch_size: int, tally: Tally) -> float:
        """Returns the mean of it over a tally's rounds."""
        found = [(rounds, self.ratio(batch_size, nodes, layer)) for layer, nodes, rounds in tally.verified]
        return sum(rounds * ratio for rounds, ratio in found) / tally.rounds


def as_measured(plain: Tally, drafted: Tally, batch_size: int, costs: Costs) -> float:
    """Returns the speed-up to expect of what was decoded side by side: rounds counted, forwards at their cost alone.

    (N' / N) (S + R s) / (S' + R' (d + s r)): N the tokens, S the time before the first round, R the rounds, s a plain
    step, d the drafter's share of a round, r what a forward over a draft costs in plain ones, a ' what is the drafter's
    (2211.17192, theorem 3.8, with drafts of any kind and verification at its cost).
    """
    step_ms = plain.verify_ms / plain.rounds
    verify_ms = drafted.rounds * step_ms * costs.mean_ratio(batch_size, drafted)
    drafted_ms = drafted.prefill_ms + drafted.draft_ms + drafted.commit_ms + verify_ms
    plain_ms = plain.prefill_ms + plain.draft_ms + plain.commit_ms + plain.verify_ms
    return drafted.tokens / plain.tokens * plain_ms / drafted_ms


def kept_full(plain: Mapping[int, Tally], drafted: Mapping[int, Tally], batch_size: int, costs: Costs) -> float:
    """Returns the speed-up to expect in batches of which no row waits for slower ones, as servers keep them.

    Tallies are by the batch sizes that were measured: of those, the nearest below gives tokens a round and the nodes
    verified. Times other than a forward's are in a straight line through two sizes; if one alone was measured, they
    grow as the target's step does.
    """
    near = max((size for size in drafted if size <= batch_size), default=min(drafted))
    is_slower_now = plain[near].verify_ms / plain[near].rounds / costs.step_ms(near)
    step_ms = costs.step_ms(batch_size) * is_slower_now

    def line(values: dict[int, float]) -> float:
        if len(values) == 1:
            return values[near] * costs.step_ms(batch_size) / costs.step_ms(near)
        low, high = sorted(sorted(values, key=lambda size: abs(size - batch_size))[:2])
        found = values[low] + (values[high] - values[low]) * (batch_size - low) / (high - low)
        return max(found, min(values.values()))

    def call_ms(tallies: Mapping[int, Tally], tau: float, ratio: float) -> float:
        start_ms = line({size: tally.prefill_ms / tally.calls for size, tally in tallies.items()})
        own_ms = line({size: (tally.draft_ms + tally.commit_ms) / tally.rounds for size, tally in tallies.items()})
        num_tokens = drafted[near].tokens / (drafted[near].calls * near)
        return start_ms + num_tokens / tau * (own_ms + step_ms * ratio)

    ratio = costs.mean_ratio(batch_size, drafted[near])
    return call_ms(plain, 1.0, 1.0) / call_ms(drafted, drafted[near].tokens / drafted[near].steps, ratio)


def by_batch_size(
    plain: Mapping[int, list[Tally]], drafted: Mapping[int, list[Tally]], sizes: set[int], costs: Costs
) -> dict[int, float]:
    """Returns `kept_full` for each of `sizes`, the median over rounds of the comparison, each with its own tallies."""
    num_rounds = len(next(iter(plain.values())))
    return {
        size: median(
            kept_full(
                {measured: tallies[number] for measured, tallies in plain.items()},
                {measured: tallies[number] for measured, tallies in drafted.items()},
                size,
                costs,
            )
            for number in range(num_rounds)
        )
        for size in sorted(sizes)
    }


def break_even(speedups: Mapping[int, float]) -> int | None:
    """Returns the smallest batch size at which the drafter is predicted to slow its user down, None if at no one."""
    return next((size for size in sorted(speedups) if speedups[size] < 1), None)
