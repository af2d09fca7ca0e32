"""Verification of deterministic drafts: samples a token from the target at each node and accepts the equal child.

The output is the sampled tokens, so it has the target's distribution for any children; no rule accepts a deterministic
child more often than its target probability. Sampling separately for each branch would favour nodes that several
branches share.

Shape suffixes: B rows, N nodes, V vocabulary.
"""

from torch import Tensor

from draftsmith.core.sampling import draw
from draftsmith.core.tree import Draft, Verdict
from draftsmith.verify.paths import follow_choices, pick, values_at

LOSSLESS = True
SCHEMES = ("deterministic",)


def verify(target_probs_BNV: Tensor, draft: Draft, uniforms_BU: Tensor) -> Verdict:
    """Returns the path of tokens sampled from the target along it, by each node's uniform, and the token after it."""
    return follow_choices(lambda node_B: draw(values_at(target_probs_BNV, node_B), pick(uniforms_BU, node_B)), draft)
