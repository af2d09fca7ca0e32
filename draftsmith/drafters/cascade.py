"""Several drafters of which one drafts at each step: as a look-up, and heads where it finds nothing.

Which one is asked first is settled by what each has brought: tokens a millisecond, drafting and verification included.
A plain step is one of the choices, so that nothing is drafted where that does not pay.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from torch import Tensor

from draftsmith.core import drafter
from draftsmith.core.drafter import Session, Step
from draftsmith.core.sampling import Sampling
from draftsmith.core.stats import drafted_depth
from draftsmith.core.target import Target
from draftsmith.core.tree import Draft
from draftsmith.parts.composites import (
    Part,
    PartConfigs,
    check_parts,
    forget_all,
    hidden_layers_of,
    load_part,
    make_part,
    parameters_of,
    save_parts,
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """The parts, and in which order they are asked."""

    parts: PartConfigs
    """Each part's family and configuration."""
    adaptive: bool = True
    """Whether the part that has brought most tokens a millisecond is asked first, and none that has brought less than
    plain steps: this goes by the clock and by earlier calls. Else all are asked in the order given."""
    min_tokens: int = 1
    """A part has found something if its draft, of some row, is at least so many tokens deep; else the next is asked. A
    draft of tokens drawn from a law counts if it has any, as it must not be judged by what was drawn."""

    def __post_init__(self) -> None:
        check_parts(self.parts)
        if self.min_tokens < 1:
            raise ValueError(f"min_tokens is {self.min_tokens}; it must be at least 1")


class Drafter(drafter.Drafter):
    """One part proposes for the whole batch, as a step is one forward; all of them see what becomes of it."""

    TRIAL_EVERY = 32
    """Steps after which a choice that was not made comes first: its estimate may have come to be wrong."""

    keeps_state_between_calls = True

    def __init__(self, config: Config, target: Target, parts: Sequence[Part] | None = None) -> None:
        self.config = config
        self.target = target
        self.parts = list(parts or [make_part(part, target) for part in config.parts])
        self.hidden_layers = hidden_layers_of(self.parts)
        self._known: dict[tuple[int, Sampling], list[Estimate]] = {}

    def save_state(self, folder: Path) -> None:
        save_parts(self.parts, folder)

    @classmethod
    def load_state(cls, folder: Path, config: Config, target: Target) -> Self:
        return cls(config, target, [load_part(folder, config.parts, at, target) for at in range(len(config.parts))])

    def parameters(self) -> Iterator[Tensor]:
        return parameters_of(self.parts)

    def forget(self) -> None:
        forget_all(self.parts)

    def start(self, session: Session) -> None:
        self._session = session
        self._is_running = [True] * len(session.rows)
        self._draft: Draft | None = None
        # What was learnt holds for calls like this one; the last estimate is that of plain steps.
        key = (len(session.rows), session.sampling)
        self._estimates = self._known.setdefault(key, [Estimate() for _ in range(len(self.parts) + 1)])
        for part in self.parts:
            part.start(session)

    def propose(self, budget: int) -> Draft:
        for place in self._order():
            is_plain = place == len(self.parts)
            self._place = place
            self._draft = self._session.empty_draft() if is_plain else self.parts[place].propose(budget)
            if is_plain or self._has_found(self._draft):
                break
        assert self._draft is not None
        return self._draft

    def observe(self, step: Step) -> None:
        self._is_running = [len(path) > 0 for path in step.paths]
        for estimate in self._estimates:
            estimate.num_since += 1
        if step.is_for(self._draft) and (step.draft.tree.depth > 0 or self._place == len(self.parts)):
            tokens = sum(map(len, step.paths)) / max(sum(self._is_running), 1)
            self._estimates[self._place].add(tokens, step.cost_ms)
        self._draft = None
        for part in self.parts:
            part.observe(step)

    def _order(self) -> list[int]:
        """Returns the order in which parts are asked, and where among them a plain step stands."""
        if not self.config.adaptive:
            return list(range(len(self.parts)))
        estimates = self._estimates
        return sorted(
            range(len(estimates)),
            key=lambda at: (estimates[at].num_since < self.TRIAL_EVERY, -estimates[at].tokens_per_ms()),
        )

    def _has_found(self, draft: Draft) -> bool:
        depths = [drafted_depth(draft, row) for row, runs in enumerate(self._is_running) if runs]
        return max(depths) >= (self.config.min_tokens if draft.draft_probs_BNV is None else 1)


class Estimate:
    """What a part's drafts have brought: means at first, then running ones."""

    WEIGHT = 0.1
    """Of the newest step in a running mean."""

    def __init__(self) -> None:
        self._num_steps = self.num_since = 0
        self._tokens = self._ms = 0.0

    def add(self, tokens: float, ms: float) -> None:
        """Takes in one step's tokens, of a row on average, and what it took."""
        self._num_steps, self.num_since = self._num_steps + 1, 0
        weight = max(self.WEIGHT, 1 / self._num_steps)
        self._tokens += weight * (tokens - self._tokens)
        self._ms += weight * (ms - self._ms)

    def tokens_per_ms(self) -> float:
        """Returns the expected rate, infinite before there is any."""
        return self._tokens / self._ms if self._ms > 0 else float("inf")
