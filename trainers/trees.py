"""Static draft trees: grown from how often each guess is right, cut where another node costs more than it brings.

Shape suffixes: K heads (depths), R ranks of a head's guesses.
"""

import heapq
import time
from collections.abc import Callable

import torch
from torch import Tensor

from draftsmith import Target
from draftsmith.tree import Tree

Path = tuple[int, ...]
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 63)
CONTEXT, REPEATS = 128, 7


def grow(accuracy_KR: Tensor, num_nodes: int) -> list[tuple[Path, float]]:
    """Returns up to `num_nodes` nodes, best first, each with the chance that it is accepted.

    `accuracy_KR[k, r]` is how often guess r of head k is the right token. Greedy as in Medusa (2401.10774, section
    2.3.3): of all next siblings and first children add the one with the largest product along its path, heads taken
    as independent. Any first part of the list is a tree too, and the best for its size; nodes never right are left out.
    """
    num_heads, num_ranks = accuracy_KR.shape
    accuracy = accuracy_KR.tolist()
    queue: list[tuple[float, Path, float]] = [(-accuracy[0][0], (0,), 1.0)]
    nodes: list[tuple[Path, float]] = []
    while queue and len(nodes) < num_nodes:
        negative, path, parent = heapq.heappop(queue)
        if negative == 0:
            break
        nodes.append((path, -negative))
        depth, rank = len(path), path[-1]
        if rank + 1 < num_ranks:
            heapq.heappush(queue, (-parent * accuracy[depth - 1][rank + 1], (*path[:-1], rank + 1), parent))
        if depth < num_heads:
            heapq.heappush(queue, (negative * accuracy[depth][0], (*path, 0), -negative))
    return nodes


def best_size(nodes: list[tuple[Path, float]], cost_ms: dict[int, float]) -> int:
    """Returns how many nodes give the most tokens a millisecond; `cost_ms` is of a round with so many nodes."""

    def rate(size: int) -> float:
        return (1 + sum(chance for _, chance in nodes[:size])) / cost_ms[size]

    return max((size for size in cost_ms if size <= len(nodes)), key=rate)


@torch.inference_mode()
def verify_ms(target: Target, sizes: tuple[int, ...] = SIZES) -> dict[int, float]:
    """Returns the milliseconds the target takes for a root and so many nodes after a context of `CONTEXT` tokens.

    The quickest of several runs each, and never less than for fewer nodes.
    """
    cache = target.new_cache(1)
    target.prefill([[1] * min(CONTEXT, target.context_length // 2)], cache)
    found: dict[int, float] = {}
    for size in sizes:
        tree = Tree.from_parents([[-1] + [0] * size], target.device)
        tokens_1N = torch.ones(1, size + 1, dtype=torch.long, device=target.device)

        def verify(tokens_1N: Tensor = tokens_1N, tree: Tree = tree) -> Tensor:
            return target.logits(target.forward(tokens_1N, tree, cache).hidden_BND)

        found[size] = quickest_ms(verify)
    costs, highest = {}, 0.0
    for size, cost in found.items():
        costs[size] = highest = max(highest, cost)
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
