"""Greedy drafting, 2502.18779: the draft's top tokens and one sampled from the rest; optimal for such drafts.

Shape suffixes: B rows, N nodes, V vocabulary.
"""

import torch
from torch import Tensor

from draftsmith.core.sampling import draw
from draftsmith.core.tree import Draft, Verdict
from draftsmith.verify.paths import Siblings, pick, values_at, verdict_at

LOSSLESS = True
SCHEMES = ("top_and_drawn",)
EPSILON = 2.0**-53


def verify(target_probs_BNV: Tensor, draft: Draft, uniforms_BU: Tensor) -> Verdict:
    """Accepts the sampled child x with probability min(1, target(x) / rest(x)), `rest` being what x was drawn from.

    If it is rejected, a token is drawn from norm(max(target - rest, 0)): either a top child, which is then accepted, or
    the next token. `rest` is the draft's distribution without the top children, normalised.
    """
    assert draft.draft_probs_BNV is not None
    tokens_BN, siblings = draft.tokens_BN, Siblings(draft)
    order_N = torch.arange(tokens_BN.shape[1], device=tokens_BN.device)
    end_B = torch.zeros_like(tokens_BN[:, 0])
    next_B, is_active_B = end_B, torch.ones_like(end_B, dtype=torch.bool)
    while is_active_B.any():
        is_child_BN = siblings.of(end_B)
        has_children_B = is_child_BN.any(1)
        last_B = torch.where(is_child_BN, order_N, -1).argmax(1)
        is_top_BN = is_child_BN & (order_N != last_B[:, None])
        target_BV = values_at(target_probs_BNV, end_B)
        rest_BV = values_at(draft.draft_probs_BNV, end_B).to(target_BV.dtype)
        is_top_BV = torch.zeros_like(rest_BV).scatter_add_(1, tokens_BN, is_top_BN.to(rest_BV.dtype)) > 0
        rest_BV = rest_BV.masked_fill(is_top_BV, 0.0)
        mass_B = rest_BV.sum(-1).clamp(min=torch.finfo(rest_BV.dtype).tiny)
        rest_BV = torch.where(has_children_B[:, None], rest_BV / mass_B[:, None], 0.0)
        token_B, uniform_B = pick(tokens_BN, last_B), pick(uniforms_BU, end_B)
        ratio_B = pick(target_BV, token_B) / pick(rest_BV, token_B)
        threshold_B = torch.where(has_children_B, ratio_B.clamp(max=1), 0.0)
        passes_B = uniform_B < threshold_B
        residual_BV = (target_BV - rest_BV).clamp_(min=0)
        residual_BV = torch.where(residual_BV.sum(-1, keepdim=True) > 0, residual_BV, target_BV)
        # Given that its test failed, the uniform is uniform above the threshold, and is rescaled to [0, 1).
        rescaled_B = (uniform_B - threshold_B).clamp(min=0) / (1 - threshold_B).clamp(min=EPSILON)
        sampled_B = draw(residual_BV, rescaled_B)
        is_sampled_BN = is_top_BN & (tokens_BN == sampled_B[:, None])
        child_B = torch.where(passes_B, last_B, is_sampled_BN.to(torch.uint8).argmax(1))
        next_B = torch.where(is_active_B, sampled_B, next_B)
        is_active_B = is_active_B & (passes_B | is_sampled_BN.any(1))
        end_B = torch.where(is_active_B, child_B, end_B)
    return verdict_at(end_B, next_B, draft)
