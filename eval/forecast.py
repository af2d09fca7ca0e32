"""What a drafter's speed-up should be by its parts, measured apart, and the batch size at which it stops paying.

A round takes the drafter's own time, the target's forward over the nodes drafted and what plain decoding spends beside
its forward; it brings as many tokens as were counted. What this leaves out, such as rows that end before others, is
what the measured speed-up shows beside it.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cache
from statistics import median
from typing import Any

import numpy as np

import draftsmith
from draftsmith import Target
from draftsmith.costs import verify_ms
from draftsmith.drafters import Session, Step, forget
from draftsmith.tree import Draft
from eval.measure import Rows, pad

NUM_NODES = (0, 1, 2, 4, 8, 16, 32, 63)
PROBE_TOKENS, PROBES = 16, 3


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a call takes beside the target's forwards over drafts, in milliseconds."""

    start_ms: float
    """Reading the prompts, the drafter's start included."""
    round_ms: float
    """A round's drafting, and learning what became of it; all but the forward in plain decoding."""
    num_nodes: float = 0.0
    """Drafted a round, over a row's pending token."""
    layer: int = 0
    """The block after which the target's forward goes on from the draft."""


class Recorded:
    """A drafter of which is noted how much it drafts."""

    def __init__(self, drafter: Any) -> None:
        self.config, self.target, self.hidden_layers = drafter.config, drafter.target, drafter.hidden_layers
        self.policy = getattr(drafter, "policy", None)
        self._drafter = drafter
        self.num_nodes: list[int] = []
        self.layer = 0

    def start(self, session: Session) -> None:
        self._drafter.start(session)

    def propose(self, budget: int) -> Draft:
        draft = self._drafter.propose(budget)
        self.num_nodes.append(draft.tree.num_nodes - 1)
        self.layer = draft.entry.layer if draft.entry is not None else 0
        return draft

    def observe(self, step: Step) -> None:
        self._drafter.observe(step)


class Costs:
    """What the target's forward takes for any batch size and number of nodes, measured when it is first asked for."""

    def __init__(self, target: Target) -> None:
        self._curve = cache(lambda batch_size, layer: verify_ms(target, NUM_NODES, batch_size=batch_size, layer=layer))

    def ms(self, batch_size: int, num_nodes: float = 0.0, layer: int = 0) -> float:
        """Returns it, between sizes that were measured in proportion."""
        curve = self._curve(batch_size, layer)
        return float(np.interp(num_nodes, list(curve), list(curve.values())))


def probe(target: Target, drafter: Any, prompts: Rows, temperature: float, costs: Costs) -> Parts:
    """Returns the parts of decoding `prompts` at once, plain without a drafter: medians of a few short calls."""
    tokens_BT, mask_BT = pad(prompts, target.device, side="right")
    found = []
    for number in range(PROBES):
        forget(drafter)
        recorded = Recorded(drafter) if drafter is not None else None
        stats = draftsmith.generate(
            target,
            tokens_BT,
            recorded,
            attention_mask=mask_BT,
            max_new_tokens=PROBE_TOKENS,
            temperature=temperature,
            seed=number,
        ).stats
        spent_ms = stats.commit_ms + (stats.draft_ms if recorded is not None else stats.verify_ms)
        parts = Parts(start_ms=stats.prefill_ms, round_ms=spent_ms / stats.rounds)
        if recorded is None:
            found.append(replace(parts, round_ms=max(0.0, parts.round_ms - costs.ms(len(prompts)))))
        else:
            num_nodes = sum(recorded.num_nodes) / stats.rounds
            found.append(replace(parts, num_nodes=num_nodes, layer=recorded.layer))
    return Parts(
        **{name: median(getattr(one, name) for one in found) for name in ("start_ms", "round_ms", "num_nodes")},
        layer=found[-1].layer,
    )


def speedup(plain: Parts, drafted: Parts, tau: float, num_tokens: int, batch_size: int, costs: Costs) -> float:
    """Returns the predicted speed-up of calls of `num_tokens` a row, of which a round brings `tau`.

    (S + T (v(0) + o)) / (S' + T / tau (d + v(n) + o)): S and S' the starts, T the tokens, v(n) the target's forward
    over a pending token and n drafted ones, o what plain decoding takes beside it, d the drafter's round (2211.17192,
    theorem 3.8, with drafts of any kind and verification at its cost).
    """
    step_ms = costs.ms(batch_size) + plain.round_ms
    round_ms = drafted.round_ms + costs.ms(batch_size, drafted.num_nodes, drafted.layer) + plain.round_ms
    return (plain.start_ms + num_tokens * step_ms) / (drafted.start_ms + num_tokens / tau * round_ms)


def break_even(by_batch_size: dict[int, float]) -> int | None:
    """Returns the smallest batch size at which the drafter is predicted to slow its user down, None if at no one."""
    return next((size for size in sorted(by_batch_size) if by_batch_size[size] < 1), None)


def of(
    target: Target, prompts: Rows, temperature: float, num_tokens: int, batch_sizes: Collection[int]
) -> Callable[[Any, float], dict[int, float]]:
    """Returns what predicts a drafter's speed-up at each batch size, given the tokens a round that it brought."""
    costs = Costs(target)
    batches = {size: [prompts[row % len(prompts)] for row in range(size)] for size in sorted(batch_sizes)}
    plain = {size: probe(target, None, rows, temperature, costs) for size, rows in batches.items()}

    def predict(drafter: Any, tau: float) -> dict[int, float]:
        found = {}
        for size, rows in batches.items():
            parts = probe(target, drafter, rows, temperature, costs)
            found[size] = speedup(plain[size], parts, tau, num_tokens, size, costs)
        return found

    return predict
