"""Tests of fine-tuned targets, which share unchanged weights with the user's model."""

import pytest
import torch

import draftsmith
from draftsmith.drafters import lookup
from draftsmith.parts.self_drafting.fine_tuned import fine_tuned_target
from tests.support.family import texts
from tests.support.models import CAUSAL, greedy_by_transformers, prompts, tiny_model, tiny_target


def names(target: draftsmith.Target) -> list[str]:
    """Returns the names of the matrices in the target's last block."""
    return [name for name, weight in target.model.named_parameters() if weight.ndim == 2 and ".2." in name]


@pytest.mark.parametrize("architecture", CAUSAL)
def test_fine_tuned_target_has_given_weights_and_shares_others(architecture: str) -> None:
    target = tiny_target(architecture)
    before = {name: weight.clone() for name, weight in target.model.state_dict().items()}
    changes = {name: 0.5 * before[name] for name in names(target)}
    found, expected = fine_tuned_target(target, changes), tiny_model(architecture)
    assert changes
    with torch.no_grad():
        for name, weight in changes.items():
            expected.get_parameter(name).copy_(weight)
        ids = torch.tensor(prompts(1))
        assert torch.equal(found.model(ids).logits, expected(ids).logits)
        assert not torch.equal(found.model(ids).logits, target.model(ids).logits)
    own = dict(found.model.named_parameters())
    for name, weight in target.model.named_parameters():
        assert (own[name] is weight) == (name not in changes)
        assert torch.equal(weight, before[name])


def test_generate_rejects_drafter_of_another_target() -> None:
    target = tiny_target("llama")
    zeros = {name: torch.zeros_like(target.model.get_parameter(name)) for name in names(target)}
    own = fine_tuned_target(target, zeros)
    ids = torch.tensor(prompts(1))
    drafter = lookup.Drafter(lookup.Config(), own)
    with pytest.raises(ValueError, match=r"drafts for another Target object.*drafter\.target"):
        draftsmith.generate(target, ids, drafter, max_new_tokens=20)
    out = draftsmith.generate(own, ids, drafter, max_new_tokens=20)
    plain = draftsmith.generate(own, ids, max_new_tokens=20)
    assert texts(out) == texts(plain) != greedy_by_transformers("llama", 1, 20)


def test_unknown_weights_are_rejected() -> None:
    target = tiny_target("llama")
    with pytest.raises(ValueError, match="has no parameter 'nowhere' to be fine-tuned"):
        fine_tuned_target(target, {"nowhere": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"is \(64, 32\) in"):
        fine_tuned_target(target, {"lm_head.weight": torch.zeros(2, 2)})
