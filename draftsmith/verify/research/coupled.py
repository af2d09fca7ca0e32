"""Drafter-invariant verification, 2408.07978: the target picks tokens by noise of their positions, drafts or none.

Token t of a row is argmax(log target + Gumbel noise of (seed, row, t)), whatever was drafted; drafters that sample use
the same noise, so that the two often agree. A child drawn from one distribution equals a token drawn from the other
with probability sum_x 1 / sum_y max(target(y) / target(x), draft(y) / draft(x)), at least (1 - TV) / (1 + TV).

Shape suffixes: B rows, N nodes, V vocabulary.
"""

from torch import Tensor

from draftsmith.core.drafter import Noise
from draftsmith.core.tree import Draft, Verdict
from draftsmith.verify.paths import follow_choices, pick, values_at

LOSSLESS = True
SCHEMES = ("deterministic", "independent", "without_replacement", "top_and_drawn")


def verify(target_probs_BNV: Tensor, draft: Draft, noise: Noise) -> Verdict:
    """Returns the path of the tokens that the noise picks from the target along it, and the token after it."""
    depths_BN, rows = draft.tree.depths_RN.expand_as(draft.tokens_BN), range(len(target_probs_BNV))

    def choose(node_B: Tensor) -> Tensor:
        probs_B1V = values_at(target_probs_BNV, node_B)[:, None]
        return noise.scores(probs_B1V, pick(depths_BN, node_B).tolist(), rows)[:, 0].argmax(-1)

    return follow_choices(choose, draft)
