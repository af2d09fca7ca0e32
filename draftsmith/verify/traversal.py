"""Sampled trees, from the leaves up: traversal verification, 2505.12398. On a chain it is block verification.

Shape suffixes: B rows, N nodes, V vocabulary; X some of the rows.
"""

import numpy as np
import torch
from torch import Tensor

from draftsmith.core.tree import Draft, Verdict
from draftsmith.verify.paths import drawn_at
from draftsmith.verify.rejection import Rejections

LOSSLESS = True
SCHEMES = ("independent", "without_replacement")


def verify(target_probs_BNV: Tensor, draft: Draft, uniforms_BU: Tensor) -> Verdict:
    """Tries leaves, first children first, and accepts a whole path at once.

    A node's weight is w = min(1, w_parent target(x) / draft(x)) by its parent's laws as they stand, node 0's is 1. A
    leaf passes if u < w. If not, it is taken away: with S = sum max(w target - draft, 0) over its parent's laws, the
    parent's target becomes max(w target - draft, 0) / S, its weight S / (S + 1 - w), and a draft law without
    replacement loses x. A node without children is a leaf. The next token follows the target's law as it then stands.
    """
    left, uniforms_BN = Rejections(target_probs_BNV, draft), uniforms_BU.cpu().numpy()
    rows_B = left.rows_B
    node_B, is_done_B = np.zeros_like(rows_B), np.zeros(len(rows_B), dtype=bool)
    weight_BN = np.ones(left.first_BN.shape)

    while not is_done_B.all():
        weight_B, uniform_B = weight_BN[rows_B, node_B], uniforms_BN[rows_B, node_B]
        # The first of several siblings that agree has the children of all; the others are then leaves.
        child_B, has_child_B = left.next(rows_B, left.first_BN[rows_B, node_B])
        # Weights only fall on the way down: below one of zero nothing can pass.
        is_leaf_B = ~is_done_B & (~has_child_B | (weight_B == 0))
        passes_B = is_leaf_B & (uniform_B < weight_B)

        X = rows_B[~is_done_B & ~is_leaf_B]
        weight_BN[X, child_B[X]] = np.minimum(weight_B[X] * left.ratio(X, child_B[X]), 1)

        F = rows_B[is_leaf_B & ~passes_B]
        node_F, parent_F = node_B[F], left.above_BN[F, node_B[F]]
        weight_F = weight_BN[F, parent_F]
        left.drop(F, node_F)
        # A parent left without children is tested next, with less than its weight as S <= w: often that settles it.
        is_open_F = left.next(F, parent_F)[1] | (uniforms_BN[F, parent_F] < weight_F)
        S_F = left.reject(F[is_open_F], node_F[is_open_F], weight_F[is_open_F])
        # In this order a weight of one, as node 0's, stays one to the last bit.
        rest_F = 1 - weight_F[is_open_F] + S_F
        weight_BN[F[is_open_F], parent_F[is_open_F]] = np.where(rest_F > 0, S_F / np.where(rest_F > 0, rest_F, 1), 1)

        node_B[X], node_B[F] = child_B[X], parent_F
        is_done_B |= passes_B

    next_probs_BV = left.probs(left.first_BN[rows_B, node_B])
    end_B = torch.from_numpy(node_B).to(draft.tokens_BN.device)
    return drawn_at(end_B, next_probs_BV, target_probs_BNV, uniforms_BU[:, -1], draft)
