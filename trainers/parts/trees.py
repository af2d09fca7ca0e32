"""Static draft trees: grown from how often each guess is right, cut where another node costs more than it brings.

Shape suffixes: M, N positions, T positions of one row, K heads (depths), R ranks of a head's guesses.
"""

import heapq
from collections.abc import Callable
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from draftsmith import Target
from draftsmith.core.sampling import Sampling
from draftsmith.core.tree import Draft, Tree
from draftsmith.length.costs import verify_ms
from draftsmith.parts.growth import draw_siblings
from draftsmith.verify.research import recursive

Path = tuple[int, ...]
ChildChances = Callable[[Path], list[float]]
"""The chance of each next guess, by rank, once a path has been accepted; nothing past the last head."""
PRIOR = 16


def grow(children: ChildChances, num_nodes: int) -> list[tuple[Path, float]]:
    """Returns up to `num_nodes` nodes, best first, each with the chance that it is accepted.

    Greedy as in Medusa (2401.10774, section 2.3.3): of all nodes whose parent is in the tree add the one with the
    largest product of chances along its path. Any first part of the list is a tree too, and the best for its size;
    nodes never right are left out.
    """
    queue: list[tuple[float, Path]] = [(-chance, (rank,)) for rank, chance in enumerate(children(()))]
    heapq.heapify(queue)
    nodes: list[tuple[Path, float]] = []
    while queue and len(nodes) < num_nodes:
        negative, path = heapq.heappop(queue)
        if negative == 0:
            break
        nodes.append((path, -negative))
        for rank, chance in enumerate(children(path)):
            heapq.heappush(queue, (negative * chance, (*path, rank)))
    return nodes


def conditional_accuracy(ranks_MK: Tensor, num_ranks: int) -> ChildChances:
    """Returns how often each guess was right at M positions, given that the guesses before it on its path were.

    `ranks_MK[m, k]` is the place of the right token among head k's guesses, -1 where there was none. Heads are right
    together far more often than independent ones would be, as in text that repeats; so each share is that of the
    positions where the path was right, and of `PRIOR` more that divide as the head's guesses do everywhere.
    """
    right_MKR = ranks_MK[:, :, None] == torch.arange(num_ranks, device=ranks_MK.device)
    known_MK = ranks_MK >= 0
    everywhere_KR = right_MKR.sum(0) / known_MK.sum(0).clamp(min=1)[:, None]

    def children(path: Path) -> list[float]:
        depth = len(path)
        if depth == ranks_MK.shape[1]:
            return []
        is_there_M = known_MK[:, depth]
        for head, rank in enumerate(path):
            is_there_M = is_there_M & right_MKR[:, head, rank]
        right_R = right_MKR[is_there_M, depth].sum(0) + PRIOR * everywhere_KR[depth]
        return (right_R / (is_there_M.sum() + PRIOR)).tolist()

    return children


def non_increasing(children: ChildChances) -> ChildChances:
    """Returns these chances with none above that of the guess before it: a tree then holds guesses in turn, from 0."""
    return lambda path: list(accumulate(children(path), min))


def tokens_per_round(nodes: list[tuple[Path, float]], rows: list[Tensor]) -> float:
    """Returns how many tokens a round brings when each row's text, of ranks [T, K], is decoded with this tree.

    A round begins where the last one ended, which is rather where heads were wrong: fewer tokens than the chances of
    the nodes promise, which are those of all positions alike.
    """
    num_tokens, num_rounds = 0, 0
    for ranks_TK in rows:
        accepted_T = torch.zeros(len(ranks_TK), dtype=torch.long)
        for path, _ in nodes:
            is_right_T = (ranks_TK[:, : len(path)] == torch.tensor(path)).all(1)
            accepted_T = torch.where(is_right_T, accepted_T.clamp(min=len(path)), accepted_T)
        accepted, place = accepted_T.tolist(), 0
        while place < len(accepted):
            num_rounds += 1
            place += accepted[place] + 1
        num_tokens += place
    return num_tokens / max(num_rounds, 1)


def best_size(nodes: list[tuple[Path, float]], rows: list[Tensor], cost_ms: dict[int, float]) -> int:
    """Returns how many nodes decode `rows` with the most tokens a millisecond; `cost_ms` is of a round so large."""
    sizes = [size for size in cost_ms if size <= len(nodes)]
    return max(sizes, key=lambda size: tokens_per_round(nodes[:size], rows) / cost_ms[size])


def best_tree(
    acceptance: list[float], cost_ms: Callable[[int, int], float], *, max_nodes: int, max_depth: int
) -> list[Path]:
    """Returns the nodes of the tree that brings most tokens a millisecond: Sequoia's dynamic program, 2402.12374.

    `acceptance[r]` is the chance that child r of an accepted node is the one accepted next, the same at every node;
    `cost_ms(n, d)` what a round with n nodes, d deep, takes. The most expected tokens of a subtree of m nodes (its root
    among them), at most l levels and b children at its root is T(m, l, b) = max_y T(y, l, b - 1) + acceptance[b - 1]
    max_c T(m - y, l - 1, c), and T(1, l, 0) = 1.
    """
    Found = tuple[float, list[Path]]  # expected tokens and the nodes that bring them, the root first
    most: dict[tuple[int, int], Found] = {}
    for level in range(max_depth + 1):
        with_children: dict[tuple[int, int], Found] = {(1, 0): (1.0, [()])}
        for branch in range(1, len(acceptance) + 1 if level else 1):
            for size in range(branch + 1, max_nodes + 2):
                best: Found | None = None
                for before in range(branch, size):
                    left, below = with_children.get((before, branch - 1)), most.get((size - before, level - 1))
                    if left is None or below is None:
                        continue
                    tokens = left[0] + acceptance[branch - 1] * below[0]
                    if best is None or tokens > best[0]:
                        best = (tokens, left[1] + [(branch - 1, *path) for path in below[1]])
                if best is not None:
                    with_children[size, branch] = best
        for (size, _), found in with_children.items():
            if found[0] > most.get((size, level), (0.0, []))[0]:
                most[size, level] = found

    def rate(key: tuple[int, int]) -> float:
        size, level = key
        return most[key][0] / cost_ms(size - 1, level)

    return sorted(most[max(most, key=rate)][1][1:], key=lambda path: (len(path), path))


def accepted_ranks(target_logits_NV: Tensor, draft_logits_NV: Tensor, sampling: Sampling, num_ranks: int) -> Tensor:
    """Returns which child [N, R] is accepted of so many siblings drafted at each position, ones and zeros.

    Greedily they are the draft's best; sampled they are drawn without replacement and judged by recursive rejection.
    """
    if sampling.is_greedy:
        chosen_N1 = target_logits_NV.argmax(-1, keepdim=True)
        ranks_N1 = (draft_logits_NV > draft_logits_NV.gather(1, chosen_N1)).sum(1, keepdim=True)
        return (ranks_N1 == torch.arange(num_ranks, device=ranks_N1.device)).float()
    probs_N1V, generator = sampling.probs(draft_logits_NV)[:, None], torch.Generator().manual_seed(0)
    children_NR = draw_siblings(probs_N1V, num_ranks, "without_replacement", generator)[:, 0]
    draft = Draft(
        tokens_BN=torch.nn.functional.pad(children_NR, (1, 0)),
        tree=Tree.from_parents([[-1] + [0] * num_ranks], children_NR.device),
        draft_probs_BNV=probs_N1V,
        sampling_scheme="without_replacement",
    )
    uniforms_NU = torch.rand(len(children_NR), num_ranks + 2, generator=generator, dtype=torch.float64)
    target_N1V = sampling.probs(target_logits_NV)[:, None]
    verdict = recursive.verify(target_N1V, draft, uniforms_NU.to(children_NR.device))
    ends_N = verdict.path_BP.gather(1, verdict.num_accepted_B[:, None])
    return (ends_N == 1 + torch.arange(num_ranks, device=ends_N.device)).float()


def round_ms(target: Target, draft: Target) -> Callable[[int, int], float]:
    """Returns what a round takes, as measured: `draft` run once a level, and the target over all nodes."""
    level_ms, costs = verify_ms(draft, sizes=(8,))[8], verify_ms(target)
    return lambda num_nodes, depth: depth * level_ms + float(np.interp(num_nodes, list(costs), list(costs.values())))
