"""Deterministic trees: draw from the target's law once per node and descend if the token drawn is a child.

The output is what was drawn, so its law is the target's whatever the children are; no rule accepts a deterministic
child more often than P(children). Drawing afresh for each branch would favour nodes that several branches share.

Shape suffixes: B rows, N nodes, V vocabulary.
"""

import torch
from torch import Tensor

from draftsmith.core.sampling import draw
from draftsmith.core.tree import Draft, Verdict
from draftsmith.verify.paths import Siblings, at, path_to, pick

LOSSLESS = True
SCHEMES = ("deterministic",)


def verify(target_probs_BNV: Tensor, draft: Draft, uniforms_BU: Tensor) -> Verdict:
    """Returns the path of tokens drawn from the target's rows along it, by each node's uniform, and the token after."""
    siblings = Siblings(draft)
    end_B = torch.zeros_like(draft.tokens_BN[:, 0])
    while True:
        # A row that has ended draws the same token again.
        drawn_B = draw(at(target_probs_BNV, end_B), pick(uniforms_BU, end_B))
        is_drawn_BN = siblings.of(end_B) & (draft.tokens_BN == drawn_B[:, None])
        if not is_drawn_BN.any():
            break
        end_B = torch.where(is_drawn_BN.any(1), is_drawn_BN.to(torch.uint8).argmax(1), end_B)
    path_BP, num_accepted_B = path_to(end_B, draft)
    return Verdict(path_BP=path_BP, num_accepted_B=num_accepted_B, next_token_B=drawn_B)
