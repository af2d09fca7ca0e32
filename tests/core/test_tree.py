"""The draft tree and the verifiers' paths in it, against slow references in plain Python."""

import random

import pytest
import torch

from draftsmith.core.tree import Draft, Tree, chain
from draftsmith.verify.paths import follow, walk


def random_parents(rng: random.Random, num_nodes: int) -> list[int]:
    return [-1, *(rng.randrange(node) for node in range(1, num_nodes))]


def ancestry(parents: list[int], node: int) -> list[int]:
    """Returns the path from node 0 to the node."""
    path = [node]
    while path[-1] != 0:
        path.append(parents[path[-1]])
    return path[::-1]


@pytest.mark.parametrize("seed", range(20))
def test_from_parents_computes_depths_and_ancestors(seed: int) -> None:
    rng = random.Random(seed)
    num_nodes = rng.randint(1, 12)
    parents = [random_parents(rng, num_nodes) for _ in range(rng.choice([1, 1, 3]))]
    tree = Tree.from_parents(parents)
    assert tree.num_nodes == num_nodes
    paths = [[ancestry(row, node) for node in range(num_nodes)] for row in parents]
    assert tree.depths_RN.tolist() == [[len(path) - 1 for path in row] for row in paths]
    assert tree.depth == max(len(path) - 1 for row in paths for path in row)
    expected = [[[other in path for other in range(num_nodes)] for path in row] for row in paths]
    assert tree.ancestors_RNN.tolist() == expected
    assert tree.is_chain == all(row == list(range(-1, num_nodes - 1)) for row in parents)


@pytest.mark.parametrize("num_nodes", [1, 2, 7])
def test_chain_equals_the_tree_with_one_branch(num_nodes: int) -> None:
    short, long = chain(num_nodes), Tree.from_parents([list(range(-1, num_nodes - 1))])
    assert short.is_chain and long.is_chain and short.depth == long.depth == num_nodes - 1
    for name in ("parents_RN", "depths_RN", "ancestors_RNN"):
        assert torch.equal(getattr(short, name), getattr(long, name)), name


@pytest.mark.parametrize("parents", [[0, 0], [-1, 1], [-1, 0, 3], [-1, -1], [-1, 0, 2]])
def test_from_parents_rejects_parents_after_their_children(parents: list[int]) -> None:
    with pytest.raises(ValueError, match="each other an earlier node"):
        Tree.from_parents([parents])
    with pytest.raises(ValueError, match="each other an earlier node"):
        Tree.from_parents([[-1, *range(len(parents) - 1)], parents])


def test_valid_masks_the_nodes_used() -> None:
    tokens_BN = torch.zeros(3, 4, dtype=torch.long)
    assert Draft(tokens_BN=tokens_BN, tree=chain(4)).valid_BN() is None
    valid_BN = Draft(tokens_BN=tokens_BN, tree=chain(4), num_nodes=[1, 4, 2]).valid_BN()
    assert valid_BN is not None
    assert valid_BN.int().tolist() == [[1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]


def slow_follow(parents: list[int], accepted: list[bool], after: list[int]) -> tuple[list[int], int]:
    """Returns (path, next token): the deepest path of accepted nodes, the first of equals in node order."""
    best = [0]
    for node in range(len(parents)):
        path = ancestry(parents, node)
        if all(accepted[other] for other in path[1:]) and len(path) > len(best):
            best = path
    return best, after[best[-1]]


def slow_walk(parents: list[int], tokens: list[int], choices: list[int], num_used: int) -> tuple[list[int], int]:
    """Returns (path, next token): from node 0 repeatedly to the child that equals the chosen token."""
    path = [0]
    while True:
        choice = choices[path[-1]]
        chosen = [node for node in range(1, num_used) if parents[node] == path[-1] and tokens[node] == choice]
        if not chosen:
            return path, choice
        path.append(chosen[0])


def random_case(seed: int) -> tuple[Draft, list[list[int]], list[int]]:
    """Returns a draft of five rows, each row's parents, and its number of nodes; siblings differ, cousins may not."""
    rng = random.Random(seed)
    num_nodes, num_rows = rng.randint(1, 10), 5
    kind = rng.choice(["shared", "own", "chain"])
    if kind == "chain":
        tree, parents = chain(num_nodes), [list(range(-1, num_nodes - 1))] * num_rows
    elif kind == "shared":
        parents = [random_parents(rng, num_nodes)] * num_rows
        tree = Tree.from_parents(parents[:1])
    else:
        parents = [random_parents(rng, num_nodes) for _ in range(num_rows)]
        tree = Tree.from_parents(parents)
    used = [rng.randint(1, num_nodes) if seed % 2 else num_nodes for _ in range(num_rows)]
    # Siblings are numbered from 0 on in one row, from 1 in the next.
    tokens = [[row % 2 + line[:at].count(line[at]) for at in range(num_nodes)] for row, line in enumerate(parents)]
    draft = Draft(tokens_BN=torch.tensor(tokens), tree=tree, num_nodes=used if seed % 2 else None)
    return draft, parents, used


@pytest.mark.parametrize("seed", range(40))
def test_walk_equals_the_slow_reference(seed: int) -> None:
    draft, parents, used = random_case(seed)
    rng = random.Random(1000 + seed)
    choices = [[rng.randrange(3) for _ in row] for row in parents]
    verdict = walk(torch.tensor(choices), draft)
    for row, row_parents in enumerate(parents):
        path, after = slow_walk(row_parents, draft.tokens_BN[row].tolist(), choices[row], used[row])
        num_accepted = int(verdict.num_accepted_B[row])
        assert verdict.path_BP[row, : num_accepted + 1].tolist() == path
        assert set(verdict.path_BP[row, num_accepted:].tolist()) == {path[-1]}, "the rest repeats the last node"
        assert int(verdict.next_token_B[row]) == after


@pytest.mark.parametrize("seed", range(40))
def test_follow_equals_the_slow_reference(seed: int) -> None:
    draft, parents, _ = random_case(2 * seed)
    rng = random.Random(2000 + seed)
    accepted = [[node == 0 or rng.random() < 0.7 for node in range(len(row))] for row in parents]
    after = [[rng.randrange(9) for _ in row] for row in parents]
    verdict = follow(torch.tensor(accepted), draft, torch.tensor(after))
    for row, row_parents in enumerate(parents):
        path, token = slow_follow(row_parents, accepted[row], after[row])
        assert verdict.path_BP[row, : int(verdict.num_accepted_B[row]) + 1].tolist() == path
        assert int(verdict.next_token_B[row]) == token
