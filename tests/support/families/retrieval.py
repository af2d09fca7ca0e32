"""Stored text for tests: shards, Hypothesis strategies, and slow references of look-ups."""

from collections import Counter

import numpy as np
import torch
from hypothesis import strategies as some

import draftsmith
from draftsmith import Target
from draftsmith.parts.suffix_array import SuffixArray
from draftsmith.parts.trie import TokenTree
from tests.support.family import texts
from tests.support.models import padded, prompts
from trainers.corpora.suffix_arrays import build

VOCAB_SIZE = 3
"""Few tokens, so that matches are frequent."""
TOKENS = some.integers(0, VOCAB_SIZE - 1)
DOCUMENTS = some.lists(some.lists(TOKENS, max_size=12), max_size=6)


def slow_splits(documents: list[list[int]]) -> list[tuple[list[int], list[int]]]:
    """Returns the tokens before and after each position between two tokens of a document."""
    return [(one[:at], one[at:]) for one in documents for at in range(1, len(one))]


def slow_match(documents: list[list[int]], text: list[int], longest: int, shortest: int) -> tuple[int, Counter]:
    """Returns the length of the longest match and the continuations of all matches of that length, by scanning."""
    for length in range(min(longest, len(text)), shortest - 1, -1):
        followed = Counter(
            tuple(after) for before, after in slow_splits(documents) if before[-length:] == text[-length:]
        )
        if followed:
            return length, followed
    return 0, Counter()


def paths_of(tree: TokenTree) -> list[tuple[int, ...]]:
    """Returns the tokens on the path to each node."""
    paths: list[tuple[int, ...]] = [()]
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        paths.append((*paths[parent], token))
    return paths[1:]


def shards_for(target: Target) -> tuple[SuffixArray, ...]:
    """Returns two shards with text that the target generates and random text."""
    ids, mask = padded([[token % target.vocab_size for token in row] for row in prompts(5)])
    own = texts(draftsmith.generate(target, ids, attention_mask=mask, max_new_tokens=20, eos_token_id=()))
    noise = torch.randint(target.vocab_size, (8, 60), generator=torch.Generator().manual_seed(0)).tolist()
    shards = (own[:3], own[3:] + noise)
    return tuple(build([np.array(row) for row in rows], target.vocab_size) for rows in shards)
