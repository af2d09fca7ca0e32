"""Sampled trees, level by level: recursive rejection, as SpecInfer (2305.09781) and EAGLE (2401.15077) do it.

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
    """Tries the children of the last accepted node in turn: child x passes with probability min(1, target(x)/draft(x)).

    A rejection leaves norm(max(target - draft, 0)) as the target's law for the next sibling, and siblings drawn without
    replacement a draft law with no chance of x. With no child left the next token follows the law that remains.
    """
    left, uniforms_BN = Rejections(target_probs_BNV, draft), uniforms_BU.cpu().numpy()
    text_B = np.zeros_like(left.rows_B)
    while True:
        child_B, is_there_B = left.next(left.rows_B, text_B)
        X = left.rows_B[is_there_B]
        if not len(X):
            break
        child_X = child_B[X]
        passes_X = uniforms_BN[X, child_X] < left.ratio(X, child_X)
        # Of siblings that agree only the first can pass: a rejection leaves nothing of its token.
        text_B[X[passes_X]] = child_X[passes_X]
        left.reject(X[~passes_X], child_X[~passes_X], np.ones((~passes_X).sum()))
    end_B = torch.from_numpy(text_B).to(draft.tokens_BN.device)
    return drawn_at(end_B, left.probs(text_B), target_probs_BNV, uniforms_BU[:, -1], draft)
