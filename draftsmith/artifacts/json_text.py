"""Strict JSON: NaN and infinite numbers, which Python's json module accepts, are neither read nor written."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any


def parse(text: str) -> Any:
    """Returns the value of a JSON text; raises ValueError if it is invalid or has a number that is not finite."""
    try:
        return json.loads(text, parse_constant=_finite, parse_float=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read(file: Path) -> Any:
    """Returns the value of a JSON file; raises ValueError, naming the file, if `parse` does."""
    try:
        return parse(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error})") from error


def check_entries(file: Path, entries: Mapping[str, Any], types: Mapping[str, tuple[type, ...]]) -> None:
    """Raises ValueError, naming `file`, for an entry of another type than `types` says; a missing entry is None."""
    for name, kinds in types.items():
        value = entries.get(name)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            expected = " or ".join("null" if kind is NoneType else kind.__name__ for kind in kinds)
            raise ValueError(f"{file} is damaged: {name} is {value!r:.40}, expected {expected}; make it again")


def text_of(value: Any, *, indent: int | None = None, sort_keys: bool = False) -> str:
    """Returns a value as JSON; raises ValueError for a number that is not finite and for objects that JSON lacks."""
    try:
        return json.dumps(value, indent=indent, sort_keys=sort_keys, allow_nan=False)
    except TypeError as error:
        raise ValueError(f"a value cannot be written as JSON: {error}") from error


def without_nan(value: Any) -> Any:
    """Returns a JSON value with null in place of numbers that are not finite, for logs."""
    if isinstance(value, dict):
        return {key: without_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"it has the number {number}, which is not finite")
    return value
