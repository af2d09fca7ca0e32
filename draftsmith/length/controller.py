"""Applies a draft-length policy to a drafter.

Shape suffixes: B rows, N nodes; R is B, or 1 when all rows share the shape.
"""

import dataclasses
from weakref import WeakKeyDictionary

import torch

from draftsmith.core.drafter import Drafter, Session, Step
from draftsmith.core.stats import drafted_depth
from draftsmith.core.tree import Draft
from draftsmith.length.node_gain import NODE_GAIN, NodeControlled, NodeGain
from draftsmith.length.policies import POLICIES, Fixed, Outcome, Policy, make

DEFAULT_NUM_DRAFT = 16
"""Longest draft of a drafter whose configuration has no `num_draft`, such as one of a fixed tree."""


OWN = "own"
"""Name of the drafter's own policy, also for batches."""
_NODE_GAINS: WeakKeyDictionary[Drafter, NodeGain] = WeakKeyDictionary()
"""What is known of costs and acceptance of each drafter that has decoded batches; kept as long as the drafter."""


def check_length(drafter: Drafter | None, length: str | Policy | NodeGain) -> None:
    """Raises ValueError for a draft-length policy that is unknown or not for this drafter."""
    if drafter is not None:
        with_length_control(drafter, length)
    elif isinstance(length, str) and length not in ("auto", OWN):
        make_control(length)


def stream_control(drafter: Drafter, length: str | Policy | NodeGain, *, keeps_text: bool) -> Drafter:
    """Returns the drafter as `generate_stream` controls it.

    By the policy "auto", batches are decoded by the policy "node_gain", which measures what drafting costs at their
    size, if the text does not depend on drafts (`keeps_text`). Single rows, and drafters that keep a policy or whose
    configuration asks for a fixed length, are decoded by the drafter's own.
    """
    own = with_length_control(drafter, length)
    is_fixed = str(getattr(drafter.config, "length", "")).startswith("fixed") and getattr(
        drafter.config, "supports_early_stop", False
    )
    if length != "auto" or not keeps_text or is_fixed or drafter.policy is not None:
        return own
    return ByBatchSize(own, NodeControlled(drafter, _NODE_GAINS.setdefault(drafter, NodeGain())))


class ByBatchSize(Drafter):
    """A drafter under one control for a call that begins with a single row, and under another for several."""

    def __init__(self, single: Drafter, several: Drafter) -> None:
        self.config, self.target, self.hidden_layers = single.config, single.target, single.hidden_layers
        self._single, self._several = single, several
        self._used: Drafter | None = None

    def start(self, session: Session) -> None:
        if self._used is None:
            self._used = self._single if len(session.rows) == 1 else self._several
        self._used.start(session)

    def change_rows(self, origins: list[int | None], new: Session | None) -> bool:
        assert self._used is not None
        return self._used.change_rows(origins, new)

    def propose(self, budget: int) -> Draft:
        assert self._used is not None
        return self._used.propose(budget)

    def observe(self, step: Step) -> None:
        assert self._used is not None
        self._used.observe(step)


def with_length_control(drafter: Drafter, length: str | Policy | NodeGain) -> Drafter:
    """Returns the drafter with its draft length controlled by `length`, "auto" and "own" being the drafter's default.

    Raises ValueError for an unknown policy, and one that needs draft confidences if the drafter does not report any.
    """
    supports_early_stop = getattr(drafter.config, "supports_early_stop", False)
    if length in ("auto", OWN):
        # A drafter may keep a policy from call to call.
        length = drafter.policy or (drafter.config.length if supports_early_stop else "fixed")
    policy = make_control(length) if isinstance(length, str) else length
    if isinstance(policy, NodeGain):
        return NodeControlled(drafter, policy)
    if policy.needs_confidence and not supports_early_stop:
        name = type(policy).__name__.lower()
        raise ValueError(
            f"length {name!r} needs the draft model's confidence, which this drafter does not report; use 'fixed',"
            " 'heuristic' or 'expected_gain'"
        )
    if isinstance(policy, Fixed) and policy.num_draft == float("inf"):
        return drafter
    return LengthControlled(drafter, policy, supports_early_stop=supports_early_stop)


class LengthControlled(Drafter):
    """A drafter whose draft length is set by a policy: per row before drafting, or token by token with early stop."""

    def __init__(self, drafter: Drafter, policy: Policy, *, supports_early_stop: bool) -> None:
        self.config, self.target, self.hidden_layers = drafter.config, drafter.target, drafter.hidden_layers
        self._drafter, self._policy, self._supports_early_stop = drafter, policy, supports_early_stop
        self._num_draft = getattr(drafter.config, "num_draft", DEFAULT_NUM_DRAFT)

    def start(self, session: Session) -> None:
        self._session = session
        self._is_running = [True] * len(session.rows)
        self._draft: Draft | None = None
        self._policy.start(len(session.rows), self._num_draft)
        self._drafter.start(self._asking(session))

    def change_rows(self, origins: list[int | None], new: Session | None) -> bool:
        if not self._drafter.change_rows(origins, self._asking(new) if new is not None else None):
            return False
        self._is_running = [True] * len(origins)
        self._policy.start(len(origins), self._num_draft)
        return True

    def propose(self, budget: int) -> Draft:
        self._confidences: list[list[float]] = [[] for _ in self._session.rows]
        most = min(budget, self._num_draft)
        self._limits = [self._limit(row, most) if runs else 0 for row, runs in enumerate(self._is_running)]
        if not any(self._limits):
            return self._session.empty_draft()
        self._draft = cut(self._drafter.propose(max(self._limits)), self._limits)
        return self._draft

    def observe(self, step: Step) -> None:
        if step.is_for(self._draft) or step.draft.tree.depth == 0:
            outcomes = []
            for row, path in enumerate(step.paths):
                num_drafted = drafted_depth(step.draft, row)
                if path and num_drafted:
                    outcome = Outcome(
                        row=row,
                        num_drafted=num_drafted,
                        num_accepted=len(path) - 1,
                        confidences=self._confidences[row],
                    )
                    outcomes.append(outcome)
            self._policy.learn(outcomes, step.draft.tree.depth, step.cost_ms)
        self._is_running = [len(path) > 0 for path in step.paths]
        self._drafter.observe(step)

    def reactivate(self) -> None:
        """Marks all rows as running again, after tokens were removed from them."""
        self._is_running = [True] * len(self._is_running)

    def _asking(self, session: Session) -> Session:
        """Returns the session in which the policy is asked after each token."""
        return dataclasses.replace(session, should_continue=self._should_continue)

    def _limit(self, row: int, most: int) -> int:
        """Returns the row's draft length, or with early stop, which decides on each token later, `most` or 0."""
        if self._supports_early_stop:
            return most if self._policy.should_continue(row, 0, ()) else 0
        number = 0
        while number < most and self._policy.should_continue(row, number, ()):
            number += 1
        return number

    def _should_continue(self, row: int, confidence: float) -> bool:
        confidences = self._confidences[row]
        confidences.append(confidence)
        num_drafted = len(confidences)
        return num_drafted < self._limits[row] and self._policy.should_continue(row, num_drafted, confidences)


def make_control(length: str) -> Policy | NodeGain:
    """Returns a new policy: "node_gain" or one of draftsmith/length/policies.py; raises ValueError for other names."""
    name, equals, _ = length.partition("=")
    if name == NODE_GAIN:
        if equals:
            raise ValueError(f"length is {length!r}; node_gain takes no number")
        return NodeGain()
    if name not in POLICIES:
        raise ValueError(f"unknown length policy {name!r}; choose one of {', '.join([*POLICIES, NODE_GAIN])}")
    return make(length)


def cut(draft: Draft, depths: list[int]) -> Draft:
    """Returns the draft with each row's nodes cut before the first one deeper than the row's entry of `depths`.

    Depths must not depend on the tokens drafted: withholding a token for what it is would bias the output. A tree's
    nodes must be in level order, so that siblings, which are verified by how all of them were sampled, stay together.
    """
    if min(depths) >= draft.tree.depth:
        return draft
    depths_RN = draft.tree.depths_RN
    assert not any(0 < depth < draft.tree.depth for depth in depths) or not (depths_RN.diff(dim=1) < 0).any()
    num_kept = (depths_RN > torch.tensor(depths, device=depths_RN.device)[:, None]).cumsum(1).eq(0).sum(1).tolist()
    if draft.num_nodes is not None:
        num_kept = [min(kept, used) for kept, used in zip(num_kept, draft.num_nodes, strict=True)]
    return dataclasses.replace(draft, num_nodes=num_kept)
