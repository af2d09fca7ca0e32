"""Tensors of zeros that take memory on a CPU only where they are written."""

import mmap
from math import prod

import torch
from torch import Tensor

FEWEST_BYTES = 2**20
"""Smaller tensors are allocated as torch does it, which is quicker."""


def lazy_zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Returns zeros of this shape, in the dtype and on the device of `like`.

    On a CPU each page of a large tensor takes memory once something is written to it, where `torch.zeros` writes all.
    """
    num_bytes = prod(shape) * like.element_size()
    if like.device.type != "cpu" or num_bytes < FEWEST_BYTES or not hasattr(mmap, "MAP_PRIVATE"):
        return like.new_zeros(shape)
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=like.dtype).view(shape)
