"""The predicted speed-up against the closed form, a simulation, and a table of the paper's formula."""

import numpy as np
import pytest

from draftsmith.length import predicted_speedup


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.9])
def test_tokens_equal_a_simulation(acceptance: float) -> None:
    accepted = np.random.default_rng(0).random((200_000, 5)) < acceptance
    simulated = 1 + accepted.cumprod(axis=1).sum(axis=1).mean()
    assert predicted_speedup.tokens(acceptance, 5) == pytest.approx(simulated, abs=0.02)
    reached = accepted.cumprod(axis=1).mean(axis=0).tolist()
    assert predicted_speedup.tokens_by_depth(reached) == pytest.approx(simulated)


@pytest.mark.parametrize(("acceptance", "num_draft"), [(0.5, 3), (0.8, 7)])
def test_tokens_equal_the_closed_form(acceptance: float, num_draft: int) -> None:
    closed = (1 - acceptance ** (num_draft + 1)) / (1 - acceptance)
    assert predicted_speedup.tokens(acceptance, num_draft) == pytest.approx(closed)


@pytest.mark.parametrize(
    ("cost_ratio", "acceptance", "expected"),
    [(0.01, 0.5, (5, 1.88)), (0.05, 0.8, (8, 3.09)), (0.1, 0.9, (10, 3.43)), (0.2, 0.6, (2, 1.40))],
)
def test_best_returns_length_and_speedup(cost_ratio: float, acceptance: float, expected: tuple[int, float]) -> None:
    length, ratio = predicted_speedup.best(acceptance, cost_ratio)
    assert (length, round(ratio, 2)) == expected


def test_best_is_no_drafting_if_costs_exceed_gains() -> None:
    assert predicted_speedup.best(0.4, 0.5) == (0, 1.0)
    assert predicted_speedup.best_by_depth([0.4, 0.2], 0.5) == (0, 1.0)


def test_best_by_depth_prefers_consecutive_acceptances() -> None:
    scattered, in_runs = [0.5, 0.25, 0.125], [0.5, 0.45, 0.4]
    assert predicted_speedup.best_by_depth(in_runs, 0.1)[1] > predicted_speedup.best_by_depth(scattered, 0.1)[1]


def test_speedup_includes_the_cost_of_verification() -> None:
    assert predicted_speedup.speedup(2.0, 4, 0.1, verify_ratio=1.6) == pytest.approx(1.0)
