"""Measures time on the current machine: of stages, and of forwards of the target.

Shape suffixes: B rows, T tokens, N nodes.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from draftsmith.core.target import Target
from draftsmith.core.tree import Tree, chain

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 63)
CONTEXT, REPEATS = 128, 7


class Stopwatch:
    """Times consecutive stages; on an accelerator it waits for pending work before reading the clock."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last = time.perf_counter()

    def lap_ms(self) -> float:
        """Returns the milliseconds since the last call."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        lap, self._last = 1e3 * (now - self._last), now
        return lap


@torch.inference_mode()
def verify_ms(target: Target, sizes: tuple[int, ...] = SIZES) -> dict[int, float]:
    """Returns the milliseconds to verify each number of nodes after a pending token and `CONTEXT` tokens of one row.

    Each is the shortest of several runs, and at least that of fewer nodes.
    """
    length = min(CONTEXT, target.context_length // 2)
    source = None
    if target.is_encoder_decoder:
        source_BT = torch.ones(1, length, dtype=torch.long, device=target.device)
        source = target.encode(source_BT, torch.ones_like(source_BT))
    cache = target.new_cache(1, source=source)
    target.prefill([[1] * length], cache)
    costs, highest = {}, 0.0
    for size in sizes:
        tree = flat(target, size)
        tokens_BN = torch.ones(1, tree.num_nodes, dtype=torch.long, device=target.device)

        def verify(tokens_BN: Tensor = tokens_BN, tree: Tree = tree) -> Tensor:
            return target.logits(target.forward(tokens_BN, tree, cache).hidden_BND)

        costs[size] = highest = max(highest, quickest_ms(verify))
    return costs


def flat(target: Target, num_nodes: int) -> Tree:
    """Returns a root with `num_nodes` children, or a chain of as many nodes if the target verifies chains only."""
    if not target.takes_trees:
        return chain(1 + num_nodes, target.device)
    return Tree.from_parents([[-1] + [0] * num_nodes], target.device)


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


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    """Runs a block on `count` CPU threads, or for 0 on the current number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
