"""Calibration and held-out batches of text for compression."""

from data.batches import Batch, Example, collate, order, split
from data.examples import Examples

HELD_OUT_SHARE = 0.05


def batches(
    examples: Examples, num_batches: int, *, batch_size: int, max_length: int, seed: int, is_held_out: bool = False
) -> list[Batch]:
    """Returns at most `num_batches` batches of random rows, each truncated to `max_length` tokens.

    Held-out rows are disjoint from the others. Raises ValueError if no row has a supervised token.
    """
    sides = split(examples.keys, held_out_share=HELD_OUT_SHARE, seed=seed)
    indices, rows = sides[is_held_out], []
    for index in order(len(indices), seed=seed, epoch=0):
        row = _cut(examples[indices[index]], max_length)
        if row.loss_mask_T[1:].any():
            rows.append(row)
        if len(rows) == num_batches * batch_size:
            break
    if not rows:
        raise ValueError(f"no row has a supervised token among its first {max_length} tokens")
    return [collate(rows[begin : begin + batch_size]) for begin in range(0, len(rows), batch_size)]


def _cut(row: Example, length: int) -> Example:
    """Returns the row's first tokens, without stored target outputs."""
    return Example(tokens_T=row.tokens_T[:length], loss_mask_T=row.loss_mask_T[:length], key=row.key)
