"""Checks of configurations that several families share."""

from typing import Any


def check_at_least(config: Any, minimum: int, *names: str) -> None:
    """Raises ValueError if one of these settings is less than `minimum`."""
    for name in names:
        value = getattr(config, name)
        if value < minimum:
            raise ValueError(f"{name} is {value}; it must be at least {minimum}")
