"""Cascade: several drafters, one of which drafts in each step, such as a look-up and heads for where it finds nothing.

The parts are tried in the order of their measured tokens per millisecond, drafting and verification included. A step
of plain decoding is one of the choices, so that nothing is drafted where drafting does not pay.
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
from draftsmith.parts.checks import MAX_NODES, check_at_least
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
    """Settings of a cascade."""

    parts: PartConfigs
    """Each part's family and configuration."""
    adaptive: bool = True
    """Try the fastest part by measured tokens per millisecond first, and none that is slower than plain steps, which
    depends on the clock and on earlier calls; otherwise try the parts in the given order."""
    min_tokens: int = 1
    """Minimum depth, in at least one row, of a part's draft; the next part is tried otherwise. A sampled draft needs
    only one token: rejecting it for what was sampled would change the output distribution."""

    def __post_init__(self) -> None:
        check_parts(self.parts)
        check_at_least(self, 1, "min_tokens", most=MAX_NODES)


class Drafter(drafter.Drafter):
    """Uses one part's draft for the whole batch in each step; all parts observe every step."""

    TRIAL_EVERY = 32
    """Steps after which a choice not used since is tried first, because its estimate may be out of date."""

    keeps_state_between_calls = True

    def __init__(self, config: Config, target: Target, parts: Sequence[Part] | None = None) -> None:
        self.config = config
        self.target = target
        self.parts = list(parts or [make_part(part, target) for part in config.parts])
        self.hidden_layers = hidden_layers_of(self.parts)
        self._estimates_by_call: dict[tuple[int, Sampling], list[Estimate]] = {}

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
        self._begin(len(session.rows))
        for part in self.parts:
            part.start(session)

    def change_rows(self, origins: list[int | None], new: Session | None) -> bool:
        self._begin(len(origins))
        return all(part.change_rows(origins, new) for part in self.parts)

    def _begin(self, num_rows: int) -> None:
        self._is_running = [True] * num_rows
        self._draft: Draft | None = None
        # Estimates hold for this batch size and sampling; the last one is that of plain steps.
        key = (num_rows, self._session.sampling)
        self._estimates = self._estimates_by_call.setdefault(key, [Estimate() for _ in range(len(self.parts) + 1)])

    def propose(self, budget: int) -> Draft:
        for choice in self._order():
            is_plain = choice == len(self.parts)
            self._choice = choice
            self._draft = self._session.empty_draft() if is_plain else self.parts[choice].propose(budget)
            if is_plain or self._is_deep_enough(self._draft):
                break
        assert self._draft is not None
        return self._draft

    def observe(self, step: Step) -> None:
        self._is_running = [len(path) > 0 for path in step.paths]
        for estimate in self._estimates:
            estimate.num_since += 1
        if step.is_of(self._draft) and (step.draft.tree.depth > 0 or self._choice == len(self.parts)):
            tokens = sum(map(len, step.paths)) / max(sum(self._is_running), 1)
            self._estimates[self._choice].add(tokens, step.cost_ms)
        self._draft = None
        for part in self.parts:
            part.observe(step)

    def _order(self) -> list[int]:
        """Returns the parts in the order in which they are tried, a plain step being the choice `len(self.parts)`."""
        if not self.config.adaptive:
            return list(range(len(self.parts)))
        estimates = self._estimates
        return sorted(
            range(len(estimates)),
            key=lambda at: (estimates[at].num_since < self.TRIAL_EVERY, -estimates[at].tokens_per_ms()),
        )

    def _is_deep_enough(self, draft: Draft) -> bool:
        depths = [drafted_depth(draft, row) for row, runs in enumerate(self._is_running) if runs]
        return max(depths) >= (self.config.min_tokens if draft.draft_probs_BNV is None else 1)


class Estimate:
    """Estimates a choice's tokens per millisecond: by plain means at first, then by running means."""

    WEIGHT = 0.1
    """Weight of the newest step in a running mean."""

    def __init__(self) -> None:
        self._num_steps = self.num_since = 0
        self._tokens = self._ms = 0.0

    def add(self, tokens: float, ms: float) -> None:
        """Adds a step: its tokens, averaged over rows, and its time."""
        self._num_steps, self.num_since = self._num_steps + 1, 0
        weight = max(self.WEIGHT, 1 / self._num_steps)
        self._tokens += weight * (tokens - self._tokens)
        self._ms += weight * (ms - self._ms)

    def tokens_per_ms(self) -> float:
        """Returns the estimate, infinite before the first step."""
        return self._tokens / self._ms if self._ms > 0 else float("inf")
