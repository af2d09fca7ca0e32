"""Tests of drafts from independent distributions: the best tree against all paths."""

import itertools

import pytest
import torch

from draftsmith.parts.parallel import best_paths


@pytest.mark.parametrize("num_nodes", [1, 5, 17, 100])
def test_best_paths_are_the_likeliest_of_all(num_nodes: int) -> None:
    generator = torch.Generator().manual_seed(num_nodes)
    for _ in range(10):
        probs_KR = torch.rand(3, 4, generator=generator, dtype=torch.float64).sort(dim=-1, descending=True).values
        logs = (probs_KR / probs_KR.sum(-1, keepdim=True)).log().tolist()
        paths: list[tuple[int, ...]] = [()]
        for number, (parent, depth, rank) in enumerate(best_paths(logs, num_nodes), start=1):
            assert parent < number and depth == len(paths[parent])
            paths.append((*paths[parent], rank))
        every = [path for length in (1, 2, 3) for path in itertools.product(range(4), repeat=length)]
        every.sort(key=lambda path: -sum(logs[depth][rank] for depth, rank in enumerate(path)))
        assert len(paths) - 1 == min(num_nodes, len(every))
        assert set(paths[1:]) == set(every[: len(paths) - 1])
