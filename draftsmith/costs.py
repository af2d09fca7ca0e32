"""What a forward of the target costs, as measured on the machine at hand, one core or one GPU.

Shape suffixes: B rows, N nodes, D hidden width.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from draftsmith.target import Target
from draftsmith.tree import Tree, chain

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 63)
CONTEXT, REPEATS = 128, 7


@torch.inference_mode()
def verify_ms(
    target: Target, sizes: tuple[int, ...] = SIZES, *, batch_size: int = 1, layer: int = 0
) -> dict[int, float]:
    """Returns the milliseconds the target takes for a root and so many nodes a row, after `CONTEXT` tokens.

    From the output of block `layer` on, where a drafter has run the first ones. The quickest of several runs each, and
    never less than for fewer nodes.
    """
    length = min(CONTEXT, target.context_length // 2)
    source = None
    if target.is_encoder_decoder:
        source_BT = torch.ones(batch_size, length, dtype=torch.long, device=target.device)
        source = target.encode(source_BT, torch.ones_like(source_BT))
    cache = target.new_cache(batch_size, source=source)
    target.prefill([[1] * length] * batch_size, cache)
    costs, highest = {}, 0.0
    for size in sizes:
        is_tree = not target.is_encoder_decoder
        tree = Tree.from_parents([[-1] + [0] * size], target.device) if is_tree else chain(size + 1, target.device)
        tokens_BN = torch.ones(batch_size, size + 1, dtype=torch.long, device=target.device)
        entry: dict = {}
        if layer:
            hidden_BND = torch.zeros(*tokens_BN.shape, target.hidden_size, device=target.device, dtype=target.dtype)
            entry = {"span": (layer, target.num_layers), "entry_BND": hidden_BND}

        def verify(tokens_BN: Tensor = tokens_BN, tree: Tree = tree, entry: dict = entry) -> Tensor:
            return target.logits(target.forward(tokens_BN, tree, cache, **entry).hidden_BND)

        costs[size] = highest = max(highest, quickest_ms(verify))
    return costs


def quickest_ms(work: Callable[[], object]) -> float:
    """Returns the shortest of several runs of `work`, in milliseconds."""
    times = []
    for _ in range(REPEATS):
        _synchronise()
        began = time.perf_counter()
        work()
        _synchronise()
        times.append(time.perf_counter() - began)
    return min(times) * 1e3


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
