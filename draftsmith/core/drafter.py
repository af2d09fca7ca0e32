"""Drafters: one file is one family, found by its name; there is no registry to edit.

A family's module defines `Config`, a frozen dataclass of what its artifact must remember, and
`Drafter(config, target)`. A drafter with weights is an `nn.Module` that hides the target from its state dict: the
module that trains is the module that drafts.

A drafter that changes its target defines `loaded()`, called once its weights are there: it sets `drafter.target` to the
tuned target (draftsmith/parts/self_drafting/fine_tuned.py), which is the one to be given to `generate`, and leaves the user's as it is.

One that drafts for a drafter sees text that may be taken back. If it can forget what came after so many tokens of each
row, it defines `rewind(lengths)`; if not, it is begun anew. One that remembers earlier calls defines `forget()`, after
which it knows what it knew when it was made: comparisons decode the same prompts again and again.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from draftsmith.core.cache import KVCache
from draftsmith.core.sampling import Sampling
from draftsmith.core.target import Source, Target
from draftsmith.core.tree import Draft, Verdict, chain

FAMILIES = "draftsmith.drafters"


def always(row: int, confidence: float) -> bool:
    """Returns True: a row drafts as far as it may."""
    return True


@dataclass(frozen=True, kw_only=True, eq=False)
class Session:
    """One call of `generate` as a drafter sees it; `rows` and `cache` are live."""

    target: Target
    rows: list[list[int]]
    """Committed ids of each row; the last one is pending: not yet fed to the target."""
    cache: KVCache
    """The target's cache: it holds all of a row's ids but the pending one."""
    sampling: Sampling
    generator: torch.Generator
    """The call's randomness, for drafters that sample."""
    hidden: dict[int, Tensor] = field(default_factory=dict)
    """The drafter's hidden layers over the prompt [B, T, D], the pending token not included, right-padded."""
    source: Source | None = None
    """What an encoder-decoder target reads."""
    goes_on: Callable[[int, float], bool] = always
    """Asked by a drafter that drafts token by token, of each row still drafting, after each token: whether the row goes
    on after one of this probability by the draft model. The `Config` of such a drafter says so by `asks_length`, and
    names the policy of draftsmith/length/policies.py that it is to be asked by, `length`."""

    def pending(self) -> Tensor:
        """Returns each row's pending token [B]."""
        return torch.tensor([row[-1] for row in self.rows], device=self.target.device)

    def uniforms(self) -> Tensor:
        """Returns what a token of each row is to be drawn by [B], between 0 and 1, in float64."""
        return torch.rand(len(self.rows), generator=self.generator, dtype=torch.float64).to(self.target.device)

    def only_pending(self) -> Draft:
        """Returns the draft of a plain step."""
        return Draft(tokens_BN=self.pending()[:, None], tree=chain(1, self.target.device))


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """One verified draft, as `observe` is told of it."""

    draft: Draft
    logits_BNV: Tensor
    """The target's logits at every node fed."""
    hidden: dict[int, Tensor]
    """The drafter's hidden layers at every node [B, N, D]."""
    verdict: Verdict
    paths: list[list[int]]
    """The nodes of each row that were committed, node 0 first; none for a row that had finished before."""
    cost_ms: float
    """What drafting and verifying took."""

    def is_of(self, draft: Draft | None) -> bool:
        """Returns whether this draft was verified, whole or cut, and not that of another drafter or a plain step's."""
        return draft is not None and self.draft.tokens_BN is draft.tokens_BN


class Drafter(Protocol):
    """What the loop asks of a drafter."""

    config: Any
    target: Target
    hidden_layers: tuple[int, ...]
    """The hidden layers of the target that it reads."""

    def start(self, session: Session) -> None:
        """Begins a new call; whatever an earlier one left is forgotten."""

    def propose(self, budget: int) -> Draft:
        """Returns a draft no deeper than `budget` >= 1 tokens; node 0 of each row is its pending token."""
        ...

    def observe(self, step: Step) -> None:
        """Learns what became of the draft; `session.rows` already holds the new tokens.

        Rows may have been cut to fewer nodes than were proposed, or the draft been another drafter's, or none at all.
        """


def forget(drafter: Any) -> None:
    """Makes a drafter forget earlier calls, if it remembers any."""
    getattr(drafter, "forget", lambda: None)()


def name_of(drafter: Any) -> str:
    """Returns the family that a drafter is of."""
    return type(drafter).__module__.rsplit(".", 1)[-1]


def names() -> list[str]:
    """Returns every family."""
    return sorted(info.name for info in pkgutil.iter_modules(importlib.import_module(FAMILIES).__path__))


def find(name: str) -> ModuleType:
    """Returns the module of the family called `name`; raises ValueError with the nearest spelling."""
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names())}"
        raise ValueError(f"unknown drafter family {name!r}; {hint}")
    return importlib.import_module(f"{FAMILIES}.{name}")
