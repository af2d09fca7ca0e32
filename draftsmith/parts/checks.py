"""Checks of configurations that several families share: every number has a finite range."""

import re
from typing import Any

MAX_DEPTH = 1024
"""Largest number of layers, heads, or levels of a draft."""
MAX_NODES = 4096
"""Largest number of nodes of a draft, or of its levels' choices."""
MAX_WIDTH = 2**17
"""Largest width of a layer."""
MAX_COUNT = 2**31 - 1
"""Largest number of anything else that is counted, such as tokens of a vocabulary or of a text."""


def check_hidden_layers(config: Any, name: str, least: int = 0) -> None:
    """Raises ValueError unless a tuple lists at least `least` hidden layers, from 0 up, ascending and none twice."""
    layers = getattr(config, name)
    if len(layers) < least or sorted(set(layers)) != list(layers) or min(layers, default=0) < 0:
        raise ValueError(f"{name} is {list(layers)}; list hidden layers from 0 up in ascending order, none twice")
    check_each(config, 0, name, most=MAX_DEPTH)


def check_head_groups(config: Any) -> None:
    """Raises ValueError unless `num_kv_heads` is 0, for as many as attention heads, or divides `num_heads`."""
    if config.num_kv_heads and config.num_heads % config.num_kv_heads:
        raise ValueError(
            f"num_kv_heads is {config.num_kv_heads}; it must divide the number of attention heads, {config.num_heads}"
        )


def check_at_least(config: Any, minimum: float, *names: str, most: float = MAX_COUNT) -> None:
    """Raises ValueError if one of these settings is less than `minimum`, more than `most`, or not a number."""
    for name in names:
        value = getattr(config, name)
        if value > most:
            raise ValueError(f"{name} is {value}; it must be at most {most}")
        if not value >= minimum:
            raise ValueError(f"{name} is {value}; it must be at least {minimum}")


def check_positive(config: Any, *names: str, most: float = 1e6) -> None:
    """Raises ValueError if one of these settings is not positive, or more than `most`."""
    for name in names:
        value = getattr(config, name)
        if not 0 < value <= most:
            raise ValueError(f"{name} is {value}; it must be positive and at most {most:g}")


def check_below_one(config: Any, *names: str) -> None:
    """Raises ValueError if one of these settings, a probability or a share, is negative or not less than 1."""
    for name in names:
        value = getattr(config, name)
        if not 0 <= value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 0 and below 1")


def check_model(model: dict[str, Any]) -> None:
    """Raises ValueError if a transformers configuration has a count that no model has."""
    for name, value in model.items():
        most = MAX_DEPTH if re.search("layers|heads|n_layer|n_head", name) else MAX_COUNT
        if isinstance(value, int) and abs(value) > most:
            raise ValueError(f"the draft model's {name} is {value}; it must be at most {most}")


def check_each(config: Any, minimum: float, *names: str, most: float = MAX_COUNT) -> None:
    """Raises ValueError if one of these settings lists a number that is less than `minimum` or more than `most`."""
    for name in names:
        values = getattr(config, name)
        if not all(minimum <= value <= most for value in values):
            raise ValueError(f"{name} is {list(values)}; each must be at least {minimum} and at most {most}")
