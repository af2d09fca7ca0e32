"""Verifies the nodes of a draft that are worth their time, at the cost measured for this batch; none where none is.

Verifying n nodes in each of B rows yields (B + sum over these nodes of their probability of being accepted) /
(d + v(n)) tokens per millisecond. A node's probability is the product along its path of the acceptance rates of nodes
of that depth and rank among siblings (EAGLE-2, 2406.16858, section 4.2, with rates in place of the draft model's
confidences), each multiplied by how much more or less than that its row has accepted lately. v(n) is a line through the
quickest verifications of each n, or for n = 0 the quickest plain step; d is the drafter's time. The n that maximises
the quotient is verified: the same in all rows, since a batch is as wide as its widest row, and 0 if too few rows have
found a draft. Where drafting as a whole yields less than plain steps, the drafter is not run; it is tried again after
16 rounds, and after twice as many each time that it still does not pay. Few nodes are tried first, and more only
where these say that they pay.

Only drafts whose tokens were not sampled are cut, and only by their shape and by earlier rounds, so that decoding stays
lossless. Drafters that draft token by token, and chains that are sampled, are told n before they draft. Sampled trees
are proposed whole or not at all.
"""

import copy
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
from draftsmith.length.costs import Stopwatch

NODE_GAIN = "node_gain"
"""Name of the policy."""
RATE_PRIOR = 8
"""Number of nodes at their rank's acceptance rate added to those of each depth and rank."""
RANK_PRIOR = 2
"""Number of nodes at the rate 1 / (2 + rank) added to those of each rank."""
ROW_PRIOR, ROW_MEMORY = 4.0, 0.9
"""Accepted and expected nodes added to those of a row, and the share of them kept from round to round."""
ROW_FACTORS = (0.25, 2.0)
"""Least and largest factor of a row."""
DEFAULT_DEPTH = 16
"""Longest chain of a drafter that does not say how many tokens it drafts."""


class NodeGain:
    """The policy "node_gain": the number of nodes of each round, from acceptance rates and times of earlier ones.

    It is kept from call to call, and learns costs for each number of rows.
    """

    FIRST, LEAST_FIRST = (0.25, 0.0, 0.25, 0.0, 0.5), 4
    """Shares of the drafter's nodes tried at the beginning, and how many of them even if drafting does not pay."""
    WHILE_ON, WHILE_OFF = (0.0, 2.0, 0.5), (1.0, 2.0)
    """Multiples of the best number of nodes tried in turn later, while drafting pays and while it does not; then none
    is best, and the number of at least one that comes nearest is multiplied. Large numbers are tried only where smaller
    ones say that they pay, since in large batches each that does not costs as much as several plain steps."""
    TRIAL_EVERY, FIRST_PAUSE, LONGEST_PAUSE = 32, 16, 512
    """Rounds between trials; while drafting does not pay, the pause doubles from the first to the longest."""
    NUM_RECENT, NUM_DRAFTS = 9, 6
    """Latest times of each number of nodes, and latest drafts, that decisions are made from."""
    needs_confidence = False

    def __init__(self) -> None:
        self._rates: dict[tuple[int, int], list[int]] = defaultdict(lambda: [0, 0])
        self._rank_rates: dict[int, list[int]] = defaultdict(lambda: [0, 0])
        self._batches: dict[int, _Batch] = defaultdict(_Batch)
        self.start(1)

    def start(self, num_rows: int) -> None:
        """Begins a call with this number of rows."""
        self._rows = [[0.0, 0.0] for _ in range(num_rows)]
        self._use_batch(num_rows)

    def change_rows(self, origins: Sequence[int | None]) -> None:
        """Follows rows as `Drafter.change_rows` does."""
        self._rows = [[0.0, 0.0] if origin is None else self._rows[origin] for origin in origins]
        self._use_batch(len(origins))

    def _use_batch(self, num_rows: int) -> None:
        """Uses what is known of this number of rows; at first the costs of nearly as many."""
        near = [size for size in self._batches if 2 * abs(size - num_rows) <= num_rows]
        if num_rows not in self._batches and near:
            closest = min(near, key=lambda size: abs(size - num_rows))
            self._batches[num_rows] = copy.deepcopy(self._batches[closest])
        self._batch = self._batches[num_rows]

    def will_draft(self) -> bool:
        """Returns whether the drafter is to be run in the next round, which begins with this call."""
        return self._batch.begin_round(self)

    def select(
        self, parents: Sequence[Sequence[int]], running: Sequence[bool], *, is_whole: bool = False
    ) -> list[list[int]]:
        """Returns the nodes to keep of each row's tree, node 0 always, the same number in all running rows if they can.

        `parents` are those of `Tree.parents_RN`, without padding. With `is_whole` all nodes are kept, or none.
        """
        ordered: list[list[int]] = []
        gains: list[list[float]] = []
        for row, (nodes, is_running) in enumerate(zip(parents, running, strict=True)):
            probs = self.node_probs(nodes, row) if is_running else [1.0]
            # A child is at most as likely as its parent, and comes after it.
            likeliest = sorted((-prob, node) for node, prob in enumerate(probs) if node)
            ordered.append([node for _, node in likeliest])
            gains.append(list(accumulate((-negated for negated, _ in likeliest), initial=0.0)))
        number = self._batch.choose(mean_tokens(gains, sum(running), is_whole=is_whole))
        if is_whole and number:
            number = max(map(len, ordered))
        drafted = [nodes for nodes, is_running in zip(parents, running, strict=True) if is_running]
        self._batch.drafted = (drafted, is_whole)
        return [[0, *sorted(nodes[:number])] for nodes in ordered]

    def select_depth(self, depth: int, running: Sequence[bool]) -> int:
        """Returns the length of the chains to draft, of at most `depth` tokens."""
        chain = range(-1, depth)
        gains = [
            list(accumulate(self.node_probs(chain, row)[1:], initial=0.0))
            for row, is_running in enumerate(running)
            if is_running
        ]
        self._batch.drafted = ([chain] * sum(running), False)
        return self._batch.choose(mean_tokens(gains, sum(running)))

    def learn(
        self,
        parents: Sequence[Sequence[int]],
        paths: Sequence[Sequence[int]],
        verify_ms: float | None,
        draft_ms: float = 0.0,
    ) -> None:
        """Updates rates and costs after a round of these trees and accepted paths, empty for rows that had ended.

        Without `verify_ms` the round does not count as one of the policy.
        """
        for row, (nodes, path) in enumerate(zip(parents, paths, strict=True)):
            accepted = set(path)
            own = self._rows[row] if path and len(nodes) > 1 else [0.0, 0.0]
            own[:] = (ROW_MEMORY * one for one in own)
            for node, (parent, kind) in enumerate(zip(nodes, _depths_and_ranks(nodes), strict=True)):
                if node and parent in accepted:
                    own[0] += node in accepted
                    own[1] += self._rate(kind)
                    for counts in (self._rates[kind], self._rank_rates[kind[1]]):
                        counts[0] += node in accepted
                        counts[1] += 1
        if verify_ms is not None:
            self._batch.end_round(self, max(map(len, parents)) - 1, verify_ms, draft_ms)

    def tokens_of(self, drafted: "Drafted") -> list[float]:
        """Returns the mean tokens of a row with the best 0, 1, 2 ... nodes of a draft, by what is known now."""
        parents, is_whole = drafted
        gains = [list(accumulate(sorted(self.node_probs(nodes)[1:], reverse=True), initial=0.0)) for nodes in parents]
        return mean_tokens(gains, len(parents), is_whole=is_whole)

    def node_probs(self, parents: Sequence[int], row: int | None = None) -> list[float]:
        """Returns the estimated probability that each node of a tree, in one row, is accepted, 1 for node 0."""
        factor = 1.0
        if row is not None:
            accepted, expected = self._rows[row]
            factor = (accepted + ROW_PRIOR) / (expected + ROW_PRIOR)
            factor = min(max(factor, ROW_FACTORS[0]), ROW_FACTORS[1])
        probs = [1.0]
        for parent, kind in list(zip(parents, _depths_and_ranks(parents), strict=True))[1:]:
            probs.append(probs[parent] * min(1.0, factor * self._rate(kind)))
        return probs

    def _rate(self, kind: tuple[int, int]) -> float:
        accepted, total = self._rates[kind]
        accepted_of_rank, total_of_rank = self._rank_rates[kind[1]]
        rank_rate = (accepted_of_rank + RANK_PRIOR / (2 + kind[1])) / (total_of_rank + RANK_PRIOR)
        return (accepted + RATE_PRIOR * rank_rate) / (total + RATE_PRIOR)


Drafted = tuple[Sequence[Sequence[int]], bool]
"""The trees of the rows that are running, and whether all of their nodes are verified or none."""


def mean_tokens(gains: Sequence[Sequence[float]], num_running: int, *, is_whole: bool = False) -> list[float]:
    """Returns the mean tokens of a row with its best 0, 1, 2 ... nodes; `gains` are rows' sums of probabilities."""
    longest = max(map(len, gains), default=1)
    totals = (sum(one[min(number, len(one) - 1)] for one in gains) for number in range(longest))
    tokens = [1 + total / max(num_running, 1) for total in totals]
    return [1.0] * (len(tokens) - 1) + tokens[-1:] if is_whole else tokens


class _Batch:
    """What is known of batches of one size: milliseconds by number of nodes, and what drafting yields."""

    def __init__(self) -> None:
        self._recent_ms: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=NodeGain.NUM_RECENT))
        self._recent_draft_ms: deque[float] = deque(maxlen=NodeGain.NUM_RECENT)
        self._base, self._slope, self._plain_ms, self._draft_ms = 1.0, 0.0, 1.0, 0.0
        self._drafts: deque[Sequence[float]] = deque(maxlen=NodeGain.NUM_DRAFTS)
        """The mean tokens of a row with 0, 1, 2 ... nodes of the latest drafts."""
        self.drafted: Drafted | None = None
        """What was drafted in this round, if anything."""
        self._tried: list[Drafted] = []
        """Those of the first trials, whose acceptance was guessed when they were drafted."""
        self._num_trials, self._num_since, self._pause = 0, 0, NodeGain.FIRST_PAUSE
        self._is_on = True
        self._share: float | None = None
        """What this round tries: a share of the nodes at first, later a multiple of their best number; else None."""

    def _yields_more(self) -> bool:
        """Returns whether rounds with a draft yield more tokens per millisecond than plain steps."""
        chosen = [(tokens, self._best(tokens)) for tokens in self._drafts]
        if not chosen:
            return True
        yielded = sum(tokens[number] for tokens, number in chosen)
        return yielded * self._plain_ms > sum(self._draft_ms + self._verify_ms(number) for _, number in chosen)

    def begin_round(self, policy: NodeGain) -> bool:
        """Returns whether to draft, and decides whether the round is a trial."""
        is_on = self._is_on = self._yields_more()
        self.drafted = None
        self._share = None
        if self._num_trials < len(policy.FIRST):
            self._share = policy.FIRST[self._num_trials]
        elif self._num_since >= (policy.TRIAL_EVERY if is_on else self._pause):
            shares = policy.WHILE_ON if is_on else policy.WHILE_OFF
            self._share = shares[(self._num_trials - len(policy.FIRST)) % len(shares)]
        return is_on if self._share is None else self._share > 0

    def choose(self, tokens: Sequence[float]) -> int:
        """Returns the number of nodes with the most tokens per millisecond, or those of the trial."""
        self._drafts.append(tokens)
        if self._share is None:
            return self._best(tokens)
        whole = len(tokens) - 1
        tried = whole if self._is_first() else self._best(tokens, least=int(not self._is_on))
        return min(whole, math.ceil(self._share * tried))

    def _is_first(self) -> bool:
        return self._num_trials < len(NodeGain.FIRST)

    def _best(self, tokens: Sequence[float], least: int = 0) -> int:
        """Returns the number of nodes with the most tokens per millisecond, of at least `least` if there are any."""
        numbers = range(min(least, len(tokens) - 1), len(tokens))
        return max(numbers, key=lambda number: tokens[number] / (self._draft_ms + self._verify_ms(number)))

    def end_round(self, policy: NodeGain, number: int, verify_ms: float, draft_ms: float) -> None:
        """Counts a round in which `number` nodes were verified."""
        was_trial = self._share is not None
        # A round is no trial if the drafter found nothing to draft.
        is_tried = self._share is not None and (self._share > 0) == (number > 0)
        self._recent_ms[number].append(verify_ms)
        if draft_ms:
            self._recent_draft_ms.append(draft_ms)
        self._fit()
        if is_tried and not self._is_first():
            self._pause = policy.FIRST_PAUSE if self._is_on else min(2 * self._pause, policy.LONGEST_PAUSE)
            if self.drafted is not None and not self._is_on:
                # What did not pay before says little about this draft, whose acceptance is known now.
                self._drafts.clear()
                self._drafts.append(policy.tokens_of(self.drafted))
        self._num_trials += is_tried
        if self.drafted is not None and self._num_trials <= len(policy.FIRST):
            self._tried.append(self.drafted)
            self._drafts.clear()
            self._drafts.extend(map(policy.tokens_of, self._tried[-policy.NUM_DRAFTS :]))
        if policy.LEAST_FIRST <= self._num_trials < len(policy.FIRST) and not self._yields_more():
            self._num_trials = len(policy.FIRST)
        # Where nothing was found and drafting does not pay, the next trial waits as well.
        self._num_since = 0 if is_tried or (was_trial and not self._is_on) else self._num_since + 1

    def _fit(self) -> None:
        quickest = {number: min(times) for number, times in sorted(self._recent_ms.items())}
        points = [(number, ms) for number, ms in quickest.items() if number > 0]
        if len(points) == 1:
            points = [*((0, ms) for number, ms in quickest.items() if not number), *points]
        if points:
            self._slope, self._base = 0.0, points[0][1]
        if len(points) > 1:
            slope, base = linear_regression(*zip(*points, strict=True))
            self._slope, self._base = max(slope, 0.0), max(base, 1e-3)
        self._plain_ms = quickest.get(0, self._base)
        # Unlike verification, drafting takes as long as what it finds.
        recent = sorted(self._recent_draft_ms)
        self._draft_ms = recent[len(recent) // 2] if recent else 0.0

    def _verify_ms(self, number: int) -> float:
        return self._base + self._slope * number if number else self._plain_ms


class NodeControlled(Drafter):
    """A drafter whose drafts are cut to the nodes that `NodeGain` keeps."""

    def __init__(self, drafter: Drafter, policy: NodeGain) -> None:
        self.config, self.target, self.hidden_layers = drafter.config, drafter.target, drafter.hidden_layers
        self._drafter, self._policy = drafter, policy
        self._num_draft = getattr(drafter.config, "num_draft", DEFAULT_DEPTH)
        self._is_told = bool(getattr(drafter.config, "supports_early_stop", False))

    def start(self, session: Session) -> None:
        self._session, self._is_running = session, [True] * len(session.rows)
        self._policy.start(len(session.rows))
        self._drafter.start(session)

    def change_rows(self, origins: list[int | None], new: Session | None) -> bool:
        if not self._drafter.change_rows(origins, new):
            return False
        self._is_running = [True] * len(origins)
        self._policy.change_rows(origins)
        return True

    def propose(self, budget: int) -> Draft:
        self._draft_ms = 0.0
        if not self._policy.will_draft():
            return self._session.empty_draft()
        if self._is_told:
            depth = self._policy.select_depth(min(budget, self._num_draft), self._is_running)
            return self._drafter.propose(depth) if depth else self._session.empty_draft()
        watch = Stopwatch(self.target.device)
        draft = self._drafter.propose(budget)
        self._draft_ms = watch.lap_ms()
        # The next ones are told their length before they are sampled.
        self._is_told = draft.draft_probs_BNV is not None and draft.tree.is_chain and draft.resume_point is None
        if draft.sampling_scheme == "deterministic" and draft.resume_point is None:
            draft = keep_nodes(draft, self._policy.select(_used_parents(draft), self._is_running))
        elif max(map(len, self._policy.select(_used_parents(draft), self._is_running, is_whole=True))) == 1:
            draft = self._session.empty_draft()
        return draft

    def observe(self, step: Step) -> None:
        verify_ms = step.cost_ms - self._draft_ms
        self._policy.learn(_used_parents(step.draft), step.paths, verify_ms, self._draft_ms)
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
        kept_of_BN=draft.tokens_BN if draft.kept_of_BN is None else draft.kept_of_BN,
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
