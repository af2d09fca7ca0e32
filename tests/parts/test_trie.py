"""Tries of looked-up text against slow references on random continuations, and the drafts made of them."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as some

from draftsmith.parts.trie import TokenTree, to_draft, heaviest_nodes, heaviest_path, build_trie

CONTINUATIONS = some.lists(some.tuples(some.lists(some.integers(0, 3), max_size=5), some.integers(1, 4)), max_size=8)


def texts_of(branches: TokenTree) -> list[tuple[int, ...]]:
    """Returns what is read on the way to each node."""
    texts: list[tuple[int, ...]] = [()]
    for token, parent in zip(branches.tokens, branches.parents, strict=True):
        texts.append((*texts[parent], token))
    return texts[1:]


def session(rows: list[list[int]]) -> Any:
    return SimpleNamespace(rows=rows, target=SimpleNamespace(device=torch.device("cpu")))


@given(CONTINUATIONS)
def test_a_node_for_each_beginning_weighs_all_that_begin_so(continuations: list[tuple[list[int], int]]) -> None:
    branches = build_trie(continuations)
    weights: Counter[tuple[int, ...]] = Counter()
    for tokens, weight in continuations:
        for end in range(1, len(tokens) + 1):
            weights[tuple(tokens[:end])] += weight
    assert dict(zip(texts_of(branches), branches.weights, strict=True)) == weights
    assert all(parent <= node for node, parent in enumerate(branches.parents))


@given(CONTINUATIONS, some.integers(0, 12))
def test_the_heaviest_are_a_tree(continuations: list[tuple[list[int], int]], num_nodes: int) -> None:
    branches = build_trie(continuations)
    kept = heaviest_nodes(branches, num_nodes)
    assert sorted(kept.weights, reverse=True) == sorted(branches.weights, reverse=True)[:num_nodes]
    weight = dict(zip(texts_of(branches), branches.weights, strict=True))
    assert [weight[text] for text in texts_of(kept)] == kept.weights


@given(CONTINUATIONS)
def test_the_heaviest_path_takes_the_heaviest_child(continuations: list[tuple[list[int], int]]) -> None:
    branches = build_trie(continuations)
    weight = dict(zip(texts_of(branches), branches.weights, strict=True))
    text: tuple[int, ...] = ()
    while children := [one for one in weight if one[:-1] == text and len(one) == len(text) + 1]:
        text = max(children, key=weight.__getitem__)
    path = heaviest_path(branches)
    assert texts_of(path) == [text[:end] for end in range(1, len(text) + 1)]
    assert path.weights == [weight[one] for one in texts_of(path)]


@given(some.lists(CONTINUATIONS, min_size=1, max_size=3))
def test_each_row_has_its_own_tree_level_by_level(rows: list[list[tuple[list[int], int]]]) -> None:
    tries = [build_trie(row) for row in rows]
    draft = to_draft(session([[7, row] for row in range(len(rows))]), tries)
    assert draft.tree.is_chain == all(trie.parents == list(range(len(trie.parents))) for trie in tries)
    for row, trie in enumerate(tries):
        used = draft.num_nodes[row] if draft.num_nodes else draft.tree.num_nodes
        shared = row if len(draft.tree.parents_RN) > 1 else 0
        found = TokenTree(
            tokens=draft.tokens_BN[row, 1:used].tolist(), parents=draft.tree.parents_RN[shared, 1:used].tolist()
        )
        assert draft.tokens_BN[row, 0] == row
        assert texts_of(found) == sorted(texts_of(trie), key=len)
        depths = draft.tree.depths_RN[shared].tolist()
        assert depths == sorted(depths), "its padding too"
