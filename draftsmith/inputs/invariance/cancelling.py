"""Finds with how many rows a model's matrix products give a row the same bits.

Kernels that add in different orders give most sums of ordinary numbers the same bits after rounding. The sums compared
here are zero but for rounding error, so that nearly every other order shows.

Shape suffixes: M rows, I and O a matrix's input and output widths, E experts.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from draftsmith.loading.placement.packed_weights import PackedLinear, pack, packed_linear

COUNTS = (*range(1, 18), 24, 31, 32, 33, 48, 63, 64, 65, 96, 127, 128, 129, 255, 256, 257, 511, 512)
MOST = (512, 128, 64)
MOST_PADDED = 32
"""Matrices that need more rows than this have no bits of their own."""
LARGE_MATRIX, ROWS_OF_LARGE = 2**24, 65
"""Matrices with this many entries, usually LM heads, are tried with fewer rows."""
MOST_RANDOM, ENTRIES_OF_RANDOM = 16, 2**18
"""Small matrices, whose short sums hide some orders, are also tried with random weights: this many, and entries."""
SCALE = 16.0

Product = Callable[[Tensor], Callable[[Tensor], Tensor]]
"""Maps weights [O, I] to the function from rows [M, I] to [M, O]."""


@torch.inference_mode()
def equal_row_counts(model: nn.Module, *, packs_weights: bool = False) -> tuple[int, int] | None:
    """Returns (fewest, most) rows between which a model's matrices give a row the same bits; None if there are none.

    With `packs_weights` layers that have packed weights multiply by these. Experts must give the same bits from one row
    on, as their numbers of rows depend on a router.
    """
    fewest, most = 1, MOST[0]
    for product, weight_OI, is_of_expert in _products(model, packs_weights):
        for weights_OI in (weight_OI, *_random_like(weight_OI)):
            counts = _row_counts(product(weights_OI), _cancelling_rows(weights_OI))
            if counts is None or (is_of_expert and counts[0] > 1):
                return None
            fewest, most = max(fewest, counts[0]), min(most, counts[1])
    return (fewest, most) if fewest <= most else None


def _random_like(weight_OI: Tensor) -> Iterator[Tensor]:
    """Yields random weights of the same shape, strides and dtype, if the matrix is small."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(min(MOST_RANDOM, ENTRIES_OF_RANDOM // weight_OI.numel())):
        # A copy keeps the strides, on which the choice of the kernel depends.
        yield torch.empty_like(weight_OI).copy_(torch.randn(weight_OI.shape, generator=generator))


def _row_counts(product: Callable[[Tensor], Tensor], rows_MI: Tensor) -> tuple[int, int] | None:
    for most in MOST:
        expected_MO = product(rows_MI[:most])
        counts = [count for count in COUNTS if count <= len(expected_MO)]
        unequal = [count for count in counts if not product(rows_MI[:count]).equal(expected_MO[:count])]
        if not unequal:
            return 1, most
        if (fewest := min((count for count in counts if count > max(unequal)), default=most + 1)) <= MOST_PADDED:
            return fewest, most
    return None


def _products(model: nn.Module, packs_weights: bool) -> Iterator[tuple[Product, Tensor, bool]]:
    """Yields each kind of matrix: its product, its weights, and if it is an expert's."""
    seen: set[Any] = set()
    for name, module in model.named_modules():
        is_of_expert = "expert" in name.lower()
        for kind, product, weight_OI in _products_of(module, packs_weights):
            key = (type(module), kind, weight_OI.shape, weight_OI.stride(), weight_OI.dtype, is_of_expert)
            if key not in seen:
                seen.add(key)
                yield product, weight_OI, is_of_expert


def _products_of(module: nn.Module, packs_weights: bool) -> Iterator[tuple[str, Product, Tensor]]:
    """Yields a module's products and their weights [O, I]; a bias is taken as zero, as it would hide rounding error."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    zero = torch.zeros_like(bias) if isinstance(bias, Tensor) else None
    if isinstance(weight, Tensor) and type(weight) in (Tensor, nn.Parameter):
        if isinstance(module, nn.Linear):
            product = _packed_product if packs_weights and is_packed(module) else _product
            yield f"{product.__name__}, bias: {zero is not None}", partial(product, bias=zero), weight
        elif isinstance(module, Conv1D) and zero is not None:
            yield "", partial(_product_by_addmm, bias=zero), weight.T
    if "expert" in type(module).__name__.lower():
        for name, weight_EOI in module.named_parameters(recurse=False):
            if weight_EOI.ndim == 3:
                # Which of the two widths is the input's depends on the model.
                yield name, _product, weight_EOI[0]
                yield f"{name} transposed", _product, weight_EOI[0].T


def is_packed(module: nn.Module) -> bool:
    """Returns whether decoding multiplies by a packed weight of this layer, unless it is told otherwise."""
    return isinstance(module, PackedLinear) and module.is_frozen


def _product(weight_OI: Tensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    return lambda rows_MI: linear(rows_MI[None], weight_OI, bias)[0]


def _packed_product(weight_OI: Tensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    packed = pack(weight_OI.detach())
    return lambda rows_MI: packed_linear(rows_MI[None], packed, bias)[0]


def _product_by_addmm(weight_OI: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda rows_MI: torch.addmm(bias, rows_MI, weight_OI.T)


def _cancelling_rows(weight_OI: Tensor) -> Tensor:
    """Returns rows [M, I], each of which one of the matrix's outputs is zero for but for rounding.

    Inputs are paired at random: one is the other's weight, the other minus the first one's.
    """
    num_outputs, width = weight_OI.shape
    num_rows = ROWS_OF_LARGE if weight_OI.numel() >= LARGE_MATRIX else MOST[0]
    generator = torch.Generator().manual_seed(0)
    outputs_M = torch.randint(num_outputs, (num_rows,), generator=generator)
    outputs_M[:2] = torch.tensor([0, num_outputs - 1])
    order_MI = torch.rand(num_rows, width, generator=generator).argsort(dim=1).to(weight_OI.device)
    one_MP, other_MP = order_MI[:, : width // 2], order_MI[:, width // 2 : width // 2 * 2]
    chosen_MI = weight_OI[outputs_M.to(weight_OI.device)]
    rows_MI = torch.zeros_like(chosen_MI)
    rows_MI.scatter_(1, one_MP, chosen_MI.gather(1, other_MP))
    rows_MI.scatter_(1, other_MP, -chosen_MI.gather(1, one_MP))
    # A power of two keeps the products exact.
    return rows_MI * (SCALE / rows_MI.abs().amax(dim=1, keepdim=True).clamp(min=1e-6)).log2().floor().exp2()
