"""Compiles the losses' operations on logits, of which each reads and writes all logits if torch runs them one by one.

Matrix products, the drafter's layers and the target are not compiled.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any, TypeVar, cast

import torch

FunctionOfTensors = TypeVar("FunctionOfTensors", bound=Callable[..., Any])
BACKEND = "inductor"
"""torch's name of what compiles the graphs."""
_is_active = False


@contextmanager
def compiled_losses() -> Iterator[None]:
    """Lets `compilable` functions run compiled until the context ends, in all threads of the process.

    The backward pass, which calls checkpointed functions again, may have a thread of its own.
    """
    global _is_active
    before, _is_active = _is_active, True
    try:
        yield
    finally:
        _is_active = before


def is_active() -> bool:
    """Returns whether `compilable` functions run compiled."""
    return _is_active


def compilable(function: FunctionOfTensors) -> FunctionOfTensors:
    """Marks a function of tensors that runs compiled within `compiled_losses`, and as it is written elsewhere."""

    @cache
    def compiled(backend: str) -> Callable[..., Any]:
        # Rows differ in length, so that sizes change from batch to batch.
        return torch.compile(function, dynamic=True, backend=backend)

    @wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        return (compiled(BACKEND) if _is_active else function)(*arguments, **options)

    return cast(FunctionOfTensors, call)


def check_compiler(device: str) -> None:
    """Compiles a small function for `device`; raises ValueError if torch cannot, with the reason that it gives."""
    needed = "Triton, a C compiler" if device.startswith("cuda") else "a C++ compiler, such as g++,"
    number = random.getrandbits(31)  # a function of an earlier run, kept in torch's cache, would need no compiler
    try:
        found = torch.compile(lambda x_N: x_N + number)(torch.zeros(2, dtype=torch.long, device=device))
    except Exception as error:  # compilers, headers, Triton and folders that are missing have no common class
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        # A compiler's own complaint, of a missing header say, comes after the command.
        reason = next((line for line in lines if "error:" in line), lines[0])
        raise ValueError(
            f"--compile cannot be used: torch cannot compile for {device} here ({reason}); install or repair {needed}"
            " and Python's headers, or omit --compile"
        ) from None
    assert found.tolist() == [number, number]
