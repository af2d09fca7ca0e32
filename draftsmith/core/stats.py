"""Counts and times of one call of `generate`."""

from collections import Counter
from dataclasses import dataclass, field

from draftsmith.core.tree import Draft


@dataclass(kw_only=True)
class GenerationStats:
    """Counts over all rows; times are totals of the call."""

    num_rows: int
    rounds: int = 0
    """Target forwards, each over all rows; the prefill is not counted."""
    steps: int = 0
    """Verified drafts, summed over running rows: each row's target forwards without the prefill."""
    new_tokens: int = 0
    """Generated tokens, without those after an end-of-sequence."""
    drafted: list[int] = field(default_factory=list)
    """Entry d is the number of drafts that reached depth d + 1."""
    accepted: list[int] = field(default_factory=list)
    """Entry d is the number of drafts whose accepted path reached depth d + 1."""
    verified: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Number of verification forwards by (first block run, drafted nodes)."""
    prefill_ms: float = 0.0
    draft_ms: float = 0.0
    verify_ms: float = 0.0
    commit_ms: float = 0.0

    @property
    def tau(self) -> float:
        """Mean accepted length: tokens committed per target forward, the target's own token included."""
        return self.new_tokens / max(self.steps, 1)

    @property
    def accepted_per_depth(self) -> list[float]:
        """Acceptance rate at each depth (from 1): the share of drafts at least that deep that are accepted to it."""
        return [accepted / drafted for accepted, drafted in zip(self.accepted, self.drafted, strict=True) if drafted]

    def count_round(self, draft: Draft) -> None:
        """Counts a verification forward."""
        self.rounds += 1
        start = draft.resume_point.layer if draft.resume_point is not None else 0
        self.verified[start, draft.tree.num_nodes - 1] += 1

    def count(self, draft: Draft, row: int, *, num_accepted: int, num_kept: int) -> None:
        """Counts one row's verified draft."""
        depth = drafted_depth(draft, row)
        self.steps += 1
        self.new_tokens += num_kept
        for counts, reached in ((self.drafted, depth), (self.accepted, min(num_accepted, depth))):
            counts.extend([0] * (max(depth, len(self.drafted)) - len(counts)))
            for level in range(reached):
                counts[level] += 1


def drafted_depth(draft: Draft, row: int) -> int:
    """Returns the depth of the deepest node that a row uses."""
    if draft.num_nodes is None:
        return draft.tree.depth
    if draft.tree.is_chain:
        return draft.num_nodes[row] - 1
    depths_RN = draft.tree.depths_RN
    return int(depths_RN[row % len(depths_RN), : draft.num_nodes[row]].max())
