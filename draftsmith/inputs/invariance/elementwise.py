"""Finds of how many rows a target's activation functions give a row the same bits.

Kernels compute most elements in vectors and the few left over one by one, by another formula, so that a row's bits can
depend on how many rows there are. The formulas differ for few values, which are searched for and used alone.

Shape suffixes: M rows, I their width, V values.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

MULTIPLES = (1, 2, 4, 8, 16, 32)
COUNTS = (*range(1, 68), 96, 127, 128, 129, 160, 255, 256, 257, 288, 511, 512)
NUM_RANDOM, SPREAD = 2**13, 4.0
"""Random values to search where a type has too many to try all, and their standard deviation."""
MODULES = ("torch.nn.modules.activation", "transformers.activations")


@torch.inference_mode()
def equal_row_multiple(model: nn.Module, run: Callable[[], object], most: int) -> int | None:
    """Returns of which multiple of rows, up to `most`, the activation functions that `run` calls keep a row's bits.

    Experts must do so for any number of rows, as theirs depends on a router. Returns None if there is no multiple.
    """
    multiple, found = 1, dict[tuple[str, int, torch.dtype], int | None]()
    for name, function, example in _calls(model, run):
        key = (repr(function), example.shape[-1], example.dtype)
        if key not in found:
            found[key] = _multiple_of(function, example, most)
        own = found[key]
        if own is None or ("expert" in name.lower() and own > 1):
            return None
        multiple = max(multiple, own)
    return multiple


def _calls(model: nn.Module, run: Callable[[], object]) -> list[tuple[str, nn.Module, Tensor]]:
    """Returns the name of each activation function that is called, the function and what it was given."""
    calls: list[tuple[str, nn.Module, Tensor]] = []
    named = {module: name for name, module in model.named_modules() if type(module).__module__ in MODULES}
    hooks = [
        module.register_forward_pre_hook(lambda module, args: calls.append((named[module], module, args[0])))
        for module in named
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _multiple_of(function: nn.Module, example: Tensor, most: int) -> int | None:
    values_V = _values(example)
    alone_V = torch.cat([function(value_1) for value_1 in values_V.split(1)])
    if not (differ_V := alone_V != function(values_V)).any():
        return 1
    values_V = values_V[differ_V]
    generator = torch.Generator().manual_seed(0)
    picked_MI = torch.randint(len(values_V), (most, example.shape[-1]), generator=generator).to(values_V.device)
    rows_MI = values_V[picked_MI]
    expected_MI = function(rows_MI)
    unequal = [
        count
        for count in sorted({*COUNTS, most})
        if count <= most and not function(rows_MI[:count]).equal(expected_MI[:count])
    ]
    return next((multiple for multiple in MULTIPLES if all(count % multiple for count in unequal)), None)


def _values(example: Tensor) -> Tensor:
    """Returns all finite values of a type of 16 bits, or random ones of a larger type."""
    if example.element_size() == 2:
        values_V = torch.arange(-(2**15), 2**15).to(torch.int16).view(example.dtype)
        return values_V[values_V.isfinite()].to(example.device)
    generator = torch.Generator().manual_seed(0)
    return (SPREAD * torch.randn(NUM_RANDOM, generator=generator)).to(example)
