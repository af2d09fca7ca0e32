"""Tests of merged trees: the nodes kept, the accuracies learnt, losslessness, rejected parts and artifacts."""

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import draftsmith
from draftsmith.artifacts.families import find, names
from draftsmith.core.drafter import Session
from draftsmith.core.sampling import Sampling
from draftsmith.core.tree import Draft, Tree
from draftsmith.drafters import hydra, kangaroo, lm, lookup, medusa, merge, suffix
from draftsmith.drafters.merge import Config, Drafter, PartTree, estimate_accuracies
from draftsmith.parts.composites import Part
from draftsmith.parts.trie import build_trie
from tests.support.distributions import check_distribution, distribution_target
from tests.support.drafters import Scripted
from tests.support.family import Watched, built, check_family, part_config, texts
from tests.support.models import SEQ2SEQ, greedy_by_transformers, padded, prompts, tiny_config, tiny_target

TARGET = tiny_target("llama")
HEADS = medusa.Config(num_heads=3, tree=((0,), (1,), (0, 0)))
SMALL = tiny_config("llama", num_hidden_layers=1).to_dict()
NUM_NEW = 20


EXAMPLE = Config(parts=(part_config("lookup", lookup.Config()), part_config("medusa", HEADS)), num_nodes=9)


def merge_of(drafters: list[Any], **settings: Any) -> Drafter:
    """Returns the drafters, each wrapped in `Watched`, with their trees merged."""
    parts = [Part(Watched(one)) for one in drafters]  # type: ignore[arg-type]
    return Drafter(Config(parts=EXAMPLE.parts, **settings), drafters[0].target, parts)


def test_family(tmp_path: Path) -> None:
    check_family(merge, EXAMPLE, tmp_path)


def merged_paths(
    *trees: list[tuple[int, int]], accuracies: list[float], **settings: Any
) -> dict[tuple[int, ...], float]:
    """Returns the kept paths and their probabilities; a tree is (token, parent) of each node, with one accuracy."""
    drafter = Drafter(Config(parts=EXAMPLE.parts, **settings), TARGET)
    tables = [[[[accuracy]] * merge.NUM_RANKS] * merge.NUM_DEPTHS for accuracy in accuracies]
    tree = drafter._merge([PartTree(*zip(*tree, strict=True)) for tree in trees], tables)  # type: ignore[arg-type]
    paths: list[tuple[int, ...]] = [()]
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        assert parent < len(paths), "a parent comes before its children"
        paths.append((*paths[parent], token))
    return dict(zip(paths[1:], tree.weights, strict=True))


def test_merge_by_hand() -> None:
    """Merges a chain of accuracy 0.8 and a tree of accuracy 0.5: agreement counts as 1 - 0.2 * 0.5."""
    chain, tree = [(7, 0), (8, 1), (9, 2)], [(7, 0), (5, 0), (6, 1), (4, 2)]
    found = merged_paths(chain, tree, accuracies=[0.8, 0.5])
    expected = {(7,): 0.9, (7, 8): 0.64, (7, 8, 9): 0.512, (5,): 0.5, (7, 6): 0.25, (5, 4): 0.25}
    assert found == pytest.approx(expected)
    assert list(merged_paths(chain, tree, accuracies=[0.8, 0.5], num_nodes=3)) == [(7,), (7, 8), (7, 8, 9)]
    assert set(merged_paths(chain, tree, accuracies=[0.8, 0.5], least_chance=0.5)) == {(7,), (7, 8), (7, 8, 9), (5,)}
    assert list(merged_paths(chain, tree, accuracies=[0.1, 0.9], num_nodes=3)) == [(7,), (5,), (7, 6)]


def test_merge_keeps_the_likeliest_nodes_of_random_trees() -> None:
    """Compares with the probabilities of all nodes of both trees, computed one by one."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        trees, accuracies = [], rng.uniform(0.05, 0.95, 2).tolist()
        for _ in range(2):
            texts_drawn = [tuple(rng.integers(0, 3, rng.integers(1, 5)).tolist()) for _ in range(rng.integers(1, 4))]
            tree = build_trie((text, 1.0) for text in texts_drawn)
            trees.append(list(zip(tree.tokens, tree.parents, strict=True)))
        paths: list[dict[tuple[int, ...], float]] = []
        for tree, accuracy in zip(trees, accuracies, strict=True):
            of_nodes: list[tuple[int, ...]] = [()]
            for token, parent in tree:
                of_nodes.append((*of_nodes[parent], token))
            paths.append({path: accuracy ** len(path) for path in of_nodes[1:]})
        both = {path: 1 - (1 - paths[0].get(path, 0)) * (1 - paths[1].get(path, 0)) for path in paths[0] | paths[1]}
        num_nodes = int(rng.integers(1, 7))
        found = merged_paths(*trees, accuracies=accuracies, num_nodes=num_nodes)
        best = sorted(both.values(), reverse=True)[:num_nodes]
        assert sorted(found.values(), reverse=True) == pytest.approx(best)
        assert all(found[path] == pytest.approx(both[path]) for path in found)


def test_count_correct_evaluates_nodes_up_to_the_end_of_the_text() -> None:
    counts_DRC2 = np.zeros((merge.NUM_DEPTHS, merge.NUM_RANKS, 1 + merge.NUM_LEVELS, 2), dtype=np.int64)
    tree = [(7, 0), (5, 0), (6, 1), (9, 1), (4, 2), (3, 4), (2, 6)]
    PartTree(*zip(*tree, strict=True)).count_correct([7, 9, 3], counts_DRC2)  # type: ignore[arg-type]
    found = {(d, r): tuple(counts_DRC2[d, r, c]) for d, r, c in zip(*counts_DRC2[..., 1].nonzero(), strict=True)}
    # Token 2 is deeper than the text, and token 4 follows the wrong token 5.
    assert found == {(0, 0): (1, 1), (0, 1): (0, 1), (1, 0): (0, 1), (1, 1): (1, 1), (2, 0): (1, 1)}


def test_nodes_are_counted_by_their_confidence() -> None:
    counts_DRC2 = np.zeros((merge.NUM_DEPTHS, merge.NUM_RANKS, 1 + merge.NUM_LEVELS, 2), dtype=np.int64)
    PartTree([7, 8], [0, 0], [1.0, 0.3]).count_correct([7, 9], counts_DRC2)
    # The square roots are 1 and 0.55, so that the nodes are of the last level and of the fifth.
    assert tuple(counts_DRC2[0, 0, 8]) == (1, 1) and tuple(counts_DRC2[0, 1, 5]) == (0, 1)
    assert counts_DRC2[..., 1].sum() == 2
    accuracies = np.zeros((merge.NUM_DEPTHS, merge.NUM_RANKS, 1 + merge.NUM_LEVELS))
    accuracies[0, 0, 8], accuracies[0, 1, 5] = 0.75, 0.125
    tree = PartTree([7, 8], [0, 0], [1.0, 0.3])
    assert list(tree.path_probabilities(accuracies.tolist())) == [((7,), 0.75), ((8,), 0.125)]


def test_estimated_accuracies_start_at_the_prior_and_follow_the_counts() -> None:
    counts_PDRC2 = np.zeros((1, 2, 3, 9, 2), dtype=np.int64)
    assert estimate_accuracies(counts_PDRC2)[0, 0, :, 0].tolist() == [0.5, 0.25, 0.125]
    assert estimate_accuracies(counts_PDRC2)[0, 1, 2, 1:].tolist() == [(k / 16) ** 2 for k in range(1, 17, 2)]
    counts_PDRC2[0, 1, 0, 0] = (90, 100)
    assert estimate_accuracies(counts_PDRC2)[0, 1, 0, 0] == pytest.approx((90 + 4) / 108)
    # Another cell of the same confidence begins with the share of all of its level.
    counts_PDRC2[0, 1, 0, 8] = (90, 100)
    of_level = (90 + 8 * (15 / 16) ** 2) / 108
    assert estimate_accuracies(counts_PDRC2)[0, 0, 1, 8] == pytest.approx(of_level)
    assert estimate_accuracies(counts_PDRC2)[0, 1, 0, 8] == pytest.approx((90 + 8 * of_level) / 108)


def test_confidences_are_those_of_the_drafters() -> None:
    """Of every kind of draft: a chain, a static tree, a dynamic tree, heads' trees and looked-up text."""
    ids = torch.tensor(prompts(1))
    families = [
        (lm, lm.Config(model=SMALL, num_draft=3, length="fixed")),
        (lm, lm.Config(model=SMALL, tree=((0,), (1,), (0, 0), (0, 1)), siblings="deterministic")),
        (hydra, hydra.Config(tree=(), width=2, num_nodes=5)),
        (medusa, HEADS),
        (lookup, lookup.Config()),
        (suffix, suffix.Config()),
    ]
    for family, config in families:
        watched = Watched(built(family, config, TARGET))
        draftsmith.generate(TARGET, ids, watched, max_new_tokens=NUM_NEW)
        assert watched.num_drafted > 0 and watched.has_confidences, family


def test_call_starts_from_the_counts_that_were_kept() -> None:
    """The part that knows the text gets a high accuracy, and the part that is always wrong a low one."""
    expected = greedy_by_transformers("llama", 5, NUM_NEW)
    drafter = merge_of(
        [Scripted(TARGET, expected, trees=False), Scripted(TARGET, expected, trees=False, wrong_every=1)]
    )
    ids, mask = padded(prompts(5))
    given: Any = {"attention_mask": mask, "max_new_tokens": NUM_NEW}
    first = draftsmith.generate(TARGET, ids, Watched(drafter), **given)
    assert texts(first) == expected and not drafter.counts_PDRC2.any()
    drafts = [part.drafter.drafts for part in drafter.parts]  # type: ignore[attr-defined]
    again = draftsmith.generate(TARGET, ids, Watched(drafter), **given)
    assert (
        again.stats.steps == first.stats.steps and drafts[0][: len(drafts[0]) // 2] == drafts[0][len(drafts[0]) // 2 :]
    )
    drafter.keep()
    correct, evaluated = drafter.counts_PDRC2[:, 0, 0].sum(1).T
    assert correct[0] == evaluated[0] > 0 and correct[1] == 0 < evaluated[1]
    drafter.config = dataclasses.replace(drafter.config, num_nodes=4)
    best = draftsmith.generate(TARGET, ids, Watched(drafter), **given)
    assert texts(best) == expected
    assert best.stats.tau == pytest.approx(5), "all four nodes are those of the correct part"


def test_counts_are_saved_and_invalid_ones_rejected(tmp_path: Path) -> None:
    drafter = built(merge, EXAMPLE, TARGET)
    draftsmith.generate(TARGET, torch.tensor(prompts(1)), drafter, max_new_tokens=NUM_NEW)
    drafter.keep()
    draftsmith.save(drafter, tmp_path / "whole", TARGET)
    assert np.array_equal(draftsmith.load(tmp_path / "whole", TARGET).counts_PDRC2, drafter.counts_PDRC2)
    file = tmp_path / "whole" / "counts.npy"
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], b"", None):
        file.unlink() if content is None else file.write_bytes(content)
        with pytest.raises(ValueError, match="counts.npy is missing( or truncated)?"):
            draftsmith.load(tmp_path / "whole", TARGET)
    np.save(file, drafter.counts_PDRC2[:1])
    with pytest.raises(ValueError, match=r"counts.npy holds int64 \[1, 8, 4, 9, 2\], expected int64 \[2, 8, 4, 9, 2\]"):
        draftsmith.load(tmp_path / "whole", TARGET)
    np.save(file, drafter.counts_PDRC2 - 1)
    with pytest.raises(ValueError, match="counts.npy counts more correct nodes than evaluated ones"):
        draftsmith.load(tmp_path / "whole", TARGET)


def test_parts_whose_drafts_cannot_be_merged_are_rejected() -> None:
    heads, ids = built(medusa, HEADS, TARGET), torch.tensor(prompts(1))
    chains = built(lm, lm.Config(model=SMALL, num_draft=3, length="fixed"), TARGET)
    out = draftsmith.generate(TARGET, ids, merge_of([chains, heads]), max_new_tokens=NUM_NEW)
    assert texts(out) == greedy_by_transformers("llama", 1, NUM_NEW), "greedy chains may be merged"
    exits = built(kangaroo, kangaroo.Config(exit_layer=2, num_draft=3), TARGET)
    with pytest.raises(ValueError, match="runs the target's first blocks over its own draft, which cannot be merged"):
        draftsmith.generate(TARGET, ids, Drafter(EXAMPLE, TARGET, [Part(exits), Part(heads)]), max_new_tokens=4)


def test_parts_that_sample_draft_as_at_temperature_0() -> None:
    """Chains and trees that are sampled elsewhere; the text follows the target's distribution."""
    target = distribution_target()
    heads = hydra.Config(num_heads=2, tree=((0,), (1,), (0, 0)))
    families = [(lm, lm.Config(model=target.model.config.to_dict(), num_draft=2, length="fixed")), (hydra, heads)]
    parts = [built(family, config, target) for family, config in families]
    alone = Watched(parts[0])
    draftsmith.generate(target, [[1, 4, 2]], alone, max_new_tokens=6, temperature=1.0, seed=0)
    assert alone.is_sampled
    drafter = merge_of(parts)
    check_distribution(drafter, target, num_samples=3_000)
    assert not any(part.drafter.is_sampled for part in drafter.parts)  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize("family", names())
def test_every_deterministic_family_may_be_a_part(family: str) -> None:
    part = built(find(family), importlib.import_module(f"tests.drafters.test_{family}").EXAMPLE, TARGET)
    if part.target is not TARGET or family in ("kangaroo", "early_exit"):
        pytest.skip("it fine-tunes its target, or resumes it after its first blocks")
    drafter = merge_of([part, built(medusa, HEADS, TARGET)])
    ids, mask = padded(prompts(5))
    out = draftsmith.generate(TARGET, ids, Watched(drafter), attention_mask=mask, max_new_tokens=NUM_NEW)
    assert texts(out) == greedy_by_transformers("llama", 5, NUM_NEW)


@pytest.mark.parametrize("architecture", SEQ2SEQ)
def test_encoder_decoder_gets_the_likeliest_path_only(architecture: str) -> None:
    target = tiny_target(architecture)
    expected = greedy_by_transformers(architecture, 5, NUM_NEW)
    right = Scripted(target, expected, trees=False, wrong_every=6)
    drafter = merge_of([lookup.Drafter(lookup.Config(), target), right], num_nodes=30)
    ids, mask = padded(prompts(5))
    out = draftsmith.generate(target, ids, Watched(drafter), attention_mask=mask, max_new_tokens=NUM_NEW)
    assert texts(out) == expected and out.stats.tau > 1.5


def test_row_without_drafts_gets_a_plain_step() -> None:
    drafter = Drafter(EXAMPLE, TARGET, [Part(lookup.Drafter(lookup.Config(), TARGET)) for _ in range(2)])
    given: Any = {"target": TARGET, "cache": None, "generator": None}
    drafter.start(Session(rows=[[3, 4, 3], [5, 6, 7]], sampling=Sampling(), **given))
    draft = drafter.propose(3)
    assert draft.num_nodes == [4, 1] and draft.tokens_BN[0].tolist() == [3, 4, 3, 4]
    with pytest.raises(ValueError, match="num_nodes is 0"):
        dataclasses.replace(EXAMPLE, num_nodes=0)
    with pytest.raises(ValueError, match="least_chance is 1"):
        dataclasses.replace(EXAMPLE, least_chance=1)


def test_part_trees_leave_out_padding() -> None:
    tree = Tree.from_parents([[-1, 0, 0, 1], [-1, 0, 1, 1]])
    draft = Draft(tokens_BN=torch.tensor([[9, 1, 2, 0], [9, 3, 4, 5]]), tree=tree, num_nodes=[3, 4])
    found = [[path for path, _ in one.path_probabilities([[[1.0] * 9] * 4] * 8)] for one in merge.part_trees(draft)]
    assert found == [[(1,), (2,)], [(3,), (3, 4), (3, 5)]]
