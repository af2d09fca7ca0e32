"""How long to draft: policies that any drafter takes, asked before each token is drafted.

A policy goes by what is known before a token is drawn: what became of earlier drafts, how likely the draft model found
the tokens drafted so far, the clock. A token that is drawn is always judged, and one that is not drawn is not; the
verifiers keep the target's law after each token judged, so they keep it however the length was chosen. To withhold a
token once it is known would not: the chance of what is withheld would be missing from the draft's law. A policy is
written as a name, or as "name=number" with its one parameter.
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


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one row's draft of at least one token."""

    row: int
    num_drafted: int
    num_matched: int
    confidences: Sequence[float] = ()
    """What the draft model gave each token drafted; empty where the drafter does not tell."""

    def judged(self) -> Iterator[tuple[int, bool]]:
        """Yields, from the first on, the place of each token judged and whether it was accepted."""
        for place in range(min(self.num_matched + 1, self.num_drafted)):
            yield place, place < self.num_matched


class Policy(Protocol):
    """What decides a draft's length; what it has learnt stays with it from call to call."""

    needs_confidence: bool
    """Whether it cannot do without what the draft model gave its tokens."""

    def start(self, num_rows: int, num_draft: int) -> None:
        """Begins a call with other rows, whose drafts have at most `num_draft` tokens."""

    def should_continue(self, row: int, num_drafted: int, confidences: Sequence[float]) -> bool:
        """Returns whether the row drafts another token; `confidences` are those of its `num_drafted`, if told."""
        ...

    def learn(self, outcomes: Sequence[Outcome], depth: int, cost_ms: float) -> None:
        """Takes note of one draft: of the running rows that drafted something, its depth, and what it all took."""


class Fixed:
    """As many tokens as the drafter drafts at most, or at most so many."""

    needs_confidence = False

    def __init__(self, num_draft: float = math.inf) -> None:
        if not num_draft >= 1:
            raise ValueError(f"length fixed={num_draft:g}: at least one token must be drafted")
        self.num_draft = num_draft

    def start(self, num_rows: int, num_draft: int) -> None:
        """Nothing depends on it."""

    def should_continue(self, row: int, num_drafted: int, confidences: Sequence[float]) -> bool:
        return num_drafted < self.num_draft

    def learn(self, outcomes: Sequence[Outcome], depth: int, cost_ms: float) -> None:
        """Nothing to learn."""


class Heuristic:
    """Two tokens more after a draft that matched whole, one less after any other, and never none.

    transformers' schedule for `num_assistant_tokens`; each row has its own. Begins with the most the drafter drafts.
    """

    needs_confidence = False

    def __init__(self, num_draft: float = math.inf) -> None:
        if not num_draft >= 1:
            raise ValueError(f"length heuristic={num_draft:g}: it must begin with at least one token")
        self._first = num_draft

    def start(self, num_rows: int, num_draft: int) -> None:
        self._num_draft = [min(self._first, num_draft)] * num_rows

    def should_continue(self, row: int, num_drafted: int, confidences: Sequence[float]) -> bool:
        return num_drafted < self._num_draft[row]

    def learn(self, outcomes: Sequence[Outcome], depth: int, cost_ms: float) -> None:
        for one in outcomes:
            change = 2 if one.num_matched == one.num_drafted else -1
            self._num_draft[one.row] = max(1, one.num_drafted + change)


class Confidence:
    """Until a token less likely than a threshold, which is drafted still (transformers' assistant_confidence)."""

    needs_confidence = True

    def __init__(self, threshold: float = 0.4) -> None:
        if not 0 < threshold < 1:
            raise ValueError(f"a confidence of {threshold:g} is no threshold; it must lie between 0 and 1")
        self.threshold = threshold

    def start(self, num_rows: int, num_draft: int) -> None:
        """Nothing depends on it."""

    def should_continue(self, row: int, num_drafted: int, confidences: Sequence[float]) -> bool:
        return not confidences or confidences[-1] >= self.threshold

    def learn(self, outcomes: Sequence[Outcome], depth: int, cost_ms: float) -> None:
        """The threshold stays."""


class Adaptive:
    """As `Confidence`, its threshold led to where 0.9 of a draft is accepted (Draft & Verify, 2309.08168).

    After each row's verdict, m of d tokens matched, rate = 0.5 rate + 0.5 m / d. The threshold then moves a tenth of
    the way to 0.01 more if the rate is below 0.9, and else to 0.01 less, unless d is the most that may be drafted.
    """

    needs_confidence = True
    WANTED, KEPT, STEP = 0.9, 0.5, 0.1 * 0.01

    def __init__(self, threshold: float = 0.6) -> None:
        self.stop, self._rate = Confidence(threshold), 0.0
        self.should_continue = self.stop.should_continue

    def start(self, num_rows: int, num_draft: int) -> None:
        self._num_draft = num_draft

    def learn(self, outcomes: Sequence[Outcome], depth: int, cost_ms: float) -> None:
        for one in outcomes:
            self._rate = self.KEPT * self._rate + (1 - self.KEPT) * one.num_matched / one.num_drafted
            if self._rate < self.WANTED:
                self.stop.threshold += self.STEP
            elif one.num_drafted < self._num_draft:
                self.stop.threshold -= self.STEP


class Refit:
    """As `Confidence`, its threshold refit to the least FPR + 3 FNR of recent tokens (transformers; 2405.04304)."""

    needs_confidence = True
    MIN_SAMPLES, MAX_SAMPLES, MISS_WEIGHT = 6, 256, 3.0

    def __init__(self, threshold: float = 0.4) -> None:
        self.stop = Confidence(threshold)
        self.should_continue = self.stop.should_continue
        self._samples: list[tuple[float, bool]] = []

    def start(self, num_rows: int, num_draft: int) -> None:
        """Nothing depends on it."""

    def learn(self, outcomes: Sequence[Outcome], depth: int, cost_ms: float) -> None:
        """Sets the threshold between two observed probabilities where the weighted error is least."""
        for one in outcomes:
            self._samples += [(one.confidences[place], matched) for place, matched in one.judged()]
        del self._samples[: -self.MAX_SAMPLES]
        confidence = np.array([sample[0] for sample in self._samples])
        matched = np.array([sample[1] for sample in self._samples])
        if len(matched) < self.MIN_SAMPLES or matched.all() or not matched.any():
            return
        order = confidence.argsort()
        confidence, matched = confidence[order], matched[order]
        # Cutting before entry i stops after the i least probable tokens.
        missed = np.concatenate([[0], matched.cumsum()]) / matched.sum()
        kept_wrong = 1 - np.concatenate([[0], (~matched).cumsum()]) / (~matched).sum()
        cut = int((kept_wrong + self.MISS_WEIGHT * missed).argmin())
        self.stop.threshold = 0.0 if cut == 0 else float(confidence[min(cut, len(confidence) - 1)])


class ExpectedGain:
    """While another token is expected to bring more tokens a millisecond than to end the draft here.

    Drafts of n tokens bring (1 + a_1 + a_1 a_2 + ...) / ms(n), with a_d the chance of the d-th token once those before
    it are accepted; for a constant a and ms(n) = 1 + c n that is the formula of Leviathan et al. (2211.17192, theorem
    3.8). The best n is the length where the drafter tells no confidences. Where it tells them, that n says whether to
    draft at all, and then another token is drafted while its chance, by the confidences so far, is above what its time
    would bring at the best n's rate. The number is c, a drafted token's cost in target steps; 0 measures ms(n), a line
    through the quickest rounds of each n, and then the same seed may give another text, of the same law.
    """

    needs_confidence = False
    TRIALS, NUM_FIRST, TRIAL_EVERY = (4, 0, 8, 1, 2), 10, 32
    """Lengths tried in turn, at first and then now and then: what is never tried is never learnt about."""
    NUM_RECENT, NUM_BINS = 9, 8

    def __init__(self, cost: float = 0.0) -> None:
        if not 0 <= cost < math.inf:
            raise ValueError(f"length expected_gain={cost:g}: the cost of a token must be 0 (measured) or positive")
        self._cost, self._num_first = cost, 0 if cost else self.NUM_FIRST
        self._recent_ms: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=self.NUM_RECENT))
        self._by_place, self._by_confidence = _Chances(), _Chances()
        self._num_trials, self._num_since = 0, 0

    def start(self, num_rows: int, num_draft: int) -> None:
        self._num_draft = num_draft
        self._plan()

    def should_continue(self, row: int, num_drafted: int, confidences: Sequence[float]) -> bool:
        if self._trial is not None:
            return num_drafted < self._trial
        if not confidences:
            return num_drafted < self.best
        chance = math.prod(self._by_confidence.of(int(self.NUM_BINS * one)) for one in confidences)
        return chance * self._by_place.of(num_drafted) > self._least_chance

    def learn(self, outcomes: Sequence[Outcome], depth: int, cost_ms: float) -> None:
        for one in outcomes:
            for place, matched in one.judged():
                self._by_place.add(place, matched)
                if one.confidences:
                    self._by_confidence.add(int(self.NUM_BINS * one.confidences[place]), matched)
        self._recent_ms[depth].append(cost_ms)
        # A drafter that found nothing to draft has not tried.
        is_tried = self._trial is not None and min(self._trial, 1) <= depth
        self._num_trials, self._num_since = self._num_trials + is_tried, 0 if is_tried else self._num_since + 1
        self._plan()

    def _plan(self) -> None:
        """Settles the next round: a trial's length, or the best one and the least chance that pays for a token."""
        costs = self._costs()
        self.best, rate = best_length([self._by_place.of(place) for place in range(self._num_draft)], costs)
        self._least_chance = rate * (costs[-1] - costs[1]) / max(self._num_draft - 1, 1)
        # Where it does not pay to draft, trials are all that would show that it has come to.
        is_due = self._num_since >= (self.TRIAL_EVERY if self.best else self.TRIAL_EVERY // 2)
        is_trial = is_due or self._num_trials < self._num_first
        self._trial = self.TRIALS[self._num_trials % len(self.TRIALS)] if is_trial else None

    def _costs(self) -> list[float]:
        """Returns what rounds of 0, 1, ... `num_draft` tokens take; the first may be off the line of the others."""
        if self._cost:
            return [1 + self._cost * number for number in range(self._num_draft + 1)]
        quickest = {depth: min(times) for depth, times in sorted(self._recent_ms.items())}
        points = [(depth, ms) for depth, ms in quickest.items() if depth > 0]
        slope, base = 0.0, points[0][1] if points else 1.0
        if len(points) > 1:
            slope, base = linear_regression(*zip(*points, strict=True))
        line = [max(base, 1e-3) + max(slope, 0.0) * number for number in range(self._num_draft + 1)]
        return [quickest.get(0, line[0]), *line[1:]]


def best_length(chances: Sequence[float], costs: Sequence[float]) -> tuple[int, float]:
    """Returns how many tokens to draft for the most tokens at a cost, and how many that is; the least of equals.

    `chances[d]` is that of a token once d before it are accepted, `costs[n]` the cost of a round of n tokens.
    """
    expected = accumulate(accumulate(chances, mul), initial=1.0)
    rates = [tokens / cost for tokens, cost in zip(expected, costs, strict=True)]
    return max(range(len(rates)), key=rates.__getitem__), max(rates)


class _Chances:
    """The share of tokens accepted of each kind, drawn to that of all kinds as if by `PRIOR` tokens more."""

    def __init__(self) -> None:
        self._counts: dict[int, list[int]] = defaultdict(lambda: [0, 0])
        self._all = [1, 2]

    def add(self, kind: int, matched: bool) -> None:
        for counts in (self._counts[kind], self._all):
            counts[0] += matched
            counts[1] += 1

    def of(self, kind: int) -> float:
        accepted, judged = self._counts[kind]
        return (accepted + PRIOR * self._all[0] / self._all[1]) / (judged + PRIOR)


POLICIES: dict[str, Callable[..., Policy]] = {
    "fixed": Fixed,
    "heuristic": Heuristic,
    "confidence": Confidence,
    "adaptive": Adaptive,
    "refit": Refit,
    "expected_gain": ExpectedGain,
}


def make(text: str) -> Policy:
    """Returns a new policy by "name" or "name=number"; raises ValueError for a name or number that cannot be."""
    name, _, number = text.partition("=")
    if name not in POLICIES:
        raise ValueError(f"unknown length policy {name!r}; there are {', '.join(POLICIES)}")
    if not number:
        return POLICIES[name]()
    try:
        parameter = float(number)
    except ValueError:
        raise ValueError(f"length {text}: {number!r} is no number") from None
    return POLICIES[name](parameter)
