"""Tests of batch-invariant decoding: its shapes, and the same bits with a drafter and beside other rows.

tests.drafters.test_batch_invariant.py compares the text of every family.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

import draftsmith
from draftsmith import Target, decoding
from draftsmith.core.fixed_shapes.chains import likeliest_chain
from draftsmith.core.fixed_shapes.forwards import Shapes
from draftsmith.core.tree import Draft, Tree, Verdict
from draftsmith.drafters import lookup
from draftsmith.inputs.invariance.self_test import Trial, shapes_for
from tests.drafters.test_batch_invariant import invariant_target
from tests.support.family import texts
from tests.support.models import CAUSAL, SEQ2SEQ, prompts, tiny_model

NUM_NEW = 24


def test_committed_logits_have_the_same_bits_drafted_and_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    target, verify = invariant_target("llama", torch.float32), decoding.verify_draft
    found: list[torch.Tensor] = []

    def spy(logits_BNV: torch.Tensor, *others: Any) -> Verdict:
        verdict = verify(logits_BNV, *others)
        found.extend(logits_BNV[0, verdict.to_host()[0][0]].clone())
        return verdict

    monkeypatch.setattr(decoding, "verify_draft", spy)
    runs = []
    for drafter in (None, lookup.Drafter(lookup.Config(), target)):
        found.clear()
        draftsmith.generate(target, prompts(1), drafter, max_new_tokens=NUM_NEW)
        runs.append(torch.stack(found[:NUM_NEW]))
    assert len(runs[0]) == NUM_NEW
    assert runs[0].equal(runs[1])


def test_text_of_a_row_does_not_depend_on_the_batch() -> None:
    target = invariant_target("llama", torch.float32)
    rows = prompts(3)
    together = draftsmith.generate(target, rows, max_new_tokens=NUM_NEW)
    assert texts(together) == [texts(draftsmith.generate(target, [row], max_new_tokens=NUM_NEW))[0] for row in rows]


def check_stream(target: Target, drafter: Any) -> None:
    """Asserts that in a stream each text is what it is alone, by greedy decoding and by the verifier coupled."""
    rows, seeds = prompts(5), [3, 4, 5, 6, 7]
    for settings in ({}, {"temperature": 1.0, "verifier": "coupled", "seed": seeds}):
        given = {"max_new_tokens": NUM_NEW} | settings
        found = {text.index: text for text in draftsmith.generate_stream(target, rows, drafter, batch_size=2, **given)}
        for index, row in enumerate(rows):
            alone = draftsmith.generate(target, [row], **given | ({"seed": seeds[index]} if settings else {}))
            assert found[index].prompt_ids + found[index].new_ids == texts(alone)[0], index


def test_stream_gives_each_text_that_it_has_alone() -> None:
    target = invariant_target("llama", torch.float32)
    check_stream(target, lookup.Drafter(lookup.Config(), target))


@pytest.mark.slow
@pytest.mark.parametrize("drafts", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("architecture", [*CAUSAL, *SEQ2SEQ])
def test_stream_gives_each_text_that_it_has_alone_everywhere(
    architecture: str, dtype: torch.dtype, drafts: bool
) -> None:
    target = invariant_target(architecture, dtype)
    check_stream(target, lookup.Drafter(lookup.Config(), target) if drafts else None)


def test_trial_fails_without_padding() -> None:
    target = invariant_target("llama", torch.float32)
    shapes = shapes_for(target, 1)
    trial = Trial(target, 1, num_blocks=1)
    padded = [field for field in ("fewest_nodes", "query_multiple") if getattr(shapes, field) > 1]
    assert padded, "nothing to leave out on this machine"
    for field in padded:
        assert trial.most_equal(replace(shapes, **{field: 1})) < shapes.most_nodes, field


def test_shapes_are_refused_if_none_is_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trial, "is_equal", lambda *_: False)
    target = Target(tiny_model("llama"))
    with pytest.raises(ValueError, match="leave batch_invariant out"):
        draftsmith.generate(target, [[3, 4, 5]], max_new_tokens=2, batch_invariant=True)


def test_long_chains_are_fed_in_parts() -> None:
    target = invariant_target("llama", torch.float32)
    shapes = shapes_for(target, 1)
    hidden = {}
    for most in (8, 16):
        cache = target.new_cache(1, shapes=replace(shapes, most_nodes=most))
        hidden[most] = target.prefill([list(range(3, 40))], cache, layers=(0, 3))
        assert cache.lengths == [37]
    assert all(hidden[8][layer].equal(hidden[16][layer]) for layer in (0, 3))


def test_dummy_nodes_of_a_tree_are_not_seen() -> None:
    tree = Tree.from_parents([[-1, 0, 0, 1]])
    padded_tree = tree.padded(2)
    assert padded_tree.num_nodes == 6 and not padded_tree.is_chain
    assert padded_tree.ancestors_RNN[0, :4, :4].equal(tree.ancestors_RNN[0])
    assert not padded_tree.ancestors_RNN[0, :4, 4:].any()
    assert padded_tree.ancestors_RNN[0, 4].tolist() == [True, False, False, False, True, False]
    assert padded_tree.depths_RN.tolist() == [[0, 1, 1, 2, 1, 1]]


def test_likeliest_chain_follows_first_children() -> None:
    # Row 0 goes 0 -> 1 -> 3; in row 1 only three nodes are used: 0 -> 1.
    draft = Draft(
        tokens_BN=torch.tensor([[10, 11, 12, 13, 14], [20, 21, 22, 23, 24]]),
        tree=Tree.from_parents([[-1, 0, 0, 1, 1]]),
        num_nodes=[5, 3],
        # Nodes behind the last one with children have no distribution.
        draft_probs_BNV=torch.arange(4.0).view(2, 2, 1),
        sampling_scheme="without_replacement",
    )
    found = likeliest_chain(draft)
    assert found.tokens_BN.tolist() == [[10, 11, 13], [20, 21, 21]]
    assert found.num_nodes == [3, 2] and found.tree.is_chain
    assert found.sampling_scheme == "independent"
    assert found.draft_probs_BNV is not None
    assert found.draft_probs_BNV[..., 0].tolist() == [[0, 1], [2, 3]]


def test_shapes_pad_nodes() -> None:
    assert [Shapes(node_multiple=4).num_dummies(number) for number in (1, 4, 5, 8)] == [3, 0, 3, 0]
    shapes = Shapes(fewest_nodes=5, most_nodes=64)
    assert [shapes.num_dummies(number, num_rows) for number, num_rows in ((1, 1), (7, 1), (1, 2), (1, 5))] == [
        4,
        0,
        2,
        0,
    ]
    assert [shapes.most_of_a_row(num_rows) for num_rows in (1, 3, 100)] == [64, 21, 1]
    assert Shapes(node_multiple=4, most_nodes=64).most_of_a_row(3) == 20


def test_shapes_pad_slots() -> None:
    shapes = Shapes(slot_multiple=512, slots_of_last=(64, 384))
    found = [shapes.num_slots(number) for number in (1, 64, 65, 385, 512, 513, 1024, 1030)]
    assert found == [64, 64, 384, 512, 512, 576, 1024, 1088]
