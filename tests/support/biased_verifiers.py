"""Wrong verifiers, whose bias the tests of sampled distributions must detect."""

import torch
from torch import Tensor

from draftsmith.core.sampling import draw
from draftsmith.core.tree import Draft, Verdict
from draftsmith.verify.paths import follow
from draftsmith.verify.research import token


def accept_by_the_targets_chance(target_probs_BNV: Tensor, draft: Draft, uniforms_BU: Tensor) -> Verdict:
    """WRONG: forgets by what law the draft was drawn, and draws from the target's law after a rejection."""
    num_drafted = draft.tree.num_nodes - 1
    target_of_drafted = target_probs_BNV[:, :num_drafted].gather(2, draft.tokens_BN[:, 1:, None])[..., 0]
    is_accepted_BN = torch.ones_like(draft.tokens_BN, dtype=torch.bool)
    is_accepted_BN[:, 1:] = uniforms_BU[:, :num_drafted] < target_of_drafted
    if (valid_BN := draft.valid_BN()) is not None:
        is_accepted_BN &= valid_BN
    after_BN = draw(target_probs_BNV, uniforms_BU[:, -1:].expand_as(draft.tokens_BN))
    return follow(is_accepted_BN, draft, after_BN)


def draw_for_each_child(target_probs_BNV: Tensor, draft: Draft, uniforms_BU: Tensor) -> Verdict:
    """WRONG: tries each child of a tree by itself, so that siblings add up to more than their share."""
    parents_BN = draft.tree.parents_RN.clamp(min=0).expand_as(draft.tokens_BN)
    rows_B1 = torch.arange(len(parents_BN))[:, None]
    is_accepted_BN = uniforms_BU[:, :-1] < target_probs_BNV[rows_B1, parents_BN, draft.tokens_BN]
    is_accepted_BN[:, 0] = True
    return follow(is_accepted_BN, draft, draw(target_probs_BNV, uniforms_BU[:, -1:].expand_as(draft.tokens_BN)))


def one_uniform_for_all(target_probs_BNV: Tensor, draft: Draft, uniforms_BU: Tensor) -> Verdict:
    """WRONG: the right rule with a single uniform for all its decisions."""
    return token.verify(target_probs_BNV, draft, uniforms_BU[:, :1].expand_as(uniforms_BU))
