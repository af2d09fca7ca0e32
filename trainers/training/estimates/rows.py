"""Counts the rows of a run: tokens, supervised tokens, padding, and optimiser steps per epoch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.batches import Example, grouped_order, order, truncate

MAX_READ = 2_000
"""Rows read; of more, this many are read and the rest is estimated from them."""


@dataclass(frozen=True, kw_only=True)
class RowCounts:
    """Counts of the training rows, scaled to all rows if only some were read."""

    num_rows: int
    num_read: int
    num_tokens: int
    num_supervised: int
    """Tokens with a loss; the first of a row has none."""
    padded_tokens_per_batch: float
    """Mean number of tokens of a micro-batch, padding included."""
    steps_per_epoch: int
    """Optimiser steps, without the last batch if it is not full."""
    rows_per_batch: int
    packed_steps_per_epoch: int
    """Optimiser steps if rows were packed, without padding, as many to a batch as the longest row would fit."""

    @property
    def supervised_share(self) -> float:
        return self.num_supervised / max(self.num_tokens, 1)

    @property
    def padding_share(self) -> float:
        """Returns the share of a micro-batch's tokens that are padding."""
        tokens = self.num_tokens / self.num_rows * self.rows_per_batch
        return max(0.0, 1 - tokens / self.padded_tokens_per_batch)


def count(
    rows: Sequence[Example],
    *,
    batch_size: int,
    rows_per_step: int,
    max_length: int,
    seed: int = 0,
    group_by_length: bool = False,
) -> RowCounts:
    """Returns the counts of rows cut to `max_length` tokens, in random order or grouped by length."""
    num_read = min(len(rows), MAX_READ)
    indices = order(len(rows), seed=seed, epoch=0)[:num_read]
    found = [truncate(rows[index], max_length) for index in indices]
    if group_by_length:
        found = [found[index] for index in grouped_order(found, rows_per_step, max_length, seed=seed, epoch=0)]
    lengths = np.array([len(row.tokens_T) for row in found])
    supervised = sum(int(row.loss_mask_T[1:].sum()) for row in found)
    scale = len(rows) / num_read
    # Rows are in the order of an epoch, so that consecutive ones are as good as a batch.
    whole = (
        lengths[: num_read // batch_size * batch_size].reshape(-1, batch_size)
        if num_read >= batch_size
        else lengths[None]
    )
    padded = float((whole.max(axis=1) * batch_size).mean())
    num_tokens = round(lengths.sum() * scale)
    return RowCounts(
        num_rows=len(rows),
        num_read=num_read,
        num_tokens=num_tokens,
        num_supervised=round(supervised * scale),
        padded_tokens_per_batch=padded,
        steps_per_epoch=len(rows) // rows_per_step,
        packed_steps_per_epoch=math.ceil(num_tokens / (int(lengths.max()) * rows_per_step)),
        rows_per_batch=batch_size,
    )
