"""Faults of loaded weights: tensors that are missing, unexpected, of another shape, or not finite."""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

NUM_NAMED = 3
"""Number of tensors that a message names."""


def load_model(auto: Any, path: str, **options: Any) -> Any:
    """Returns the model that a class of transformers loads from a folder or hub name, with `options`.

    Raises ValueError, instead of initialising or leaving out weights as transformers does, if they are missing,
    unexpected, of another shape or not finite.
    """
    model, report = auto.from_pretrained(path, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    prediction_heads = _prediction_heads(model.config.get_text_config(decoder=True))
    faults = {
        "missing, and would get random weights": report["missing_keys"],
        "of another shape": (mismatched[0] for mismatched in report["mismatched_keys"]),
        "unknown to the model": (name for name in report["unexpected_keys"] if not prediction_heads.search(name)),
    }
    for fault, names in faults.items():
        if found := sorted(names):
            raise ValueError(
                f"{_listed(found)} {fault}; the weights in {path} do not fit its config.json: download both again, or"
                " give draftsmith.Target a model that you have loaded and checked yourself"
            )
    check_finite(f"the weights in {path}", model.named_parameters())
    return model


def _prediction_heads(config: Any) -> re.Pattern[str]:
    """Returns a pattern of the tensors of multi-token prediction heads, stored as layers behind a model's own or apart.

    transformers leaves them out, but knows only the numbers that they have in the first models of an architecture, and
    none of MiMo-7B's, whose layers are Qwen2's.
    """
    last = getattr(config, "num_hidden_layers", 0) + (getattr(config, "num_mtp_layers", None) or 0)
    numbers = range(getattr(config, "num_hidden_layers", 0), last)
    behind = rf"\blayers\.({'|'.join(map(str, numbers))})\." if numbers else "(?!)"
    return re.compile(rf"{behind}|\bmtp_layers\.\d+\.")


def check_finite(source: object, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raises ValueError if a tensor has NaN or infinite values."""
    if found := [name for name, tensor in tensors if not is_finite(tensor)]:
        raise ValueError(f"{source}: {_listed(found)} not finite (NaN or infinite); download or train it again")


def is_finite(tensor: Tensor) -> bool:
    """Returns whether all of a tensor's values are finite; True for tensors of integers."""
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local()  # under tensor parallelism each process looks at its own part
    if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.is_meta:
        return True
    if tensor.dtype.itemsize == 1:  # 8-bit floats have no aminmax
        tensor = tensor.to(torch.float32)
    # The smallest and the largest value are NaN if any is; a mask of all values would take memory.
    smallest, largest = tensor.aminmax()
    return bool(smallest.isfinite() & largest.isfinite())


def _listed(names: list[str]) -> str:
    """Returns the subject and verb of a sentence about tensors."""
    more = len(names) - NUM_NAMED
    listed = ", ".join(names[:NUM_NAMED]) + (f" and {more} more" if more > 0 else "")
    return f"tensor {listed} is" if len(names) == 1 else f"tensors {listed} are"
