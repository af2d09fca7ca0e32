"""Verification of deterministic drafts: samples a token from the target at each node and accepts the equal child.

The output is the sampled tokens, so it has the target's distribution for any children; no rule accepts a deterministic
child more often than its target probability. Sampling separately for each branch would favour nodes that several
branches share.

Shape suffixes: B rows, N nodes, V vocabulary.
"""

import torch
from torch import Tensor

from draftsmith.core.sampling import draw
from draftsmith.core.tree import Draft, Verdict
from draftsmith.verify.paths import Siblings, pick, values_at, verdict_at

LOSSLESS = True
SCHEMES = ("deterministic",)


def verify(target_probs_BNV: Tensor, draft: Draft, uniforms_BU: Tensor) -> Verdict:
    """Returns the path of tokens sampled from the target along it, by each node's uniform, and the token after it."""
    siblings = Siblings(draft)
    end_B = torch.zeros_like(draft.tokens_BN[:, 0])
    while True:
        # A row that is finished samples the same token again.
        sampled_B = draw(values_at(target_probs_BNV, end_B), pick(uniforms_BU, end_B))
        is_sampled_BN = siblings.of(end_B) & (draft.tokens_BN == sampled_B[:, None])
        if not is_sampled_BN.any():
            break
        end_B = torch.where(is_sampled_BN.any(1), is_sampled_BN.to(torch.uint8).argmax(1), end_B)
    return verdict_at(end_B, sampled_B, draft)
