"""Sampled trees, from the leaves up: traversal verification, 2505.12398. On a chain it is block verification.

Shape suffixes: B rows, N nodes, L levels of the path from node 0, V vocabulary; X the rows that a step concerns.
"""

import torch
from torch import Tensor

from draftsmith.tree import Draft
from draftsmith.verify.verdict import Siblings, Verdict, at, drawn_at

LOSSLESS = True
DRAWN = ("independent", "without_replacement")


def verify(target_probs_BNV: Tensor, draft: Draft, uniforms_BU: Tensor) -> Verdict:
    """Tries leaves, first children first, and accepts a whole path at once.

    A node's weight is w = min(1, w_parent target(x) / draft(x)) by its parent's laws as they stand, node 0's is 1. A
    leaf passes if u < w. If not, it is taken away: with S = sum max(w target - draft, 0) over its parent's laws, the
    parent's target becomes max(w target - draft, 0) / S, its weight S / (S + 1 - w), and a draft law without
    replacement loses x. A node without children is a leaf. The next token follows the target's law as it then stands.
    """
    assert draft.draft_probs_BNV is not None
    tokens_BN, dtype = draft.tokens_BN, target_probs_BNV.dtype
    num_rows, num_levels = len(tokens_BN), draft.tree.depth + 1
    siblings = Siblings(draft)
    rows_B = torch.arange(num_rows, device=tokens_BN.device)
    level_B = torch.zeros_like(rows_B)
    node_BL = torch.zeros(num_rows, num_levels, dtype=torch.long, device=tokens_BN.device)
    weight_BL = target_probs_BNV.new_ones(num_rows, num_levels)
    # Laws are copied to their level once something has been taken from them.
    is_changed_BL = torch.zeros_like(node_BL, dtype=torch.bool)
    target_BLV = target_probs_BNV.new_empty(num_rows, num_levels, target_probs_BNV.shape[-1])
    draft_BLV = torch.empty_like(target_BLV) if draft.drawn == "without_replacement" else None
    is_done_B = torch.zeros_like(rows_B, dtype=torch.bool)

    while not is_done_B.all():
        node_B, weight_B = node_BL[rows_B, level_B], weight_BL[rows_B, level_B]
        # The first of several siblings that agree has the children of all; the others are then leaves.
        child_B, token_B, has_child_B = siblings.next(siblings.first_BN[rows_B, node_B])
        descends_B = has_child_B & ~is_done_B
        is_changed_B = is_changed_BL[rows_B, level_B]
        wanted_B = torch.where(
            is_changed_B, target_BLV[rows_B, level_B, token_B], target_probs_BNV[rows_B, node_B, token_B]
        )
        drafted_B = draft.draft_probs_BNV[rows_B, node_B.clamp(max=draft.draft_probs_BNV.shape[1] - 1), token_B].to(
            dtype
        )
        if draft_BLV is not None:
            drafted_B = torch.where(is_changed_B, draft_BLV[rows_B, level_B, token_B], drafted_B)

        X = rows_B[descends_B]
        below_X = level_B[X] + 1
        node_BL[X, below_X] = child_B[X]
        weight_BL[X, below_X] = (weight_B * wanted_B / drafted_B).clamp(max=1)[X]
        is_changed_BL[X, below_X] = False

        is_leaf_B = ~has_child_B & ~is_done_B
        passes_B = is_leaf_B & ((uniforms_BU[rows_B, node_B] < weight_B) | (level_B == 0))
        is_done_B = is_done_B | passes_B
        fails_B = is_leaf_B & ~passes_B
        siblings.remove(node_B, fails_B)
        level_B = level_B + descends_B.long() - fails_B.long()

        X = rows_B[fails_B]
        if len(X):
            at_X, parent_X = level_B[X], node_BL[X, level_B[X]]
            is_changed_X1 = is_changed_BL[X, at_X][:, None]
            target_XV = torch.where(is_changed_X1, target_BLV[X, at_X], target_probs_BNV[X, parent_X])
            draft_XV = draft.draft_probs_BNV[X, parent_X].to(dtype)
            if draft_BLV is not None:
                draft_XV = torch.where(is_changed_X1, draft_BLV[X, at_X], draft_XV)
            weight_X = weight_BL[X, at_X]
            left_XV = (weight_X[:, None] * target_XV - draft_XV).clamp_(min=0)
            left_X = left_XV.sum(-1)
            rest_X = left_X + 1 - weight_X
            weight_BL[X, at_X] = torch.where(rest_X > 0, left_X / rest_X, 1.0)
            target_BLV[X, at_X] = torch.where(left_X[:, None] > 0, left_XV / left_X[:, None], target_XV)
            if draft_BLV is not None:
                draft_XV = draft_XV.scatter(1, tokens_BN[X, node_B[X]][:, None], 0.0)
                draft_BLV[X, at_X] = draft_XV / draft_XV.sum(-1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
            is_changed_BL[X, at_X] = True

    end_B = node_BL[rows_B, level_B]
    is_changed_B1 = is_changed_BL[rows_B, level_B][:, None]
    target_BV = at(target_probs_BNV, end_B)
    law_BV = torch.where(is_changed_B1, target_BLV[rows_B, level_B], target_BV)
    return drawn_at(end_B, law_BV, target_BV, uniforms_BU[:, -1], draft)
