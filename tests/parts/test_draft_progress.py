"""Tests of the bookkeeping of processed and accepted draft nodes."""

from types import SimpleNamespace
from typing import Any

import torch

from draftsmith.core.drafter import Step
from draftsmith.core.tree import Draft, Verdict, chain
from draftsmith.parts.draft_progress import DraftProgress


def draft_of(num_nodes: int) -> Draft:
    return Draft(tokens_BN=torch.zeros(2, num_nodes, dtype=torch.long), tree=chain(num_nodes))


def step_of(draft: Draft, paths: list[list[int]]) -> Step:
    none: Any = None
    verdict: Verdict = none
    return Step(draft=draft, logits_BNV=none, hidden={}, verdict=verdict, paths=paths, cost_ms=1.0)


def progress_of(rows: list[list[int]]) -> DraftProgress:
    session: Any = SimpleNamespace(rows=rows)
    return DraftProgress(session)


def test_accepted_returns_processed_nodes_of_own_draft_once() -> None:
    progress, draft = progress_of([[1], [1]]), draft_of(4)
    progress.drafted(draft, 3)
    assert progress.accepted(step_of(draft, [[0, 1, 2, 3], [0]])) == [[0, 1, 2], [0]]
    assert progress.accepted(step_of(draft, [[0, 1, 2, 3], [0]])) == [[], []]


def test_accepted_keeps_only_node_0_of_other_and_reordered_drafts() -> None:
    progress, draft = progress_of([[1], [1]]), draft_of(4)
    progress.drafted(draft, 3)
    assert progress.accepted(step_of(draft_of(4), [[0, 1, 2], []])) == [[0], []]
    progress.drafted(draft, 3, is_reordered=True)
    assert progress.accepted(step_of(draft, [[0, 2], [0, 1]])) == [[0], [0]]


def test_accepted_drops_nodes_beyond_a_finished_row() -> None:
    """The first row has room for two of its three nodes before its last token."""
    progress, draft = progress_of([[9] * 8, [9] * 12]), draft_of(4)
    progress.drafted(draft, 4)
    assert progress.accepted(step_of(draft, [[0, 1, 2], [0, 1, 2]]), [5, 5]) == [[0, 1], [0, 1, 2]]
