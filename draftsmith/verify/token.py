"""Chains with a draft law, token by token: Leviathan et al. 2211.17192, algorithm 1; Chen et al. 2302.01318."""

import torch
from torch import Tensor

from draftsmith.sampling import draw
from draftsmith.tree import Draft
from draftsmith.verify.verdict import Verdict, follow

LOSSLESS = True
DRAWN = ("independent", "deterministic")
SHAPE = "chain"


def verify(target_probs_BNV: Tensor, draft: Draft, uniforms_BU: Tensor) -> Verdict:
    """Accepts x_i with probability min(1, target(x_i) / draft(x_i)), stops at the first rejection.

    After a rejection the next token follows norm(max(target - draft, 0)), after none the target's last row. A
    deterministic draft is a law that is one at its token.
    """
    assert draft.tree.is_chain
    drafted_BN1 = draft.tokens_BN[:, 1:, None]
    num_drafted = drafted_BN1.shape[1]
    target_of_drafted = target_probs_BNV[:, :num_drafted].gather(2, drafted_BN1)[..., 0]
    draft_probs_BNV = draft.draft_probs_BNV
    if draft_probs_BNV is None:
        draft_probs_BNV = torch.zeros_like(target_probs_BNV[:, :num_drafted]).scatter_(2, drafted_BN1, 1.0)
    draft_probs_BNV = draft_probs_BNV[:, :num_drafted].to(target_probs_BNV.dtype)
    draft_of_drafted = draft_probs_BNV.gather(2, drafted_BN1)[..., 0]
    is_accepted_BN = torch.ones_like(draft.tokens_BN, dtype=torch.bool)
    is_accepted_BN[:, 1:] = uniforms_BU[:, 1:-1] * draft_of_drafted < target_of_drafted
    is_real_BN = draft.valid_BN()
    if is_real_BN is not None:
        is_accepted_BN &= is_real_BN
    verdict = follow(is_accepted_BN, draft, draft.tokens_BN)

    end_B11 = verdict.num_accepted_B[:, None, None].expand(-1, 1, target_probs_BNV.shape[-1])
    law_BV = target_probs_BNV.gather(1, end_B11)[:, 0]
    # Past the last drafted token there is no draft law to subtract; a padded zero row says so.
    padded_BNV = torch.nn.functional.pad(draft_probs_BNV, (0, 0, 0, 1))
    if is_real_BN is not None:
        has_child_BN = torch.nn.functional.pad(is_real_BN[:, 1:], (0, 1))
        padded_BNV = padded_BNV * has_child_BN[..., None]
    residual_BV = (law_BV - padded_BNV.gather(1, end_B11)[:, 0]).clamp(min=0)
    # Equal laws leave no residual; then a rejection has probability zero but for rounding.
    residual_BV = torch.where(residual_BV.sum(-1, keepdim=True) > 0, residual_BV, law_BV)
    return Verdict(
        path_BP=verdict.path_BP,
        num_accepted_B=verdict.num_accepted_B,
        next_token_B=draw(residual_BV, uniforms_BU[:, -1]),
        law_BV=residual_BV,
    )
