"""Static draft trees, grown from measured acceptance and sized by measured costs.

Shape suffixes: M, N positions, T positions of one row, K heads (depths), R ranks of a head's tokens.
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
from draftsmith.parts.autoregressive import draw_siblings
from draftsmith.verify.research import recursive

NodePath = tuple[int, ...]
ChildProbs = Callable[[NodePath], list[float]]
"""Node -> acceptance probability of each child, by rank, given that the node was; empty past the last head."""
PRIOR = 16
"""Weight, in positions, of a head's overall accuracy in the estimates for one path."""


def chain(depth: int) -> tuple[NodePath, ...]:
    """Returns the chain of each head's most likely token."""
    return tuple((0,) * size for size in range(1, depth + 1))


def grow(children: ChildProbs, num_nodes: int) -> list[tuple[NodePath, float]]:
    """Returns up to `num_nodes` nodes, best first, each with the probability that it is accepted.

    Greedy as in Medusa (2401.10774, section 2.3.3): of all nodes whose parent is in the tree, add the one with the
    largest product of probabilities along its path. Every prefix of the list is the best tree of its size; nodes of
    probability 0 are left out.
    """
    queue: list[tuple[float, NodePath]] = [(-prob, (rank,)) for rank, prob in enumerate(children(()))]
    heapq.heapify(queue)
    nodes: list[tuple[NodePath, float]] = []
    while queue and len(nodes) < num_nodes:
        negative, path = heapq.heappop(queue)
        if negative == 0:
            break
        nodes.append((path, -negative))
        for rank, prob in enumerate(children(path)):
            heapq.heappush(queue, (negative * prob, (*path, rank)))
    return nodes


def conditional_accuracy(ranks_MK: Tensor, num_ranks: int) -> ChildProbs:
    """Returns the accuracy of each head's token by rank over M positions, given that its path so far was correct.

    `ranks_MK[m, k]` is the rank of the label in head k's logits, -1 if there is none. Heads are correct together far
    more often than independent ones would be, as in text that repeats; so accuracy is measured at the positions where
    the path was correct, plus `PRIOR` positions with the head's accuracy over all positions.
    """
    right_MKR = ranks_MK[:, :, None] == torch.arange(num_ranks, device=ranks_MK.device)
    known_MK = ranks_MK >= 0
    overall_KR = right_MKR.sum(0) / known_MK.sum(0).clamp(min=1)[:, None]

    def children(path: NodePath) -> list[float]:
        depth = len(path)
        if depth == ranks_MK.shape[1]:
            return []
        is_counted_M = known_MK[:, depth]
        for head, rank in enumerate(path):
            is_counted_M = is_counted_M & right_MKR[:, head, rank]
        right_R = right_MKR[is_counted_M, depth].sum(0) + PRIOR * overall_KR[depth]
        return (right_R / (is_counted_M.sum() + PRIOR)).tolist()

    return children


def non_increasing(children: ChildProbs) -> ChildProbs:
    """Returns these probabilities made non-increasing in rank, so that a tree contains ranks without gaps, from 0."""
    return lambda path: list(accumulate(children(path), min))


def tokens_per_round(nodes: list[tuple[NodePath, float]], rows: list[Tensor]) -> float:
    """Returns the tokens committed per round when rows with ranks [T, K] are decoded with this tree.

    Each round begins where the last one ended, more often where heads were wrong. The result is therefore smaller than
    the sum of the nodes' probabilities, which are means over all positions.
    """
    num_tokens, num_rounds = 0, 0
    for ranks_TK in rows:
        accepted_T = torch.zeros(len(ranks_TK), dtype=torch.long)
        for path, _ in nodes:
            is_right_T = (ranks_TK[:, : len(path)] == torch.tensor(path)).all(1)
            accepted_T = torch.where(is_right_T, accepted_T.clamp(min=len(path)), accepted_T)
        accepted, position = accepted_T.tolist(), 0
        while position < len(accepted):
            num_rounds += 1
            position += accepted[position] + 1
        num_tokens += position
    return num_tokens / max(num_rounds, 1)


def best_size(nodes: list[tuple[NodePath, float]], rows: list[Tensor], cost_ms: dict[int, float]) -> int:
    """Returns the number of nodes that decodes `rows` with the most tokens per ms; `cost_ms` maps sizes to costs."""
    sizes = [size for size in cost_ms if size <= len(nodes)]
    return max(sizes, key=lambda size: tokens_per_round(nodes[:size], rows) / cost_ms[size])


def best_tree(
    acceptance: list[float], cost_ms: Callable[[int, int], float], *, max_nodes: int, max_depth: int
) -> list[NodePath]:
    """Returns the nodes of the tree with the most tokens per ms, by Sequoia's dynamic program (2402.12374).

    `acceptance[r]` is the probability that child r of an accepted node is accepted next, the same at every node;
    `cost_ms(n, d)` the time of a round with n nodes at depths up to d. The largest expected number of tokens of a
    subtree of m nodes, its root included, with at most l levels and b children of the root is
    T(m, l, b) = max_y T(y, l, b - 1) + acceptance[b - 1] max_c T(m - y, l - 1, c), and T(1, l, 0) = 1.
    """
    Subtree = tuple[float, list[NodePath]]  # expected tokens and its nodes, the root first
    most: dict[tuple[int, int], Subtree] = {}
    for level in range(max_depth + 1):
        with_children: dict[tuple[int, int], Subtree] = {(1, 0): (1.0, [()])}
        for branch in range(1, len(acceptance) + 1 if level else 1):
            for size in range(branch + 1, max_nodes + 2):
                best: Subtree | None = None
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
    """Returns 1 for the accepted one of `num_ranks` siblings drafted at each position, else 0 [N, R].

    In greedy decoding siblings are the draft's most likely tokens; else they are sampled without replacement and
    verified by recursive rejection.
    """
    if sampling.is_greedy:
        chosen_N1 = target_logits_NV.argmax(-1, keepdim=True)
        ranks_N1 = (~(draft_logits_NV <= draft_logits_NV.gather(1, chosen_N1))).sum(1, keepdim=True)  # NaN is last
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
    """Returns (nodes, depth) -> measured ms of a round, which runs `draft` once per level and the target once."""
    level_ms, costs = verify_ms(draft, sizes=(8,))[8], verify_ms(target)
    return lambda num_nodes, depth: depth * level_ms + float(np.interp(num_nodes, list(costs), list(costs.values())))
