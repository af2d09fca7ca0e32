"""Whole systems at temperature 1: what is sampled follows the target's law, and the test would see it if it did not.

Fixed beforehand: 20,000 continuations of three tokens from a vocabulary of eight, seed 0, false alarms at 1e-4.
"""

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from draftsmith.core.sampling import Sampling, draw
from draftsmith.core.tree import Draft, Verdict
from draftsmith.drafters import lm, lookup, medusa
from draftsmith.verify.paths import follow
from tests.support.distributions import FALSE_ALARM, VOCAB_SIZE, check_distribution, exact_distribution, judge, distribution_target, p_value
from tests.support.family import built
from tests.support.models import tiny_config

NUM_SAMPLES = 20_000
TREE = ((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0))
SMALL = tiny_config("llama", vocab_size=VOCAB_SIZE, num_hidden_layers=1).to_dict()


@cache
def drafter_of(name: str) -> Any:
    target = distribution_target()
    if name == "medusa":
        return built(medusa, medusa.Config(num_heads=3, tree=TREE), target)
    if name == "lm":  # stops after unlikely tokens, so that rows draft unequal lengths
        return built(lm, lm.Config(model=SMALL, num_draft=3, length="refit=0.3"), target)
    return lookup.Drafter(lookup.Config(), target)


@pytest.mark.parametrize("name", ["medusa", "lm", "lookup"])
def test_sampled_text_follows_the_law(name: str) -> None:
    check_distribution(drafter_of(name), distribution_target(), num_samples=NUM_SAMPLES)


def test_plain_decoding_follows_the_law() -> None:
    check_distribution(None, distribution_target(), num_samples=NUM_SAMPLES // 2)


@pytest.mark.parametrize("settings", [{"top_p": 0.9}, {"top_k": 5}, {"temperature": 0.7, "top_k": 6, "top_p": 0.8}])
@pytest.mark.parametrize("name", ["medusa", "lm", "lookup"])
def test_the_law_is_taken_after_top_k_and_top_p(name: str, settings: dict[str, float]) -> None:
    check_distribution(drafter_of(name), distribution_target(), num_samples=NUM_SAMPLES // 4, seed=1, **settings)


def test_a_deterministic_chain_may_also_be_judged_token_by_token() -> None:
    check_distribution(drafter_of("lookup"), distribution_target(), num_samples=NUM_SAMPLES // 2, verifier="token")


def accept_by_the_targets_chance(target_probs_BNV: Tensor, draft: Draft, uniforms_BU: Tensor) -> Verdict:
    """WRONG: forgets by what law the draft was drawn, and draws from the target's law after a rejection."""
    num_drafted = draft.tree.num_nodes - 1
    target_of_drafted = target_probs_BNV[:, :num_drafted].gather(2, draft.tokens_BN[:, 1:, None])[..., 0]
    is_accepted_BN = torch.ones_like(draft.tokens_BN, dtype=torch.bool)
    is_accepted_BN[:, 1:] = uniforms_BU[:, :num_drafted] < target_of_drafted
    if (valid_BN := draft.valid_BN()) is not None:
        is_accepted_BN &= valid_BN
    after_BN = draw(target_probs_BNV, uniforms_BU[:, -1:].expand_as(draft.tokens_BN))
    return follow(is_accepted_BN, draft, after_BN)


def draw_for_each_child(target_probs_BNV: Tensor, draft: Draft, uniforms_BU: Tensor) -> Verdict:
    """WRONG: tries each child of a tree by itself, so that siblings add up to more than their share."""
    parents_BN = draft.tree.parents_RN.clamp(min=0).expand_as(draft.tokens_BN)
    rows_B1 = torch.arange(len(parents_BN))[:, None]
    is_accepted_BN = uniforms_BU[:, :-1] < target_probs_BNV[rows_B1, parents_BN, draft.tokens_BN]
    is_accepted_BN[:, 0] = True
    return follow(is_accepted_BN, draft, draw(target_probs_BNV, uniforms_BU[:, -1:].expand_as(draft.tokens_BN)))


def one_uniform_for_all(target_probs_BNV: Tensor, draft: Draft, uniforms_BU: Tensor) -> Verdict:
    """WRONG: the right rule with a single uniform for all its decisions."""
    from draftsmith.verify.research import token

    return token.verify(target_probs_BNV, draft, uniforms_BU[:, :1].expand_as(uniforms_BU))


@pytest.mark.parametrize(
    ("name", "verify"),
    [("lm", accept_by_the_targets_chance), ("medusa", draw_for_each_child), ("lm", one_uniform_for_all)],
)
def test_a_biased_verifier_is_seen(name: str, verify: Callable[..., Verdict], monkeypatch: pytest.MonkeyPatch) -> None:
    biased = SimpleNamespace(name="biased", sampling=Sampling(temperature=1.0), verify=verify)
    monkeypatch.setattr("draftsmith.verify.choose", lambda *_: biased)
    assert judge(drafter_of(name), distribution_target(), num_samples=NUM_SAMPLES // 4) < FALSE_ALARM


def test_typical_acceptance_is_seen_to_be_lossy() -> None:
    assert judge(drafter_of("medusa"), distribution_target(), num_samples=NUM_SAMPLES // 4, verifier="typical") < FALSE_ALARM


def test_drafts_judged_by_another_law_than_theirs_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """WRONG: the target's law after top-k, the draft's before it."""
    drafter = drafter_of("lm")
    propose = drafter.propose

    def without_truncation(budget: int) -> Draft:
        draft = propose(budget)
        flatter = draft.draft_probs_BNV**0.5
        return Draft(**vars(draft) | {"draft_probs_BNV": flatter / flatter.sum(-1, keepdim=True)})

    monkeypatch.setattr(drafter, "propose", without_truncation)
    assert judge(drafter, distribution_target(), num_samples=NUM_SAMPLES // 4, top_k=5) < FALSE_ALARM


def test_the_exact_law_and_the_test_are_sound() -> None:
    probs_C = exact_distribution(distribution_target())
    assert probs_C.sum().item() == pytest.approx(1, abs=1e-6)
    assert (exact_distribution(distribution_target(), top_k=5) > 0).sum() == 5**3
    generator = torch.Generator().manual_seed(0)
    p_values = []
    for _ in range(200):
        drawn = torch.multinomial(probs_C.float(), 2_000, replacement=True, generator=generator)
        p_values.append(p_value(torch.bincount(drawn, minlength=len(probs_C)), probs_C))
    # Under the law itself p-values are uniform: their mean is 0.5 give or take 0.02.
    assert sum(p_values) / 200 == pytest.approx(0.5, abs=0.08)
    assert min(p_values) > FALSE_ALARM
    impossible = torch.zeros_like(probs_C)
    impossible[0] = 1
    assert p_value(impossible, torch.where(impossible > 0, 0.0, probs_C)) == 0
