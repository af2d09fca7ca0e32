"""What a call of `generate` counts and times, and the threads it is timed on."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from draftsmith.core.tree import Draft


@dataclass(kw_only=True)
class GenerationStats:
    """Counts over all rows; times are totals of the call."""

    num_rows: int
    rounds: int = 0
    """Target forwards over all rows at once, the prefill not counted."""
    steps: int = 0
    """Verified drafts, summed over running rows: a row's target forwards, the prefill not counted."""
    new_tokens: int = 0
    """Tokens generated, those after an end-of-sequence not counted."""
    drafted: list[int] = field(default_factory=list)
    """Entry d counts the drafts that reached depth d + 1."""
    accepted: list[int] = field(default_factory=list)
    """Entry d counts the drafts whose accepted path reached depth d + 1."""
    verified: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Rounds by the block after which the target went on, 0 for all, and by the nodes read after a pending token."""
    prefill_ms: float = 0.0
    draft_ms: float = 0.0
    verify_ms: float = 0.0
    commit_ms: float = 0.0

    @property
    def tau(self) -> float:
        """Tokens committed per target forward, the target's own token included."""
        return self.new_tokens / max(self.steps, 1)

    @property
    def accepted_per_depth(self) -> list[float]:
        """Share of drafts reaching each depth (from 1) whose accepted path reached it too."""
        return [accepted / drafted for accepted, drafted in zip(self.accepted, self.drafted, strict=True) if drafted]

    def count_round(self, draft: Draft) -> None:
        """Adds a forward over a draft."""
        self.rounds += 1
        self.verified[draft.resume_point.layer if draft.resume_point is not None else 0, draft.tree.num_nodes - 1] += 1

    def count(self, draft: Draft, row: int, *, num_accepted: int, num_kept: int) -> None:
        """Adds one row's verified draft."""
        depth = drafted_depth(draft, row)
        self.steps += 1
        self.new_tokens += num_kept
        for counts, reached in ((self.drafted, depth), (self.accepted, min(num_accepted, depth))):
            counts.extend([0] * (max(depth, len(self.drafted)) - len(counts)))
            for level in range(reached):
                counts[level] += 1


def drafted_depth(draft: Draft, row: int) -> int:
    """Returns how deep the row's nodes in use reach."""
    if draft.num_nodes is None:
        return draft.tree.depth
    if draft.tree.is_chain:
        return draft.num_nodes[row] - 1
    depths_RN = draft.tree.depths_RN
    return int(depths_RN[row % len(depths_RN), : draft.num_nodes[row]].max())


class Stopwatch:
    """Times consecutive stages; on an accelerator it waits for the work before reading the clock."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last = time.perf_counter()

    def lap_ms(self) -> float:
        """Returns milliseconds since the last call."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        lap, self._last = 1e3 * (now - self._last), now
        return lap


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    """Runs a block on `count` CPU threads, 0 for as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
