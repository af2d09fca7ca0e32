"""Calibration batches: rows with nothing to learn are left out and reported."""

import pytest

from data.examples import TextExamples
from data.prompts import Prompt
from trainers.compression.calibration import batches


def texts(*masks: list[bool]) -> TextExamples:
    """Returns a text of tokens 5 for each loss mask."""
    return TextExamples(
        [
            Prompt(ids=[5] * len(mask), loss_mask=mask, text="", category=None, key=f"k{at}", source=f"rows.jsonl:{at}")
            for at, mask in enumerate(masks)
        ]
    )


def test_batches_leave_out_rows_with_nothing_to_learn(capsys: pytest.CaptureFixture[str]) -> None:
    good, short, late = [[False, True, True]] * 30, [True], [False] * 4 + [True]
    found = batches(texts(*good, short, late), 2, batch_size=8, max_length=4, seed=0)
    assert [len(batch.lengths_B) for batch in found] == [8, 8]
    assert all(batch.loss_mask_BT[:, 1:].any(dim=1).all() for batch in found)
    printed = capsys.readouterr().out
    assert "calibration text: 2 of 32 rows cannot be used" in printed
    assert "rows.jsonl:30: it has nothing to learn" in printed and "rows.jsonl:31: its answer lies beyond 4" in printed
    with pytest.raises(ValueError, match=r"calibration text: 2 of 2 rows cannot be used .*none is left"):
        batches(texts(short, late), 4, batch_size=8, max_length=4, seed=0)
