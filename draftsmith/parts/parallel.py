"""Drafts from one forward that gives logits for each of the next positions: chains, and best-first trees.

The logits depend on the committed text alone, but for a bias by the token before, which a drafter may add. So each
token's distribution is known exactly once its predecessor is drafted, and the lossless verifiers apply at any
temperature.

Shape suffixes: B rows, K positions drafted, R likeliest tokens of each, N nodes, V vocabulary, W tokens of
the draft vocabulary.
"""

import heapq
import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from draftsmith.core.drafter import Session
from draftsmith.core.tree import Draft, Tree, chain
from draftsmith.parts import autoregressive
from draftsmith.parts.checks import MAX_NODES, check_at_least

Bias = Callable[[Tensor], Tensor]
"""From tokens [...] to what is added to the logits of the position after each [..., W]."""


class Shape(Protocol):
    """The settings of a drafter's configuration that select chains or trees."""

    @property
    def num_nodes(self) -> int:
        """Nodes of a tree; 0 for chains."""


def check_shape(shape: Shape) -> None:
    """Raises ValueError if the number of nodes is out of range."""
    check_at_least(shape, 0, "num_nodes", most=MAX_NODES)


def draft(
    logits_BKW: Tensor,
    session: Session,
    shape: Shape,
    vocabulary: autoregressive.DraftVocabulary | None = None,
    bias: Bias | None = None,
) -> Draft:
    """Drafts a chain, or a tree if `shape.num_nodes` is not 0 and the target verifies trees.

    The logits are of the tokens of `vocabulary`, or of all tokens; `bias` is added to those after each drafted token.
    """
    is_tree = shape.num_nodes > 0 and session.target.takes_trees
    if bias is not None:
        return _draft_in_turn(logits_BKW, session, shape.num_nodes if is_tree else 0, vocabulary, bias)
    if is_tree:
        return draft_tree(logits_BKW, session, shape.num_nodes, vocabulary)
    return draft_chain(logits_BKW, session, vocabulary)


def _draft_in_turn(
    logits_BKW: Tensor,
    session: Session,
    num_nodes: int,
    vocabulary: autoregressive.DraftVocabulary | None,
    bias: Bias,
) -> Draft:
    """Drafts level by level, as each token's distribution depends on the one before it.

    Of a level of the tree of the `num_nodes` best paths at most `num_nodes` are in it, so a dynamic tree that expands
    as many is that tree.
    """

    def logits_after(tokens_BN: Tensor, tree: Tree, first: int) -> Tensor:
        level = int(tree.depths_RN[0, first])
        return logits_BKW[:, level, None] + bias(tokens_BN[:, first:])

    depth = logits_BKW.shape[1]
    if not num_nodes:
        return autoregressive.draft_chain(logits_after, session, depth, vocabulary)
    width = min(num_nodes, logits_BKW.shape[-1])
    return autoregressive.draft_dynamic_tree(
        logits_after, session, width=width, num_nodes=num_nodes, depth=depth, vocabulary=vocabulary
    )


def draft_chain(
    logits_BKW: Tensor, session: Session, vocabulary: autoregressive.DraftVocabulary | None = None
) -> Draft:
    """Drafts a chain, token k drawn from the k-th distribution; greedily its likeliest token.

    A row stops early when `session.should_continue` returns False after a token.
    """
    sampling, num_rows = session.sampling, len(session.rows)
    if sampling.is_greedy:
        probs_BKV = None
        logit_BK1, token_BK1 = autoregressive.top(logits_BKW, 1, vocabulary)
        tokens_BK = token_BK1[..., 0]
    else:
        logits_BKW = logits_BKW if vocabulary is None else vocabulary.spread(logits_BKW)
        probs_BKV = sampling.probs(logits_BKW)
        tokens_BK = torch.stack([session.draw(one, depth) for depth, one in enumerate(probs_BKV.unbind(1))], dim=1)
        logit_BK1 = logits_BKW.gather(-1, tokens_BK[..., None])
    confidences_BK = autoregressive.probabilities(logit_BK1, logits_BKW)[..., 0].tolist()
    num_nodes, is_drafting = [1] * num_rows, [True] * num_rows
    for depth in range(logits_BKW.shape[1]):
        for row in range(num_rows):
            if is_drafting[row]:
                num_nodes[row] += 1
                is_drafting[row] = session.should_continue(row, confidences_BK[row][depth])
    longest = max(num_nodes)
    return Draft(
        tokens_BN=torch.cat([session.pending()[:, None], tokens_BK[:, : longest - 1]], dim=1),
        tree=chain(longest, session.target.device),
        num_nodes=num_nodes if min(num_nodes) < longest else None,
        draft_probs_BNV=None if probs_BKV is None else probs_BKV[:, : longest - 1],
        sampling_scheme="deterministic" if probs_BKV is None else "independent",
        confidences=lambda: confidences_BK,
    )


def draft_tree(
    logits_BKW: Tensor, session: Session, num_nodes: int, vocabulary: autoregressive.DraftVocabulary | None = None
) -> Draft:
    """Drafts, for each row, the tree of the `num_nodes` paths with the largest products of probabilities.

    The products are those of the positions' distributions, as in DDTree (2604.12989). No token is sampled, so the draft
    is deterministic.
    """
    device = session.target.device
    count = min(num_nodes, logits_BKW.shape[-1])
    log_BKR, token_BKR = autoregressive.top(logits_BKW.float().log_softmax(-1), count, vocabulary)
    tokens, parents, confidences = [], [], []
    for row, logs, ids in zip(session.rows, log_BKR.tolist(), token_BKR.tolist(), strict=True):
        nodes = best_paths(logs, num_nodes)
        confidences.append([math.exp(logs[depth][rank]) for _, depth, rank in nodes])
        tokens.append([row[-1]] + [ids[depth][rank] for _, depth, rank in nodes])
        parents.append([-1] + [parent for parent, _, _ in nodes])
    return Draft(
        tokens_BN=torch.tensor(tokens, device=device),
        tree=Tree.from_parents(parents, device),
        confidences=lambda: confidences,
    )


def best_paths(log_probs: list[list[float]], num_nodes: int) -> list[tuple[int, int, int]]:
    """Returns the (parent, depth, rank) of the nodes 1, 2, ... of the best tree, parents before children.

    `log_probs[depth][rank]` is that of a depth's token of a rank, in descending order. A path's score is the sum along
    it. A path is taken after its parent and its better sibling, whose scores are no smaller, so the nodes are the
    `num_nodes` best paths of all; there are fewer if the tree has no more.
    """
    found: list[tuple[int, int, int]] = []
    # Minus the score, a number that breaks ties, the score of the parent, and the node.
    heap = [(-log_probs[0][0], 0, 0.0, (0, 0, 0))]
    number = 1
    while heap and len(found) < num_nodes:
        minus_score, _, above, (parent, depth, rank) = heapq.heappop(heap)
        found.append((parent, depth, rank))
        if rank + 1 < len(log_probs[depth]):
            heapq.heappush(heap, (-above - log_probs[depth][rank + 1], number, above, (parent, depth, rank + 1)))
            number += 1
        if depth + 1 < len(log_probs):
            child = (len(found), depth + 1, 0)
            heapq.heappush(heap, (minus_score - log_probs[depth + 1][0], number, -minus_score, child))
            number += 1
    return found
