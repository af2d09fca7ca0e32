"""Bookkeeping after verification: which accepted tokens a drafter's own cache or state already covers."""

from collections.abc import Sequence

from draftsmith.core.drafter import Session, Step
from draftsmith.core.tree import Draft


class DraftProgress:
    """Counts the nodes of the last draft that the drafter has processed, and says which of them were accepted."""

    def __init__(self, session: Session) -> None:
        self._rows = session.rows
        self.reset()

    def reset(self) -> None:
        """Forgets the draft."""
        self._draft: Draft | None = None
        self.num_processed = 0
        """Leading nodes of the draft whose keys and values, or states, the drafter holds in the draft's order."""

    def drafted(self, draft: Draft, num_processed: int, *, is_reordered: bool = False) -> None:
        """Records a new draft, of which the first `num_processed` nodes were processed.

        The nodes of a dynamic tree were processed in another order than the draft lists them in: of such a draft only
        node 0 counts.
        """
        self._draft = draft
        self.num_processed = min(num_processed, 1) if is_reordered else num_processed

    def accepted(self, step: Step, num_held: Sequence[int] | None = None) -> list[list[int]]:
        """Returns each row's accepted nodes that were processed, in order; the draft is then over.

        A row that finished within its path has fewer tokens than were accepted: with `num_held`, the number of each
        row's tokens that the drafter held before the draft, the nodes of the missing tokens are left out.
        """
        # Another drafter's draft, or that of a plain step, shares only node 0, the pending token.
        num_processed = self.num_processed if step.is_for(self._draft) else min(self.num_processed, 1)
        self.reset()
        kept = [[node for node in path if node < num_processed] for path in step.paths]
        if num_held is None:
            return kept
        limits = [len(ids) - 1 - held for ids, held in zip(self._rows, num_held, strict=True)]
        return [nodes[:limit] for nodes, limit in zip(kept, limits, strict=True)]
