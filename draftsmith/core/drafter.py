"""The interface of drafters: `Drafter`, the `Session` that it drafts in, and the `Step` that it observes.

A drafter with weights is an `nn.Module` that hides the target from its state dict: the module that trains is the module
that drafts.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from draftsmith.core.cache import KVCache
from draftsmith.core.rows import followed
from draftsmith.core.sampling import Sampling, draw, uniforms
from draftsmith.core.target import Source, Target
from draftsmith.core.tree import Draft, Verdict, chain


def always_continue(row: int, confidence: float) -> bool:
    """Returns True: no row stops early."""
    return True


class Noise(Protocol):
    """Noise that belongs to positions of rows' texts (draftsmith/verify/research/position_noise.py)."""

    def scores(self, probs_XFV: Tensor, depths: Sequence[int], rows: Sequence[int]) -> Tensor: ...

    def following(self, rows: list[list[int]]) -> "Noise": ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Session:
    """The state of one call of `generate` that its drafter can read; the loop updates `rows` and `cache` in place."""

    target: Target
    rows: list[list[int]]
    """Committed token ids of each row; the last one is pending: not yet fed to the target."""
    cache: KVCache
    """The target's KV cache, which holds all tokens of a row but the pending one."""
    sampling: Sampling
    generator: torch.Generator
    """The call's random generator, for drafters that sample."""
    noise: Noise | None = None
    """Under the verifier "coupled", what to draw tokens by instead."""
    hidden: dict[int, Tensor] = field(default_factory=dict)
    """By hidden layer that the drafter reads: its states over the prompt [B, T, D], right-padded, without the pending
    token."""
    source: Source | None = None
    """The encoded source of an encoder-decoder target."""
    should_continue: Callable[[int, float], bool] = always_continue
    """Returns whether a row drafts another token after one of this probability under the draft model. A drafter that
    drafts token by token calls it for each row still drafting, after each token. The `Config` of such a drafter has
    `supports_early_stop`, and names its default policy of draftsmith/length/policies.py in `length`."""

    def pending(self) -> Tensor:
        """Returns each row's pending token [B]."""
        return torch.tensor([row[-1] for row in self.rows], device=self.target.device)

    def uniforms(self) -> Tensor:
        """Returns one uniform random number per row [B], in float64, to draw a token with."""
        return uniforms(self.generator, len(self.rows)).to(self.target.device)

    def draw(self, probs_XV: Tensor, depth: int, rows: Sequence[int] | None = None) -> Tensor:
        """Returns a token [X] for each of `rows`, or all, drawn from its distribution after `depth` drafted tokens."""
        rows = range(len(self.rows)) if rows is None else rows
        if self.noise is not None:
            return self.noise.scores(probs_XV[:, None], [depth] * len(rows), rows)[:, 0].argmax(-1)
        return draw(probs_XV, self.uniforms()[list(rows)].to(probs_XV.device))

    def empty_draft(self) -> Draft:
        """Returns a draft of no tokens: the pending ones alone, as in a step of plain decoding."""
        return Draft(tokens_BN=self.pending()[:, None], tree=chain(1, self.target.device))


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """One verified draft, as passed to `observe`."""

    draft: Draft
    logits_BNV: Tensor
    """The target's logits at every node."""
    hidden: dict[int, Tensor]
    """By hidden layer that the drafter reads: its states at every node [B, N, D]."""
    verdict: Verdict
    paths: list[list[int]]
    """The committed nodes of each row, node 0 first; empty for a row that had finished before."""
    cost_ms: float
    """Milliseconds of drafting and verification."""

    def is_for(self, draft: Draft | None) -> bool:
        """Returns whether the verified draft is this one, whole or cut."""
        return draft is not None and self.draft.tokens_BN is draft.tokens_BN

    def is_of(self, draft: Draft | None) -> bool:
        """Returns whether the verified draft is this one, whole or cut, or some of its nodes."""
        return self.is_for(draft) or (draft is not None and self.draft.kept_of_BN is draft.tokens_BN)


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
    has_draft_model: bool = False
    """Whether the family's drafters have a draft model."""
    draft_model: Target | None = None
    """The draft model, with a cache of its own, of a drafter that has one."""
    parts: Sequence[Any] = ()
    """The drafters that it combines, each the `drafter` of an entry."""
    policy: Any = None
    """A draft-length policy (draftsmith/length/policies.py) kept between calls; None if each call has its own."""
    row_state: tuple[str, ...] = ()
    """Names of the attributes that hold the state of the call's rows, each as `followed` takes it."""
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
        """Drops each row's state past its first `lengths` tokens, after the others were removed; all rows are running.

        Returns False, the default, if it cannot: the caller must `start` it again.
        """
        return False

    def change_rows(self, origins: list[int | None], new: Session | None) -> bool:
        """Follows a batch whose rows come and go: row i is now what row `origins[i]` was, or for None a new text.

        Rows without a place in `origins` have ended. `session.rows` and `session.cache` hold the new batch already;
        `new` is the session of the new texts alone, None if there are none. The default takes the new rows' `row_state`
        from a copy of the drafter that is started on them. Returns False if it cannot follow, as where `row_state`
        names nothing: the loop then calls `start` with the rows' texts as prompts.
        """
        if not self.row_state:
            return False
        other = None
        if new is not None:
            other = copy.copy(self)
            other.start(new)
        states = {name: (getattr(self, name), getattr(other, name, None)) for name in self.row_state}
        if any(kept is None and fresh is not None for kept, fresh in states.values()):
            return False
        for name, (kept, fresh) in states.items():
            object.__setattr__(self, name, followed(origins, kept, fresh) if kept is not None else None)
        return True

    def forget(self) -> None:  # noqa: B027 (a default, not abstract)
        """Drops the state that earlier calls have left, so that it drafts as when it was made or loaded."""

    def on_weights_loaded(self) -> None:  # noqa: B027
        """Finishes a drafter whose weights are in place: it may check or quantise them, or fine-tune the target.

        A drafter that fine-tunes the target sets `target` to the fine-tuned one, the one to give to
        `generate`, and leaves the user's unchanged. Raises ValueError for weights that do not fit.
        """

    def parameters(self) -> Iterator[Tensor]:
        """Returns its weights."""
        return iter(())

    def save_state(self, folder: Path) -> None:  # noqa: B027
        """Writes the state that an artifact must hold beside the configuration and the weights."""

    @classmethod
    def load_state(cls, folder: Path, config: Any, target: Target) -> Self:
        """Returns the drafter with the state that `save_state` wrote, its weights not yet loaded.

        Raises ValueError if a file is missing, truncated or does not fit.
        """
        make: Any = cls
        return make(config, target)
