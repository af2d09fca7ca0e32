"""Calibration and held-out batches of text for compression."""

from data.batches import Batch, Example, collate, order, split
from data.examples import Examples, usable_rows

HELD_OUT_SHARE = 0.05


def batches(
    examples: Examples, num_batches: int, *, batch_size: int, max_length: int, seed: int, is_held_out: bool = False
) -> list[Batch]:
    """Returns at most `num_batches` batches of random rows, each truncated to `max_length` tokens.

    Held-out rows are disjoint from the others. Rows without a supervised token are left out and reported. Raises
    ValueError if none is left.
    """
    usable = usable_rows(examples, "calibration text", max_length=max_length, max_left_out=1.0)
    sides = split([examples.keys[index] for index in usable], held_out_share=HELD_OUT_SHARE, seed=seed)
    indices = [usable[index] for index in sides[is_held_out]]
    drawn = order(len(indices), seed=seed, epoch=0)[: num_batches * batch_size]
    rows = [_cut(examples[indices[index]], max_length) for index in drawn]
    return [collate(rows[begin : begin + batch_size]) for begin in range(0, len(rows), batch_size)]


def _cut(row: Example, length: int) -> Example:
    """Returns the row's first tokens, without stored target outputs."""
    return Example(tokens_T=row.tokens_T[:length], loss_mask_T=row.loss_mask_T[:length], key=row.key)
