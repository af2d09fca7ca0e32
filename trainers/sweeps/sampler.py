"""Parameters of a sweep in wandb's form: reading their distributions and choosing the values of the next trial.

The choice depends on the seed and the trials so far alone, so an interrupted sweep continues with the same next trial.
`at` maps a share, uniform in [0, 1), to a value of the parameter. Method random draws shares in the order of the names,
constants included, so that its values are those of wandb's sampler. For method bayes, `encode` and `decode` map values
to coordinates within `bounds`, all of the same scale.
"""

import bisect
import difflib
import itertools
import json
import math
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

METHODS = ("random", "grid", "bayes")
KEYS: dict[str, tuple[set[str], set[str]]] = {
    "constant": ({"value"}, set()),
    "categorical": ({"values"}, {"probabilities"}),
    "categorical_w_probabilities": ({"values", "probabilities"}, set()),
    "int_uniform": ({"min", "max"}, set()),
    "uniform": ({"min", "max"}, set()),
    "q_uniform": ({"min", "max"}, {"q"}),
    "log_uniform_values": ({"min", "max"}, set()),
    "q_log_uniform_values": ({"min", "max"}, {"q"}),
}
"""Required and optional keys of each supported distribution, beside `distribution` itself."""
EXPLORATION = 1.0
"""Weight of the deviation in method bayes; less than the library's 2.576, since a sweep has few trials."""
MAX_REDRAWS = 100
"""Random draws at most in place of a suggestion that has been tried already."""

Values = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Categorical:
    """A parameter with listed values; a constant has one."""

    values: tuple[Any, ...]
    probabilities: tuple[float, ...] | None = None
    """None for equal ones; `bayes` does not use them."""

    @property
    def listed(self) -> Sequence[Any]:
        return self.values

    @property
    def bounds(self) -> tuple[Any, ...]:
        return tuple(map(str, range(len(self.values))))

    def at(self, share: float) -> Any:
        if self.probabilities is None:
            return self.values[_index(share, len(self.values))]
        cumulative = list(itertools.accumulate(self.probabilities))
        return self.values[min(bisect.bisect_right(cumulative, share), len(self.values) - 1)]

    def encode(self, value: Any) -> Any:
        return str(self.values.index(value))

    def decode(self, coordinate: Any) -> Any:
        return self.values[int(coordinate)]


@dataclass(frozen=True, kw_only=True)
class Integer:
    """A whole number from `low` to `high`, both included."""

    low: int
    high: int
    bounds: ClassVar = (0.0, 1.0)

    @property
    def listed(self) -> Sequence[Any]:
        return range(self.low, self.high + 1)

    def at(self, share: float) -> Any:
        return self.low + _index(share, len(self.listed))

    def encode(self, value: Any) -> Any:
        return (value - self.low + 0.5) / len(self.listed)

    def decode(self, coordinate: Any) -> Any:
        return self.at(float(coordinate))


@dataclass(frozen=True, kw_only=True)
class Continuous:
    """A number from `low` to `high`, uniform on a linear or logarithmic scale."""

    low: float
    high: float
    is_log: bool
    step: float | None
    """None, or values are multiples of it."""
    bounds: ClassVar = (0.0, 1.0)
    listed: ClassVar = None

    def at(self, share: float) -> Any:
        low, high = self._scaled(self.low), self._scaled(self.high)
        scaled = low + share * (high - low)
        value = min(max(float(np.exp(scaled)) if self.is_log else scaled, self.low), self.high)
        if self.step is None:
            return value
        steps = min(max(round(value / self.step), math.ceil(self.low / self.step)), math.floor(self.high / self.step))
        return steps * self.step

    def encode(self, value: Any) -> Any:
        low, high = self._scaled(self.low), self._scaled(self.high)
        return min(max((self._scaled(value) - low) / (high - low), 0.0), 1.0)

    def decode(self, coordinate: Any) -> Any:
        return self.at(float(coordinate))

    def _scaled(self, value: float) -> float:
        return float(np.log(value)) if self.is_log else value


Parameter = Categorical | Integer | Continuous


def _index(share: float, size: int) -> int:
    """Returns the index of `size` equal parts of [0, 1] that `share` lies in, the lower one on a border."""
    return max(math.ceil(share * size) - 1, 0)


def read_parameter(options: Any) -> Parameter:
    """Returns a parameter from its mapping in the sweep's file.

    Raises ValueError, whose text follows "parameter NAME", for faults and for distributions that are not supported.
    """
    if not isinstance(options, dict):
        raise ValueError(f"is {options!r}; it must be a mapping such as {{values: [1, 2]}}")
    if "parameters" in options:
        raise ValueError("has nested parameters, but settings are flat; list them beside the others instead")
    kind = options.get("distribution") or _default_distribution(options)
    if kind not in KEYS:
        near = difflib.get_close_matches(str(kind), KEYS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"supported are {', '.join(KEYS)}"
        raise ValueError(f"has the unsupported distribution {kind!r}; {hint}")
    required, optional = KEYS[kind]
    keys = set(options) - {"distribution"}
    if missing := sorted(required - keys):
        raise ValueError(f"needs {' and '.join(missing)} for distribution {kind}")
    if unknown := sorted(map(str, keys - required - optional)):
        raise ValueError(f"has the unknown key {unknown[0]!r}; distribution {kind} takes {_enumerated(kind)}")
    if kind == "constant":
        return Categorical(values=(options["value"],))
    if "values" in options:
        return _categorical(options["values"], options.get("probabilities"))
    return _range(kind, options)


def _default_distribution(options: dict[str, Any]) -> str:
    if "value" in options:
        return "constant"
    if "values" in options:
        return "categorical"
    return "int_uniform" if all(type(options.get(key)) is int for key in ("min", "max")) else "uniform"


def _enumerated(kind: str) -> str:
    required, optional = KEYS[kind]
    return ", ".join([*sorted(required), *(f"{key} (optional)" for key in sorted(optional))])


def _categorical(values: Any, probabilities: Any) -> Categorical:
    if not isinstance(values, list) or not values:
        raise ValueError(f"has values {values!r}; they must be a list of at least one")
    if probabilities is None:
        return Categorical(values=tuple(values))
    if not isinstance(probabilities, list) or len(probabilities) != len(values):
        raise ValueError(f"has probabilities {probabilities!r}; there must be one for each of {len(values)} values")
    numbers = [_number("a probability", one) for one in probabilities]
    if min(numbers) < 0 or not math.isclose(sum(numbers), 1.0, abs_tol=1e-6):
        raise ValueError(f"has probabilities {probabilities!r}; they must not be negative and must add up to 1")
    return Categorical(values=tuple(values), probabilities=tuple(one / sum(numbers) for one in numbers))


def _range(kind: str, options: dict[str, Any]) -> Integer | Continuous:
    low, high = _number("min", options["min"]), _number("max", options["max"])
    if low >= high:
        raise ValueError(f"has min {low} and max {high}; min must be less than max")
    if kind == "int_uniform":
        if type(low) is not int or type(high) is not int:
            raise ValueError(f"has min {low} and max {high}; int_uniform takes whole numbers")
        return Integer(low=low, high=high)
    is_log = "log" in kind
    if is_log and low <= 0:
        raise ValueError(f"has min {low}; {kind} takes positive numbers")
    step = _number("q", options.get("q", 1)) if kind.startswith("q_") else None
    if step is not None and (step <= 0 or math.ceil(low / step) > math.floor(high / step)):
        raise ValueError(f"has q {step}; it must be positive, with a multiple of it between {low} and {high}")
    return Continuous(low=low, high=high, is_log=is_log, step=step)


def _number(name: str, value: Any) -> int | float:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return value
    hint = "; YAML reads an exponent only after a decimal point, as in 1.0e-4" if isinstance(value, str) else ""
    raise ValueError(f"has {name} {value!r}, which is not a number{hint}")


def draw(
    method: str, space: dict[str, Parameter], trials: list[dict[str, Any]], *, maximize: bool, seed: int
) -> Values | None:
    """Returns the values of the next trial, None if a grid has no more.

    Trials are dictionaries with their `parameters` and the `value` of the metric, None for those that failed.
    """
    space = dict(sorted(space.items()))
    tried = {_key(one["parameters"]) for one in trials}
    if method == "grid":
        lists = [one.listed for one in space.values()]
        assert None not in lists
        combinations = (dict(zip(space, values, strict=True)) for values in itertools.product(*lists))  # type: ignore[arg-type]
        return next((values for values in combinations if _key(values) not in tried), None)
    rng = random.Random(f"{seed} {len(trials)}")
    if method == "random" or all(one["value"] is None for one in trials):
        return {name: one.at(rng.random()) for name, one in space.items()}
    values = _suggest(space, trials, maximize=maximize, seed=rng.randrange(2**31))
    for _ in range(MAX_REDRAWS):
        if _key(values) not in tried:
            break
        values = {name: one.at(rng.random()) for name, one in space.items()}
    return values


def _suggest(space: dict[str, Parameter], trials: list[dict[str, Any]], *, maximize: bool, seed: int) -> Values:
    """Returns the values with the highest upper confidence bound under a Gaussian process fitted to the trials.

    Failed trials count as the worst of the others.
    """
    from bayes_opt import BayesianOptimization, acquisition

    values = {name: one.listed[0] for name, one in space.items() if one.listed is not None and len(one.listed) == 1}
    varied = {name: one for name, one in space.items() if name not in values}
    if not varied:
        return values
    sign = 1 if maximize else -1
    worst = min(sign * one["value"] for one in trials if one["value"] is not None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about listed values, and about kernels that fit few trials badly
        optimizer = BayesianOptimization(
            f=None,
            pbounds={name: one.bounds for name, one in varied.items()},
            acquisition_function=acquisition.UpperConfidenceBound(kappa=EXPLORATION),
            random_state=seed,
            verbose=0,
            allow_duplicate_points=True,
        )
        for one in trials:
            params = {name: parameter.encode(one["parameters"][name]) for name, parameter in varied.items()}
            optimizer.register(params, worst if one["value"] is None else sign * one["value"])
        found = optimizer.suggest()
    return values | {name: parameter.decode(found[name]) for name, parameter in varied.items()}


def _key(values: Values) -> str:
    return json.dumps(values, sort_keys=True)
