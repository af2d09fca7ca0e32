"""Keeps the nodes of a draft tree that are worth their verification, at the cost measured for this batch.

A tree of n nodes in each of B rows yields (B + sum over all nodes of their probability of being accepted) / ms(n)
tokens per millisecond. A node's probability is the product along its path of the acceptance rates of nodes of that
depth and rank among siblings (EAGLE-2, 2406.16858, section 4.2, with rates in place of the draft model's confidences);
ms(n) is a line through the quickest rounds of each n, or for n = 0 the quickest plain step. The n that maximises the
quotient is verified; where that is 0, the drafter is not run.

Only drafts whose tokens were not sampled are cut, and only by their shape and by earlier rounds, so that decoding stays
lossless. Sampled drafts are proposed whole or not at all.
"""

import dataclasses
import math
from collections import defaultdict, deque
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from statistics import linear_regression

import torch

from draftsmith.core.drafter import Drafter, Session, Step
from draftsmith.core.tree import Draft, Tree

NODE_GAIN = "node_gain"
"""Name of the policy."""
RATE_PRIOR = 8
"""Number of nodes at their rank's acceptance rate added to those of each depth and rank."""
RANK_PRIOR = 2
"""Number of nodes at the rate 1 / (2 + rank) added to those of each rank."""


class NodeGain:
    """The policy "node_gain": the number of nodes of each round, from acceptance rates and times of earlier ones.

    It is kept from call to call, and learns costs for each number of rows.
    """

    TRIALS = (1.0, 0.0, 0.5, 1.0, 0.25)
    """Shares of the drafter's nodes tried in turn, at the beginning and then at intervals."""
    NUM_FIRST, TRIAL_EVERY, NUM_RECENT, MOMENTUM = 10, 32, 9, 0.9
    needs_confidence = False

    def __init__(self) -> None:
        self._rates: dict[tuple[int, int], list[int]] = defaultdict(lambda: [0, 0])
        self._rank_rates: dict[int, list[int]] = defaultdict(lambda: [0, 0])
        self._batches: dict[int, _Batch] = defaultdict(_Batch)
        self.start(1)

    def start(self, num_rows: int) -> None:
        """Begins a call with this number of rows."""
        self._batch = self._batches[num_rows]

    def will_draft(self) -> bool:
        """Returns whether the drafter is to be run in the next round."""
        share = self._batch.trial(self)
        return share > 0 if share is not None else self._batch.best() > 0

    def select(self, parents: Sequence[Sequence[int]], running: Sequence[bool]) -> list[list[int]]:
        """Returns the nodes to keep of each row's tree, node 0 always, the same number in all running rows if they can.

        `parents` are those of `Tree.parents_RN`, without padding.
        """
        ordered: list[list[int]] = []
        totals: list[float] = [0.0]
        for row, is_running in zip(parents, running, strict=True):
            probs = self.node_probs(row) if is_running else [1.0]
            # A child is at most as likely as its parent, and comes after it.
            likeliest = sorted((-prob, node) for node, prob in enumerate(probs) if node)
            ordered.append([node for _, node in likeliest])
            gains = list(accumulate((-negated for negated, _ in likeliest), initial=0.0))
            longest = max(len(totals), len(gains))
            totals = [
                totals[min(number, len(totals) - 1)] + gains[min(number, len(gains) - 1)] for number in range(longest)
            ]
        tokens = [1 + total / max(sum(running), 1) for total in totals]
        share = self._batch.trial(self)
        number = math.ceil(share * (len(tokens) - 1)) if share is not None else self._batch.best(tokens)
        self._batch.remember(tokens, self.MOMENTUM)
        return [[0, *sorted(nodes[:number])] for nodes in ordered]

    def learn(self, parents: Sequence[Sequence[int]], paths: Sequence[Sequence[int]], cost_ms: float | None) -> None:
        """Updates rates and costs after a round of these trees and accepted paths, empty for rows that had ended.

        Without `cost_ms` the round does not count as one of the policy.
        """
        for row, path in zip(parents, paths, strict=True):
            accepted = set(path)
            for node, (parent, (depth, rank)) in enumerate(zip(row, _depths_and_ranks(row), strict=True)):
                if node and parent in accepted:
                    for counts in (self._rates[depth, rank], self._rank_rates[rank]):
                        counts[0] += node in accepted
                        counts[1] += 1
        if cost_ms is not None:
            self._batch.count(self, max(map(len, parents)) - 1, cost_ms)

    def node_probs(self, parents: Sequence[int]) -> list[float]:
        """Returns the estimated probability that each node of a tree is accepted, 1 for node 0."""
        probs = [1.0]
        for parent, kind in list(zip(parents, _depths_and_ranks(parents), strict=True))[1:]:
            probs.append(probs[parent] * self._rate(kind))
        return probs

    def _rate(self, kind: tuple[int, int]) -> float:
        accepted, total = self._rates[kind]
        accepted_of_rank, total_of_rank = self._rank_rates[kind[1]]
        rank_rate = (accepted_of_rank + RANK_PRIOR / (2 + kind[1])) / (total_of_rank + RANK_PRIOR)
        return (accepted + RATE_PRIOR * rank_rate) / (total + RATE_PRIOR)


class _Batch:
    """What is known of batches of one size: milliseconds by number of nodes, and mean tokens of the best n nodes."""

    def __init__(self) -> None:
        self._recent_ms: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=NodeGain.NUM_RECENT))
        self._tokens: list[float] = [1.0]
        self._num_trials, self._num_since = 0, 0

    def trial(self, policy: NodeGain) -> float | None:
        """Returns the share of nodes that the next round tries, None if it is no trial."""
        # While drafting does not pay, only trials can show that it has begun to.
        pause = policy.TRIAL_EVERY if self.best() else policy.TRIAL_EVERY // 2
        is_trial = self._num_trials < policy.NUM_FIRST or self._num_since >= pause
        return policy.TRIALS[self._num_trials % len(policy.TRIALS)] if is_trial else None

    def count(self, policy: NodeGain, number: int, cost_ms: float) -> None:
        # A round is no trial if the drafter found nothing to draft.
        share = self.trial(policy)
        is_tried = share is not None and (share > 0) == (number > 0)
        self._recent_ms[number].append(cost_ms)
        self._num_trials, self._num_since = self._num_trials + is_tried, 0 if is_tried else self._num_since + 1

    def remember(self, tokens: Sequence[float], momentum: float) -> None:
        longest = max(len(tokens), len(self._tokens))
        old, new = ([one[min(at, len(one) - 1)] for at in range(longest)] for one in (self._tokens, tokens))
        weight = 1.0 if len(self._tokens) == 1 else 1 - momentum
        self._tokens = [before + weight * (after - before) for before, after in zip(old, new, strict=True)]

    def best(self, tokens: Sequence[float] | None = None) -> int:
        """Returns the number of nodes with the most tokens per millisecond, of the trees before if none is given.

        A draft already made is verified with at least one of its nodes.
        """
        first = 0 if tokens is None else min(1, len(tokens) - 1)
        tokens = self._tokens if tokens is None else tokens
        quickest = {number: min(times) for number, times in sorted(self._recent_ms.items())}
        points = [(number, ms) for number, ms in quickest.items() if number > 0]
        slope, base = 0.0, points[0][1] if points else 1.0
        if len(points) > 1:
            slope, base = linear_regression(*zip(*points, strict=True))
        line = [max(base, 1e-3) + max(slope, 0.0) * number for number in range(len(tokens))]
        line[0] = quickest.get(0, line[0])
        return max(range(first, len(tokens)), key=lambda number: tokens[number] / line[number])


class NodeControlled(Drafter):
    """A drafter whose drafts are cut to the nodes that `NodeGain` keeps."""

    def __init__(self, drafter: Drafter, policy: NodeGain) -> None:
        self.config, self.target, self.hidden_layers = drafter.config, drafter.target, drafter.hidden_layers
        self._drafter, self._policy = drafter, policy

    def start(self, session: Session) -> None:
        self._session, self._is_running = session, [True] * len(session.rows)
        self._draft: Draft | None = None
        self._policy.start(len(session.rows))
        self._drafter.start(session)

    def propose(self, budget: int) -> Draft:
        if not self._policy.will_draft():
            self._draft = self._session.empty_draft()
            return self._draft
        draft = self._drafter.propose(budget)
        if draft.sampling_scheme == "deterministic" and draft.resume_point is None:
            draft = keep_nodes(draft, self._policy.select(_used_parents(draft), self._is_running))
        self._draft = draft
        return draft

    def observe(self, step: Step) -> None:
        cost_ms = step.cost_ms if step.is_for(self._draft) else None
        self._policy.learn(_used_parents(step.draft), step.paths, cost_ms)
        self._is_running = [len(path) > 0 for path in step.paths]
        self._drafter.observe(step)


def keep_nodes(draft: Draft, kept: Sequence[Sequence[int]]) -> Draft:
    """Returns a deterministic draft with only the nodes `kept` of each row, in ascending order, parents included."""
    assert draft.draft_probs_BNV is None and draft.resume_point is None
    used, longest = _used_parents(draft), max(map(len, kept))
    if all(len(nodes) == len(row) for nodes, row in zip(kept, used, strict=True)):
        return draft
    rows = []
    for nodes, parents in zip(kept, used, strict=True):
        number = {node: at for at, node in enumerate(nodes)}
        row = [-1, *(number[parents[node]] for node in nodes[1:])]
        # Padding hangs below the last node, so that a chain stays one.
        rows.append((*row, *range(len(row) - 1, longest - 1)))
    shapes = (rows[0],) if len(set(rows)) == 1 else tuple(rows)
    index_BN = torch.tensor([[*nodes, *[0] * (longest - len(nodes))] for nodes in kept], device=draft.tokens_BN.device)
    counts = [len(nodes) for nodes in kept]
    return dataclasses.replace(
        draft,
        tokens_BN=draft.tokens_BN.gather(1, index_BN),
        tree=_tree(shapes, draft.tokens_BN.device),
        num_nodes=counts if min(counts) < longest else None,
    )


@lru_cache(maxsize=256)
def _tree(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tree:
    return Tree.from_parents([list(row) for row in rows], device)


def _used_parents(draft: Draft) -> list[list[int]]:
    """Returns the parents of each row's nodes without padding."""
    rows = draft.tree.parents_RN.tolist()
    counts = draft.num_nodes or [draft.tree.num_nodes] * len(draft.tokens_BN)
    return [rows[at % len(rows)][:count] for at, count in enumerate(counts)]


def _depths_and_ranks(parents: Sequence[int]) -> list[tuple[int, int]]:
    """Returns the depth of each node and its rank among its siblings."""
    depths, num_children, kinds = [0], [0] * len(parents), [(0, 0)]
    for parent in parents[1:]:
        depths.append(depths[parent] + 1)
        kinds.append((depths[-1], num_children[parent]))
        num_children[parent] += 1
    return kinds
