"""eval/forecast.py: the formula by hand, what is taken apart, and where a drafter stops paying."""

import pytest

from draftsmith.drafters import find
from eval import forecast
from eval.forecast import Costs, Parts, break_even, probe, speedup
from tests.models import prompts, tiny_target


class ByHand(Costs):
    """A quarter of a plain step for each node and row more."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def ratio(self, batch_size: int, num_nodes: float, layer: int) -> float:
        self.asked.append(layer)
        return 1 + batch_size * num_nodes / 4


def test_the_formula_by_hand() -> None:
    """Plain: 10 + 40 * 4 = 170 ms. Drafted: 20 + 40 / 2.5 * (1 + 4 * (1 + 3 / 4)) = 148 ms."""
    plain, drafted = Parts(start_ms=10, round_ms=4), Parts(start_ms=20, round_ms=1, num_nodes=3, layer=2)
    costs = ByHand()
    assert speedup(plain, drafted, 2.5, 40, 1, costs) == pytest.approx(170 / 148)
    assert costs.asked == [2]
    by_batch_size = {size: speedup(plain, drafted, 2.5, 40, size, costs) for size in (1, 2, 4)}
    assert by_batch_size[1] > 1 > by_batch_size[2] > by_batch_size[4]
    assert break_even(by_batch_size) == 2
    assert break_even({1: 1.2, 2: 1.1}) is None


@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_parts_are_those_of_the_drafter(architecture: str) -> None:
    target, family = tiny_target(architecture), find("lookup")
    plain = probe(target, None, prompts(2), 0.0, 0, 16)
    drafted = probe(target, family.Drafter(family.Config(num_draft=3), target), prompts(2), 0.0, 0, 16)
    assert plain.num_nodes == plain.layer == 0 and plain.start_ms > 0 and plain.round_ms > 0
    assert 0 < drafted.num_nodes <= 3 and drafted.round_ms > 0


def test_costs_lie_between_those_measured() -> None:
    costs = Costs(tiny_target("llama"))
    assert costs.ratio(1, 0, 0) == 1
    assert costs.ratio(1, 3, 0) == pytest.approx((costs.ratio(1, 2, 0) + costs.ratio(1, 4, 0)) / 2)
    assert costs.ratio(1, 16, 0) >= costs.ratio(1, 1, 0)
    assert costs.ratio(1, 0, 2) > 0


def test_a_draft_that_left_the_target_midway_pays_for_the_other_blocks_alone() -> None:
    target, family = tiny_target("llama"), find("kangaroo")
    drafter = family.Drafter(family.Config(exit_layer=1), target).eval()
    found = probe(target, drafter, prompts(1), 0.0, 0, 16)
    assert found.layer == 1


def test_all_batch_sizes_are_predicted_from_few_prompts() -> None:
    target, family = tiny_target("llama"), find("lookup")
    drafter = family.Drafter(family.Config(), target)
    found = forecast.of(target, prompts(2), 8, (1, 3))(drafter, 0.0, 1.5)
    assert list(found) == [1, 3] and min(found.values()) > 0
