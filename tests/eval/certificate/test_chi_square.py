"""Tests of the chi-square statistics on a toy of seven tokens, their power, and the reference distributions.

Shape suffixes: V vocabulary, T positions, B rows, C cells.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from draftsmith.core.sampling import Sampling
from eval.certificate import chi_square
from eval.certificate.chi_square import (
    Evidence,
    EvidenceByGrouping,
    SampledText,
    Tokens,
    collect_evidence,
    combine_p_values,
    detectable_shift,
    p_value,
)
from eval.certificate.reference import reference_logits, reference_probs
from tests.support.models import tiny_target


def toy_probs() -> Tensor:
    """Returns distributions [7, 7] of the token after each token, one of them with an impossible token."""
    probs_VV = torch.rand(7, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64) ** 3
    probs_VV[2, 5] = 0
    return probs_VV / probs_VV.sum(1, keepdim=True)


def toy_texts(probs_VV: Tensor, num_rows: int, generator: torch.Generator) -> list[SampledText]:
    """Returns texts of four tokens sampled after two prompts, 0 and 1; texts end after a 6."""
    prompt_B = torch.arange(num_rows) % 2
    tokens = [prompt_B]
    for _ in range(4):
        tokens.append(torch.multinomial(probs_VV[tokens[-1]], 1, generator=generator)[:, 0])
    rows = torch.stack(tokens[1:], dim=1).tolist()
    ends = [row.index(6) + 1 if 6 in row else 4 for row in rows]
    return [
        SampledText(prompt=prompt, tokens=tuple(row[:end]), drafts=drafts)
        for prompt, row, end, drafts in zip(prompt_B.tolist(), rows, ends, toy_drafts(num_rows), strict=True)
    ]


DRAFT_WEIGHTS = torch.tensor([3, 1, 5]), torch.tensor([0.5, 0.25, 0.125])


def toy_drafts(num_rows: int) -> list[dict[int, tuple[Tensor, Tensor]]]:
    """Returns drafts at every position of odd rows, at the first and third of even rows, and beyond the text."""
    return [
        {0: DRAFT_WEIGHTS, 2: DRAFT_WEIGHTS, 9: DRAFT_WEIGHTS}
        | ({1: DRAFT_WEIGHTS, 3: DRAFT_WEIGHTS} if row % 2 else {})
        for row in range(num_rows)
    ]


def toy_reference(probs_VV: Tensor) -> chi_square.ReferenceProbs:
    def probs_for(prompt: int, texts: list[Tokens]) -> Iterator[tuple[Tensor, Tensor]]:
        for text in texts:
            before = torch.tensor([prompt, *text[:-1]])
            yield probs_VV[before], before != 4  # positions after a 4 are unclear

    return probs_for


def toy_p_values(probs_VV: Tensor, num_rows: int, times: int) -> tuple[Tensor, EvidenceByGrouping]:
    """Returns p-values [times, 3] by prefix, rank and draft of texts sampled from `probs_VV`, and the last evidence."""
    generator = torch.Generator().manual_seed(0)
    p_values = []
    for _ in range(times):
        texts = toy_texts(probs_VV, num_rows, generator)
        found = collect_evidence(texts, 4, toy_reference(toy_probs()), generator)
        by_prefix = p_value(*combine_p_values([evidence.p_value for evidence in found.by_prefix if evidence.freedom]))
        p_values.append((by_prefix, found.by_rank.p_value, found.by_draft.p_value))
    return torch.tensor(p_values), found


@pytest.mark.slow
def test_p_values_are_uniform_under_the_null_hypothesis() -> None:
    p_values, found = toy_p_values(toy_probs(), num_rows=400, times=50)
    for values in p_values.T:
        assert values.mean().item() == pytest.approx(0.5, abs=0.11)
        assert (values < 0.1).float().mean().item() == pytest.approx(0.1, abs=0.11)
        assert values.min() > 1e-4
    by_prefix = sum(found.by_prefix, Evidence())
    assert by_prefix.num_unclear > 0
    assert by_prefix.num_samples < found.by_rank.num_samples < 1_600
    assert found.by_draft.num_samples < found.by_rank.num_samples * 0.85
    assert by_prefix.num_excluded == found.by_rank.num_excluded == 0


def shifted(share: float, to_drafted: bool) -> Tensor:
    """Returns the toy's distributions with a share of each shifted to its likeliest token or to the drafted tokens."""
    probs_VV = toy_probs()
    if to_drafted:
        there_VV = torch.zeros(7, dtype=torch.float64).scatter(0, DRAFT_WEIGHTS[0], DRAFT_WEIGHTS[1].double() / 0.875)
    else:
        there_VV = torch.nn.functional.one_hot(probs_VV.argmax(1), 7)
    return (1 - share) * probs_VV + share * there_VV


@pytest.mark.parametrize("way", [0, *(pytest.param(way, marks=pytest.mark.slow) for way in (1, 2))])
def test_detectable_shift_has_the_stated_power(way: int) -> None:
    _, found = toy_p_values(toy_probs(), num_rows=400, times=1)
    evidence = (sum(found.by_prefix, Evidence()), found.by_rank, found.by_draft)[way]
    share = detectable_shift(evidence, 1e-3)
    assert share is not None
    assert 0.03 < share < 0.3
    p_values, _ = toy_p_values(shifted(share, to_drafted=way == 2), num_rows=400, times=20)
    assert (p_values[:, way] < 1e-3).float().mean() > 0.7
    p_values, _ = toy_p_values(shifted(share / 4, to_drafted=way == 2), num_rows=400, times=10)
    assert (p_values[:, way] < 1e-3).float().mean() < 0.3


def test_detectable_shift_without_enough_samples_is_none() -> None:
    assert detectable_shift(Evidence(), 1e-3) is None
    assert detectable_shift(Evidence(freedom=1, leverage=1.0), 1e-3) is None
    found = collect_evidence(
        toy_texts(toy_probs(), 8, torch.Generator()), 4, toy_reference(toy_probs()), torch.Generator()
    )
    assert [evidence.freedom for evidence in found.by_prefix] == [0] * 4
    assert found.by_rank.freedom == found.by_draft.freedom == 0


def test_normal_scores_of_small_counts_are_standard_normal() -> None:
    generator = torch.Generator().manual_seed(0)
    trials_C, probs_C = torch.full((60_000,), 40.0, dtype=torch.float64), torch.full((60_000,), 0.1).double()
    counts_C = torch.binomial(trials_C, probs_C, generator=generator)
    scores_C = chi_square._normal_scores(counts_C, trials_C, probs_C, generator).square()
    assert scores_C.mean().item() == pytest.approx(1, abs=0.03)
    assert scores_C.var().item() == pytest.approx(2, abs=0.15)
    far = int((scores_C > 10.83).sum())  # one in a thousand
    assert 35 < far < 90
    # Pearson's statistic exceeds that level up to three times as often.
    pearson_C = (counts_C - 4) ** 2 / (40 * 0.1 * 0.9)
    assert int((pearson_C > 10.83).sum()) > 1.5 * far


def test_chi_square_cells_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    probs_V = torch.tensor([0.02, 0.5, 0.03, 0.25, 0.2])
    # With 101 samples the two rarest expect 5 together; with 60 they need the next one; with 12 one cell has one token.
    for num_samples, freedom in ((101, 3), (60, 2), (12, 1), (9, 0)):
        counts_V = torch.tensor([0, num_samples, 0, 0, 0])
        evidence = chi_square.chi_square(counts_V, probs_V, generator)
        assert evidence.freedom == freedom
        assert evidence.num_samples == (num_samples if freedom else 0)
        assert evidence.leverage == pytest.approx(num_samples if freedom else 0)
    certain = chi_square.chi_square(torch.tensor([0, 50]), torch.tensor([0.0, 1.0]), generator)
    assert (certain.freedom, certain.num_excluded, certain.p_value) == (0, 0, 1.0)
    wrong = chi_square.chi_square(torch.tensor([1, 49]), torch.tensor([0.0, 1.0]), generator)
    assert (wrong.num_excluded, wrong.p_value) == (1, 0.0)
    # 90 heads of 100: one cell, a score of -8.3 up to the randomisation.
    heads = chi_square.chi_square(torch.tensor([90, 10]), torch.tensor([0.5, 0.5]), generator)
    assert heads.freedom == 1
    assert 7.8**2 < heads.statistic < 8.6**2
    assert p_value(3.841, 1) == pytest.approx(0.05, abs=1e-4)
    assert combine_p_values([0.5, 0.0, 1.0])[1] == 6


# --- Reference logits and distributions ------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "t5"])
def test_reference_logits_equal_one_forward_per_token(architecture: str) -> None:
    target, prompt = tiny_target(architecture), [5, 9, 11]
    texts = [[7, 8, 9], [3], [], [7, 8]] * 5  # more than one forward takes
    found = list(reference_logits(target, prompt, texts))
    assert [len(logits_TV) for logits_TV in found] == [len(text) + 1 for text in texts]
    for logits_TV, text in zip(found, texts, strict=True):
        assert logits_TV.dtype == torch.float64
        for at in range(len(text) + 1):
            given = {"input_ids": torch.tensor([prompt + text[:at]])}
            if target.is_encoder_decoder:
                given = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": torch.tensor([[0, *text[:at]]])}
            with torch.no_grad():
                expected_V = target.model(**given).logits[0, -1].double()
            assert torch.allclose(logits_TV[at], expected_V, atol=1e-5)


def test_reference_probs_and_their_clear_positions() -> None:
    probs_TV = torch.tensor([[0.1, 0.5, 0.25, 0.15], [0.3, 0.3001, 0.2999, 0.1001]], dtype=torch.float64)
    logits_TV, error_T = (1.5 * probs_TV).log() / 2, torch.tensor([1e-5, 1e-5])
    cases: list[tuple[Sampling, list[float], list[bool]]] = [
        (Sampling(temperature=0.5), [0.1, 0.5, 0.25, 0.15], [True, True]),
        (Sampling(temperature=0.5, top_k=2), [0, 2 / 3, 1 / 3, 0], [True, True]),
        (Sampling(temperature=0.5, top_p=0.7), [0, 2 / 3, 1 / 3, 0], [True, True]),
        (Sampling(temperature=0.5, top_k=3, top_p=0.8), [0, 2 / 3, 1 / 3, 0], [True, True]),
    ]
    for sampling, first, is_clear in cases:
        sampled_probs_TV, is_clear_T = reference_probs(logits_TV, sampling, error_T)
        assert sampled_probs_TV[0].tolist() == pytest.approx(first)
        assert sampled_probs_TV.sum(1).tolist() == pytest.approx([1, 1])
        assert is_clear_T.tolist() == is_clear
    # An error of 0.001 at this temperature may swap the second and third token of the other row, or move mass by 0.004.
    for sampling, is_clear in (
        (Sampling(temperature=0.5), [True, True]),
        (Sampling(temperature=0.5, top_k=2), [True, False]),
        (Sampling(temperature=0.5, top_k=3), [True, True]),
        (Sampling(temperature=0.5, top_p=0.7), [True, True]),
        (Sampling(temperature=0.5, top_p=0.751), [False, True]),
        (Sampling(temperature=0.5, top_p=0.599), [True, False]),
    ):
        assert reference_probs(logits_TV, sampling, torch.tensor([1e-3, 1e-3]))[1].tolist() == is_clear, sampling
