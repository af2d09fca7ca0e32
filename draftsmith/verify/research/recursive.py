"""Recursive rejection of sampled trees, level by level, as in SpecInfer (2305.09781) and EAGLE (2401.15077).

Shape suffixes: B rows, N nodes, V vocabulary; X a subset of the rows.
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
    """Tests the children of the last accepted node in turn: x passes with probability min(1, target(x) / draft(x)).

    After a rejection the target's distribution becomes norm(max(target - draft, 0)) for the next sibling, and without
    replacement the draft's probability of x becomes 0. If no child is left, the next token follows the target's
    remaining distribution.
    """
    rejections, uniforms_BN = Rejections(target_probs_BNV, draft), uniforms_BU.cpu().numpy()
    text_B = np.zeros_like(rejections.rows_B)
    while True:
        child_B, has_child_B = rejections.next(rejections.rows_B, text_B)
        X = rejections.rows_B[has_child_B]
        if not len(X):
            break
        child_X = child_B[X]
        passes_X = uniforms_BN[X, child_X] < rejections.ratio(X, child_X)
        # Of siblings with the same token only the first can pass: a rejection leaves none of its probability.
        text_B[X[passes_X]] = child_X[passes_X]
        rejections.reject(X[~passes_X], child_X[~passes_X], np.ones((~passes_X).sum()))
    end_B = torch.from_numpy(text_B).to(draft.tokens_BN.device)
    return sample_next(end_B, rejections.target_probs(text_B), target_probs_BNV, uniforms_BU[:, -1], draft)
