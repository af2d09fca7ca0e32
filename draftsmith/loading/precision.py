"""Casts that leave in full precision what transformers keeps so when it loads a model in half precision.

`nn.Module.to(torch.bfloat16)` also rounds buffers that no checkpoint holds, such as the rotary frequencies of
transformers' models, and no later cast restores them. `from_pretrained(dtype=torch.bfloat16)` keeps them, so that a
drafter cast by `to` and the same drafter loaded by its dtype are two models with equal state dicts. So are weights that
an architecture keeps in float32, such as T5's `wo` in float16.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

DTYPES = ("float32", "bfloat16", "float16", "float64")
"""Dtypes in which models can be run, by name."""


def checked_dtype(dtype: Any) -> str:
    """Returns the name of a dtype given as torch's or by name; raises ValueError if it is neither "auto" nor known."""
    name = str(dtype).removeprefix("torch.")
    if name not in ("auto", *DTYPES):
        raise ValueError(f"dtype is {dtype!r}; it must be auto, {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
    return name


def checked_device(device: Any) -> torch.device:
    """Returns a device by name, "auto" being the GPU if there is one; raises ValueError if it cannot hold weights."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device is {device!r}; it must be auto, cpu, cuda, cuda:1 or another of torch's") from None
    if found.type == "meta":
        raise ValueError("device is 'meta', which holds no weights; name a device such as cpu or cuda")
    return found


class KeepsPrecision(nn.Module):
    """A module whose casts, and those of a module around it, leave such buffers and weights as they are."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `to`, `float`, `bfloat16` and `half` of this module and of those around it come by here, DeepSpeed's included.
        return _without_rounding(self, lambda: super(KeepsPrecision, self)._apply(fn, recurse))


def cast(model: Any, dtype: torch.dtype) -> Any:
    """Returns a transformers model, changed in place to the weights that it has when it is loaded in `dtype`.

    Buffers that no checkpoint holds keep the precision in which they were made.
    """
    return _without_rounding(model, lambda: model.to(dtype))


def _without_rounding(module: Any, change: Callable[[], Any]) -> Any:
    """Calls `change`, which casts the module, and restores what must not be rounded, on the device it was moved to."""
    models = [part for part in module.modules() if isinstance(part, PreTrainedModel)]
    kept = [
        (model, name, weight, weight.data) for model in models for name, weight in _kept(model.named_parameters, model)
    ]
    unrounded = {id(buffer) for model in models for _, buffer in _kept(model.named_buffers, model)}
    buffers = [
        (part, name, buffer)
        for part in module.modules()
        for name, buffer in part._buffers.items()
        if buffer is not None and (name in part._non_persistent_buffers_set or id(buffer) in unrounded)
    ]
    changed = change()
    for part, name, buffer in buffers:
        now = part._buffers[name]
        if now.dtype != buffer.dtype:
            part._buffers[name] = buffer.to(now.device)
    for model, name, weight, data in kept:
        if weight.dtype != data.dtype and _matches(name, model._get_dtype_plan(weight.dtype)):
            weight.data = data.to(weight.device)
    return changed


def _kept(named: Callable[[], Iterable[tuple[str, Tensor]]], model: PreTrainedModel) -> list[tuple[str, Tensor]]:
    """Returns the weights or saved buffers in float32 that transformers would not load in every lower precision."""
    patterns = [*model._get_dtype_plan(torch.float16), *model._get_dtype_plan(torch.bfloat16)]
    return [
        (name, tensor)
        for name, tensor in (named() if patterns else ())
        if tensor.dtype == torch.float32 and _matches(name, patterns)
    ]


def _matches(name: str, patterns: Any) -> bool:
    """Returns whether transformers' patterns, in which * stands for any text, occur in a weight's name."""
    return any(re.search(pattern.replace("*", ".*"), name) for pattern in patterns)
