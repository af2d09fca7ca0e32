"""Sampled trees, from the leaves up: traversal verification, 2505.12398. On a chain it is block verification.

Shape suffixes: B rows, N nodes, L levels of the path from node 0, V vocabulary; X some of the rows.
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
    tokens_BN = draft.tokens_BN
    siblings = Siblings(draft)
    rows_B = torch.arange(len(tokens_BN), device=tokens_BN.device)
    level_B = torch.zeros_like(rows_B)
    node_BL = torch.zeros(len(tokens_BN), draft.tree.depth + 1, dtype=torch.long, device=tokens_BN.device)
    weight_BL = target_probs_BNV.new_ones(node_BL.shape)
    left = _Left(target_probs_BNV, draft, siblings, node_BL)
    is_done_B = torch.zeros_like(rows_B, dtype=torch.bool)

    while not is_done_B.all():
        node_B, weight_B = node_BL[rows_B, level_B], weight_BL[rows_B, level_B]
        # The first of several siblings that agree has the children of all; the others are then leaves.
        child_B, token_B, has_child_B = siblings.next(pick(siblings.first_BN, node_B))
        is_leaf_B = ~has_child_B & ~is_done_B
        passes_B = is_leaf_B & ((pick(uniforms_BU, node_B) < weight_B) | (level_B == 0))
        fails_B = is_leaf_B & ~passes_B

        X = rows_B[has_child_B & ~is_done_B]
        weight_BL[X, level_B[X] + 1] = (weight_B[X] * left.ratio(X, level_B[X], token_B[X])).clamp(max=1)
        level_B[X] += 1
        node_BL[X, level_B[X]] = child_B[X]
        left.begin(X, level_B[X])

        is_done_B = is_done_B | passes_B
        siblings.remove(node_B, fails_B)
        level_B = level_B - fails_B.long()
        parent_B = node_BL[rows_B, level_B]
        # A parent left without children is tested next, with less than its weight as S <= w: often that settles it.
        has_more_B = siblings.next(pick(siblings.first_BN, parent_B))[2]
        is_open_B = has_more_B | (level_B == 0) | (pick(uniforms_BU, parent_B) < weight_BL[rows_B, level_B])

        X = rows_B[fails_B & is_open_B]
        if len(X):
            weight_X = weight_BL[X, level_B[X]]
            left_X = left.take(X, level_B[X], weight_X, node_B[X])
            rest_X = left_X + 1 - weight_X
            weight_BL[X, level_B[X]] = torch.where(rest_X > 0, left_X / rest_X, 1.0)

    end_B = node_BL[rows_B, level_B]
    return drawn_at(end_B, left.law(level_B), at(target_probs_BNV, end_B), uniforms_BU[:, -1], draft)


class _Left:
    """The laws that stand at each level of each row's path, two numbers and a few tokens each.

    However often w target - draft has been taken and cut at zero, the target's law is (a target - b draft)+ / mass, as
    ((a x - b y)+ - c y)+ = (a x - (b + c) y)+ for y >= 0. Only tokens drawn without replacement and taken away keep a
    value of their own, as they have left the draft's law.
    """

    def __init__(self, target_probs_BNV: Tensor, draft: Draft, siblings: Siblings, node_BL: Tensor) -> None:
        assert draft.draft_probs_BNV is not None
        self._target_BNV, self._draft_BNV, self._tokens_BN = target_probs_BNV, draft.draft_probs_BNV, draft.tokens_BN
        self._above_BN, self._node_BL = siblings.above_BN, node_BL
        self._is_replaced = draft.drawn == "independent"
        self._a_BL, self._mass_BL, self._draft_mass_BL = (target_probs_BNV.new_ones(node_BL.shape) for _ in range(3))
        self._b_BL = torch.zeros_like(self._a_BL)
        self._is_gone_BN = torch.zeros_like(draft.tokens_BN, dtype=torch.bool)
        self._gone_BN = target_probs_BNV.new_zeros(draft.tokens_BN.shape)

    def begin(self, X: Tensor, level_X: Tensor) -> None:
        """Lays the untouched laws down at a level."""
        self._a_BL[X, level_X] = self._mass_BL[X, level_X] = self._draft_mass_BL[X, level_X] = 1
        self._b_BL[X, level_X] = 0

    def ratio(self, X: Tensor, level_X: Tensor, token_X: Tensor) -> Tensor:
        """Returns target(x) / draft(x) of a token that has not been taken away, by the laws as they stand."""
        node_X = self._node_BL[X, level_X]
        draft_X = self._draft_BNV[X, node_X, token_X].to(self._a_BL.dtype)
        wanted_X = self._a_BL[X, level_X] * self._target_BNV[X, node_X, token_X] - self._b_BL[X, level_X] * draft_X
        return wanted_X.clamp(min=0) / self._mass_BL[X, level_X] * self._draft_mass_BL[X, level_X] / draft_X

    def take(self, X: Tensor, level_X: Tensor, weight_X: Tensor, child_X: Tensor) -> Tensor:
        """Takes a child away from the laws at its parent's level; returns S [X], the mass that is left."""
        node_X = self._node_BL[X, level_X]
        factor_X = weight_X / self._mass_BL[X, level_X]
        self._a_BL[X, level_X] *= factor_X
        self._b_BL[X, level_X] = self._b_BL[X, level_X] * factor_X + 1 / self._draft_mass_BL[X, level_X]
        if not self._is_replaced:
            is_gone_XN = self._is_gone_BN[X] & (self._above_BN[X] == node_X[:, None])
            self._gone_BN[X] *= torch.where(is_gone_XN, factor_X[:, None], 1.0)
        left_XV, draft_XV = self._laws(X, level_X)
        left_X = left_XV.sum(-1)
        if not self._is_replaced:
            token_X1 = self._tokens_BN[X, child_X][:, None]
            self._is_gone_BN[X, child_X] = True
            self._gone_BN[X, child_X] = left_XV.gather(1, token_X1)[:, 0]
            self._draft_mass_BL[X, level_X] = draft_XV.scatter_(1, token_X1, 0.0).sum(-1)
        self._mass_BL[X, level_X] = left_X.clamp(min=torch.finfo(left_X.dtype).tiny)
        return left_X

    def law(self, level_B: Tensor) -> Tensor:
        """Returns the target's law [B, V] as it stands at each row's level, not normalised."""
        return self._laws(torch.arange(len(level_B), device=level_B.device), level_B)[0]

    def _laws(self, X: Tensor, level_X: Tensor) -> tuple[Tensor, Tensor]:
        """Returns what is left of the target's law and of the draft's, neither normalised [X, V]."""
        node_X, place = self._node_BL[X, level_X], (X, level_X)
        draft_XV = at(self._draft_BNV, node_X, X).to(self._a_BL.dtype)
        left_XV = at(self._target_BNV, node_X, X).mul_(self._a_BL[place][:, None])
        left_XV.addcmul_(draft_XV, self._b_BL[place][:, None], value=-1).clamp_(min=0)
        if not self._is_replaced:
            row, node = (self._is_gone_BN[X] & (self._above_BN[X] == node_X[:, None])).nonzero(as_tuple=True)
            token = self._tokens_BN[X[row], node]
            left_XV[row, token], draft_XV[row, token] = self._gone_BN[X[row], node], 0.0
        return left_XV, draft_XV
