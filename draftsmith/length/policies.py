"""Draft-length policies: they decide, before each token, whether a row drafts another one.

A policy may use anything known before the token is sampled: the outcomes of earlier drafts, the draft model's
confidence in the tokens drafted so far, measured times. Every sampled token is verified, and verification is lossless
token by token, so decoding is lossless however lengths are chosen. Withholding a token after it was sampled would not
be: its probability would be missing from the draft distribution. A policy is named as "name", or "name=number" with
its parameter.
"""

import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from statistics import linear_regression
from typing import Protocol

import numpy as np

PRIOR = 8
"""Number of tokens at the overall acceptance rate added to each kind's."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of verifying one row's draft of at least one token."""

    row: int
    num_drafted: int
    num_accepted: int
    confidences: Sequence[float] = ()
    """The draft model's probability of each drafted token, or the acceptance that it predicts for it; empty if the
    drafter reports neither."""

    def verified(self) -> Iterator[tuple[int, bool]]:
        """Yields the index of each verified token, from the first on, and whether it was accepted."""
        for index in range(min(self.num_accepted + 1, self.num_drafted)):
            yield index, index < self.num_accepted


class Policy(Protocol):
    """The interface of a draft-length policy, whose state is kept from call to call."""

    needs_confidence: bool
    """True if it needs the draft model's probabilities."""

    def start(self, num_rows: int, num_draft: int) -> None:
        """Begins a call with new rows, whose drafts have at most `num_draft` tokens."""

    def should_continue(self, row: int, num_drafted: int, confidences: Sequence[float]) -> bool:
        """Returns whether the row drafts another token after `num_drafted`, with these `confidences` if reported."""
        ...

    def learn(self, outcomes: Sequence[Outcome], depth: int, cost_ms: float) -> None:
        """Updates the policy after a round: outcomes of the rows that drafted, the draft's depth and the time."""


class Fixed:
    """Drafts `num_draft` tokens, or the drafter's maximum if that is less."""

    needs_confidence = False

    def __init__(self, num_draft: float = math.inf) -> None:
        if not num_draft >= 1:
            raise ValueError(f"length fixed={num_draft:g}: the number of drafted tokens must be at least 1")
        self.num_draft = num_draft

    def start(self, num_rows: int, num_draft: int) -> None:
        """Does nothing."""

    def should_continue(self, row: int, num_drafted: int, confidences: Sequence[float]) -> bool:
        return num_drafted < self.num_draft

    def learn(self, outcomes: Sequence[Outcome], depth: int, cost_ms: float) -> None:
        """Does nothing."""


class Heuristic:
    """Drafts two tokens more after a fully accepted draft and one less after any other, but at least one.

    This is transformers' heuristic schedule for `num_assistant_tokens`, here per row. It begins with `num_draft`, or
    the drafter's maximum if that is less.
    """

    needs_confidence = False

    def __init__(self, num_draft: float = math.inf) -> None:
        if not num_draft >= 1:
            raise ValueError(f"length heuristic={num_draft:g}: the first number of drafted tokens must be at least 1")
        self._first = num_draft

    def start(self, num_rows: int, num_draft: int) -> None:
        self._num_draft = [min(self._first, num_draft)] * num_rows

    def should_continue(self, row: int, num_drafted: int, confidences: Sequence[float]) -> bool:
        return num_drafted < self._num_draft[row]

    def learn(self, outcomes: Sequence[Outcome], depth: int, cost_ms: float) -> None:
        for outcome in outcomes:
            change = 2 if outcome.num_accepted == outcome.num_drafted else -1
            self._num_draft[outcome.row] = max(1, outcome.num_drafted + change)


class Confidence:
    """Drafts until the draft model's probability of a token is below a threshold; that token is kept.

    This is transformers' `assistant_confidence_threshold`.
    """

    needs_confidence = True

    def __init__(self, threshold: float = 0.4) -> None:
        if not 0 < threshold < 1:
            raise ValueError(f"the confidence threshold is {threshold:g}; it must lie between 0 and 1")
        self.threshold = threshold

    def start(self, num_rows: int, num_draft: int) -> None:
        """Does nothing."""

    def should_continue(self, row: int, num_drafted: int, confidences: Sequence[float]) -> bool:
        return not confidences or confidences[-1] >= self.threshold

    def learn(self, outcomes: Sequence[Outcome], depth: int, cost_ms: float) -> None:
        """Does nothing: the threshold is fixed."""


class Adaptive:
    """As `Confidence`, with the threshold adapted to an acceptance rate of 0.9 (Draft & Verify, 2309.08168).

    After each verified row with m of d tokens accepted, rate = 0.5 rate + 0.5 m / d. The threshold then moves a tenth
    of the way to 0.01 more if the rate is below 0.9, and otherwise to 0.01 less, unless d is the maximum.
    """

    needs_confidence = True
    TARGET_RATE, DECAY, STEP = 0.9, 0.5, 0.1 * 0.01

    def __init__(self, threshold: float = 0.6) -> None:
        self.stop, self._rate = Confidence(threshold), 0.0
        self.should_continue = self.stop.should_continue

    def start(self, num_rows: int, num_draft: int) -> None:
        self._num_draft = num_draft

    def learn(self, outcomes: Sequence[Outcome], depth: int, cost_ms: float) -> None:
        for outcome in outcomes:
            self._rate = self.DECAY * self._rate + (1 - self.DECAY) * outcome.num_accepted / outcome.num_drafted
            if self._rate < self.TARGET_RATE:
                self.stop.threshold += self.STEP
            elif outcome.num_drafted < self._num_draft:
                self.stop.threshold -= self.STEP


class Refit:
    """As `Confidence`, the threshold fitted to the least FPR + 3 FNR of recent tokens (transformers; 2405.04304)."""

    needs_confidence = True
    MIN_SAMPLES, MAX_SAMPLES, MISS_WEIGHT = 6, 256, 3.0

    def __init__(self, threshold: float = 0.4) -> None:
        self.stop = Confidence(threshold)
        self.should_continue = self.stop.should_continue
        self._samples: list[tuple[float, bool]] = []

    def start(self, num_rows: int, num_draft: int) -> None:
        """Does nothing."""

    def learn(self, outcomes: Sequence[Outcome], depth: int, cost_ms: float) -> None:
        """Sets the threshold to the observed probability that minimises the weighted error."""
        for outcome in outcomes:
            self._samples += [(outcome.confidences[index], accepted) for index, accepted in outcome.verified()]
        del self._samples[: -self.MAX_SAMPLES]
        confidence = np.array([sample[0] for sample in self._samples])
        accepted = np.array([sample[1] for sample in self._samples])
        if len(accepted) < self.MIN_SAMPLES or accepted.all() or not accepted.any():
            return
        order = confidence.argsort()
        confidence, accepted = confidence[order], accepted[order]
        # A threshold at entry i stops drafting at the i least probable tokens.
        false_negatives = np.concatenate([[0], accepted.cumsum()]) / accepted.sum()
        false_positives = 1 - np.concatenate([[0], (~accepted).cumsum()]) / (~accepted).sum()
        cut = int((false_positives + self.MISS_WEIGHT * false_negatives).argmin())
        self.stop.threshold = 0.0 if cut == 0 else float(confidence[min(cut, len(confidence) - 1)])


class ExpectedGain:
    """Drafts while another token is expected to raise the number of tokens per millisecond.

    A draft of n tokens yields (1 + a_1 + a_1 a_2 + ...) / ms(n) tokens per millisecond, with a_d the acceptance rate of
    the d-th token once those before it are accepted; for a constant a and ms(n) = 1 + c n this is the formula of
    Leviathan et al. (2211.17192, theorem 3.8). The n that maximises it is the draft length if the drafter reports no
    confidences. If it does, that n decides whether to draft at all, and another token is drafted while its probability
    of acceptance, given the confidences so far, exceeds its time multiplied by the best n's tokens per millisecond. The
    parameter is c, a drafted token's cost in target steps; with 0, ms(n) is measured, as a line through the quickest
    rounds of each n, and the same seed may then give another text of the same distribution.
    """

    needs_confidence = False
    TRIALS, NUM_FIRST, TRIAL_EVERY = (4, 0, 8, 1, 2), 10, 32
    """Lengths tried in turn, at the beginning and then at intervals, so that each has measurements."""
    NUM_RECENT, NUM_BINS = 9, 8

    def __init__(self, cost: float = 0.0) -> None:
        if not 0 <= cost < math.inf:
            raise ValueError(f"length expected_gain={cost:g}: the cost of a token must be 0 (measured) or positive")
        self._cost, self._num_first = cost, 0 if cost else self.NUM_FIRST
        self._recent_ms: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=self.NUM_RECENT))
        self._by_index, self._by_confidence = _AcceptanceRates(), _AcceptanceRates()
        self._num_trials, self._num_since = 0, 0

    def start(self, num_rows: int, num_draft: int) -> None:
        self._num_draft = num_draft
        self._plan()

    def should_continue(self, row: int, num_drafted: int, confidences: Sequence[float]) -> bool:
        if self._trial is not None:
            return num_drafted < self._trial
        if not confidences:
            return num_drafted < self.best
        reached = math.prod(self._by_confidence.of(int(self.NUM_BINS * one)) for one in confidences)
        return reached * self._by_index.of(num_drafted) > self._least_rate

    def learn(self, outcomes: Sequence[Outcome], depth: int, cost_ms: float) -> None:
        for outcome in outcomes:
            for index, accepted in outcome.verified():
                self._by_index.add(index, accepted)
                if outcome.confidences:
                    self._by_confidence.add(int(self.NUM_BINS * outcome.confidences[index]), accepted)
        self._recent_ms[depth].append(cost_ms)
        # A round is no trial if the drafter found nothing to draft.
        is_tried = self._trial is not None and min(self._trial, 1) <= depth
        self._num_trials, self._num_since = self._num_trials + is_tried, 0 if is_tried else self._num_since + 1
        self._plan()

    def _plan(self) -> None:
        """Chooses the next round: a trial's length, or the best length and the least acceptance rate that pays."""
        costs = self._costs()
        self.best, rate = best_length([self._by_index.of(index) for index in range(self._num_draft)], costs)
        self._least_rate = rate * (costs[-1] - costs[1]) / max(self._num_draft - 1, 1)
        # While drafting does not pay, only trials can show that it has begun to.
        is_due = self._num_since >= (self.TRIAL_EVERY if self.best else self.TRIAL_EVERY // 2)
        is_trial = is_due or self._num_trials < self._num_first
        self._trial = self.TRIALS[self._num_trials % len(self.TRIALS)] if is_trial else None

    def _costs(self) -> list[float]:
        """Returns the cost of a round of 0, 1, ... `num_draft` tokens; the first need not lie on the others' line."""
        if self._cost:
            return [1 + self._cost * number for number in range(self._num_draft + 1)]
        quickest = {depth: min(times) for depth, times in sorted(self._recent_ms.items())}
        points = [(depth, ms) for depth, ms in quickest.items() if depth > 0]
        slope, base = 0.0, points[0][1] if points else 1.0
        if len(points) > 1:
            slope, base = linear_regression(*zip(*points, strict=True))
        line = [max(base, 1e-3) + max(slope, 0.0) * number for number in range(self._num_draft + 1)]
        return [quickest.get(0, line[0]), *line[1:]]


def best_length(acceptance: Sequence[float], costs: Sequence[float]) -> tuple[int, float]:
    """Returns the draft length with the most tokens per cost, the least of equals, and that ratio.

    `acceptance[d]` is the acceptance rate of a token once d before it are accepted, `costs[n]` the cost of a round of n
    tokens.
    """
    expected = accumulate(accumulate(acceptance, mul), initial=1.0)
    rates = [tokens / cost for tokens, cost in zip(expected, costs, strict=True)]
    return max(range(len(rates)), key=rates.__getitem__), max(rates)


class _AcceptanceRates:
    """The acceptance rate of each kind of token, smoothed towards the overall rate as if by `PRIOR` more tokens."""

    def __init__(self) -> None:
        self._counts: dict[int, list[int]] = defaultdict(lambda: [0, 0])
        self._all = [1, 2]

    def add(self, kind: int, accepted: bool) -> None:
        for counts in (self._counts[kind], self._all):
            counts[0] += accepted
            counts[1] += 1

    def of(self, kind: int) -> float:
        accepted, total = self._counts[kind]
        return (accepted + PRIOR * self._all[0] / self._all[1]) / (total + PRIOR)


POLICIES: dict[str, Callable[..., Policy]] = {
    "fixed": Fixed,
    "heuristic": Heuristic,
    "confidence": Confidence,
    "adaptive": Adaptive,
    "refit": Refit,
    "expected_gain": ExpectedGain,
}


def make(text: str) -> Policy:
    """Returns a new policy by "name" or "name=number"; raises ValueError for an unknown name or invalid number."""
    name, equals, number = text.partition("=")
    if name not in POLICIES:
        raise ValueError(f"unknown length policy {name!r}; choose one of {', '.join(POLICIES)}")
    if not equals:
        return POLICIES[name]()
    try:
        parameter = float(number)
    except ValueError:
        raise ValueError(f"length {text}: {number!r} is not a number") from None
    return POLICIES[name](parameter)
