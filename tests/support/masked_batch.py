"""A training batch with rows of several lengths, each supervised in part."""

import torch

from data.batches import Batch, collate, example
from tests.support.models import VOCAB_SIZE


def masked_batch(num_rows: int = 3) -> Batch:
    """Returns rows of 9, 12 and 15 tokens in turn, whose loss masks begin at different positions and have a gap."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for row in range(num_rows):
        length = 9 + 3 * (row % 3)
        mask = [position >= 2 + row % 3 and position != 7 for position in range(length)]
        rows.append(example(torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist(), mask, str(row)))
    return collate(rows)
