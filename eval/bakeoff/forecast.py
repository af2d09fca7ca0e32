"""Predicts a drafter's speed-up from its acceptance and costs, and the batch size at which it becomes a slow-down.

Tokens per round, verified nodes and the drafter's own time come from the comparison. The cost of verification is
measured separately with a dummy drafter, for each batch size and number of draft nodes.
"""

from bisect import bisect_left
from collections.abc import Mapping
from functools import cache
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

import draftsmith
from draftsmith import Target
from draftsmith.core.drafter import Drafter, Session, Step
from draftsmith.core.stats import GenerationStats
from draftsmith.core.tree import Draft, ResumePoint
from draftsmith.length.costs import flat
from eval.bakeoff.measure import Rows, Tally, pad

NUM_NODES = (0, 1, 2, 4, 8, 16, 32, 63)
ROUNDS, REPEATS = 6, 7


class DummyDrafter(Drafter):
    """Always drafts `num_nodes` tokens for the next position, as if it had run the target's blocks up to `layer`."""

    def __init__(self, target: Target, num_nodes: int, layer: int) -> None:
        self.config, self.target, self.hidden_layers = SimpleNamespace(length="fixed"), target, ()
        self._tree, self._layer = flat(target, num_nodes), layer

    def start(self, session: Session) -> None:
        self._session = session

    def propose(self, budget: int) -> Draft:
        pending_B1 = self._session.pending()[:, None]
        tokens_BN = pending_B1.repeat(1, self._tree.num_nodes)
        resume_point = None
        if self._layer:
            hidden_BND = torch.zeros(*tokens_BN.shape, self.target.hidden_size, device=self.target.device)
            resume_point = ResumePoint(layer=self._layer, hidden_BND=hidden_BND.to(self.target.dtype))
        return Draft(tokens_BN=tokens_BN, tree=self._tree, resume_point=resume_point)

    def observe(self, step: Step) -> None:
        """Keeps no state."""


class VerificationCosts:
    """Cost of target forwards by batch size, draft nodes and start layer; each is measured on first use."""

    def __init__(self, target: Target, prompts: Rows) -> None:
        self._target, self._prompts = target, [ids[: target.context_length - ROUNDS] for ids in prompts]
        self._timing = cache(self._measure)

    def step_ms(self, batch_size: int) -> float:
        """Returns the milliseconds of a plain decoding step."""
        return self._timing(batch_size, 1, 0)[0]

    def ratio(self, batch_size: int, num_nodes: int, layer: int) -> float:
        """Returns the time of verifying `num_nodes` nodes from block `layer` on, relative to a plain decoding step.

        Interpolates linearly between measured numbers of nodes, and extrapolates proportionally beyond the largest.
        """
        if not num_nodes and not layer:
            return 1.0
        high = min(bisect_left(NUM_NODES, num_nodes), len(NUM_NODES) - 1)
        measured = [num_nodes] if NUM_NODES[high] == num_nodes else list(NUM_NODES[max(high - 1, 0) : high + 1])
        ratios = [self._timing(batch_size, nodes, layer)[1] if nodes or layer else 1.0 for nodes in measured]
        beyond = max(1.0, (num_nodes + 1) / (NUM_NODES[-1] + 1))
        return beyond * float(np.interp(num_nodes, measured, ratios))

    def _measure(self, batch_size: int, num_nodes: int, layer: int) -> tuple[float, float]:
        """Returns (ms of a plain step, relative cost of verifying the nodes), each the median of `REPEATS` runs."""
        rows = [self._prompts[row % len(self._prompts)] for row in range(batch_size)]
        dummy = DummyDrafter(self._target, num_nodes, layer)
        runs = []
        for _ in range(REPEATS):
            stats = self._decode(rows, None)
            plain_ms = stats.verify_ms / stats.rounds
            stats = self._decode(rows, dummy)
            num_drafted = stats.verified[layer, num_nodes]
            # Rounds with room for a single token draft nothing.
            drafted_ms = (stats.verify_ms - (stats.rounds - num_drafted) * plain_ms) / num_drafted
            runs.append((plain_ms, drafted_ms / plain_ms))
        return median(plain_ms for plain_ms, _ in runs), median(ratio for _, ratio in runs)

    def _decode(self, rows: Rows, drafter: Any) -> GenerationStats:
        tokens_BT, mask_BT = pad(rows, self._target.device, side="right")
        return draftsmith.generate(
            self._target, tokens_BT, drafter, attention_mask=mask_BT, max_new_tokens=ROUNDS, eos_token_id=[]
        ).stats

    def mean_ratio(self, batch_size: int, tally: Tally) -> float:
        """Returns the mean of `ratio` over the target forwards of a tally."""
        found = [(rounds, self.ratio(batch_size, nodes, layer)) for layer, nodes, rounds in tally.verified]
        return sum(rounds * ratio for rounds, ratio in found) / tally.rounds


def predict_static_batching(plain: Tally, drafted: Tally, batch_size: int, costs: VerificationCosts) -> float:
    """Returns the predicted speed-up of the measured decoding, in which rows of a batch start and end together.

    (N' / N) (S + R s) / (S' + R' (d + s r)): N tokens, S time before the first round, R rounds, s time of a plain step,
    d the drafter's time per round, r the relative cost of verifying a draft; primes mark decoding with the drafter
    (2211.17192, theorem 3.8, for drafts of any shape and measured verification costs).
    """
    step_ms = plain.verify_ms / plain.rounds
    verify_ms = drafted.rounds * step_ms * costs.mean_ratio(batch_size, drafted)
    drafted_ms = drafted.prefill_ms + drafted.draft_ms + drafted.commit_ms + verify_ms
    plain_ms = plain.prefill_ms + plain.draft_ms + plain.commit_ms + plain.verify_ms
    return drafted.tokens / plain.tokens * plain_ms / drafted_ms


def predict_continuous_batching(
    plain: Mapping[int, Tally], drafted: Mapping[int, Tally], batch_size: int, costs: VerificationCosts
) -> float:
    """Returns the predicted speed-up under continuous batching, where no row waits for stragglers, as in servers.

    Tallies are keyed by measured batch size. Tokens per step and verified nodes are those of the nearest smaller
    measured size. Times other than target forwards are linear in the batch size through the two nearest measured
    sizes; with one measured size they grow as the target's step does.
    """
    near = max((size for size in drafted if size <= batch_size), default=min(drafted))
    slowdown = plain[near].verify_ms / plain[near].rounds / costs.step_ms(near)
    step_ms = costs.step_ms(batch_size) * slowdown

    def interpolate(values: dict[int, float]) -> float:
        if len(values) == 1:
            return values[near] * costs.step_ms(batch_size) / costs.step_ms(near)
        low, high = sorted(sorted(values, key=lambda size: abs(size - batch_size))[:2])
        value = values[low] + (values[high] - values[low]) * (batch_size - low) / (high - low)
        return max(value, min(values.values()))

    def call_ms(tallies: Mapping[int, Tally], tau: float, ratio: float) -> float:
        start_ms = interpolate({size: tally.prefill_ms / tally.calls for size, tally in tallies.items()})
        drafter_ms = interpolate(
            {size: (tally.draft_ms + tally.commit_ms) / tally.rounds for size, tally in tallies.items()}
        )
        num_tokens = drafted[near].tokens / (drafted[near].calls * near)
        return start_ms + num_tokens / tau * (drafter_ms + step_ms * ratio)

    ratio = costs.mean_ratio(batch_size, drafted[near])
    return call_ms(plain, 1.0, 1.0) / call_ms(drafted, drafted[near].tokens / drafted[near].steps, ratio)


def predict_over_rounds(
    plain: Mapping[int, list[Tally]], drafted: Mapping[int, list[Tally]], batch_size: int, costs: VerificationCosts
) -> float:
    """Returns `predict_continuous_batching`, the median over the comparison's rounds."""
    num_rounds = len(next(iter(plain.values())))
    return median(
        predict_continuous_batching(
            {measured: tallies[number] for measured, tallies in plain.items()},
            {measured: tallies[number] for measured, tallies in drafted.items()},
            batch_size,
            costs,
        )
        for number in range(num_rounds)
    )


def break_even(speedups: Mapping[int, float]) -> int | None:
    """Returns the smallest batch size with a predicted speed-up below 1, None if there is none."""
    return next((size for size in sorted(speedups) if speedups[size] < 1), None)
