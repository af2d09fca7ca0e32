"""Verifiers: pure functions from laws, a draft and uniforms to the tokens kept.

One file is one verifier. It defines `LOSSLESS`, `SCHEMES` (how the drafts it takes may have been drawn) and
`verify(target_probs_BNV, draft, uniforms_BU) -> Verdict`; `find` lists this folder, so that a new verifier is a new
file. Uniforms are [B, N + 1] in [0, 1): one for each node, and a last one. It may define `SHAPE = "chain"` if it takes
nothing else, `PARAMETER`, the name of the one number that `verify` takes beside, and `TARGET_TEMPERATURE` if the target's
law is wanted at a temperature of its own.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType

import torch
from torch import Tensor

from draftsmith.core.sampling import Sampling
from draftsmith.core.tree import Draft, Verdict

__all__ = ["Verdict", "Verifier", "choose", "names", "verify_draft"]

ROOMS = ("draftsmith.verify", "draftsmith.verify.research", "draftsmith.verify.lossy")
SHARED = ("rejection", "paths")
AUTO = {
    "deterministic": ("deterministic", "deterministic"),
    "independent": ("block", "traversal"),
    "without_replacement": ("block", "traversal"),
    "top_and_drawn": ("greedy_drafting", "greedy_drafting"),
}
"""The best lossless verifier for how a draft was drawn: of a chain, and of a tree."""


@dataclass(frozen=True, kw_only=True)
class Verifier:
    """A verifier as the loop uses it."""

    name: str
    is_lossless: bool
    sampling: Sampling
    """How the target probabilities that it reads are computed."""
    verify: Callable[[Tensor, Draft, Tensor], Verdict]


@cache
def names() -> tuple[str, ...]:
    """Returns the names that `generate(verifier=...)` takes beside "auto"."""
    return tuple(sorted(_rooms()))


@cache
def _rooms() -> dict[str, str]:
    """Returns the package that each verifier lies in."""
    return {
        info.name: room
        for room in ROOMS
        for info in pkgutil.iter_modules(importlib.import_module(room).__path__)
        if not info.ispkg and info.name not in SHARED
    }


def find(name: str) -> tuple[ModuleType, float | None]:
    """Returns the module of a verifier and, for "name=number", its parameter; raises ValueError for an unknown one."""
    name, _, number = name.partition("=")
    if name not in names():
        raise ValueError(f"unknown verifier {name!r}; there are auto, {', '.join(names())}")
    module = importlib.import_module(f"{_rooms()[name]}.{name}")
    if not number:
        return module, None
    if not hasattr(module, "PARAMETER"):
        raise ValueError(f"verifier {name!r} takes no number, and {number!r} was given")
    try:
        return module, float(number)
    except ValueError:
        raise ValueError(f"verifier {name}={number}: {number!r} is no number") from None


@cache
def _made(name: str, sampling: Sampling) -> Verifier:
    module, number = find(name)
    verify = module.verify if number is None else partial(module.verify, **{module.PARAMETER: number})
    temperature = getattr(module, "TARGET_TEMPERATURE", None)
    target_sampling = sampling if temperature is None else Sampling(temperature=temperature)
    return Verifier(name=name, is_lossless=module.LOSSLESS, sampling=target_sampling, verify=verify)


def choose(name: str, sampling: Sampling, draft: Draft) -> Verifier:
    """Returns the verifier called `name`, or with "auto" the best lossless one for how the draft was drawn.

    Raises ValueError for an unknown name, and for one that would not keep the law it promises on this draft.
    """
    # A plain step fits them all.
    if name == "auto" or (draft.tree.num_nodes == 1 and find(name)[0].LOSSLESS):
        of_chain, of_tree = AUTO[draft.sampling_scheme]
        return _made("greedy" if sampling.is_greedy else of_chain if draft.tree.is_chain else of_tree, sampling)
    module, _ = find(name)
    if sampling.is_greedy and module.LOSSLESS and name != "greedy":
        raise ValueError(f"verifier {name!r} keeps a sampled law; at temperature 0 use 'greedy' or 'auto'")
    if name == "greedy" and not sampling.is_greedy:
        raise ValueError(f"verifier 'greedy' is for temperature 0, not {sampling.temperature}; use 'auto'")
    if draft.sampling_scheme not in module.SCHEMES:
        raise ValueError(
            f"verifier {name!r} does not fit a draft drawn {draft.sampling_scheme.replace('_', ' ')}; use 'auto'"
        )
    if getattr(module, "SHAPE", None) == "chain" and not draft.tree.is_chain:
        raise ValueError(f"verifier {name!r} takes chains, and this drafter proposes trees; use 'auto'")
    return _made(name, sampling)


def verify_draft(
    logits_BNV: Tensor, draft: Draft, sampling: Sampling, name: str, generator: torch.Generator
) -> Verdict:
    """Verifies a draft with the verifier called `name`, drawing its uniforms from `generator`."""
    verifier = choose(name, sampling, draft)
    if verifier.name == "greedy":
        return verifier.verify(logits_BNV, draft, logits_BNV)
    uniforms_BU = torch.rand(len(logits_BNV), draft.tree.num_nodes + 1, generator=generator, dtype=torch.float64)
    return verifier.verify(verifier.sampling.probs(logits_BNV), draft, uniforms_BU.to(logits_BNV.device))
