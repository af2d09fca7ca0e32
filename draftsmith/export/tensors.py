"""Writes the tensors of an export and checks names, shapes and dtypes against those that the server's loader expects.

Loaders ignore unknown tensors and initialise missing ones at random. The output stays correct then, and the mistake
shows in the acceptance rate only.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

WEIGHTS = "model.safetensors"
Specs = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of each tensor, by name."""


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], expected: Specs) -> None:
    """Writes `tensors` to a safetensors file; raises ValueError if they are not those `expected` by the loader."""
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(copies, folder / WEIGHTS, metadata={"format": "pt"})
    check_file(folder / WEIGHTS, expected)


def check_file(file: Path, expected: Specs) -> None:
    """Raises ValueError unless the file contains exactly the expected tensors."""
    with safe_open(file, framework="pt") as opened:
        found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    for name in sorted(expected.keys() ^ found.keys()):
        fault = "is missing" if name in expected else "is unknown to the engine"
        raise ValueError(f"tensor {name!r} {fault}; the drafter cannot be exported")
    for name, (shape, dtype) in expected.items():
        tensor = found[name]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(
                f"tensor {name!r} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}, and the engine expects"
                f" {shape} and {dtype}; the drafter cannot be exported"
            )
