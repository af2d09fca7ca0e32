"""Tensors as servers want them: contiguous, in one safetensors file, their names, shapes and types as expected.

Loaders leave out what they do not know and start at random what they miss, and text stays right: only acceptance tells.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

WEIGHTS = "model.safetensors"
Kinds = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and type of each tensor, by name."""


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], wanted: Kinds) -> None:
    """Writes tensors, and compares the file with what the engine's loader wants; raises ValueError if they differ."""
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(copies, folder / WEIGHTS, metadata={"format": "pt"})
    check_file(folder / WEIGHTS, wanted)


def check_file(file: Path, wanted: Kinds) -> None:
    """Raises ValueError unless the file holds just these tensors."""
    with safe_open(file, framework="pt") as opened:
        found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    for name in sorted(wanted.keys() ^ found.keys()):
        what = "is missing" if name in wanted else "is none that the engine loads"
        raise ValueError(f"tensor {name!r} {what}; the drafter cannot be exported so")
    for name, (shape, dtype) in wanted.items():
        tensor = found[name]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(
                f"tensor {name!r} is {tuple(tensor.shape)} of {tensor.dtype}, and the engine loads {shape} of {dtype};"
                " the drafter cannot be exported so"
            )
