"""Sampler of sweeps: distributions, faults in parameters, and the choice of the next trial by each method."""

import math
import random
import re
from typing import Any

import numpy as np
import pytest

from trainers.sweeps.sampler import Continuous, Parameter, draw, read_parameter

FAULTS = [
    (7, "is 7; it must be a mapping"),
    ({"parameters": {"learning_rate": {"value": 1}}}, "has nested parameters, but settings are flat"),
    (
        {"distribution": "uniforn", "min": 0, "max": 1},
        "has the unsupported distribution 'uniforn'; did you mean uniform?",
    ),
    ({"distribution": "beta"}, "has the unsupported distribution 'beta'; supported are constant, categorical"),
    ({"distribution": "log_uniform_values", "min": 1}, "needs max for distribution log_uniform_values"),
    ({}, "needs max and min for distribution uniform"),
    ({"value": 1, "min": 0}, "has the unknown key 'min'; distribution constant takes value"),
    ({"distribution": "q_uniform", "min": 0, "max": 1, "mu": 0}, "takes max, min, q (optional)"),
    ({"values": []}, "has values []; they must be a list of at least one"),
    ({"values": [1, 2], "probabilities": [1.0]}, "there must be one for each of 2 values"),
    ({"values": [1, 2], "probabilities": [0.5, 0.6]}, "must not be negative and must add up to 1"),
    ({"min": "1e-4", "max": 1.0}, "has min '1e-4', which is not a number; YAML reads an exponent only after"),
    ({"min": True, "max": 2}, "has min True, which is not a number"),
    ({"distribution": "int_uniform", "min": 0.5, "max": 2}, "int_uniform takes whole numbers"),
    ({"distribution": "log_uniform_values", "min": 0.0, "max": 1.0}, "log_uniform_values takes positive numbers"),
    ({"distribution": "q_uniform", "min": 0.1, "max": 0.9}, "has q 1; it must be positive, with a multiple of it"),
]


def space(**parameters: Any) -> dict[str, Parameter]:
    return {name: read_parameter(options) for name, options in parameters.items()}


def quantiles(options: dict[str, Any], num: int = 2000) -> list[Any]:
    parameter = read_parameter(options)
    return [parameter.at((index + 0.5) / num) for index in range(num)]


@pytest.mark.parametrize(("options", "message"), FAULTS)
def test_read_parameter_rejects_faults(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read_parameter(options)


def test_listed_values_follow_their_probabilities() -> None:
    assert quantiles({"value": "x"}, 3) == ["x"] * 3
    equal = quantiles({"values": ["a", [1, 2]]})
    assert equal.count("a") == 1000 and [1, 2] in equal
    skewed = quantiles({"values": [1, 2, 3], "probabilities": [0.2, 0.8, 0]})
    assert skewed.count(1) == 400 and 3 not in skewed


def test_ranges_are_uniform_on_their_scale() -> None:
    assert set(quantiles({"min": 1, "max": 3})) == {1, 2, 3}
    assert np.mean(quantiles({"min": 2, "max": 4.0})) == pytest.approx(3)
    logs = [math.log10(one) for one in quantiles({"distribution": "log_uniform_values", "min": 1.0e-4, "max": 1.0e-2})]
    assert min(logs) >= -4 and max(logs) <= -2 and np.mean(logs) == pytest.approx(-3)


def test_quantised_ranges_are_multiples_of_q_within_bounds() -> None:
    whole = quantiles({"distribution": "q_uniform", "min": 3, "max": 17, "q": 5})
    assert set(whole) == {5, 10, 15} and all(type(one) is int for one in whole)
    assert set(quantiles({"distribution": "q_uniform", "min": 0.0, "max": 1.0, "q": 0.5})) == {0.0, 0.5, 1.0}
    assert set(quantiles({"distribution": "q_log_uniform_values", "min": 1, "max": 4})) == {1, 2, 3, 4}


def test_random_equals_the_sampler_of_wandb() -> None:
    """Values drawn by `sweeps` 0.3.0, the sampler in use before: its sweeps continue."""
    parameters = space(
        rate={"distribution": "log_uniform_values", "min": 0.0005, "max": 0.02},
        blocks={"values": [1, 2]},
        steps={"value": 6},
        depth={"min": 1, "max": 9},
        kind={"values": ["a", "b", "c"], "probabilities": [0.2, 0.5, 0.3]},
        size={"distribution": "q_uniform", "min": 10, "max": 90, "q": 5},
    )
    trials = [{"parameters": {}, "value": 0.5}] * 2
    assert draw("random", parameters, trials, maximize=True, seed=5) == {
        "blocks": 1,
        "depth": 2,
        "kind": "c",
        "rate": 0.005048634467412073,
        "size": 35,
        "steps": 6,
    }


@pytest.mark.parametrize("distribution", ["uniform", "log_uniform_values"])
def test_encode_inverts_at(distribution: str) -> None:
    parameter = read_parameter({"distribution": distribution, "min": 0.01, "max": 3.0})
    assert isinstance(parameter, Continuous)
    assert [parameter.encode(parameter.at(share)) for share in (0.0, 0.3, 1.0)] == pytest.approx([0.0, 0.3, 1.0])


def test_grid_lists_all_combinations_once_whatever_was_tried_first() -> None:
    grid = space(y={"values": ["a", "b"]}, x={"min": 1, "max": 2}, z={"value": 0})
    trials: list[dict[str, Any]] = [{"parameters": {"x": 2, "y": "a", "z": 0}, "value": 1.0}]
    while (values := draw("grid", grid, trials, maximize=True, seed=0)) is not None:
        trials.append({"parameters": values, "value": None})
    assert sorted((one["parameters"]["x"], one["parameters"]["y"]) for one in trials) == [
        (1, "a"),
        (1, "b"),
        (2, "a"),
        (2, "b"),
    ]


def optimise(method: str, score: Any, parameters: dict[str, Parameter], num_trials: int, **options: Any) -> list[Any]:
    trials: list[dict[str, Any]] = []
    for _ in range(num_trials):
        values = draw(method, parameters, trials, seed=1, **options)
        assert values is not None
        trials.append({"parameters": values, "value": score(**values)})
    return trials


def test_bayes_finds_a_better_optimum_than_random() -> None:
    parameters = space(
        rate={"distribution": "log_uniform_values", "min": 1.0e-5, "max": 1.0e-1},
        depth={"min": 1, "max": 8},
        fixed={"value": 3},
    )

    def loss(rate: float, depth: int, fixed: int) -> float:
        assert fixed == 3
        return (math.log10(rate) + 3) ** 2 + 0.2 * (depth - 6) ** 2

    found = {
        method: min(one["value"] for one in optimise(method, loss, parameters, 12, maximize=False))
        for method in ("bayes", "random")
    }
    assert found["bayes"] < 0.2 and found["bayes"] < found["random"]


def test_bayes_counts_failed_trials_as_the_worst() -> None:
    trials = optimise("bayes", lambda x: None if x > 0.5 else x, space(x={"min": 0.0, "max": 1.0}), 12, maximize=True)
    assert sum(one["value"] is None for one in trials) < 6
    assert max(one["value"] for one in trials if one["value"] is not None) > 0.4


def test_bayes_does_not_repeat_a_trial_while_others_are_left() -> None:
    parameters = space(x={"min": 1, "max": 3}, y={"values": [False, True]})
    trials = optimise("bayes", lambda x, y: x + y, parameters, 6, maximize=True)
    assert len({tuple(one["parameters"].items()) for one in trials}) == 6


@pytest.mark.parametrize("method", ["random", "bayes"])
def test_draw_depends_on_the_seed_and_the_trials_alone(method: str) -> None:
    parameters = space(x={"min": 0.0, "max": 1.0}, y={"values": [1, 2, 3]})
    trials = [{"parameters": {"x": 0.1, "y": 2}, "value": 1.0}, {"parameters": {"x": 0.9, "y": 1}, "value": 0.5}]
    reordered = dict(reversed(parameters.items()))
    first = draw(method, parameters, trials, maximize=True, seed=3)
    random.seed(7)
    assert draw(method, reordered, trials, maximize=True, seed=3) == first
    assert draw(method, parameters, trials, maximize=True, seed=4) != first
