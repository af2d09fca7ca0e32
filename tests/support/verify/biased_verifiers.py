"""Biased verifiers, which the tests of sampled distributions must detect.

Shape suffixes: B rows, N nodes, V vocabulary, U uniforms.
"""

import torch
from torch import Tensor

from draftsmith.core.sampling import draw
from draftsmith.core.tree import Draft, Verdict
from draftsmith.verify.paths import follow
from draftsmith.verify.research import token


def accept_by_target_probability(target_probs_BNV: Tensor, draft: Draft, uniforms_BU: Tensor) -> Verdict:
    """WRONG: ignores the draft distribution, and samples from the target after a rejection."""
    num_drafted = draft.tree.num_nodes - 1
    target_of_drafted = target_probs_BNV[:, :num_drafted].gather(2, draft.tokens_BN[:, 1:, None])[..., 0]
    is_accepted_BN = torch.ones_like(draft.tokens_BN, dtype=torch.bool)
    is_accepted_BN[:, 1:] = uniforms_BU[:, :num_drafted] < target_of_drafted
    if (valid_BN := draft.valid_BN()) is not None:
        is_accepted_BN &= valid_BN
    after_BN = draw(target_probs_BNV, uniforms_BU[:, -1:].expand_as(draft.tokens_BN))
    return follow(is_accepted_BN, draft, after_BN)


def sample_for_each_child(target_probs_BNV: Tensor, draft: Draft, uniforms_BU: Tensor) -> Verdict:
    """WRONG: tests each child independently, so that siblings are accepted too often."""
    parents_BN = draft.tree.parents_RN.clamp(min=0).expand_as(draft.tokens_BN)
    rows_B1 = torch.arange(len(parents_BN))[:, None]
    is_accepted_BN = uniforms_BU[:, :-1] < target_probs_BNV[rows_B1, parents_BN, draft.tokens_BN]
    is_accepted_BN[:, 0] = True
    return follow(is_accepted_BN, draft, draw(target_probs_BNV, uniforms_BU[:, -1:].expand_as(draft.tokens_BN)))


def reuse_one_uniform(target_probs_BNV: Tensor, draft: Draft, uniforms_BU: Tensor) -> Verdict:
    """WRONG: the correct rule with a single uniform for all its decisions."""
    return token.verify(target_probs_BNV, draft, uniforms_BU[:, :1].expand_as(uniforms_BU))
