"""Traversal verification of sampled trees, from the leaves up: 2505.12398. On a chain it is block verification.

Shape suffixes: B rows, N nodes, V vocabulary; X and F subsets of the rows.
"""

import numpy as np
import torch
from torch import Tensor

from draftsmith.core.tree import Draft, Verdict
from draftsmith.verify.paths import sample_next
from draftsmith.verify.rejection import Rejections

LOSSLESS = True
SCHEMES = ("independent", "without_replacement")


def verify(target_probs_BNV: Tensor, draft: Draft, uniforms_BU: Tensor) -> Verdict:
    """Tests leaves, first children first, and accepts the whole path to the first leaf that passes.

    A node's weight is w = min(1, w_parent target(x) / draft(x)) by its parent's remaining distributions; node 0's is 1.
    A leaf passes if u < w. If not, it is removed: with S = sum max(w target - draft, 0) over its parent's
    distributions, the parent's target becomes max(w target - draft, 0) / S, its weight S / (S + 1 - w), and without
    replacement the draft's probability of x becomes 0. A node without children is a leaf. The next token follows the
    target's remaining distribution.
    """
    rejections, uniforms_BN = Rejections(target_probs_BNV, draft), uniforms_BU.cpu().numpy()
    rows_B = rejections.rows_B
    node_B, is_done_B = np.zeros_like(rows_B), np.zeros(len(rows_B), dtype=bool)
    weight_BN = np.ones(rejections.first_BN.shape)

    while not is_done_B.all():
        weight_B, uniform_B = weight_BN[rows_B, node_B], uniforms_BN[rows_B, node_B]
        # Of siblings with the same token the first has the children of all; the others are leaves.
        child_B, has_child_B = rejections.next(rows_B, rejections.first_BN[rows_B, node_B])
        # Weights only fall on the way down: below a weight of 0 nothing can pass.
        is_leaf_B = ~is_done_B & (~has_child_B | (weight_B == 0))
        passes_B = is_leaf_B & (uniform_B < weight_B)

        X = rows_B[~is_done_B & ~is_leaf_B]
        weight_BN[X, child_B[X]] = np.minimum(weight_B[X] * rejections.ratio(X, child_B[X]), 1)

        F = rows_B[is_leaf_B & ~passes_B]
        node_F, parent_F = node_B[F], rejections.above_BN[F, node_B[F]]
        weight_F = weight_BN[F, parent_F]
        rejections.drop(F, node_F)
        # A parent left without children is tested next, by at most its weight as S <= w: often it fails already here.
        is_open_F = rejections.next(F, parent_F)[1] | (uniforms_BN[F, parent_F] < weight_F)
        S_F = rejections.reject(F[is_open_F], node_F[is_open_F], weight_F[is_open_F])
        # In this order of operations a weight of 1, such as node 0's, stays exactly 1.
        total_F = 1 - weight_F[is_open_F] + S_F
        weight_BN[F[is_open_F], parent_F[is_open_F]] = np.where(total_F > 0, S_F / np.where(total_F > 0, total_F, 1), 1)

        node_B[X], node_B[F] = child_B[X], parent_F
        is_done_B |= passes_B

    next_probs_BV = rejections.target_probs(rejections.first_BN[rows_B, node_B])
    end_B = torch.from_numpy(node_B).to(draft.tokens_BN.device)
    return sample_next(end_B, next_probs_BV, target_probs_BNV, uniforms_BU[:, -1], draft)
