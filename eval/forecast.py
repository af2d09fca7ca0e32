"""What a drafter's speed-up should be by its parts, measured apart, and the batch size at which it stops paying.

A round takes the drafter's own time and a plain step's, the longer the more nodes are verified at once; it brings as
many tokens as were counted. Plain decoding is timed beside each drafter, as machines are not always as quick. What this
leaves out, such as rows that end before others, is what the measured speed-up shows beside it.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
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
PROBES = {1: (16, 3), 2: (16, 3)}
FEWER_PROBES = (8, 2)
"""Tokens of a call and calls, by batch size: large batches take long, and have many rows to tell from."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a call takes beside the target's forwards over drafts, in milliseconds."""

    start_ms: float
    """Reading the prompts, the drafter's start included."""
    round_ms: float
    """A round's drafting, and learning what became of it; in plain decoding a whole step."""
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
    """What verification costs in plain steps, for any batch size and number of nodes; measured when first asked for."""

    def __init__(self, target: Target) -> None:
        self._curve = cache(lambda size, layer: verify_ms(target, NUM_NODES, batch_size=size, layer=layer))

    def ratio(self, batch_size: int, num_nodes: float, layer: int) -> float:
        """Returns the time of a forward over so many nodes from a block on, over that of a pending token alone.

        Between numbers of nodes that were measured in proportion.
        """
        curve = self._curve(batch_size, layer)
        return float(np.interp(num_nodes, list(curve), list(curve.values()))) / self._curve(batch_size, 0)[0]


def probe(target: Target, drafter: Any, prompts: Rows, temperature: float, seed: int, num_tokens: int) -> Parts:
    """Returns the parts of a call that decodes so many tokens after all `prompts` at once, plain without a drafter."""
    tokens_BT, mask_BT = pad(prompts, target.device, side="right")
    forget(drafter)
    recorded = Recorded(drafter) if drafter is not None else None
    stats = draftsmith.generate(
        target,
        tokens_BT,
        recorded,
        attention_mask=mask_BT,
        max_new_tokens=num_tokens,
        temperature=temperature,
        seed=seed,
    ).stats
    if recorded is None:
        return Parts(start_ms=stats.prefill_ms, round_ms=(stats.verify_ms + stats.commit_ms) / stats.rounds)
    return Parts(
        start_ms=stats.prefill_ms,
        round_ms=(stats.draft_ms + stats.commit_ms) / stats.rounds,
        num_nodes=sum(recorded.num_nodes) / stats.rounds,
        layer=recorded.layer,
    )


def speedup(plain: Parts, drafted: Parts, tau: float, num_tokens: int, batch_size: int, costs: Costs) -> float:
    """Returns the predicted speed-up of calls of `num_tokens` a row, of which a round brings `tau`.

    (S + T s) / (S' + T / tau (d + s r(n))): S and S' the starts, T the tokens, s a plain step, d the drafter's round,
    r(n) the cost of a forward over a pending token and n drafted ones in plain forwards (2211.17192, theorem 3.8, with
    drafts of any kind and verification at its cost).
    """
    round_ms = drafted.round_ms + plain.round_ms * costs.ratio(batch_size, drafted.num_nodes, drafted.layer)
    return (plain.start_ms + num_tokens * plain.round_ms) / (drafted.start_ms + num_tokens / tau * round_ms)


def break_even(by_batch_size: dict[int, float]) -> int | None:
    """Returns the smallest batch size at which the drafter is predicted to slow its user down, None if at no one."""
    return next((size for size in sorted(by_batch_size) if by_batch_size[size] < 1), None)


def of(
    target: Target, prompts: Rows, num_tokens: int, batch_sizes: Collection[int]
) -> Callable[[Any, float, float], dict[int, float]]:
    """Returns what predicts a drafter's speed-up at each batch size by temperature and the tokens a round brought."""
    costs = Costs(target)
    batches = {size: [prompts[row % len(prompts)] for row in range(size)] for size in sorted(batch_sizes)}

    def predict(drafter: Any, temperature: float, tau: float) -> dict[int, float]:
        found = {}
        for size, rows in batches.items():
            probe_tokens, probes = PROBES.get(size, FEWER_PROBES)
            in_turn = [
                [probe(target, one, rows, temperature, seed, probe_tokens) for one in (None, drafter)]
                for seed in range(probes)
            ]
            ratios = [speedup(plain, drafted, tau, num_tokens, size, costs) for plain, drafted in in_turn]
            found[size] = median(ratios)
        return found

    return predict
