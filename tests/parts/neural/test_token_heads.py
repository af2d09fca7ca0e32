"""Tests of Medusa-style token heads.

Shape suffixes: B rows, D hidden width, K token heads.
"""

import torch
from torch import nn

from draftsmith.parts.neural.token_heads import FusedHeads, ResidualHead
from tests.support.models import scramble

WIDTH = 16


@torch.no_grad()
def test_fused_heads_match_single_heads() -> None:
    heads = nn.ModuleList(ResidualHead(WIDTH, 2) for _ in range(3))
    scramble(heads, seed=3)
    z_BD = torch.randn((5, WIDTH), generator=torch.Generator().manual_seed(0))
    for num_heads in (1, 3):
        found_BKD = FusedHeads(heads)(z_BD, num_heads)
        assert found_BKD.shape == (5, num_heads, WIDTH)
        for k in range(num_heads):
            assert torch.allclose(found_BKD[:, k], heads[k](z_BD), atol=1e-5)
