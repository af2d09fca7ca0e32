"""Block verification of sampled chains: Sun et al. 2403.10444, algorithm 2. Never fewer tokens than token by token.

Shape suffixes: B rows, N nodes, V vocabulary.
"""

import torch
from torch import Tensor

from draftsmith.core.tree import Draft, Verdict
from draftsmith.verify.paths import sample_next, values_at

LOSSLESS = True
SCHEMES = ("independent", "without_replacement")
SHAPE = "chain"


def verify(target_probs_BNV: Tensor, draft: Draft, uniforms_BU: Tensor) -> Verdict:
    """Accepts the longest prefix x_1 .. x_i of the chain that passes its test, even where shorter ones fail theirs.

    With w_0 = 1 and w_i = min(1, w_{i-1} target(x_i) / draft(x_i)), and both distributions those after x_i, the test is
    u_i < S / (S + 1 - w_i) with S = sum max(w_i target - draft, 0), and u_i < w_i at the chain's end. The next token
    follows norm(max(w_i target - draft, 0)), or the target at the chain's end.
    """
    assert draft.draft_probs_BNV is not None
    draft_probs_BNV, num_nodes = draft.draft_probs_BNV.to(target_probs_BNV.dtype), draft.tree.num_nodes
    used_B = torch.tensor(draft.num_nodes or [num_nodes] * len(draft.tokens_BN), device=draft.tokens_BN.device)
    drafted_BN1 = draft.tokens_BN[:, 1:, None]
    target_of_drafted_BN = target_probs_BNV[:, :-1].gather(2, drafted_BN1)[..., 0]
    draft_of_drafted_BN = draft_probs_BNV[:, : num_nodes - 1].gather(2, drafted_BN1)[..., 0]
    weights = [torch.ones_like(target_probs_BNV[:, 0, 0])]
    for ratio_B in (target_of_drafted_BN / draft_of_drafted_BN).unbind(1):
        weights.append((weights[-1] * ratio_B).clamp(max=1))

    end_B, end_weight_B = torch.zeros_like(used_B), weights[0]
    # From the longest prefix on: once one passes, shorter ones need no test.
    for node in range(num_nodes - 1, 0, -1):
        # The test's threshold is at most the weight, as S <= w_i.
        is_open_B = (end_B == 0) & (node < used_B) & (uniforms_BU[:, node] < weights[node])
        threshold_B = weights[node]
        inner_B = is_open_B & (node + 1 < used_B)
        if inner_B.any():
            residual_BV = torch.addcmul(-draft_probs_BNV[:, node], weights[node][:, None], target_probs_BNV[:, node])
            mass_B = residual_BV.clamp_(min=0).sum(-1)
            total_B = mass_B + 1 - weights[node]
            # A weight of 1 and equal distributions make both 0: the prefix then passes.
            threshold_B = torch.where(inner_B, torch.where(total_B > 0, mass_B / total_B, 1.0), threshold_B)
        passes_B = is_open_B & (uniforms_BU[:, node] < threshold_B)
        end_B = torch.where(passes_B, node, end_B)
        end_weight_B = torch.where(passes_B, weights[node], end_weight_B)
        if (end_B > 0).all():
            break
    is_last_B = end_B + 1 == used_B
    subtracted_BV = torch.where(is_last_B[:, None], 0.0, values_at(draft_probs_BNV, end_B))
    end_weight_B = torch.where(is_last_B, 1.0, end_weight_B)
    next_probs_BV = (end_weight_B[:, None] * values_at(target_probs_BNV, end_B) - subtracted_BV).clamp_(min=0)
    return sample_next(end_B, next_probs_BV, target_probs_BNV, uniforms_BU[:, -1], draft)
