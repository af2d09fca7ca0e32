"""Verifiers: pure functions of target probabilities, a draft and uniforms that return the accepted tokens.

A verifier is a module with `LOSSLESS`, `SCHEMES` (the sampling schemes of the drafts that it accepts) and
`verify(target_probs_BNV, draft, uniforms_BU) -> Verdict`, listed in `VERIFIERS`. Uniforms are [B, N + 1] in [0, 1): one
for each node, and one more; "coupled" takes the noise of the rows' positions instead. Optional are `SHAPE = "chain"` if
it takes chains only, `PARAMETER`, the name of a number that `verify` takes as a keyword, and `TARGET_TEMPERATURE`, at
which it reads the target's probabilities.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from draftsmith.core.drafter import Noise
from draftsmith.core.sampling import RowGenerators, Sampling, uniforms
from draftsmith.core.tree import Draft, Verdict

VERIFIERS = {
    "bild": "lossy.bild",
    "block": "block",
    "coupled": "research.coupled",
    "deterministic": "deterministic",
    "greedy": "greedy",
    "greedy_drafting": "greedy_drafting",
    "kseq": "research.kseq",
    "lenience": "lossy.lenience",
    "multipath": "research.multipath",
    "recursive": "research.recursive",
    "token": "research.token",
    "traversal": "traversal",
    "typical": "lossy.typical",
}
"""The module of each verifier that `generate(verifier=...)` takes besides "auto"."""
TOLERANCE = 1e-3
"""Largest deviation of a distribution's sum from 1."""
ALIASES = {"once": "deterministic"}
AUTO = {
    "deterministic": ("deterministic", "deterministic"),
    "independent": ("block", "traversal"),
    "without_replacement": ("block", "traversal"),
    "top_and_drawn": ("greedy_drafting", "greedy_drafting"),
}
"""The best lossless verifier for each sampling scheme: of a chain, and of a tree."""


@dataclass(frozen=True, kw_only=True)
class Verifier:
    """A verifier as the decoding loop uses it."""

    name: str
    is_lossless: bool
    sampling: Sampling
    """Sampling settings of the target probabilities that it reads."""
    verify: Callable[[Tensor, Draft, Any], Verdict]


def find(name: str) -> tuple[ModuleType, float | None]:
    """Returns the module and the number of the verifier "name" or "name=number"; raises ValueError if there is none."""
    name, equals, number = name.partition("=")
    name = ALIASES.get(name, name)
    if name not in VERIFIERS:
        raise ValueError(f"unknown verifier {name!r}; choose one of auto, {', '.join(VERIFIERS)}")
    module = importlib.import_module(f"{__name__}.{VERIFIERS[name]}")
    if not equals:
        return module, None
    if not hasattr(module, "PARAMETER"):
        raise ValueError(f"verifier {name!r} takes no number, but {number!r} was given; leave it out")
    try:
        return module, float(number)
    except ValueError:
        raise ValueError(f"verifier {name}={number}: {number!r} is not a number") from None


@cache
def _configured(name: str, sampling: Sampling) -> Verifier:
    module, number = find(name)
    verify = module.verify if number is None else partial(module.verify, **{module.PARAMETER: number})
    if hasattr(module, "TARGET_TEMPERATURE"):
        sampling = Sampling(temperature=module.TARGET_TEMPERATURE)
    return Verifier(name=name, is_lossless=module.LOSSLESS, sampling=sampling, verify=verify)


def choose(name: str, sampling: Sampling, draft: Draft) -> Verifier:
    """Returns the verifier called `name`, or for "auto" the best lossless one for the draft's sampling scheme.

    Raises ValueError for an unknown name, and for a verifier that is not valid for this draft or temperature.
    """
    if name == "coupled":
        return _configured("greedy" if sampling.is_greedy else name, sampling)
    # A draft without drafted tokens is valid for every lossless verifier.
    if name == "auto" or (draft.tree.num_nodes == 1 and find(name)[0].LOSSLESS):
        for_chain, for_tree = AUTO[draft.sampling_scheme]
        return _configured("greedy" if sampling.is_greedy else for_chain if draft.tree.is_chain else for_tree, sampling)
    module, _ = find(name)
    if sampling.is_greedy and module.LOSSLESS and name != "greedy":
        raise ValueError(f"verifier {name!r} is for sampling; at temperature 0 use 'greedy' or 'auto'")
    if name == "greedy" and not sampling.is_greedy:
        raise ValueError(f"verifier 'greedy' is for temperature 0, not {sampling.temperature}; use 'auto'")
    if draft.sampling_scheme not in module.SCHEMES:
        raise ValueError(
            f"verifier {name!r} does not support drafts of the sampling scheme {draft.sampling_scheme!r}; use 'auto'"
        )
    if getattr(module, "SHAPE", None) == "chain" and not draft.tree.is_chain:
        raise ValueError(f"verifier {name!r} takes chains, and this drafter proposes trees; use 'auto'")
    return _configured(name, sampling)


def verify_draft(
    logits_BNV: Tensor,
    draft: Draft,
    sampling: Sampling,
    name: str,
    generator: torch.Generator,
    noise: Noise | None = None,
) -> Verdict:
    """Returns the verdict of the verifier called `name` on a draft, with uniforms from `generator`.

    With the rows' `noise` the verifier is "coupled". Raises ValueError if the target's logits are not finite, or if the
    draft's probabilities are no distributions.
    """
    verifier = choose(name if noise is None else "coupled", sampling, draft)
    check_finite_logits(logits_BNV, draft)
    if draft.draft_probs_BNV is not None:
        check_draft_probs(draft)
    if verifier.name == "greedy":
        return verifier.verify(logits_BNV, draft, logits_BNV)
    if noise is not None:
        return verifier.verify(verifier.sampling.probs(logits_BNV), draft, noise)
    uniforms_BU = uniforms(generator, len(logits_BNV), draft.tree.num_nodes + 1)
    if isinstance(generator, RowGenerators) and draft.sampling_scheme != "deterministic":
        # The last number chooses the token after the path: drawn first, it does not depend on other rows' nodes.
        uniforms_BU = uniforms_BU.roll(-1, dims=1)
    return verifier.verify(verifier.sampling.probs(logits_BNV), draft, uniforms_BU.to(logits_BNV.device))


def check_finite_logits(logits_BNV: Tensor, draft: Draft) -> None:
    """Raises ValueError if the largest logit of a node is not finite; others may be -inf."""
    is_finite_BN = logits_BNV.amax(-1).isfinite()
    if not bool((is_finite_BN if (valid_BN := draft.valid_BN()) is None else is_finite_BN | ~valid_BN).all()):
        raise ValueError("the target's logits are NaN or infinite; check its weights, or load it in float32")


def check_draft_probs(draft: Draft) -> None:
    """Raises ValueError if the probabilities that a token of the draft was sampled from are no distribution."""
    assert draft.draft_probs_BNV is not None
    sums_BN = draft.draft_probs_BNV.sum(-1)
    is_distribution_BN = ((sums_BN - 1).abs() < TOLERANCE) & (draft.draft_probs_BNV.amin(-1) >= 0)
    parents_BN = draft.tree.parents_RN[:, 1:].expand(len(sums_BN), -1)
    is_right_BN, valid_BN = is_distribution_BN.gather(1, parents_BN), draft.valid_BN()
    if not bool((is_right_BN if valid_BN is None else is_right_BN | ~valid_BN[:, 1:]).all()):
        raise ValueError(
            "the drafter's probabilities are no distribution (NaN, negative, or a sum other than 1); its weights may be"
            " broken or too large for their dtype: train it again, or load the target in float32"
        )
