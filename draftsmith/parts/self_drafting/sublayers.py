"""Self-drafting with sublayers of the target skipped: their notation, and a whole text read as drafting would read it.

Shape suffixes: B rows, T tokens, D hidden width.
"""

from functools import lru_cache

import torch
from torch import Tensor

from draftsmith.core.cache import KVCache
from draftsmith.core.target import Target
from draftsmith.core.tree import Tree

Sublayers = frozenset[tuple[str, int]]
"""Sublayers to skip, as ("attention", block) and ("mlp", block), blocks counted from 0."""


def sublayers(attention: tuple[int, ...], mlp: tuple[int, ...]) -> Sublayers:
    """Returns these sublayers as `Target.forward` takes them."""
    return frozenset([("attention", block) for block in attention] + [("mlp", block) for block in mlp])


@lru_cache(maxsize=32)
def text_and_drafts(num_tokens: int, block: int, device: torch.device) -> Tree:
    """Returns the tree of a text and of drafts of the same tokens, from its second token on.

    Nodes 0 to T - 1 are the text, and node T - 1 + i is token i as drafted. A draft begins every `block` tokens: a
    drafted token attends to the text before its draft and to the draft itself.
    """
    drafts = [token - 1 if (token - 1) % block == 0 else num_tokens + token - 2 for token in range(1, num_tokens)]
    return Tree.from_parents([[*range(-1, num_tokens - 1), *drafts]], device)


def draft_hidden(target: Target, tokens_BT: Tensor, cache: KVCache, skipped: Sublayers, block: int) -> Tensor:
    """Returns hidden states [B, T - 1, D] of tokens 1 to T - 1 as drafting without `skipped` computes them.

    One forward covers drafts of `block` tokens each, all accepted. The cache must hold the whole model's keys and
    values of all T tokens in the slots beyond its lengths; they are left unchanged, and so are the lengths.
    """
    num_tokens = tokens_BT.shape[1]
    tree = text_and_drafts(num_tokens, block, tokens_BT.device)
    return target.forward(tokens_BT[:, 1:], tree, cache, skipped=skipped, first=num_tokens).hidden_BND
