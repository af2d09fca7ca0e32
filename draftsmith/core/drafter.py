"""The interface of drafters, and how families of drafters are found by name.

A family is a module or package that defines `Config`, a frozen dataclass of what its artifact must remember, and
`Drafter(config, target)`. It lies in draftsmith/drafters, or in an installed package that names it as an entry point.
A drafter with weights is an `nn.Module` that hides the target from its state dict: the module that trains is the module
that drafts.
"""

import difflib
import importlib
import pkgutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import torch
from torch import Tensor

from draftsmith.core.cache import KVCache
from draftsmith.core.sampling import Sampling
from draftsmith.core.target import Source, Target
from draftsmith.core.tree import Draft, Verdict, chain

FAMILIES = "draftsmith.drafters"
ENTRY_POINTS = "draftsmith.families"
"""Group of entry points by which an installed package names the modules of its families."""


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
    should_continue: Callable[[int, float], bool] = always
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


class Drafter(ABC):
    """The interface of a drafter, which every family's drafter inherits.

    `config`, `target`, `start`, `propose` and `observe` are each family's own; everything else has a default.
    """

    config: Any
    target: Target
    """The target to draft for: the one it was made for, or its fine-tuned version of that one."""
    hidden_layers: tuple[int, ...] = ()
    """Hidden layers of the target that it reads."""
    serving_engines: tuple[str, ...] = ()
    """Engines other than transformers that `draftsmith export` supports for the family."""
    draft_model: Target | None = None
    """The draft model, with a cache of its own, of a drafter that has one."""
    policy: Any = None
    """A draft-length policy (draftsmith/length/policies.py) kept between calls; None if each call has its own."""
    keeps_state_between_calls: bool = False
    """True if earlier calls change its drafts until `forget` is called."""

    @property
    def fine_tunes_target(self) -> bool:
        """Returns whether it drafts for a fine-tuned version of the target that it was made for."""
        return False

    @abstractmethod
    def start(self, session: Session) -> None:
        """Begins a call of `generate`, dropping the state of the call before."""

    @abstractmethod
    def propose(self, budget: int) -> Draft:
        """Returns a draft no deeper than `budget` >= 1 tokens; node 0 of each row is its pending token."""
        ...

    @abstractmethod
    def observe(self, step: Step) -> None:
        """Updates its state after verification; `session.rows` already holds the new tokens.

        The draft verified may have been cut to fewer nodes than proposed, or be another drafter's, or a plain step's.
        """

    def rewind(self, lengths: list[int]) -> bool:
        """Drops the state of each row past its first `lengths` tokens, which were taken back; all rows are running.

        Returns False, the default, if it cannot: the caller must `start` it again.
        """
        return False

    def forget(self) -> None:  # noqa: B027 (a default, not abstract)
        """Drops what earlier calls have taught it, so that it drafts as it did when it was made or loaded."""

    def on_weights_loaded(self) -> None:  # noqa: B027
        """Finishes a drafter whose weights are in place: it may check or quantise them, or fine-tune the target.

        A drafter that fine-tunes the target sets `target` to the fine-tuned one, the one to give to
        `generate`, and leaves the user's unchanged. Raises ValueError for weights that do not fit.
        """

    def parameters(self) -> Iterator[Tensor]:
        """Returns its weights."""
        return iter(())

    def save_state(self, folder: Path) -> None:  # noqa: B027
        """Writes what an artifact must hold beside the configuration and the weights."""

    @classmethod
    def load_state(cls, folder: Path, config: Any, target: Target) -> Self:
        """Returns the drafter with what `save_state` wrote, its weights not yet loaded.

        Raises ValueError if a file is missing, truncated or does not fit.
        """
        make: Any = cls
        return make(config, target)


def names() -> list[str]:
    """Returns the families of draftsmith and of installed packages."""
    return sorted({*_built_in(), *(entry.name for entry in entry_points(group=ENTRY_POINTS))})


def find(name: str) -> ModuleType:
    """Returns a family's module.

    Raises ValueError for an unknown name, giving the nearest spelling, and for a family of an installed package whose
    name is taken or whose module cannot be imported.
    """
    entries = list(entry_points(group=ENTRY_POINTS, name=name))
    packages = ["draftsmith"] * (name in _built_in()) + [_package(entry) for entry in entries]
    if not packages:
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the families are {', '.join(names())}"
        raise ValueError(f"unknown drafter family {name!r}; {hint}")
    if len(packages) > 1:
        raise ValueError(f"drafter family {name!r} is defined by {' and '.join(packages)}; uninstall all but one")
    if not entries:
        return importlib.import_module(f"{FAMILIES}.{name}")
    try:
        module = importlib.import_module(entries[0].value)
        missing = [part for part in ("Config", "Drafter") if part not in vars(module)]
        if missing:
            raise ImportError(f"{entries[0].value} does not define {' and '.join(missing)}")
    except Exception as error:  # another package's code may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"drafter family {name!r} of the installed package {packages[0]} cannot be imported ({reason}); update or"
            " uninstall the package"
        ) from error
    return module


def name_of(drafter: Drafter) -> str:
    """Returns the name of a drafter's family; raises ValueError if it belongs to none."""
    paths = {f"{FAMILIES}.{name}": name for name in _built_in()}
    paths |= {entry.value: entry.name for entry in entry_points(group=ENTRY_POINTS)}
    families = {vars(sys.modules[path]).get("Drafter"): name for path, name in paths.items() if path in sys.modules}
    for kind in type(drafter).__mro__:
        if kind in families:
            return families[kind]
    raise ValueError(
        f"{type(drafter).__qualname__} is the Drafter of no family; name its module in the entry-point group"
        f" {ENTRY_POINTS!r} of an installed package"
    )


def package_of(name: str) -> str | None:
    """Returns the installed package that defines a family, None for draftsmith's own."""
    return next((_package(entry) for entry in entry_points(group=ENTRY_POINTS, name=name)), None)


def _built_in() -> list[str]:
    return [info.name for info in pkgutil.iter_modules(importlib.import_module(FAMILIES).__path__)]


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else entry.value
