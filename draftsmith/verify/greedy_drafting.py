"""The draft's likeliest tokens and one drawn from the others: greedy drafting, 2502.18779, optimal for such drafts.

Shape suffixes: B rows, N nodes, V vocabulary.
"""

import torch
from torch import Tensor

from draftsmith.core.sampling import draw
from draftsmith.core.tree import Draft, Verdict
from draftsmith.verify.paths import Siblings, at, path_to, pick

LOSSLESS = True
SCHEMES = ("top_and_drawn",)
EPSILON = 2.0**-53


def verify(target_probs_BNV: Tensor, draft: Draft, uniforms_BU: Tensor) -> Verdict:
    """Takes the drawn child x with probability min(1, target(x) / rest(x)), `rest` being the law that it came from.

    If it fails, a token is drawn from norm(max(target - rest, 0)): one of the top children, where the walk goes on, or
    the next token. `rest` is the draft's law without the top children, normalised.
    """
    assert draft.draft_probs_BNV is not None
    tokens_BN, siblings = draft.tokens_BN, Siblings(draft)
    order_N = torch.arange(tokens_BN.shape[1], device=tokens_BN.device)
    end_B = torch.zeros_like(tokens_BN[:, 0])
    next_B, goes_on_B = end_B, torch.ones_like(end_B, dtype=torch.bool)
    while goes_on_B.any():
        is_child_BN = siblings.of(end_B)
        has_children_B = is_child_BN.any(1)
        last_B = torch.where(is_child_BN, order_N, -1).argmax(1)
        is_top_BN = is_child_BN & (order_N != last_B[:, None])
        target_BV = at(target_probs_BNV, end_B)
        rest_BV = at(draft.draft_probs_BNV, end_B).to(target_BV.dtype)
        is_top_BV = torch.zeros_like(rest_BV).scatter_add_(1, tokens_BN, is_top_BN.to(rest_BV.dtype)) > 0
        rest_BV = rest_BV.masked_fill(is_top_BV, 0.0)
        mass_B = rest_BV.sum(-1).clamp(min=torch.finfo(rest_BV.dtype).tiny)
        rest_BV = torch.where(has_children_B[:, None], rest_BV / mass_B[:, None], 0.0)
        token_B, uniform_B = pick(tokens_BN, last_B), pick(uniforms_BU, end_B)
        ratio_B = pick(target_BV, token_B) / pick(rest_BV, token_B)
        chance_B = torch.where(has_children_B, ratio_B.clamp(max=1), 0.0)
        passes_B = uniform_B < chance_B
        left_BV = (target_BV - rest_BV).clamp_(min=0)
        left_BV = torch.where(left_BV.sum(-1, keepdim=True) > 0, left_BV, target_BV)
        # What a failed test leaves of a uniform is, stretched, a uniform again.
        drawn_B = draw(left_BV, (uniform_B - chance_B).clamp(min=0) / (1 - chance_B).clamp(min=EPSILON))
        is_drawn_BN = is_top_BN & (tokens_BN == drawn_B[:, None])
        child_B = torch.where(passes_B, last_B, is_drawn_BN.to(torch.uint8).argmax(1))
        next_B = torch.where(goes_on_B, drawn_B, next_B)
        goes_on_B = goes_on_B & (passes_B | is_drawn_BN.any(1))
        end_B = torch.where(goes_on_B, child_B, end_B)
    path_BP, num_accepted_B = path_to(end_B, draft)
    return Verdict(path_BP=path_BP, num_accepted_B=num_accepted_B, next_token_B=next_B)
