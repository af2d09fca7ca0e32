"""Sampled text of whole systems follows the target's distribution, and the test detects systems whose text does not.

Fixed in advance: 20,000 continuations of three tokens from a vocabulary of eight, seed 0, false alarms at 1e-4.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.generation.logits_process import (
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from draftsmith.core.sampling import Sampling
from draftsmith.core.tree import Draft, Verdict
from draftsmith.inputs import processors
from tests.support.distributions import (
    FALSE_ALARM,
    VOCAB_SIZE,
    check_distribution,
    distribution_p_value,
    distribution_target,
    exact_distribution,
    p_value,
)
from tests.support.drafters import sampled_drafter
from tests.support.verify.biased_verifiers import accept_by_target_probability, reuse_one_uniform, sample_for_each_child

NUM_SAMPLES = 20_000


@pytest.mark.parametrize("name", ["lm", *(pytest.param(name, marks=pytest.mark.slow) for name in ("medusa", "lookup"))])
def test_sampling_with_drafters_is_lossless(name: str) -> None:
    check_distribution(sampled_drafter(name), distribution_target(), num_samples=NUM_SAMPLES)


def test_plain_decoding_samples_the_target_distribution() -> None:
    check_distribution(None, distribution_target(), num_samples=NUM_SAMPLES // 2)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"top_p": 0.9}, marks=pytest.mark.slow),
        pytest.param({"top_k": 5}, marks=pytest.mark.slow),
        {"temperature": 0.7, "top_k": 6, "top_p": 0.8},
    ],
)
@pytest.mark.parametrize("name", ["medusa", "lm", "lookup"])
def test_sampling_is_lossless_with_temperature_top_k_and_top_p(name: str, settings: dict[str, float]) -> None:
    check_distribution(sampled_drafter(name), distribution_target(), num_samples=NUM_SAMPLES // 4, seed=1, **settings)


def second_pair(prefix_BT: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
    """A user's own processor: favours the token after the last but one."""
    return scores_BV.scatter_add(1, (prefix_BT[:, -2:-1] + 1) % VOCAB_SIZE, torch.full_like(scores_BV[:, :1], 2.0))


PENALTIES = (
    RepetitionPenaltyLogitsProcessor(1.7),
    NoRepeatNGramLogitsProcessor(3),
    NoBadWordsLogitsProcessor([[4, 1], [0, 3, 3]]),
    second_pair,
)
"""They forbid or favour tokens depending on the prefix: what an error in a node's prefix would change."""


@pytest.mark.parametrize(
    ("name", "verifier"),
    [("medusa", "deterministic"), ("lm", "block"), ("lm", "token"), ("lm_tree", "traversal")],
)
def test_sampling_is_lossless_with_logits_processors(name: str, verifier: str) -> None:
    settings = {"logits_processor": PENALTIES, "verifier": verifier, "temperature": 1.2}
    check_distribution(sampled_drafter(name), distribution_target(), num_samples=NUM_SAMPLES // 8, **settings)


@pytest.mark.parametrize(
    ("name", "cutoffs"), [("lm", {"min_p": 0.2}), ("lm_tree", {"typical_p": 0.8, "epsilon_cutoff": 0.1})]
)
def test_sampling_is_lossless_with_further_cutoffs(name: str, cutoffs: dict[str, float]) -> None:
    settings = {"generation_config": cutoffs, "top_k": 7, "temperature": 1.0}
    check_distribution(sampled_drafter(name), distribution_target(), num_samples=NUM_SAMPLES // 8, **settings)


def test_processors_applied_to_a_wrong_prefix_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """WRONG: every node gets the prefix of the pending token."""
    prefixes = processors._prefixes

    def without_drafted(draft: Draft, rows: Any, *given: Any) -> torch.Tensor:
        of_pending = prefixes(draft, rows, *given).view(len(rows), draft.tree.num_nodes, -1)[:, :1]
        return of_pending.expand(-1, draft.tree.num_nodes, -1).flatten(0, 1)

    monkeypatch.setattr(processors, "_prefixes", without_drafted)
    given = {"num_samples": NUM_SAMPLES // 8, "logits_processor": PENALTIES}
    assert distribution_p_value(sampled_drafter("lm"), distribution_target(), **given) < FALSE_ALARM


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
