"""Verifiers: pure functions from laws, a draft and uniforms to the tokens kept.

One file is one verifier. It defines `LOSSLESS`, `DRAWN` (how the drafts it takes may have been drawn) and
`verify(target_probs_BNV, draft, uniforms_BU) -> Verdict`; `find` lists this folder, so that a new verifier is a new
file. Uniforms are [B, N + 1] in [0, 1): one for each node, and a last one.
"""

import importlib
import pkgutil
from collections.abc import Callable
from functools import cache
from typing import Protocol

from torch import Tensor

from draftsmith.sampling import Sampling
from draftsmith.tree import Draft
from draftsmith.verify.verdict import Verdict

__all__ = ["Verdict", "Verifier", "choose", "names"]


class Verifier(Protocol):
    """The module of one verifier."""

    LOSSLESS: bool
    DRAWN: tuple[str, ...]
    verify: Callable[[Tensor, Draft, Tensor], Verdict]


@cache
def names() -> tuple[str, ...]:
    """Returns the names that `generate(verifier=...)` takes beside "auto"."""
    return tuple(sorted(info.name for info in pkgutil.iter_modules(__path__) if info.name != "verdict"))


def choose(name: str, sampling: Sampling, draft: Draft) -> Verifier:
    """Returns the verifier called `name`, or with "auto" the best lossless one for how the draft was drawn.

    Raises ValueError for an unknown name, and for one that would not keep the law it promises on this draft.
    """
    is_auto = name == "auto"
    if is_auto:
        if sampling.is_greedy:
            name = "greedy"
        else:
            name = "once" if draft.drawn == "deterministic" else "token"
    if name not in names():
        raise ValueError(f"unknown verifier {name!r}; there are auto, {', '.join(names())}")
    verifier: Verifier = importlib.import_module(f"draftsmith.verify.{name}")
    if sampling.is_greedy and verifier.LOSSLESS and name != "greedy":
        raise ValueError(f"verifier {name!r} keeps a sampled law; at temperature 0 use 'greedy' or 'auto'")
    if name == "greedy" and not sampling.is_greedy:
        raise ValueError(f"verifier 'greedy' is for temperature 0, not {sampling.temperature}; use 'auto'")
    if is_auto and draft.drawn not in verifier.DRAWN:
        raise ValueError(f"no verifier here keeps the target's law for drafts drawn {draft.drawn.replace('_', ' ')}")
    if draft.drawn not in verifier.DRAWN:
        raise ValueError(f"verifier {name!r} does not fit a draft drawn {draft.drawn.replace('_', ' ')}; use 'auto'")
    if name == "token" and not draft.tree.is_chain:
        raise ValueError("verifier 'token' takes chains, and this drafter proposes trees; use 'auto'")
    return verifier
