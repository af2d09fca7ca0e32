"""LOSSY. BiLD's rollback, Kim et al. 2302.07863: accepts tokens that the target does not find very unlikely.

Its fallback is a drafter's own: a draft that stops where the draft model is not confident (0.6 in the paper).
"""

import torch
from torch import Tensor

from draftsmith.core.tree import Draft, Verdict
from draftsmith.verify.paths import follow

LOSSLESS = False
SCHEMES = ("deterministic", "independent")
SHAPE = "chain"
PARAMETER = "rollback"
TARGET_TEMPERATURE = 1.0  # likelihoods are the model's own, whatever the sampling settings


def verify(target_probs_BNV: Tensor, draft: Draft, uniforms_BU: Tensor, *, rollback: float = 5.0) -> Verdict:
    """Accepts x while -ln target(x) <= `rollback` or x is the target's argmax; the next token is the argmax."""
    best_BN, drafted_BN = target_probs_BNV.argmax(-1), draft.tokens_BN[:, 1:]
    target_of_drafted_BN = target_probs_BNV[:, :-1].gather(2, drafted_BN[..., None])[..., 0]
    is_accepted_BN = torch.ones_like(draft.tokens_BN, dtype=torch.bool)
    is_accepted_BN[:, 1:] = (drafted_BN == best_BN[:, :-1]) | (-target_of_drafted_BN.log() <= rollback)
    if (valid_BN := draft.valid_BN()) is not None:
        is_accepted_BN &= valid_BN
    return follow(is_accepted_BN, draft, best_BN)
