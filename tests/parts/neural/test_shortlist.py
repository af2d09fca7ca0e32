"""Tests of shortlists, and of LM heads restricted to them."""

import pytest
import torch
from torch import nn

from draftsmith.core.sampling import Sampling
from draftsmith.parts.neural.shortlist import Shortlist, ShortlistHead, weights_version
from draftsmith.parts.neural.tied_heads import TiedHead
from tests.support.models import tiny_target


def test_shortlist_gives_other_tokens_probability_zero() -> None:
    torch.manual_seed(0)
    shortlist = Shortlist(3, 7)
    shortlist.set_tokens(torch.tensor([1, 4, 6]))
    logits_W = torch.randn(2, 5, 3)
    for temperature in (0.5, 1.0, 20.0):
        probs_V = Sampling(temperature=temperature).probs(shortlist.spread(logits_W))
        assert probs_V[..., [0, 2, 3, 5]].eq(0).all()
        torch.testing.assert_close(probs_V[..., [1, 4, 6]], (logits_W / temperature).softmax(-1))
    assert shortlist.contains(torch.tensor([[0, 1], [6, 5]])).tolist() == [[False, True], [True, False]]
    assert len(shortlist) == 3 and not shortlist.is_whole


def test_empty_shortlist_keeps_whole_vocabulary() -> None:
    whole, logits_V = Shortlist(0, 7), torch.randn(2, 7)
    assert whole.is_whole and len(whole) == 7 and not whole.state_dict()
    assert whole.spread(logits_V) is logits_V and whole.rows(logits_V.T).shape == (7, 2)
    assert whole.contains(torch.arange(7)).all()


@pytest.mark.parametrize("num_tokens", [-1, 8])
def test_shortlist_rejects_invalid_size(num_tokens: int) -> None:
    with pytest.raises(ValueError, match=f"shortlist is {num_tokens}; it must lie between 0, for none, and 7"):
        Shortlist(num_tokens, 7)


@pytest.mark.parametrize("bias", [False, True])
def test_shortlist_head_matches_whole_head(bias: bool) -> None:
    """With and without gradients, before and after its weights or tokens change."""
    torch.manual_seed(0)
    whole = nn.Linear(5, 7, bias=bias)
    head, features = ShortlistHead(whole, 3), torch.randn(2, 4, 5)
    for ids in ([0, 1, 2], [1, 4, 6]):
        head.shortlist.set_tokens(torch.tensor(ids))
        for _ in range(2):
            expected = whole(features)[..., ids]
            torch.testing.assert_close(head(features)[..., ids], expected)
            with torch.inference_mode():
                torch.testing.assert_close(head(features)[..., ids], expected)
            with torch.no_grad():
                whole.weight.mul_(2)
    head(features).sum().backward()
    assert whole.weight.grad is not None
    assert whole.weight.grad.abs().sum(1).gt(0).tolist() == [at in (1, 4, 6) for at in range(7)]


def test_weights_version_changes_with_weights_tokens_and_mode() -> None:
    head = ShortlistHead(nn.Linear(5, 7), 3).eval()
    versions = [weights_version(head)]
    with torch.no_grad():
        head.weight.add_(1)
    versions.append(weights_version(head))
    head.shortlist.set_tokens(torch.tensor([0, 1, 3]))
    versions.append(weights_version(head))
    assert versions[0] != versions[1] != versions[2] == weights_version(head.eval())
    assert weights_version(head.train()) != weights_version(head)
    assert versions[2] != weights_version(head.eval()) == weights_version(head)


@pytest.mark.parametrize("is_fused", [False, True])
def test_lm_heads_use_weights_of_last_training_step(is_fused: bool) -> None:
    """Fused optimisers change weights without counting the writes."""
    torch.manual_seed(0)
    whole, features = nn.Linear(5, 7), torch.randn(2, 5)
    heads = [ShortlistHead(whole, 3), TiedHead(tiny_target("llama"), 5, 4, shortlist=3)]
    for head in heads:
        optimiser = torch.optim.AdamW(head.parameters(), lr=0.1, fused=is_fused)
        for _ in range(3):
            head.train()(features).sum().backward()
            optimiser.step()
            expected = head(features)
            with torch.no_grad():
                torch.testing.assert_close(head(features), expected)
                torch.testing.assert_close(head.eval()(features), expected)
