"""Static draft trees: greedy growth, dynamic programming, and sizes chosen by simulated decoding.

Shape suffixes: M positions, T positions of a row, K heads.
"""

import itertools
import math

import pytest
import torch

from draftsmith.core.sampling import Sampling
from trainers.parts import trees


def independent(accuracy_KR: list[list[float]]) -> trees.ChildProbs:
    """Returns the probabilities of heads that are correct independently of each other."""
    return lambda path: accuracy_KR[len(path)] if len(path) < len(accuracy_KR) else []


def test_grow_by_hand() -> None:
    """Head 0's tokens are correct with 0.6 and 0.3, head 1's with 0.5 and 0.1: products 0.6, 0.3, 0.3, 0.15, 0.06."""
    heads = independent([[0.6, 0.3], [0.5, 0.1]])
    nodes = trees.grow(heads, 5)
    assert [path for path, _ in nodes] == [(0,), (0, 0), (1,), (1, 0), (0, 1)]
    assert [prob for _, prob in nodes] == pytest.approx([0.6, 0.3, 0.3, 0.15, 0.06])
    assert len(trees.grow(heads, 100)) == 6
    assert trees.grow(independent([[0.0, 0.0]]), 5) == []


def test_grow_finds_the_best_tree_of_its_size() -> None:
    """Compared with all subtrees with 4 of 14 nodes, for probabilities that depend on the whole path."""
    generator = torch.Generator().manual_seed(0)
    paths = [path for depth in range(1, 4) for path in itertools.product(range(2), repeat=depth)]
    conditional = {path: float(torch.rand((), generator=generator)) / 2 for path in paths}
    probs = {path: math.prod(conditional[path[:depth]] for depth in range(1, len(path) + 1)) for path in paths}
    best = max(
        sum(probs[path] for path in chosen)
        for chosen in itertools.combinations(probs, 4)
        if all(len(path) == 1 or path[:-1] in chosen for path in chosen)
    )
    nodes = trees.grow(lambda path: [conditional[(*path, rank)] for rank in range(2)] if len(path) < 3 else [], 4)
    assert sum(prob for _, prob in nodes) == pytest.approx(best)


def test_conditional_accuracy_by_hand() -> None:
    """Head 0's rank 0 is correct at two of four positions; there head 1 is correct once; the last has no head 1."""
    ranks_MK = torch.tensor([[0, 0], [0, 1], [1, 5], [1, -1]])
    children = trees.conditional_accuracy(ranks_MK, 3)
    assert children(()) == pytest.approx([0.5, 0.5, 0])
    everywhere, prior = 1 / 3, trees.PRIOR
    accuracy = (1 + prior * everywhere) / (2 + prior)
    assert children((0,)) == pytest.approx([accuracy, accuracy, 0])
    assert children((1,)) == pytest.approx([prior * everywhere / (1 + prior)] * 2 + [0])
    assert children((0, 0)) == []


def test_tokens_per_round_and_best_size_by_hand() -> None:
    """A tree of (0), (0, 0) and (1) accepts 2 tokens, then from position 3 none, then 1 of the two left."""
    nodes = [((0,), 0.5), ((0, 0), 0.3), ((1,), 0.2)]
    ranks_TK = torch.tensor([[0, 0], [7, 7], [7, 7], [0, 4], [1, -1]])
    assert trees.tokens_per_round(nodes, [ranks_TK]) == pytest.approx((3 + 2) / 2)
    assert trees.tokens_per_round(nodes[:1], [ranks_TK, ranks_TK[3:]]) == pytest.approx(
        (2 + 1 + 2 + 2) / (1 + 1 + 1 + 1)
    )
    # 1 node: 2, 1 and 2 tokens; 2 nodes: 3 and 2 tokens in twice the time.
    assert trees.best_size(nodes, [ranks_TK], {1: 1.0, 2: 1.2}) == 2
    assert trees.best_size(nodes, [ranks_TK], {1: 1.0, 2: 2.0}) == 1


def tokens_of(paths: list[trees.NodePath], acceptance: list[float]) -> float:
    """Returns the expected tokens of a round, each node accepted with the product of probabilities along its path."""
    return 1 + sum(math.prod(acceptance[rank] for rank in path) for path in paths)


@pytest.mark.parametrize("node_ms", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("level_ms", [0.0, 0.3, 2.0])
def test_best_tree_has_the_most_tokens_per_ms(node_ms: float, level_ms: float) -> None:
    """Compared with all trees of up to six nodes, three levels and three children."""
    acceptance = [0.55, 0.2, 0.1]

    def cost_ms(num_nodes: int, depth: int) -> float:
        return 5 + node_ms * num_nodes + level_ms * depth

    def rate(paths: list[trees.NodePath]) -> float:
        return tokens_of(paths, acceptance) / cost_ms(len(paths), max(map(len, paths), default=0))

    everything = [path for depth in range(1, 4) for path in itertools.product(range(3), repeat=depth)]
    # A child of rank r + 1 without a sibling of rank r would be better at rank r.
    sensible = [path for path in everything if sum(path) + len(path) <= 6]
    found = trees.best_tree(acceptance, cost_ms, max_nodes=6, max_depth=3)
    best = max(
        rate(list(paths))
        for size in range(7)
        for paths in itertools.combinations(sensible, size)
        if all(len(path) == 1 or path[:-1] in paths for path in paths)
    )
    assert rate(found) == pytest.approx(best)


def test_best_tree_equals_the_greedy_tree_if_depth_costs_nothing() -> None:
    acceptance = [0.5, 0.15, 0.08, 0.04]
    nodes = trees.grow(independent([acceptance] * 5), 20)
    found = trees.best_tree(acceptance, lambda num_nodes, _: 1.0 if num_nodes == 20 else 1e9, max_nodes=20, max_depth=5)
    assert len(found) == 20
    assert tokens_of(found, acceptance) == pytest.approx(1 + sum(prob for _, prob in nodes))


def test_accepted_ranks_greedy() -> None:
    """The target's most likely token is the draft's third, its first, and none of its top three."""
    draft_NV = torch.tensor([[4.0, 3.0, 2.0, 1.0]] * 3)
    target_NV = torch.eye(4)[[2, 0, 3]]
    ranks_NR = trees.accepted_ranks(target_NV, draft_NV, Sampling(), 3)
    assert ranks_NR.tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 0]]


def test_accepted_ranks_sampled() -> None:
    """With (0.6, 0.3, 0.1) and (0.2, 0.3, 0.5), the first is accepted with the sum of minima, 0.6."""
    target_NV = torch.tensor([0.6, 0.3, 0.1]).log().expand(20_000, 3)
    draft_NV = torch.tensor([0.2, 0.3, 0.5]).log().expand(20_000, 3)
    ranks_NR = trees.accepted_ranks(target_NV, draft_NV, Sampling(temperature=1.0), 3)
    assert ranks_NR[:, 0].mean().item() == pytest.approx(0.6, abs=0.02)
    assert ranks_NR.sum(1).max() == 1 and ranks_NR.sum(1).mean() > 0.9
