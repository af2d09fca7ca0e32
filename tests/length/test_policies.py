"""Draft-length policies, hand-worked; how they are applied to a drafter is tested in test_controller.py."""

import math
import random
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from transformers.generation.candidate_generator import AssistedCandidateGenerator

from draftsmith.length.policies import (
    Adaptive,
    Confidence,
    ExpectedGain,
    Outcome,
    Policy,
    Refit,
    _AcceptanceRates,
    best_length,
    make,
)


def allowed(policy: Policy, confidences: Sequence[float] = (), *, row: int = 0, most: int = 10) -> int:
    """Returns the draft length of a row whose draft model reports these confidences, or none."""
    number = 0
    while number < most and policy.should_continue(row, number, confidences[:number]):
        number += 1
    return number


def outcome(num_drafted: int, num_accepted: int, *confidences: float, row: int = 0) -> Outcome:
    return Outcome(row=row, num_drafted=num_drafted, num_accepted=num_accepted, confidences=confidences)


def test_outcome_verified_ends_at_the_first_rejected_token() -> None:
    assert list(outcome(5, 2).verified()) == [(0, True), (1, True), (2, False)]
    assert list(outcome(2, 2).verified()) == [(0, True), (1, True)]
    assert list(outcome(3, 0).verified()) == [(0, False)]


def test_fixed_length() -> None:
    assert (allowed(make("fixed")), allowed(make("fixed=3")), allowed(make("fixed=30"))) == (10, 3, 10)


def test_heuristic_hand_worked() -> None:
    policy = make("heuristic=2")
    policy.start(2, 10)
    found = []
    for accepted in (2, 3, 6, 8, 3, 5, 0):  # of 2, 4, 3, 5, 7 ... drafted in row 0; row 1 accepts none
        drafted = allowed(policy)
        found.append((drafted, allowed(policy, row=1)))
        policy.learn([outcome(drafted, min(accepted, drafted)), outcome(found[-1][1], 0, row=1)], drafted, 1.0)
    assert found == [(2, 2), (4, 1), (3, 1), (5, 1), (7, 1), (6, 1), (5, 1)]
    policy.start(1, 10)
    assert allowed(policy) == 2, "each call begins with the first length"
    policy = make("heuristic")
    policy.start(1, 7)
    assert allowed(policy) == 7, "it begins with the drafter's maximum"


def test_heuristic_equals_transformers() -> None:
    rng = random.Random(0)
    config = SimpleNamespace(num_assistant_tokens_schedule="heuristic", assistant_confidence_threshold=None)
    theirs = SimpleNamespace(assistant_generation_config=config, num_assistant_tokens=5)
    ours = make("heuristic=5")
    ours.start(1, 100)
    for _ in range(60):
        drafted = allowed(ours, most=100)
        assert drafted == theirs.num_assistant_tokens
        accepted = drafted if rng.random() < 0.4 else rng.randrange(drafted)
        scores = torch.zeros(1, drafted + 1, 3)
        AssistedCandidateGenerator.update_candidate_strategy(theirs, torch.zeros(1, 1), scores, accepted)  # type: ignore
        ours.learn([outcome(drafted, accepted)], drafted, 1.0)


def test_confidence_stops_after_the_first_token_below_the_threshold() -> None:
    policy = Confidence(0.5)
    assert allowed(policy, [0.9, 0.5, 0.4, 0.9]) == 3, "the token below the threshold is kept"
    assert allowed(policy, [0.1, 0.9]) == 1
    policy.learn([outcome(1, 0, 0.9)] * 20, 1, 1.0)
    assert policy.threshold == 0.5


def test_adaptive_hand_worked() -> None:
    policy = Adaptive(0.6)
    policy.start(1, 8)
    found = []
    # Rates 0.5, 0.75, 0.875, 0.9375 (of maximal length), 0.969 (shorter), 0.484.
    for accepted, drafted in ((8, 8), (8, 8), (8, 8), (8, 8), (2, 2), (0, 3)):
        policy.learn([outcome(drafted, accepted, *[0.9] * drafted)], drafted, 1.0)
        found.append(policy.stop.threshold)
    assert found == pytest.approx([0.601, 0.602, 0.603, 0.603, 0.602, 0.603])
    assert allowed(policy, [0.7, 0.6, 0.7]) == 2


def test_adaptive_equals_the_papers_rule() -> None:
    rng = random.Random(1)
    policy, rate, threshold = Adaptive(0.5), 0.0, 0.5
    policy.start(1, 6)
    for _ in range(200):
        drafted = rng.randint(1, 6)
        accepted = drafted if rng.random() < 0.8 else rng.randint(0, drafted)
        rate = 0.5 * rate + 0.5 * accepted / drafted
        aim = threshold + 0.01 if rate < 0.9 else threshold if drafted == 6 else threshold - 0.01
        threshold = 0.9 * threshold + 0.1 * aim
        policy.learn([outcome(drafted, accepted, *[0.9] * drafted)], drafted, 1.0)
        assert policy.stop.threshold == pytest.approx(threshold)
    assert threshold != pytest.approx(0.5, abs=1e-3)


def refit(samples: list[tuple[float, bool]], policy: Refit) -> float:
    """Returns the threshold after these tokens, each its own draft."""
    policy.learn([outcome(1, int(accepted), confidence) for confidence, accepted in samples], 1, 1.0)
    return policy.stop.threshold


def slow_error(samples: list[tuple[float, bool]], threshold: float) -> float:
    """Returns the false-positive rate plus three times the false-negative rate."""
    wrong = [confidence for confidence, accepted in samples if not accepted]
    right = [confidence for confidence, accepted in samples if accepted]
    false_positives = sum(confidence >= threshold for confidence in wrong) / len(wrong)
    return false_positives + 3 * sum(confidence < threshold for confidence in right) / len(right)


@pytest.mark.parametrize("seed", range(10))
def test_refit_minimises_the_weighted_error(seed: int) -> None:
    rng = random.Random(seed)
    confidences = [rng.random() for _ in range(rng.randint(6, 60))]
    samples = [(confidence, rng.random() < confidence**2) for confidence in confidences]
    threshold = refit(samples, Refit(0.4))
    if len({accepted for _, accepted in samples}) == 2:
        best = min(slow_error(samples, threshold) for threshold in [0.0, *(confidence for confidence, _ in samples)])
        assert slow_error(samples, threshold) == pytest.approx(best)


def test_refit_needs_samples_of_both_kinds_and_drops_old_ones() -> None:
    mixed = [(0.9, True), (0.8, True), (0.7, True), (0.2, False), (0.1, False), (0.3, False)]
    assert refit(mixed, Refit()) == 0.7
    assert refit(mixed[:5], Refit()) == 0.4, "too few"
    assert refit(mixed[:3] * 4, Refit()) == 0.4, "of one kind"
    old, recent = [(0.55, True)] * 100, [(0.6, True), (0.58, False)] * 128
    assert refit(old + recent, Refit()) == 0.6, "with the old ones it would be 0.55 or below"
    policy = Refit()
    policy.learn([outcome(4, 2, 0.9, 0.8, 0.3, 0.99), outcome(3, 1, 0.7, 0.2, 0.98, row=1)], 4, 1.0)
    assert policy.stop.threshold == 0.4, "five tokens were verified"
    policy.learn([outcome(1, 0, 0.1)], 1, 1.0)
    assert policy.stop.threshold == 0.7


# Leviathan et al.'s formula: (best length, speed-up) by a token's cost and acceptance rate.
ALPHAS = (0.5, 0.6, 0.7, 0.8, 0.9)
OPTIMA = {
    0.01: ((5, 1.88), (7, 2.30), (9, 2.97), (14, 4.23), (24, 7.49)),
    0.05: ((3, 1.63), (4, 1.92), (6, 2.35), (8, 3.09), (13, 4.67)),
    0.10: ((2, 1.46), (3, 1.67), (4, 1.98), (6, 2.47), (10, 3.43)),
    0.20: ((1, 1.25), (2, 1.40), (3, 1.58), (4, 1.87), (7, 2.37)),
}


def test_best_length_equals_the_papers_formula() -> None:
    for cost, optima in OPTIMA.items():
        for alpha, (length, speedup) in zip(ALPHAS, optima, strict=True):
            found = best_length([alpha] * 40, [1 + cost * number for number in range(41)])
            assert found[1] == pytest.approx(speedup, abs=0.006)
            assert found[0] == length or (cost, alpha) == (0.2, 0.5), "one and two tokens are equally good there"
    assert best_length([0.2] * 9, [1 + 0.3 * number for number in range(10)]) == (0, 1.0), "drafting does not pay"


def measured_policy(alpha: float, token_ms: float, *, plain_ms: float = 10.0) -> ExpectedGain:
    """Returns a policy after drafts with an acceptance rate of `alpha` per token and linear costs."""
    policy, num_drafts = ExpectedGain(), 1_000
    policy.start(1, 12)
    for number in (4, 0, 8, 1, 2, 4, 0, 8, 1, 2):
        assert allowed(policy) == number, "each length is tried twice at first"
        policy.learn([], number, plain_ms + number * token_ms)
    drafts = [
        outcome(12, sum(alpha**depth * num_drafts > draft for depth in range(1, 13))) for draft in range(num_drafts)
    ]
    policy.learn(drafts, 12, plain_ms + 12 * token_ms)
    return policy


@pytest.mark.parametrize(
    ("alpha", "token_ms", "best"), [(0.8, 1, 6), (0.5, 1, 2), (0.9, 2, 7), (0.7, 0.5, 6), (0.2, 3, 0)]
)
def test_expected_gain_finds_the_optimum_of_measured_costs(alpha: float, token_ms: float, best: int) -> None:
    policy = measured_policy(alpha, token_ms)
    assert (policy.best, allowed(policy)) == (best, best)
    policy.learn([], 4, 900.0)
    assert policy.best == best, "a single slow round is ignored"


def test_expected_gain_accounts_for_the_fixed_cost_of_drafting() -> None:
    policy = measured_policy(0.5, 0.01, plain_ms=20.0)
    assert policy.best > 3
    policy.learn([], 0, 5.0)
    assert policy.best == 0, "two tokens at most in 20 ms, plain ones in 5"


def test_expected_gain_tries_lengths_at_the_beginning_and_at_intervals() -> None:
    def tried(accepted: int, *, finds_nothing: tuple[int, ...] = ()) -> list[int]:
        """Returns each round's draft length if `accepted` tokens are accepted; in some the drafter finds none."""
        policy, found = ExpectedGain(), []
        policy.start(1, 10)
        for number in range(80):
            found.append(allowed(policy))
            drafted = 0 if number in finds_nothing else found[-1]
            outcomes = [outcome(drafted, min(drafted, accepted))] if drafted else []
            policy.learn(outcomes, drafted, 10.0 + 0.5 * drafted)
        return found

    never, always = tried(0), tried(10)
    assert never[:10] == always[:10] == [4, 0, 8, 1, 2] * 2
    assert {number: length for number, length in enumerate(never[10:]) if length} == {16: 4, 50: 8, 67: 1}
    assert {number: length for number, length in enumerate(always[10:]) if length < 10} == {32: 4, 65: 0}
    assert tried(0, finds_nothing=(0, 1, 2))[:8] == [4, 4, 4, 4, 0, 8, 1, 2], (
        "a length for which nothing was found is tried again"
    )
    reproducible = ExpectedGain(0.1)
    reproducible.start(1, 10)
    assert allowed(reproducible) == 2, "at an initial acceptance rate of 1/2: 1.75 tokens for a cost of 1.2"


def test_expected_gain_uses_confidences() -> None:
    """First tokens of three confidences; a rate is that of the counts and of `PRIOR` tokens at the overall rate."""
    policy = ExpectedGain(0.1)
    policy.start(1, 10)
    accepted = {0.95: 380, 0.5: 118, 0.2: 100}
    for confidence, number in accepted.items():
        policy.learn([outcome(1, int(at < number), confidence) for at in range(400)], 1, 1.0)
    overall = 599 / 1202
    rate = {confidence: (number + 8 * overall) / 408 for confidence, number in accepted.items()}
    first = (598 + 8 * overall) / 1208
    least = 0.1 * max((1 + first * (1 - overall**n) / (1 - overall)) / (1 + 0.1 * n) for n in range(11))
    assert policy.should_continue(0, 0, [])
    found = []
    for confidences in ([0.95], [0.5], [0.2], [0.95] * 9, [0.95, 0.5], [0.95] * 22):
        found.append(policy.should_continue(0, len(confidences), confidences))
        assert found[-1] == (math.prod(rate[one] for one in confidences) * overall > least)
    assert found == [True, True, False, True, False, False]
    assert allowed(policy, [0.95, 0.95, 0.2, 0.95]) == 3


def test_acceptance_rates_are_smoothed_towards_the_overall_rate() -> None:
    rates = _AcceptanceRates()
    assert rates.of(3) == 0.5
    for accepted in (True, True, True, False):
        rates.add(3, accepted)
    assert rates.of(1) == 4 / 6
    assert rates.of(3) == pytest.approx((3 + 8 * 4 / 6) / 12)
