"""Sampled text of whole systems follows the target's distribution, and the test detects systems whose text does not.

Fixed in advance: 20,000 continuations of three tokens from a vocabulary of eight, seed 0, false alarms at 1e-4.
"""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from draftsmith.core.sampling import Sampling
from draftsmith.core.tree import Draft, Verdict
from tests.support.distributions import (
    FALSE_ALARM,
    check_distribution,
    distribution_p_value,
    distribution_target,
    exact_distribution,
    p_value,
)
from tests.support.drafters import sampled_drafter
from tests.support.verify.biased_verifiers import accept_by_target_probability, reuse_one_uniform, sample_for_each_child

NUM_SAMPLES = 20_000


@pytest.mark.parametrize("name", ["medusa", "lm", "lookup"])
def test_sampling_with_drafters_is_lossless(name: str) -> None:
    check_distribution(sampled_drafter(name), distribution_target(), num_samples=NUM_SAMPLES)


def test_plain_decoding_samples_the_target_distribution() -> None:
    check_distribution(None, distribution_target(), num_samples=NUM_SAMPLES // 2)


@pytest.mark.parametrize("settings", [{"top_p": 0.9}, {"top_k": 5}, {"temperature": 0.7, "top_k": 6, "top_p": 0.8}])
@pytest.mark.parametrize("name", ["medusa", "lm", "lookup"])
def test_sampling_is_lossless_with_temperature_top_k_and_top_p(name: str, settings: dict[str, float]) -> None:
    check_distribution(sampled_drafter(name), distribution_target(), num_samples=NUM_SAMPLES // 4, seed=1, **settings)


def test_token_verification_of_deterministic_chains_is_lossless() -> None:
    check_distribution(sampled_drafter("lookup"), distribution_target(), num_samples=NUM_SAMPLES // 2, verifier="token")


@pytest.mark.parametrize("name", ["medusa", "lm", "none"])
def test_sampling_by_noise_of_positions_is_lossless(name: str) -> None:
    drafter, target = sampled_drafter(name) if name != "none" else None, distribution_target()
    check_distribution(drafter, target, num_samples=NUM_SAMPLES // 4, verifier="coupled", top_p=0.9)


@pytest.mark.parametrize(
    ("name", "verify"),
    [("lm", accept_by_target_probability), ("medusa", sample_for_each_child), ("lm", reuse_one_uniform)],
)
def test_biased_verifiers_are_detected(
    name: str, verify: Callable[..., Verdict], monkeypatch: pytest.MonkeyPatch
) -> None:
    biased = SimpleNamespace(name="biased", sampling=Sampling(temperature=1.0), verify=verify)
    monkeypatch.setattr("draftsmith.verify.choose", lambda *_: biased)
    assert (
        distribution_p_value(sampled_drafter(name), distribution_target(), num_samples=NUM_SAMPLES // 4) < FALSE_ALARM
    )


def test_typical_acceptance_is_detected_as_lossy() -> None:
    assert (
        distribution_p_value(
            sampled_drafter("medusa"), distribution_target(), num_samples=NUM_SAMPLES // 4, verifier="typical"
        )
        < FALSE_ALARM
    )


def test_wrong_draft_probabilities_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """WRONG: reports a flatter distribution than the tokens were sampled from."""
    drafter = sampled_drafter("lm")
    propose = drafter.propose

    def propose_flatter(budget: int) -> Draft:
        draft = propose(budget)
        flatter = draft.draft_probs_BNV**0.5
        return Draft(**vars(draft) | {"draft_probs_BNV": flatter / flatter.sum(-1, keepdim=True)})

    monkeypatch.setattr(drafter, "propose", propose_flatter)
    assert distribution_p_value(drafter, distribution_target(), num_samples=NUM_SAMPLES // 4, top_k=5) < FALSE_ALARM


def test_exact_distribution_and_p_values_are_correct() -> None:
    probs_C = exact_distribution(distribution_target())
    assert probs_C.sum().item() == pytest.approx(1, abs=1e-6)
    assert (exact_distribution(distribution_target(), top_k=5) > 0).sum() == 5**3
    generator = torch.Generator().manual_seed(0)
    p_values = []
    for _ in range(200):
        samples = torch.multinomial(probs_C.float(), 2_000, replacement=True, generator=generator)
        p_values.append(p_value(torch.bincount(samples, minlength=len(probs_C)), probs_C))
    # For samples of the distribution p-values are uniform: their mean is 0.5 with standard deviation 0.02.
    assert sum(p_values) / 200 == pytest.approx(0.5, abs=0.08)
    assert min(p_values) > FALSE_ALARM
    impossible = torch.zeros_like(probs_C)
    impossible[0] = 1
    assert p_value(impossible, torch.where(impossible > 0, 0.0, probs_C)) == 0
