"""Tests of tries against slow references on random continuations, and of the drafts made of them."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as some

from draftsmith.parts.trie import TokenTree, build_trie, heaviest_nodes, heaviest_path, to_draft
from tests.support.families.retrieval import paths_of

CONTINUATIONS = some.lists(some.tuples(some.lists(some.integers(0, 3), max_size=5), some.integers(1, 4)), max_size=8)


def session(rows: list[list[int]]) -> Any:
    return SimpleNamespace(rows=rows, target=SimpleNamespace(device=torch.device("cpu")))


@given(CONTINUATIONS)
def test_build_trie_has_a_node_for_each_prefix_with_its_total_weight(
    continuations: list[tuple[list[int], int]],
) -> None:
    tree = build_trie(continuations)
    weights: Counter[tuple[int, ...]] = Counter()
    for tokens, weight in continuations:
        for end in range(1, len(tokens) + 1):
            weights[tuple(tokens[:end])] += weight
    assert dict(zip(paths_of(tree), tree.weights, strict=True)) == weights
    assert all(parent <= node for node, parent in enumerate(tree.parents))


@given(CONTINUATIONS, some.integers(0, 12))
def test_heaviest_nodes_are_a_tree(continuations: list[tuple[list[int], int]], num_nodes: int) -> None:
    tree = build_trie(continuations)
    kept = heaviest_nodes(tree, num_nodes)
    assert sorted(kept.weights, reverse=True) == sorted(tree.weights, reverse=True)[:num_nodes]
    weight = dict(zip(paths_of(tree), tree.weights, strict=True))
    assert [weight[path] for path in paths_of(kept)] == kept.weights


@given(CONTINUATIONS)
def test_heaviest_path_takes_the_heaviest_child(continuations: list[tuple[list[int], int]]) -> None:
    tree = build_trie(continuations)
    weight = dict(zip(paths_of(tree), tree.weights, strict=True))
    expected: tuple[int, ...] = ()
    while children := [one for one in weight if one[:-1] == expected and len(one) == len(expected) + 1]:
        expected = max(children, key=weight.__getitem__)
    path = heaviest_path(tree)
    assert paths_of(path) == [expected[:end] for end in range(1, len(expected) + 1)]
    assert path.weights == [weight[one] for one in paths_of(path)]


@given(some.lists(CONTINUATIONS, min_size=1, max_size=3))
def test_to_draft_gives_each_row_its_own_tree_level_by_level(rows: list[list[tuple[list[int], int]]]) -> None:
    tries = [build_trie(row) for row in rows]
    draft = to_draft(session([[7, row] for row in range(len(rows))]), tries)
    assert draft.tree.is_chain == all(trie.parents == list(range(len(trie.parents))) for trie in tries)
    for row, trie in enumerate(tries):
        used = draft.num_nodes[row] if draft.num_nodes else draft.tree.num_nodes
        tree_row = row if len(draft.tree.parents_RN) > 1 else 0
        found = TokenTree(
            tokens=draft.tokens_BN[row, 1:used].tolist(), parents=draft.tree.parents_RN[tree_row, 1:used].tolist()
        )
        assert draft.tokens_BN[row, 0] == row
        assert paths_of(found) == sorted(paths_of(trie), key=len)
        depths = draft.tree.depths_RN[tree_row].tolist()
        assert depths == sorted(depths), "padding included"
