"""Verification at temperature 0: accepts the target's argmax (Stern et al. 2018; Leviathan et al. 2211.17192)."""

from torch import Tensor

from draftsmith.core.tree import Draft, Verdict
from draftsmith.verify.paths import walk

LOSSLESS = True
SCHEMES = ("deterministic", "independent", "without_replacement", "top_and_drawn")


def verify(target_probs_BNV: Tensor, draft: Draft, uniforms_BU: Tensor) -> Verdict:
    """Returns the longest path of argmaxes and the argmax after it; logits may be passed in place of probabilities."""
    # On CPUs `argmax` of bfloat16 takes four times as long; both return the first of equal ones.
    return walk(target_probs_BNV.max(-1).indices, draft)
