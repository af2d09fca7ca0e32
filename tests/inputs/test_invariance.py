"""Tests of batch-invariant decoding: the same text and bits with every drafter and with none."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

import draftsmith
from draftsmith import Target, decoding
from draftsmith.core.fixed_shapes.chains import likeliest_chain
from draftsmith.core.fixed_shapes.forwards import Shapes
from draftsmith.core.tree import Draft, Tree, Verdict
from draftsmith.drafters import early_exit, lookup, medusa
from draftsmith.inputs.invariance import Trial, shapes_for
from tests.support.family import built, texts
from tests.support.models import CAUSAL, SEQ2SEQ, padded, prompts, tiny_model

DRAFTERS = (
    (lookup, lookup.Config()),
    (medusa, medusa.Config()),
    (early_exit, early_exit.Config(exit_layer=1)),
    (early_exit, early_exit.Config(exit_layer=1, width=3)),
)
NUM_NEW = 24


@cache
def invariant_target(architecture: str, dtype: torch.dtype) -> Target:
    return Target(tiny_model(architecture).to(dtype), batch_invariant=True)


def check_same_text(target: Target) -> None:
    drafters = [built(*pair, target) for pair in (DRAFTERS[:1] if target.is_encoder_decoder else DRAFTERS)]
    for num_rows, side in ((1, "right"), (3, "left")):
        ids, mask = padded(prompts(num_rows), side=side)
        plain = texts(draftsmith.generate(target, ids, attention_mask=mask, max_new_tokens=NUM_NEW))
        for drafter in drafters:
            out = draftsmith.generate(target, ids, drafter, attention_mask=mask, max_new_tokens=NUM_NEW)
            assert texts(out) == plain, f"{type(drafter).__module__}, {num_rows} rows"


def test_text_is_the_same_with_every_drafter() -> None:
    check_same_text(invariant_target("llama", torch.bfloat16))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("architecture", [*CAUSAL, *SEQ2SEQ])
def test_text_is_the_same_in_every_architecture(architecture: str, dtype: torch.dtype) -> None:
    check_same_text(invariant_target(architecture, dtype))


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


def test_trial_fails_without_padding() -> None:
    target = invariant_target("llama", torch.float32)
    shapes = shapes_for(target, 1)
    trial = Trial(target, 1, num_blocks=1)
    assert shapes.node_multiple > 1, "nothing to leave out on this machine"
    assert trial.most_equal(replace(shapes, node_multiple=1)) < shapes.most_nodes


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
        draft_probs_BNV=torch.arange(10.0).view(2, 5, 1),
        sampling_scheme="without_replacement",
    )
    found = likeliest_chain(draft)
    assert found.tokens_BN.tolist() == [[10, 11, 13], [20, 21, 21]]
    assert found.num_nodes == [3, 2] and found.tree.is_chain
    assert found.sampling_scheme == "independent"
    assert found.draft_probs_BNV is not None
    assert found.draft_probs_BNV[..., 0].tolist() == [[0, 1, 3], [5, 6, 6]]


def test_shapes_pad_to_a_multiple() -> None:
    assert [Shapes(node_multiple=4).num_dummies(number) for number in (1, 4, 5, 8)] == [3, 0, 3, 0]
