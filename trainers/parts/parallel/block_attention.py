"""Attention of many blocks of a text at once: each sees the text before it, and itself both ways (DFlash, 2602.06036).

Shape suffixes: B rows, T positions of the text, M blocks of a row, L tokens of a block, Q = M L, H attention heads,
D head width.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention

Pair = tuple[Tensor, Tensor]
"""Keys and values."""


def block_attention(query_BHQD: Tensor, text: Pair, blocks: Pair, starts_BM: Tensor) -> Tensor:
    """Returns [B, Q, H * D]: block m attends to the text's positions before `starts_BM[m]`, and to all of itself.

    `text` [B, H, T, D] and `blocks` [B, H, Q, D] may have fewer heads, each shared by a group of query heads. On a GPU
    this is flex attention, which skips what no query sees; on a CPU, a product with a mask.
    """
    attend = sparse_attention if query_BHQD.device.type == "cuda" else dense_attention
    return attend(query_BHQD, text, blocks, starts_BM).transpose(1, 2).flatten(2)


def dense_attention(query_BHQD: Tensor, text: Pair, blocks: Pair, starts_BM: Tensor) -> Tensor:
    """Returns [B, H, Q, D], with scores for the whole text and for each block's own tokens alone."""
    (num_rows, num_heads, num_queries, head_width), num_blocks = query_BHQD.shape, starts_BM.shape[1]
    size, group = num_queries // num_blocks, num_heads // text[0].shape[1]
    key_BHTD, value_BHTD, own_key_BHQD, own_value_BHQD = (
        one.repeat_interleave(group, dim=1) for one in (*text, *blocks)
    )
    scaled_BHQD = query_BHQD / head_width**0.5
    seen_BQT = (torch.arange(key_BHTD.shape[2], device=starts_BM.device) < starts_BM[..., None]).repeat_interleave(
        size, 1
    )
    scores_BHQT = (scaled_BHQD @ key_BHTD.mT).masked_fill(~seen_BQT[:, None], -torch.inf)
    by_block = (num_rows, num_heads, num_blocks, size, head_width)
    own_BHML = (scaled_BHQD.reshape(by_block) @ own_key_BHQD.reshape(by_block).mT).flatten(2, 3)
    weights = torch.cat([scores_BHQT, own_BHML], dim=-1).softmax(-1)
    own_weights = weights[..., -size:].reshape(num_rows, num_heads, num_blocks, size, size)
    own_BHQD = (own_weights @ own_value_BHQD.reshape(by_block)).flatten(2, 3)
    return weights[..., :-size] @ value_BHTD + own_BHQD


def sparse_attention(query_BHQD: Tensor, text: Pair, blocks: Pair, starts_BM: Tensor) -> Tensor:
    """Returns [B, H, Q, D] by flex attention over the keys of the text, then of the blocks."""
    num_text, size = text[0].shape[2], query_BHQD.shape[2] // starts_BM.shape[1]

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        is_before = (key < num_text) & (key < starts_BM[row, query // size])
        return is_before | ((key >= num_text) & ((key - num_text) // size == query // size))

    key_BHSD, value_BHSD = (torch.cat(pair, dim=2) for pair in zip(text, blocks, strict=True))
    num_rows, _, num_queries, _ = query_BHQD.shape
    mask = flex_attention.create_block_mask(
        sees, num_rows, None, num_queries, key_BHSD.shape[2], device=query_BHQD.device
    )
    run = _compiled() if query_BHQD.device.type == "cuda" else flex_attention.flex_attention
    is_grouped = query_BHQD.shape[1] != key_BHSD.shape[1]
    return run(query_BHQD, key_BHSD, value_BHSD, block_mask=mask, enable_gqa=is_grouped)


@cache
def _compiled() -> Any:
    """Returns flex attention compiled for sizes that change from batch to batch; uncompiled it keeps all scores."""
    return torch.compile(flex_attention.flex_attention, dynamic=True)
