"""Whole systems at temperature 1: what is sampled follows the target's law, and the test would see it if it did not.

Fixed beforehand: 20,000 continuations of three tokens from a vocabulary of eight, seed 0, false alarms at 1e-4.
"""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from draftsmith.core.sampling import Sampling
from draftsmith.core.tree import Draft, Verdict
from tests.support.biased_verifiers import accept_by_the_targets_chance, draw_for_each_child, one_uniform_for_all
from tests.support.distributions import (
    FALSE_ALARM,
    check_distribution,
    distribution_p_value,
    distribution_target,
    exact_distribution,
    p_value,
)
from tests.support.drafters import sampled_drafter

NUM_SAMPLES = 20_000


@pytest.mark.parametrize("name", ["medusa", "lm", "lookup"])
def test_sampled_text_follows_the_law(name: str) -> None:
    check_distribution(sampled_drafter(name), distribution_target(), num_samples=NUM_SAMPLES)


def test_plain_decoding_follows_the_law() -> None:
    check_distribution(None, distribution_target(), num_samples=NUM_SAMPLES // 2)


@pytest.mark.parametrize("settings", [{"top_p": 0.9}, {"top_k": 5}, {"temperature": 0.7, "top_k": 6, "top_p": 0.8}])
@pytest.mark.parametrize("name", ["medusa", "lm", "lookup"])
def test_the_law_is_taken_after_top_k_and_top_p(name: str, settings: dict[str, float]) -> None:
    check_distribution(sampled_drafter(name), distribution_target(), num_samples=NUM_SAMPLES // 4, seed=1, **settings)


def test_a_deterministic_chain_may_also_be_judged_token_by_token() -> None:
    check_distribution(sampled_drafter("lookup"), distribution_target(), num_samples=NUM_SAMPLES // 2, verifier="token")


@pytest.mark.parametrize(
    ("name", "verify"),
    [("lm", accept_by_the_targets_chance), ("medusa", draw_for_each_child), ("lm", one_uniform_for_all)],
)
def test_a_biased_verifier_is_seen(name: str, verify: Callable[..., Verdict], monkeypatch: pytest.MonkeyPatch) -> None:
    biased = SimpleNamespace(name="biased", sampling=Sampling(temperature=1.0), verify=verify)
    monkeypatch.setattr("draftsmith.verify.choose", lambda *_: biased)
    assert distribution_p_value(sampled_drafter(name), distribution_target(), num_samples=NUM_SAMPLES // 4) < FALSE_ALARM


def test_typical_acceptance_is_seen_to_be_lossy() -> None:
    assert (
        distribution_p_value(
            sampled_drafter("medusa"), distribution_target(), num_samples=NUM_SAMPLES // 4, verifier="typical"
        )
        < FALSE_ALARM
    )


def test_drafts_judged_by_another_law_than_theirs_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """WRONG: the target's law after top-k, the draft's before it."""
    drafter = sampled_drafter("lm")
    propose = drafter.propose

    def without_truncation(budget: int) -> Draft:
        draft = propose(budget)
        flatter = draft.draft_probs_BNV**0.5
        return Draft(**vars(draft) | {"draft_probs_BNV": flatter / flatter.sum(-1, keepdim=True)})

    monkeypatch.setattr(drafter, "propose", without_truncation)
    assert distribution_p_value(drafter, distribution_target(), num_samples=NUM_SAMPLES // 4, top_k=5) < FALSE_ALARM


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
