"""What forwards cost: every architecture is timed, and more nodes or layers never take less."""

import time

import pytest

from draftsmith.costs import REPEATS, quickest_ms, verify_ms
from tests.models import tiny_target


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "t5"])
def test_a_round_with_more_nodes_never_costs_less(architecture: str) -> None:
    costs = verify_ms(tiny_target(architecture), sizes=(1, 4, 16), batch_size=2)
    assert list(costs) == [1, 4, 16]
    assert 0 < costs[1] <= costs[4] <= costs[16]


def test_verification_from_a_block_on_runs_the_others_alone() -> None:
    target, run = tiny_target("llama"), []
    hooks = [
        block.register_forward_hook(lambda *_, number=number: run.append(number))
        for number, block in enumerate(target.model.model.layers)
    ]
    run.clear()
    costs = verify_ms(target, sizes=(2,), layer=target.num_layers - 1)
    for hook in hooks:
        hook.remove()
    assert costs[2] > 0
    # All blocks read the prompt, once; what is timed is the last alone.
    assert run.count(0) == 1 and run.count(target.num_layers - 1) > 2


def test_the_quickest_of_several_runs_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    clock = iter([0.0, 0.5, 1.0, 1.003, 2.0, 2.001, *([9.0, 9.7] * REPEATS)])
    with monkeypatch.context() as patched:
        patched.setattr(time, "perf_counter", lambda: next(clock))
        found = quickest_ms(lambda: calls.append(1))
    assert found == pytest.approx(1.0)
    assert len(calls) == REPEATS
