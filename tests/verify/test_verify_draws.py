"""Verifiers that sample a token at each node, by exact enumeration: `deterministic` and `greedy_drafting`.

Their outputs are step functions of each node's uniform, with steps known in closed form, so that one uniform from each
cell between two steps, weighted by the cell's width, integrates exactly.

Shape suffixes: B rows, N nodes, V vocabulary, U uniforms.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from draftsmith.core.tree import Draft, Tree
from draftsmith.verify import deterministic, greedy_drafting
from tests.support.verify.enumeration import (
    EXACT,
    TOKENS,
    Distributions,
    Shape,
    Text,
    Verify,
    draft_of_fillings,
    error,
    expected_tokens,
    fillings,
    full,
    random_distributions,
    texts_of,
)


def steps_of(weights_V: Tensor) -> list[float]:
    """Returns the uniforms at which the sampled token changes."""
    return (weights_V.cumsum(-1) / weights_V.sum()).tolist()


def output_of_cells(
    verify: Verify, draft: Draft, target_probs_1NV: Tensor, edges: list[list[float]]
) -> dict[Text, float]:
    """Returns the distribution of the output for one draft, node n's uniform having steps at `edges[n]`."""
    cells = []
    for steps in edges:
        ends = sorted({0.0, 1.0, *(edge for edge in steps if 0 < edge < 1)})
        cells.append([((low + high) / 2, high - low) for low, high in itertools.pairwise(ends) if high - low > 1e-15])
    rows = list(itertools.product(*cells))
    uniforms_BU = torch.tensor([[*(uniform for uniform, _ in row), 0.5] for row in rows], dtype=torch.float64)
    repeated = Draft(
        tokens_BN=draft.tokens_BN.expand(len(rows), -1),
        tree=draft.tree,
        num_nodes=None if draft.num_nodes is None else draft.num_nodes * len(rows),
        draft_probs_BNV=None if draft.draft_probs_BNV is None else draft.draft_probs_BNV.expand(len(rows), -1, -1),
        sampling_scheme=draft.sampling_scheme,
    )
    verdict = verify(target_probs_1NV.expand(len(rows), -1, -1), repeated, uniforms_BU)
    found: dict[Text, float] = defaultdict(float)
    for text, row in zip(texts_of(verdict, repeated.tokens_BN), rows, strict=True):
        found[text] += math.prod(width for _, width in row)
    return found


def small_trees() -> Iterator[tuple[list[int], Text]]:
    """Yields every tree of up to four nodes whose siblings differ, with every labelling."""
    for num_nodes in range(1, 5):
        for parents in itertools.product(*(range(node) for node in range(1, num_nodes))):
            for labels in itertools.product(TOKENS, repeat=num_nodes - 1):
                if len(set(zip(parents, labels, strict=True))) == num_nodes - 1:
                    yield [-1, *parents], labels


def deterministic_output(target: Distributions, parents: list[int], labels: Text, used: int) -> dict[Text, float]:
    """Returns the distribution of the output for a tree of which `used` nodes are in use."""
    texts: list[Text] = [()]
    for parent, label in zip(parents[1:], labels, strict=True):
        texts.append((*texts[parent], label))
    draft = Draft(
        tokens_BN=torch.tensor([[0, *labels]]),
        tree=Tree.from_parents([parents]),
        num_nodes=None if used == len(parents) else [used],
    )
    target_probs_1NV = torch.stack([target[text] for text in texts])[None]
    return output_of_cells(deterministic.verify, draft, target_probs_1NV, [steps_of(target[text]) for text in texts])


@pytest.mark.parametrize("zeros", [False, True])
def test_deterministic_is_lossless_on_every_small_tree(zeros: bool) -> None:
    target = random_distributions(4, seed=21, zeros=zeros)
    for parents, labels in small_trees():
        found = deterministic_output(target, parents, labels, len(parents))
        assert error(found, target, 4) < EXACT, (parents, labels)
        # The optimum: the first token is accepted with the probability of node 0's children.
        children = {label for parent, label in zip(parents[1:], labels, strict=True) if parent == 0}
        accepted = sum(weight for text, weight in found.items() if len(text) > 1)
        assert accepted == pytest.approx(sum(target[()][child].item() for child in children), abs=EXACT)


def test_deterministic_is_lossless_with_duplicate_siblings() -> None:
    """Duplicates are one text, whose next token must be sampled once."""
    target = random_distributions(4, seed=23)
    for parents, labels in (([-1, 0, 0, 2], (0, 0, 0)), ([-1, 0, 0, 1], (1, 1, 2)), ([-1, 0, 1, 1], (0, 2, 2))):
        assert error(deterministic_output(target, parents, labels, 4), target, 4) < EXACT, (parents, labels)


@pytest.mark.parametrize("used", [1, 2, 3])
def test_deterministic_ignores_padding_nodes(used: int) -> None:
    target = random_distributions(4, seed=22)
    for parents, labels in small_trees():
        if len(parents) > used:
            found = deterministic_output(target, parents, labels, used)
            expected = deterministic_output(target, parents[:used], labels[: used - 1], used)
            assert found == pytest.approx(expected, abs=EXACT), (parents, labels)


def rest_of(draft: Distributions, text: Text, tops: list[int]) -> Tensor:
    """Returns the distribution that the last child is drawn from."""
    probs_V = draft[text].clone()
    probs_V[tops] = 0
    return probs_V / probs_V.sum()


def greedy_drafting_output(shape: Shape, draft: Distributions, target: Distributions) -> dict[Text, float]:
    found: dict[Text, float] = defaultdict(float)
    for texts, used, weight in fillings(shape, draft):
        edges = []
        for node, text in enumerate(texts):
            children = [texts[other][-1] for other in range(1, len(texts)) if shape.parents[other] == node]
            threshold, residual_V = 0.0, target[text]
            if children:
                rest_V = rest_of(draft, text, children[:-1])
                threshold = min(1.0, float(target[text][children[-1]] / rest_V[children[-1]]))
                residual_V = (target[text] - rest_V).clamp(min=0)
            edges.append([threshold, *(threshold + (1 - threshold) * step for step in steps_of(residual_V))])
        one, target_probs_1NV = draft_of_fillings(shape, [texts], [used], draft, target)
        for output, share in output_of_cells(greedy_drafting.verify, one, target_probs_1NV, edges).items():
            found[output] += weight * share
    return found


@pytest.mark.parametrize("widths", [(1,), (2,), (3,), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("zeros", [False, True])
def test_greedy_drafting_is_lossless(widths: tuple[int, ...], zeros: bool) -> None:
    shape = full(*widths, sampling_scheme="top_and_drawn")
    target, draft = random_distributions(3, seed=5, zeros=zeros), random_distributions(3, seed=6)
    assert error(greedy_drafting_output(shape, draft, target), target, shape.depth + 1) < EXACT


@pytest.mark.parametrize("width", [2, 3])
def test_greedy_drafting_reaches_the_optimal_acceptance_rate(width: int) -> None:
    """The optimum for such drafts is P(top) + sum of min(target, rest) over the other tokens."""
    for seed in range(3):
        target, draft = random_distributions(2, seed=seed), random_distributions(2, seed=seed + 50)
        found = greedy_drafting_output(full(width, sampling_scheme="top_and_drawn"), draft, target)
        tops = draft[()].topk(width - 1).indices.tolist()
        others = [one for one in TOKENS if one not in tops]
        rest_V = rest_of(draft, (), tops)
        optimum = target[()][tops].sum() + torch.minimum(target[()], rest_V)[others].sum()
        assert expected_tokens(found) - 1 == pytest.approx(float(optimum), abs=EXACT)
