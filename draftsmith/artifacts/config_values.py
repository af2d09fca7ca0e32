"""Checks of configuration values that hold for every dataclass of settings: types, and numbers that are finite."""

import dataclasses
import math
import types
import typing
from typing import Any

LARGEST = 2**63 - 1
"""Largest whole number that compiled code can take."""


def check_types(kind: type, values: dict[str, Any], source: Any) -> None:
    """Raises ValueError for a value, read from JSON, that is not of the type of the field of `kind` with its name."""
    annotations = typing.get_type_hints(kind)
    for name, value in values.items():
        if not _is_of(value, annotations[name]):
            expected = getattr(annotations[name], "__name__", None)
            raise ValueError(f"{source}: {name} is {value!r}; expected a value of type {expected or annotations[name]}")


def check_numbers(config: Any) -> None:
    """Raises ValueError for a number anywhere in a dataclass that is not finite, or whole and beyond 64 bits."""
    for field in dataclasses.fields(config):
        _check_number(field.name, getattr(config, field.name))


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value}; it must be a finite number")
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError(f"{name} is {value:.3g}; it must be a whole number of at most 64 bits")
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_number(f"{name}.{key}", inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_number(name, inner)


def _is_of(value: Any, annotation: Any) -> bool:
    """Returns whether a JSON value fits an annotation; annotations that JSON cannot express fit any value."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_is_of(value, one) for one in arguments)
    if origin is tuple:
        inner = arguments[:1] * len(value) if isinstance(value, list | tuple) and ... in arguments else arguments
        return isinstance(value, list | tuple) and len(value) == len(inner) and all(map(_is_of, value, inner))
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation is types.NoneType:
        return value is None
    if annotation in (str, bool):
        return isinstance(value, annotation)
    return isinstance(value, dict) if dict in (annotation, origin) else True
