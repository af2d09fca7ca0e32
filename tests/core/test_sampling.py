"""The sampling distribution against transformers' warpers, and drawing from it."""

import math

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from draftsmith.core.sampling import BLOCK, Sampling, draw
from tests.support.distributions import CUTOFFS

JUST_BELOW_ONE = math.nextafter(1.0, 0.0)


def random_logits(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 5, 100])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-6])
def test_probs_equal_transformers(temperature: float, top_k: int, top_p: float) -> None:
    """Temperature first, then top-k, then top-p: any other order would give another distribution."""
    logits_BV = random_logits(200, 23)
    scores_BV = TemperatureLogitsWarper(temperature)(None, logits_BV)
    if top_k:
        scores_BV = TopKLogitsWarper(top_k)(None, scores_BV)
    if top_p < 1:
        scores_BV = TopPLogitsWarper(top_p)(None, scores_BV)
    probs_BV = Sampling(temperature=temperature, top_k=top_k, top_p=top_p).probs(logits_BV)
    assert torch.allclose(probs_BV, scores_BV.softmax(-1), atol=1e-12, rtol=0)
    assert torch.equal(probs_BV == 0, scores_BV == float("-inf"))


@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize(
    "settings",
    [
        {"min_p": 0.15},
        {"min_p": 1.0},
        {"typical_p": 0.6},
        {"epsilon_cutoff": 0.05},
        {"eta_cutoff": 0.2},
        {"min_p": 0.05, "typical_p": 0.9, "epsilon_cutoff": 0.02, "eta_cutoff": 0.1},
    ],
)
def test_probs_with_further_cutoffs_equal_transformers(settings: dict[str, float], top_p: float) -> None:
    logits_BV = random_logits(200, 23)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.7), TopKLogitsWarper(12), TopPLogitsWarper(top_p)])
    warpers += [CUTOFFS[name](value) for name, value in settings.items()]
    scores_BV = warpers(None, logits_BV)
    probs_BV = Sampling(temperature=0.7, top_k=12, top_p=top_p, **settings).probs(logits_BV)
    assert torch.allclose(probs_BV, scores_BV.softmax(-1), atol=1e-12, rtol=0)
    assert torch.equal(probs_BV == 0, scores_BV == float("-inf"))
    assert torch.equal(Sampling(temperature=0.7, top_k=12, top_p=top_p, **settings).probs(logits_BV[3]), probs_BV[3])


def test_as_settings_holds_what_differs_from_the_defaults() -> None:
    assert Sampling().as_settings() == {}
    settings = {"temperature": 0.5, "min_p": 0.1, "top_k": 3}
    assert Sampling(**settings).as_settings() == settings


def test_probs_hand_worked() -> None:
    logits_V = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()
    assert Sampling(temperature=1.0).probs(logits_V).tolist() == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert Sampling(temperature=0.5).probs(logits_V).tolist() == pytest.approx([16 / 30, 9 / 30, 4 / 30, 1 / 30])
    assert Sampling(temperature=1.0, top_k=2).probs(logits_V).tolist() == pytest.approx([4 / 7, 3 / 7, 0, 0])
    # 0.4 + 0.3 reach 0.6, so the second is the last one kept.
    assert Sampling(temperature=1.0, top_p=0.6).probs(logits_V).tolist() == pytest.approx([4 / 7, 3 / 7, 0, 0])
    # Of the three that top-k keeps the first two hold 7 / 9 of the mass; without top-k 0.75 would keep three.
    assert Sampling(temperature=1.0, top_k=3, top_p=0.75).probs(logits_V).tolist() == pytest.approx(
        [4 / 7, 3 / 7, 0, 0]
    )
    assert Sampling(temperature=1.0, top_p=0.75).probs(logits_V).tolist() == pytest.approx([4 / 9, 3 / 9, 2 / 9, 0])


def test_probs_are_one_hot_when_greedy() -> None:
    probs_V = Sampling().probs(torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 0.0]]))
    assert probs_V.tolist() == [[0, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_probs_of_low_precision_logits_are_float32(dtype: torch.dtype) -> None:
    logits_BV = random_logits(50, 300).to(dtype)
    for sampling in (Sampling(temperature=1.0), Sampling(temperature=0.7, top_k=20, top_p=0.9)):
        probs_BV = sampling.probs(logits_BV)
        assert probs_BV.dtype == torch.float32
        assert torch.allclose(probs_BV.sum(-1), torch.ones(50), atol=1e-5)
        assert torch.allclose(probs_BV.double(), sampling.probs(logits_BV.double()), atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p is 1.5"),
        ({"temperature": 1.0, "top_p": float("nan")}, "top_p is nan"),
        ({"temperature": 1.0, "top_k": -1}, "top_k is -1"),
        ({"temperature": 1.0, "top_k": 2.5}, "top_k is 2.5"),
        ({"min_p": -0.1}, "min_p is -0.1; it must be at least 0 and at most 1"),
        ({"typical_p": 0.0}, "typical_p is 0.0; it must be above 0 and at most 1"),
        ({"epsilon_cutoff": 1.0}, "epsilon_cutoff is 1.0; it must be at least 0 and below 1"),
        ({"eta_cutoff": float("nan")}, "eta_cutoff is nan; it must be at least 0 and below 1"),
    ],
)
def test_sampling_rejects_settings_out_of_range(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draw_inverts_the_running_sum(dtype: torch.dtype) -> None:
    weights_V = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0], dtype=dtype)
    uniforms_B = torch.tensor([0.0, 0.2, 0.25, 0.5, 0.75, 0.9, JUST_BELOW_ONE], dtype=torch.float64)
    expected = [1, 1, 3, 3, 4, 4, 4]
    assert draw(weights_V.expand(7, -1), uniforms_B).tolist() == expected
    assert draw(8 * weights_V.expand(7, -1), uniforms_B).tolist() == expected, "weights need not be normalised"


@pytest.mark.parametrize("vocab_size", [8 * BLOCK, 10 * BLOCK + 7])
def test_draw_in_blocks_equals_draw_without(vocab_size: int) -> None:
    weights_BV = random_logits(400, vocab_size, dtype=torch.float64).softmax(-1)
    weights_BV[torch.rand(weights_BV.shape, generator=torch.Generator().manual_seed(1)) < 0.6] = 0
    weights_BV[::5, : BLOCK + 1], weights_BV[1::5, -BLOCK - 1 :] = 0, 0
    uniforms_B = torch.rand(400, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    running_BV = weights_BV.cumsum(-1)
    expected_B = (running_BV <= uniforms_B[:, None] * running_BV[:, -1:]).sum(-1)
    assert draw(weights_BV, uniforms_B).tolist() == expected_B.tolist()


@pytest.mark.parametrize("vocab_size", [1_000, 10 * BLOCK + 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("uniform", [0.0, 1e-300, 0.5, 1 - 1e-9, JUST_BELOW_ONE])
def test_draw_never_returns_tokens_of_probability_0(dtype: torch.dtype, uniform: float, vocab_size: int) -> None:
    """Includes uniforms at both edges, a vocabulary whose sums round, and zeros first, last and between."""
    weights_BV = random_logits(300, vocab_size, dtype=dtype).softmax(-1)
    weights_BV[torch.rand(weights_BV.shape, generator=torch.Generator().manual_seed(1)) < 0.6] = 0
    weights_BV[::2, :3], weights_BV[1::2, -3:] = 0, 0
    weights_BV[:10, 1:] = 0
    weights_BV[:10, 0] = 1e-30  # all remaining weight may be tiny
    tokens_B = draw(weights_BV, torch.full((300,), uniform, dtype=torch.float64))
    assert (weights_BV.gather(1, tokens_B[:, None]) > 0).all()


def test_draw_keeps_leading_dimensions_and_the_distribution() -> None:
    probs_BNV = random_logits(2, 3, 4).softmax(-1)
    num_cells = 200_000
    # Evenly spaced uniforms integrate over the unit interval to 1 / num_cells.
    uniforms = (torch.arange(num_cells, dtype=torch.float64) + 0.5) / num_cells
    counts_BNV = torch.zeros_like(probs_BNV)
    tokens = draw(probs_BNV.expand(num_cells, 2, 3, 4), uniforms[:, None, None].expand(-1, 2, 3))
    assert tokens.shape == (num_cells, 2, 3)
    for token in range(4):
        counts_BNV[..., token] = (tokens == token).double().mean(0)
    assert (counts_BNV - probs_BNV).abs().max() < 2 / num_cells


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("settings", [{"temperature": 1e-38}, {"temperature": 5e-324}, {"top_p": 1e-300}])
def test_extreme_settings_keep_the_most_likely_token(settings: dict[str, float], dtype: torch.dtype) -> None:
    """A division by 1e-38 overflows in float32, and 1e-300 is 0 there."""
    logits_BV = (30 * random_logits(50, 23)).to(dtype)
    probs_BV = Sampling(**{"temperature": 1.0} | settings).probs(logits_BV)
    assert torch.equal(probs_BV.argmax(-1), logits_BV.argmax(-1))
    assert torch.equal(probs_BV.max(-1).values, torch.ones_like(probs_BV[:, 0]))
    assert torch.equal(probs_BV.sum(-1), torch.ones_like(probs_BV[:, 0]))
