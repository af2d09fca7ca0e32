"""Sampled trees, from the leaves up: traversal verification, 2505.12398. On a chain it is block verification.

Shape suffixes: B rows, N nodes, L levels of the path from node 0, V vocabulary; X and N some of the rows.
"""

import torch
from torch import Tensor

from draftsmith.tree import Draft
from draftsmith.verify.verdict import Siblings, Verdict, at, drawn_at, pick

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
    tokens_BN, draft_probs_BNV = draft.tokens_BN, draft.draft_probs_BNV
    num_rows, num_levels = len(tokens_BN), draft.tree.depth + 1
    siblings = Siblings(draft)
    rows_B = torch.arange(num_rows, device=tokens_BN.device)
    level_B = torch.zeros_like(rows_B)
    node_BL = torch.zeros(num_rows, num_levels, dtype=torch.long, device=tokens_BN.device)
    weight_BL = target_probs_BNV.new_ones(num_rows, num_levels)
    # Once something is taken from a level's law it is copied there; laws are kept with their sums, not normalised.
    is_changed_BL = torch.zeros_like(node_BL, dtype=torch.bool)
    left_BLV = target_probs_BNV.new_empty(num_rows, num_levels, target_probs_BNV.shape[-1])
    mass_BL, draft_mass_BL = torch.ones_like(weight_BL), torch.ones_like(weight_BL)
    is_gone_BN = torch.zeros_like(tokens_BN, dtype=torch.bool)
    is_done_B = torch.zeros_like(rows_B, dtype=torch.bool)

    while not is_done_B.all():
        node_B, weight_B = node_BL[rows_B, level_B], weight_BL[rows_B, level_B]
        # The first of several siblings that agree has the children of all; the others are then leaves.
        child_B, token_B, has_child_B = siblings.next(pick(siblings.first_BN, node_B))
        is_leaf_B = ~has_child_B & ~is_done_B
        passes_B = is_leaf_B & ((pick(uniforms_BU, node_B) < weight_B) | (level_B == 0))
        fails_B = is_leaf_B & ~passes_B

        X = rows_B[has_child_B & ~is_done_B]
        above_X, token_X = level_B[X], token_B[X]
        wanted_X = torch.where(
            is_changed_BL[X, above_X], left_BLV[X, above_X, token_X], target_probs_BNV[X, node_B[X], token_X]
        )
        ratio_X = wanted_X / mass_BL[X, above_X] * draft_mass_BL[X, above_X]
        ratio_X = ratio_X / draft_probs_BNV[X, node_B[X], token_X]
        level_B[X] += 1
        node_BL[X, above_X + 1] = child_B[X]
        weight_BL[X, above_X + 1] = (weight_B[X] * ratio_X).clamp(max=1)
        is_changed_BL[X, above_X + 1] = False
        mass_BL[X, above_X + 1] = draft_mass_BL[X, above_X + 1] = 1

        is_done_B = is_done_B | passes_B
        siblings.remove(node_B, fails_B)
        level_B = level_B - fails_B.long()
        parent_B = node_BL[rows_B, level_B]
        # A parent left without children is tested next, with less than its weight as S <= w: often that settles it.
        has_more_B = siblings.next(pick(siblings.first_BN, parent_B))[2]
        is_open_B = has_more_B | (level_B == 0) | (pick(uniforms_BU, parent_B) < weight_BL[rows_B, level_B])

        X = rows_B[fails_B & is_open_B]
        if len(X):
            level_X, parent_X, weight_X = level_B[X], parent_B[X], weight_BL[X, level_B[X]]
            N = X[~is_changed_BL[X, level_X]]
            left_BLV[N, level_B[N]] = target_probs_BNV[N, parent_B[N]]
            is_changed_BL[X, level_X] = True
            draft_XV = draft_probs_BNV[X, parent_X].to(left_BLV.dtype)
            if draft.drawn == "without_replacement":
                _forget(draft_XV, tokens_BN[X], is_gone_BN[X] & (siblings.above_BN[X] == parent_X[:, None]))
            left_XV = left_BLV[X, level_X].mul_((weight_X / mass_BL[X, level_X])[:, None])
            left_XV = left_XV.addcmul_(draft_XV, -1 / draft_mass_BL[X, level_X][:, None]).clamp_(min=0)
            left_X = left_XV.sum(-1)
            rest_X = left_X + 1 - weight_X
            weight_BL[X, level_X] = torch.where(rest_X > 0, left_X / rest_X, 1.0)
            left_BLV[X, level_X] = left_XV
            mass_BL[X, level_X] = left_X.clamp(min=torch.finfo(left_X.dtype).tiny)
            if draft.drawn == "without_replacement":
                is_gone_BN[X, node_B[X]] = True
                draft_mass_BL[X, level_X] = draft_XV.scatter_(1, tokens_BN[X, node_B[X]][:, None], 0.0).sum(-1)

    end_B = node_BL[rows_B, level_B]
    target_BV = at(target_probs_BNV, end_B)
    law_BV = torch.where(is_changed_BL[rows_B, level_B][:, None], left_BLV[rows_B, level_B], target_BV)
    return drawn_at(end_B, law_BV, target_BV, uniforms_BU[:, -1], draft)


def _forget(law_XV: Tensor, tokens_XN: Tensor, is_gone_XN: Tensor) -> None:
    """Gives the tokens that are gone no chance."""
    rows, nodes = is_gone_XN.nonzero(as_tuple=True)
    law_XV[rows, tokens_XN[rows, nodes]] = 0.0
