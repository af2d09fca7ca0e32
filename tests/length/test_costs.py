"""Measured forward costs do not decrease with the number of nodes, for each architecture."""

import time

import pytest

from draftsmith.length.costs import REPEATS, quickest_ms, verify_ms
from tests.support.models import tiny_target


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "t5"])
def test_verify_ms_does_not_decrease_with_nodes(architecture: str) -> None:
    costs = verify_ms(tiny_target(architecture), sizes=(1, 4, 16))
    assert list(costs) == [1, 4, 16]
    assert 0 < costs[1] <= costs[4] <= costs[16]


def test_quickest_ms_returns_the_shortest_run(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    clock = iter([0.0, 0.5, 1.0, 1.003, 2.0, 2.001, *([9.0, 9.7] * REPEATS)])
    with monkeypatch.context() as patched:
        patched.setattr(time, "perf_counter", lambda: next(clock))
        found = quickest_ms(lambda: calls.append(1))
    assert found == pytest.approx(1.0)
    assert len(calls) == REPEATS
