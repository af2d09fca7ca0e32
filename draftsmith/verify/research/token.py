"""Token-by-token verification of chains: Leviathan et al. 2211.17192, algorithm 1; Chen et al. 2302.01318.

Shape suffixes: B rows, N nodes, V vocabulary.
"""

import torch
from torch import Tensor

from draftsmith.core.tree import Draft, Verdict
from draftsmith.verify.paths import follow, sample_next, values_at

LOSSLESS = True
SCHEMES = ("independent", "deterministic")
SHAPE = "chain"


def verify(target_probs_BNV: Tensor, draft: Draft, uniforms_BU: Tensor) -> Verdict:
    """Accepts x_i with probability min(1, target(x_i) / draft(x_i)) and stops at the first rejection.

    After a rejection the next token follows norm(max(target - draft, 0)), after none the target at the last node. The
    distribution of a deterministic draft is one-hot at its token.
    """
    assert draft.tree.is_chain
    drafted_BN1 = draft.tokens_BN[:, 1:, None]
    num_drafted = drafted_BN1.shape[1]
    target_of_drafted_BN = target_probs_BNV[:, :num_drafted].gather(2, drafted_BN1)[..., 0]
    draft_probs_BNV = draft.draft_probs_BNV
    if draft_probs_BNV is None:
        draft_probs_BNV = torch.zeros_like(target_probs_BNV[:, :num_drafted]).scatter_(2, drafted_BN1, 1.0)
    draft_probs_BNV = draft_probs_BNV[:, :num_drafted].to(target_probs_BNV.dtype)
    draft_of_drafted_BN = draft_probs_BNV.gather(2, drafted_BN1)[..., 0]
    is_accepted_BN = torch.ones_like(draft.tokens_BN, dtype=torch.bool)
    is_accepted_BN[:, 1:] = uniforms_BU[:, 1:-1] * draft_of_drafted_BN < target_of_drafted_BN
    valid_BN = draft.valid_BN()
    if valid_BN is not None:
        is_accepted_BN &= valid_BN
    end_B = follow(is_accepted_BN, draft, draft.tokens_BN).num_accepted_B
    num_used_B = num_drafted if valid_BN is None else valid_BN.sum(1) - 1
    # After the last drafted token there is no draft distribution to subtract.
    subtracted_BV = values_at(draft_probs_BNV, end_B) * (end_B < num_used_B)[:, None] if num_drafted else 0.0
    next_probs_BV = (values_at(target_probs_BNV, end_B) - subtracted_BV).clamp(min=0)
    return sample_next(end_B, next_probs_BV, target_probs_BNV, uniforms_BU[:, -1], draft)
