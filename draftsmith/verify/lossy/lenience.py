"""LOSSY. Token verification with lenience, Leviathan et al. 2211.17192 appendix A.5: accepts drafts more often."""

from torch import Tensor

from draftsmith.core.tree import Draft, Verdict
from draftsmith.verify.research import token

LOSSLESS = False
SCHEMES = token.SCHEMES
SHAPE = "chain"
PARAMETER = "lenience"


def verify(target_probs_BNV: Tensor, draft: Draft, uniforms_BU: Tensor, *, lenience: float = 0.5) -> Verdict:
    """Accepts x with probability min(1, target(x) / (lenience draft(x))); a lenience of 1 is token verification.

    Raises ValueError for a lenience that is not above 0 and at most 1.
    """
    if not 0 < lenience <= 1:
        raise ValueError(f"lenience is {lenience}; it must be above 0 and at most 1")
    uniforms_BU = uniforms_BU.clone()
    uniforms_BU[:, :-1] *= lenience
    return token.verify(target_probs_BNV, draft, uniforms_BU)
