"""Recorded drafts replay to what decoding does, and every length is timed."""

from typing import Any

import pytest

import draftsmith
from draftsmith.drafters import lookup
from draftsmith.planning.grid import Grid
from draftsmith.planning.lengths import replay
from draftsmith.planning.measure import Probe, measure
from tests.support.drafters import generate_rows, tiny_drafter
from tests.support.models import tiny_target

GRID = Grid(batch_sizes=(1, 2), contexts=(6, 9), lengths=(0, 1, 3), num_texts=4, num_tokens=12, repeats=1)


def rows_of(context: int, number: int) -> list[list[int]]:
    return [[3 + (7 * row + at) % 20 for at in range(context)] for row in range(number)]


@pytest.mark.parametrize("name", ["lookup", "copy", "medusa"])
def test_recorded_drafts_replay_to_the_rounds_of_decoding(name: str) -> None:
    """At temperature 0 the mean accepted length of each draft length is that of decoding with it."""
    target, drafter = tiny_target("llama"), tiny_drafter(name, "llama")
    lengths = (1, 2) if name == "medusa" else (1, 3)
    grid = Grid(batch_sizes=(1,), contexts=(9,), lengths=(0, *lengths), num_texts=3, num_tokens=20, repeats=1)
    rows = rows_of(9, 3)
    before = drafter.config
    found = measure(target, drafter, lambda context, number: rows[:number], grid)
    assert drafter.config is before
    for row, positions in zip(rows, found.texts[9], strict=True):
        for length in lengths:
            steps = draftsmith.generate(
                target, [row], drafter, max_new_tokens=20, length=f"fixed={length}", batch_invariant=name == "medusa"
            ).stats.steps
            assert replay([positions], length, 1, tokens_per_place=0).rounds.total() == steps


def test_every_length_is_timed_at_every_batch_size_and_context() -> None:
    rounds: list[None] = []
    target = tiny_target("llama")
    drafter: Any = lookup.Drafter(lookup.Config(), target)
    found = measure(target, drafter, rows_of, GRID, lambda: rounds.append(None))
    cells = {(1, 6), (2, 6), (1, 9), (2, 9)}
    assert found.draft_ms.keys() == found.verify_ms.keys() == cells
    assert all(times.keys() == set(GRID.lengths) for times in found.verify_ms.values())
    assert all(min(times.values()) > 0 for times in found.verify_ms.values())
    assert len(rounds) == GRID.num_rounds
    assert {context: len(texts) for context, texts in found.texts.items()} == {6: 4, 9: 4}
    assert all(len(text) <= 12 for texts in found.texts.values() for text in texts)


def test_a_probe_leaves_the_text_unchanged() -> None:
    target = tiny_target("llama")
    plain = generate_rows(target, 3, None)
    probe = Probe(tiny_drafter("copy", "llama"), (0, 2), 4, 20)
    assert generate_rows(target, 3, probe).sequences.tolist() == plain.sequences.tolist()
