"""How often any rule could accept one of several drafted tokens: what a verifier is measured against.

Shape suffixes: V vocabulary; `...` any leading dimensions.
"""

import torch
from torch import Tensor


def optimal_acceptance(target_probs_V: Tensor, draft_probs_V: Tensor, num_drafts: Tensor | int) -> Tensor:
    """Returns the best chance [...] of accepting one of `num_drafts` tokens drawn independently from the draft's law.

    1 + min_i [P(H_i) - Q(H_i)^k], H_i being the i tokens with the largest draft / target, P and Q both laws' mass of
    it (2502.18779, theorem 4): the value of the optimal transport between the target and k drafts.
    """
    ratio_V = torch.where(target_probs_V > 0, draft_probs_V / target_probs_V, torch.inf)
    order_V = ratio_V.argsort(dim=-1, descending=True)
    target_mass_V, draft_mass_V = (
        law_V.gather(-1, order_V).double().cumsum(-1) for law_V in (target_probs_V, draft_probs_V)
    )
    powers = torch.as_tensor(num_drafts, device=target_probs_V.device)[..., None]
    return 1 + (target_mass_V - draft_mass_V.clamp(max=1) ** powers).amin(-1).clamp(max=0)
