"""The target without some of its sublayers, over text that it has read whole: what drafting would make of it.

Shape suffixes: B rows, T tokens, D hidden width.
"""

from functools import lru_cache

import torch
from torch import Tensor

from draftsmith.core.cache import KVCache
from draftsmith.core.target import Target
from draftsmith.core.tree import Tree

Sublayers = frozenset[tuple[str, int]]
"""Sublayers to leave out, as ("attention", block) and ("mlp", block), blocks counted from 0."""


def sublayers(attention: tuple[int, ...], mlp: tuple[int, ...]) -> Sublayers:
    """Returns these sublayers as `Target.forward` takes them."""
    return frozenset([("attention", block) for block in attention] + [("mlp", block) for block in mlp])


@lru_cache(maxsize=32)
def twice(num_tokens: int, block: int, device: torch.device) -> Tree:
    """Returns the tree of a text and, from its second token on, the same tokens again as drafting would read them.

    Nodes 0 to T - 1 are the text, node T - 1 + i is token i again. Every `block` tokens a draft begins: a token sees
    the text before its draft and the draft itself.
    """
    again = [token - 1 if (token - 1) % block == 0 else num_tokens + token - 2 for token in range(1, num_tokens)]
    return Tree.from_parents([[*range(-1, num_tokens - 1), *again]], device)


def reread(target: Target, tokens_BT: Tensor, cache: KVCache, skipped: Sublayers, block: int) -> Tensor:
    """Returns hidden states [B, T - 1, D] of tokens 1 to T - 1 as drafts without `skipped` would have them.

    In a single pass: drafts of `block` tokens each, the text's own. The cache must hold the whole model's keys and
    values of all T tokens in the slots after those it owns; they stay as they are, and it owns no more afterwards.
    """
    num_tokens = tokens_BT.shape[1]
    tree = twice(num_tokens, block, tokens_BT.device)
    return target.forward(tokens_BT[:, 1:], tree, cache, skipped=skipped, first=num_tokens).hidden_BND
