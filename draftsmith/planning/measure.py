"""Measures what a plan is computed from, in the decoding loop itself: `measure`.

The target decodes plainly while the drafter drafts at every position, so that each position's draft can be compared
with the text that follows: how far it agrees is how far it would be accepted, for every draft length at once. At
temperature 0 that is exact, as the text does not depend on drafts. Above 0 the verifier "coupled" fixes the text in the
same way; drafts that are sampled are accepted slightly less often by it than by the default verifiers. Rounds of every
length follow, verified in earnest and timed in turn.

Shape suffixes: B rows, N nodes.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from draftsmith.core.drafter import Drafter, Session, Step
from draftsmith.core.fixed_shapes.chains import likeliest_chain
from draftsmith.core.target import Target
from draftsmith.core.tree import Draft, chain
from draftsmith.decoding import generate
from draftsmith.length.costs import Stopwatch
from draftsmith.planning.grid import Grid

Cell = tuple[int, int]
"""A batch size and a context length."""


@dataclass(frozen=True, kw_only=True)
class Position:
    """The draft at one position of a text, compared with the text that followed."""

    num_drafted: int
    num_accepted: int
    confidences: tuple[float, ...] = ()
    """The draft model's probability of each drafted token; empty if the drafter does not report them."""


@dataclass(kw_only=True)
class Measured:
    """Times in milliseconds of one round, and the positions of every text by context."""

    draft_ms: dict[Cell, dict[int, float]] = field(default_factory=dict)
    """By number of tokens asked for: the drafter's own time, of drafting and of reading the outcome."""
    verify_ms: dict[Cell, dict[int, float]] = field(default_factory=dict)
    """By number of tokens verified, 0 being a plain step: everything else."""
    texts: dict[int, list[list[Position]]] = field(default_factory=dict)

    @property
    def deepest(self) -> int:
        """Returns the number of tokens of the longest draft."""
        return max((p.num_drafted for texts in self.texts.values() for text in texts for p in text), default=0)


def measure(
    target: Target,
    drafter: Drafter,
    rows_of: Callable[[int, int], list[list[int]]],
    grid: Grid,
    on_round: Callable[[], Any] = lambda: None,
) -> Measured:
    """Returns the measurements of the whole grid; `rows_of(context, number)` returns as many prompts of that length.

    `on_round` is called `grid.num_rounds` times. Earlier calls' state in the drafter is dropped.
    """
    found, most = Measured(), grid.batch_sizes[-1]
    with chains_only(drafter, grid.lengths[-1]):
        for context in grid.contexts:
            rows = rows_of(context, grid.num_batches * most)
            texts: list[list[Position]] = []
            for at in range(grid.num_batches):
                # The last batch of the largest size goes on with timed rounds.
                timed = grid.repeats + 1 if at == grid.num_batches - 1 else 0
                probe = _run(target, drafter, rows[at * most : (at + 1) * most], grid, timed, True, on_round)
                texts += probe.positions(grid.num_tokens, target.eos_token_ids or ())
                if timed:
                    found.draft_ms[most, context], found.verify_ms[most, context] = probe.times()
            found.texts[context] = texts[: grid.num_texts]
            for size in grid.batch_sizes[:-1]:
                probe = _run(target, drafter, rows[:size], grid, grid.repeats + 1, False, on_round)
                found.draft_ms[size, context], found.verify_ms[size, context] = probe.times()
    return found


@contextmanager
def chains_only(drafter: Drafter, num_draft: int) -> Iterator[None]:
    """Makes a drafter draft chains of up to `num_draft` tokens in a block, as far as its configuration sets shapes."""
    before, shape = drafter.config, {"num_draft": num_draft, "width": 0, "tree": ()}
    names = {one.name for one in dataclasses.fields(before)}
    if "num_draft" in names:
        drafter.config = dataclasses.replace(before, **{key: shape[key] for key in shape.keys() & names})
    try:
        yield
    finally:
        drafter.config = before


class _Finished(Exception):
    """Ends a call of `generate` after the last round of a probe."""


def _run(
    target: Target,
    drafter: Drafter,
    rows: list[list[int]],
    grid: Grid,
    num_timed: int,
    is_recorded: bool,
    on_round: Callable[[], Any],
) -> "Probe":
    """Decodes `rows` with a probe, which records first and then times every length `num_timed` times in turn."""
    drafter.forget()
    num_recorded = grid.num_tokens + grid.lengths[-1] if is_recorded else 0
    probe = Probe(drafter, grid.lengths, num_recorded, num_timed, on_round)
    with suppress(_Finished):
        generate(
            target,
            rows,
            probe,
            max_new_tokens=grid.room,
            temperature=grid.temperature,
            verifier="coupled" if grid.temperature > 0 else "auto",
            seed=grid.seed,
            eos_token_id=[],
        )
    return probe


class Probe(Drafter):
    """A drafter that records another one's drafts without having them verified, and then times rounds of each length.

    In recorded rounds the target makes plain steps. In timed ones the draft has exactly the length asked for: what the
    drafter has not found is filled up, as the cost does not depend on tokens.
    """

    def __init__(
        self,
        drafter: Drafter,
        lengths: Sequence[int],
        num_recorded: int,
        num_timed: int,
        on_round: Callable[[], Any] = lambda: None,
    ) -> None:
        """Takes the number of recorded rounds, and of timed rounds of each length, the first being a warm-up."""
        self.config, self.target = SimpleNamespace(length="fixed"), drafter.target
        self.hidden_layers = drafter.hidden_layers
        self.rows: list[list[int]] = []
        """Each row's text at the end."""
        self._drafter, self._on_round = drafter, on_round
        self._num_recorded, self._timed, self._num_warm_up = num_recorded, list(lengths) * num_timed, len(lengths)
        self._longest = lengths[-1]
        self._records: list[list[tuple[int, list[int], list[float]]]] = []
        self._drafting: dict[int, list[float]] = defaultdict(list)
        self._others: dict[int, list[float]] = defaultdict(list)
        self._round = 0

    def start(self, session: Session) -> None:
        self._session = session
        self._records = [[] for _ in session.rows]
        self._drafter.start(dataclasses.replace(session, should_continue=self._should_continue))
        self._watch = Stopwatch(self.target.device)
        self._own_ms = 0.0

    def propose(self, budget: int) -> Draft:
        rest_ms = self._watch.lap_ms()
        timed_at = self._round - self._num_recorded - 1  # of the round that has just ended
        if timed_at >= self._num_warm_up:
            length = self._timed[timed_at]
            self._drafting[length].append(self._own_ms)
            self._others[length].append(self._verify_ms + rest_ms)
        if self._round > 0:
            self._on_round()
        if self._round >= self._num_recorded + len(self._timed):
            self.rows = [list(row) for row in self._session.rows]
            raise _Finished
        is_recorded = self._round < self._num_recorded
        length = self._longest if is_recorded else self._timed[self._round - self._num_recorded]
        self._round += 1
        self._confidences: list[list[float]] = [[] for _ in self._session.rows]
        self._watch.lap_ms()
        draft = likeliest_chain(self._drafter.propose(length)) if length else self._session.empty_draft()
        self._own_ms = self._watch.lap_ms()
        if is_recorded:
            self._record(draft)
            draft = self._session.empty_draft()
        elif length:
            draft = self._filled(draft, length)
        self._watch.lap_ms()
        return draft

    def observe(self, step: Step) -> None:
        self._verify_ms = self._watch.lap_ms()
        self._drafter.observe(step)
        self._own_ms += self._watch.lap_ms()

    def positions(self, num_tokens: int, eos: Sequence[int]) -> list[list[Position]]:
        """Returns each row's first `num_tokens` recorded positions, fewer if its text ended before."""
        found = []
        for row, records in zip(self.rows, self._records, strict=True):
            first = records[0][0]
            end = next((at + 1 for at in range(first, len(row)) if row[at] in eos), len(row))
            positions = []
            for begin, tokens, confidences in records[:num_tokens]:
                if begin >= end:
                    break
                after = row[begin : min(begin + len(tokens), end)]
                pairs = zip(tokens, after, strict=False)
                accepted = next((at for at, (one, other) in enumerate(pairs) if one != other), len(after))
                positions.append(
                    Position(num_drafted=len(tokens), num_accepted=accepted, confidences=tuple(confidences))
                )
            found.append(positions)
        return found

    def times(self) -> tuple[dict[int, float], dict[int, float]]:
        """Returns the median milliseconds of each length: the drafter's own, and of everything else."""
        draft_ms = {length: median(times) for length, times in self._drafting.items()}
        return draft_ms, {length: median(times) for length, times in self._others.items()}

    def _should_continue(self, row: int, confidence: float) -> bool:
        self._confidences[row].append(confidence)
        return True

    def _record(self, draft: Draft) -> None:
        used = draft.num_nodes or [draft.tree.num_nodes] * len(draft.tokens_BN)
        rows = zip(self._session.rows, draft.tokens_BN.tolist(), used, self._confidences, self._records, strict=True)
        for row, tokens, number, confidences, records in rows:
            records.append((len(row), tokens[1:number], confidences[: number - 1]))

    def _filled(self, draft: Draft, length: int) -> Draft:
        """Returns the draft with `length` tokens in every row, as far as its tokens alone are to be verified."""
        is_whole = draft.tree.depth == length and draft.num_nodes is None
        if is_whole or draft.draft_probs_BNV is not None or draft.resume_point is not None:
            return draft
        tokens_BN = draft.tokens_BN[:, : 1 + length]
        missing = 1 + length - tokens_BN.shape[1]
        tokens_BN = torch.cat([tokens_BN, tokens_BN[:, :1].expand(-1, missing)], dim=1)
        return Draft(tokens_BN=tokens_BN, tree=chain(1 + length, tokens_BN.device))


def interpolated(times: dict[int, float], number: int) -> float:
    """Returns the time for `number` tokens, on the line between the two nearest measured numbers."""
    known = sorted(times)
    return float(np.interp(number, known, [times[one] for one in known]))
