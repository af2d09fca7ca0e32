"""Chains with a draft law, judged as a block: Sun et al. 2403.10444, algorithm 2. Never fewer tokens than one by one.

Shape suffixes: B rows, N nodes, V vocabulary.
"""

import torch
from torch import Tensor

from draftsmith.core.tree import Draft, Verdict
from draftsmith.verify.paths import at, drawn_at

LOSSLESS = True
SCHEMES = ("independent", "without_replacement")
SHAPE = "chain"


def verify(target_probs_BNV: Tensor, draft: Draft, uniforms_BU: Tensor) -> Verdict:
    """Keeps the longest prefix x_1 .. x_i of the chain whose own test passes, whatever shorter ones said.

    With w_0 = 1 and w_i = min(1, w_{i-1} target(x_i) / draft(x_i)), and both laws those after x_i, the test is
    u_i < S / (S + 1 - w_i) with S = sum max(w_i target - draft, 0), and u_i < w_i at the chain's end. The next token
    follows norm(max(w_i target - draft, 0)), at the chain's end the target's law.
    """
    assert draft.draft_probs_BNV is not None
    draft_probs_BNV, num_nodes = draft.draft_probs_BNV.to(target_probs_BNV.dtype), draft.tree.num_nodes
    used_B = torch.full_like(draft.tokens_BN[:, 0], num_nodes)
    if draft.num_nodes is not None:
        used_B = torch.tensor(draft.num_nodes, device=used_B.device)
    drafted_BN1 = draft.tokens_BN[:, 1:, None]
    wanted_BN = target_probs_BNV[:, :-1].gather(2, drafted_BN1)[..., 0]
    given_BN = draft_probs_BNV[:, : num_nodes - 1].gather(2, drafted_BN1)[..., 0]
    weights = [torch.ones_like(target_probs_BNV[:, 0, 0])]
    for ratio_B in (wanted_BN / given_BN).unbind(1):
        weights.append((weights[-1] * ratio_B).clamp(max=1))

    end_B, end_weight_B = torch.zeros_like(used_B), weights[0]
    # The longest prefix that passes is kept: whatever is shorter need not be looked at.
    for node in range(num_nodes - 1, 0, -1):
        # The test asks for less than the weight, as S <= w_i.
        is_open_B = (end_B == 0) & (node < used_B) & (uniforms_BU[:, node] < weights[node])
        chance_B = weights[node]
        inner_B = is_open_B & (node + 1 < used_B)
        if inner_B.any():
            left_BV = torch.addcmul(-draft_probs_BNV[:, node], weights[node][:, None], target_probs_BNV[:, node])
            left_B = left_BV.clamp_(min=0).sum(-1)
            rest_B = left_B + 1 - weights[node]
            # A weight of one and equal laws leave nothing of either: what follows is then as good as drawn.
            chance_B = torch.where(inner_B, torch.where(rest_B > 0, left_B / rest_B, 1.0), chance_B)
        passes_B = is_open_B & (uniforms_BU[:, node] < chance_B)
        end_B = torch.where(passes_B, node, end_B)
        end_weight_B = torch.where(passes_B, weights[node], end_weight_B)
        if (end_B > 0).all():
            break
    target_BV = at(target_probs_BNV, end_B)
    is_last_B = end_B + 1 == used_B
    taken_BV = torch.where(is_last_B[:, None], 0.0, at(draft_probs_BNV, end_B))
    end_weight_B = torch.where(is_last_B, 1.0, end_weight_B)
    next_probs_BV = (end_weight_B[:, None] * target_BV - taken_BV).clamp_(min=0)
    return drawn_at(end_B, next_probs_BV, target_probs_BNV, uniforms_BU[:, -1], draft)
