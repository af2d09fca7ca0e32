"""Tests of predicted speed-ups: both formulas by hand, the counts that they use, and break-even batch sizes."""

import pytest

import draftsmith
from draftsmith.artifacts.families import find
from eval.bakeoff import forecast
from eval.bakeoff.forecast import (
    DummyDrafter,
    VerificationCosts,
    break_even,
    predict_continuous_batching,
    predict_static_batching,
)
from eval.bakeoff.measure import DecodingMethod, DecodingRequest, Tally, draftsmith_method, measure, merge_forwards
from tests.support.models import padded, prompts, tiny_target


class KnownCosts(VerificationCosts):
    """A step takes 3 ms plus 1 ms per row; each node of a row costs a quarter of a step."""

    def __init__(self) -> None:
        self.layers: set[int] = set()

    def step_ms(self, batch_size: int) -> float:
        return 3.0 + batch_size

    def ratio(self, batch_size: int, num_nodes: float, layer: int) -> float:
        self.layers.add(layer)
        return 1 + batch_size * num_nodes / 4


def plain_tally(size: int, slower: float = 1.0) -> Tally:
    """Returns the tally of plain decoding: two calls of 40 tokens per row."""
    return Tally(
        tokens=80 * size,
        calls=2,
        rounds=80,
        steps=80 * size,
        verified=[[0, 0, 80]],
        prefill_ms=20.0 * size,
        commit_ms=80 * 0.5,
        verify_ms=80 * (3 + size) * slower,
    )


def drafted_tally(size: int, rounds: int = 32) -> Tally:
    """Returns a tally of 2.5 tokens per step; half of the rounds verify 1 node, half 3 nodes from block 2 on."""
    return Tally(
        tokens=80 * size,
        calls=2,
        rounds=rounds,
        steps=32 * size,
        verified=[[0, 1, rounds // 2], [2, 3, rounds // 2]],
        prefill_ms=40.0 * size,
        draft_ms=rounds * (1.0 + size),
        commit_ms=rounds * 0.5,
        verify_ms=1e9,  # measured forward times are not used
    )


def test_predict_static_batching_by_hand() -> None:
    """Plain 20 + 40 + 320 = 380 ms; drafted 40 + 64 + 16 + 32 * 4 * (1.25 + 1.75) / 2 = 312 ms."""
    costs = KnownCosts()
    assert predict_static_batching(plain_tally(1), drafted_tally(1), 1, costs) == pytest.approx(380 / 312)
    assert costs.layers == {0, 2}
    assert predict_static_batching(plain_tally(1, slower=2), drafted_tally(1), 1, costs) == pytest.approx(
        700 / (120 + 2 * 192)
    )
    shorter = drafted_tally(1)
    shorter.tokens = 60  # an earlier end of sequence
    assert predict_static_batching(plain_tally(1), shorter, 1, costs) == pytest.approx(0.75 * 380 / 312)
    assert predict_static_batching(plain_tally(4), drafted_tally(4, rounds=48), 4, costs) < predict_static_batching(
        plain_tally(4), drafted_tally(4), 4, costs
    )


def test_predict_continuous_batching_by_hand() -> None:
    """A call at size B: plain 10 B + 40 (0.5 + 3 + B); drafted 20 B + 16 (1 + B + 0.5 + (3 + B) (1 + B / 2))."""
    costs = KnownCosts()
    several = {size: plain_tally(size) for size in (1, 4)}, {1: drafted_tally(1), 4: drafted_tally(4, rounds=48)}

    def by_hand(size: int) -> float:
        own = 10 * size + 40 * (3.5 + size)
        return own / (20 * size + 16 * (1.5 + size + (3 + size) * (1 + size / 2)))

    for size in (1, 2, 4, 8):  # rows that end early, as in the 48 rounds, cost nothing here
        assert predict_continuous_batching(*several, size, costs) == pytest.approx(by_hand(size))
    assert predict_continuous_batching({1: plain_tally(1)}, {1: drafted_tally(1)}, 1, costs) == pytest.approx(
        by_hand(1)
    )
    assert predict_continuous_batching({1: plain_tally(1)}, {1: drafted_tally(1)}, 1, costs) == pytest.approx(
        predict_static_batching(plain_tally(1), drafted_tally(1), 1, costs)
    )
    # With one measured size, times other than forwards grow as the step does: by 6 / 4 from one row to three.
    expected = 1.5 * (10 + 40 * 4.5) / (1.5 * (20 + 16 * 2.5) + 16 * 6 * (1 + 3 / 2))
    assert predict_continuous_batching({1: plain_tally(1)}, {1: drafted_tally(1)}, 3, costs) == pytest.approx(expected)


def test_predict_over_rounds_is_the_median_and_break_even() -> None:
    rounds = {1: [plain_tally(1, slower) for slower in (1, 2, 9)]}, {1: [drafted_tally(1)] * 3}
    found = forecast.predict_over_rounds(*rounds, 1, KnownCosts())
    assert found == pytest.approx(predict_static_batching(plain_tally(1, 2), drafted_tally(1), 1, KnownCosts()))
    assert break_even({1: 1.2, 2: 1.1, 4: 0.9, 8: 0.8}) == 4
    assert break_even({1: 1.2, 2: 1.1}) is None


@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_verification_costs_interpolate_and_extrapolate(architecture: str) -> None:
    costs = VerificationCosts(tiny_target(architecture), prompts(2))
    assert costs.ratio(3, 0, 0) == 1 and costs.step_ms(3) > 0
    assert costs.ratio(3, 3, 0) == pytest.approx((costs.ratio(3, 2, 0) + costs.ratio(3, 4, 0)) / 2)
    assert costs.ratio(3, 31, 0) == costs.ratio(3, 31, 0), "measured once"
    if architecture == "llama":
        assert costs.ratio(1, 127, 0) == pytest.approx(2 * costs.ratio(1, 63, 0))
        assert costs.ratio(1, 0, 2) > 0
        assert costs.ratio(1, 1, 1) == pytest.approx(costs.ratio(1, 1, 1))


def test_verification_costs_from_a_layer_run_later_blocks_only() -> None:
    target, calls = tiny_target("llama"), []
    last = target.num_layers - 1
    hooks = [
        block.register_forward_hook(lambda *_, number=number: calls.append(number))
        for number, block in enumerate(target.model.model.layers)
    ]
    calls.clear()
    stats = VerificationCosts(target, prompts(1))._decode(prompts(1), DummyDrafter(target, 2, last))
    for hook in hooks:
        hook.remove()
    assert stats.verified[last, 2] > 2
    # All blocks run for the prompt, once, and in rounds without a draft; otherwise only the last one runs.
    assert calls.count(0) == 1 + stats.rounds - stats.verified[last, 2]
    assert calls.count(last) == 1 + stats.rounds


@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_tally_counts_forwards_by_nodes(architecture: str) -> None:
    target, family = tiny_target(architecture), find("lookup")
    drafter = family.Drafter(family.Config(num_draft=3), target)
    methods = [
        DecodingMethod(name="plain", decode=draftsmith_method(target)),
        DecodingMethod(name="x", decode=draftsmith_method(target, drafter)),
    ]
    requests = [
        DecodingRequest(prompts=prompts(2, seed=seed), temperature=0.0, max_new_tokens=6, seed=0) for seed in (0, 1)
    ]
    tallies = measure(methods, requests, target.device)
    for tally in tallies.values():
        assert sum(rounds for _, _, rounds in tally.verified) == tally.rounds and tally.calls == 2
        assert tally.prefill_ms > 0 and tally.steps <= 2 * tally.rounds
    assert tallies["plain"].verified == [[0, 0, tallies["plain"].rounds]]
    assert {layer for layer, _, _ in tallies["x"].verified} == {0}
    assert 0 < max(nodes for _, nodes, _ in tallies["x"].verified) <= 3
    doubled = merge_forwards([tallies["x"].verified, tallies["x"].verified])
    assert doubled == [[layer, nodes, 2 * rounds] for layer, nodes, rounds in tallies["x"].verified]


def test_stats_count_forwards_from_the_exit_layer() -> None:
    target, family = tiny_target("llama"), find("kangaroo")
    drafter = family.Drafter(family.Config(exit_layer=1), target).eval()
    tokens_BT, mask_BT = padded(prompts(1))
    stats = draftsmith.generate(target, tokens_BT, drafter, attention_mask=mask_BT, max_new_tokens=6).stats
    assert {layer for layer, nodes in stats.verified if nodes} == {1}
