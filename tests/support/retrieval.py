"""Hypothesis strategies for stored text, and slow references of look-ups in it."""

from collections import Counter

from hypothesis import strategies as some

from draftsmith.parts.trie import TokenTree

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
