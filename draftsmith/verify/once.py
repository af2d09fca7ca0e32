"""Deterministic trees: draw from the target's law once per node and descend if the token drawn is a child.

The output is what was drawn, so its law is the target's whatever the children are; no rule accepts a deterministic
child more often than P(children). Drawing afresh for each branch would favour nodes that several branches share.
"""

from torch import Tensor

from draftsmith.sampling import draw
from draftsmith.tree import Draft
from draftsmith.verify.verdict import Verdict, walk

LOSSLESS = True
DRAWN = ("deterministic",)


def verify(target_probs_BNV: Tensor, draft: Draft, uniforms_BU: Tensor) -> Verdict:
    """Returns the path of tokens drawn from the rows of `target_probs_BNV`, one uniform a node, and the token after."""
    return walk(draw(target_probs_BNV, uniforms_BU[:, : target_probs_BNV.shape[1]]), draft)
