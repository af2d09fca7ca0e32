"""The two ways to compute the attention of blocks, against each other and one block at a time.

Shape suffixes: B rows, T positions of the text, M blocks, L tokens of a block, Q = M L, H heads, D head width.
"""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from trainers.parts.parallel.block_attention import dense_attention, sparse_attention


@pytest.mark.parametrize(
    "attend",
    [pytest.param(dense_attention, id="dense"), pytest.param(sparse_attention, id="sparse", marks=pytest.mark.slow)],
)
def test_every_block_sees_the_text_before_it_and_itself(attend: object) -> None:
    generator = torch.Generator().manual_seed(0)
    num_rows, num_blocks, size, num_text = 2, 3, 4, 9
    query_BHQD = torch.randn(num_rows, 4, num_blocks * size, 16, generator=generator)
    text = tuple(torch.randn(num_rows, 2, num_text, 16, generator=generator) for _ in range(2))
    blocks = tuple(torch.randn(num_rows, 2, num_blocks * size, 16, generator=generator) for _ in range(2))
    starts_BM = torch.tensor([[0, 3, 7], [2, 2, 9]])
    found_BHQD = attend(query_BHQD, text, blocks, starts_BM)  # type: ignore[operator]
    for row in range(num_rows):
        for block, start in enumerate(starts_BM[row].tolist()):
            own = slice(block * size, (block + 1) * size)
            key_HSD, value_HSD = (
                torch.cat([before[row, :, :start], after[row, :, own]], dim=1)
                for before, after in zip(text, blocks, strict=True)
            )
            alone_HLD = scaled_dot_product_attention(query_BHQD[row, :, own], key_HSD, value_HSD, enable_gqa=True)
            torch.testing.assert_close(found_BHQD[row, :, own], alone_HLD)
