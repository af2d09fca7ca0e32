"""LOSSY. Typical acceptance, Medusa 2401.10774 section 2.3.1: accepts tokens that the target finds plausible."""

import torch
from torch import Tensor

from draftsmith.core.sampling import draw
from draftsmith.core.tree import Draft, Verdict
from draftsmith.verify.paths import follow

LOSSLESS = False
SCHEMES = ("deterministic", "independent", "without_replacement", "top_and_drawn")
EPSILON, DELTA = 0.09, 0.3


def verify(target_probs_BNV: Tensor, draft: Draft, uniforms_BU: Tensor) -> Verdict:
    """Accepts x where target(x) > min(EPSILON, DELTA * exp(-entropy)) and keeps the deepest path, the first of equals.

    The next token is sampled from the target.
    """
    entropy_BN = -torch.special.xlogy(target_probs_BNV, target_probs_BNV).sum(-1)
    threshold_BN = torch.clamp(DELTA * torch.exp(-entropy_BN), max=EPSILON)
    parents_BN = draft.tree.parents_RN.clamp(min=0).expand_as(draft.tokens_BN)
    rows_B1 = torch.arange(len(parents_BN), device=parents_BN.device)[:, None]
    probs_BN = target_probs_BNV[rows_B1, parents_BN, draft.tokens_BN]
    is_accepted_BN = probs_BN > threshold_BN.gather(1, parents_BN)
    if (valid_BN := draft.valid_BN()) is not None:
        is_accepted_BN &= valid_BN
    is_accepted_BN[:, 0] = True
    return follow(is_accepted_BN, draft, draw(target_probs_BNV, uniforms_BU[:, : draft.tree.num_nodes]))
