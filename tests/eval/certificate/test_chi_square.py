"""eval/certificate/chi_square.py on a toy of seven tokens, and eval/certificate/reference.py: exact laws, p-values, and what they would see.

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


def toy_laws() -> Tensor:
    """Returns laws [7, 7] of the next token after each, one of them with an impossible token."""
    probs_VV = torch.rand(7, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64) ** 3
    probs_VV[2, 5] = 0
    return probs_VV / probs_VV.sum(1, keepdim=True)


def toy_texts(probs_VV: Tensor, num_rows: int, generator: torch.Generator) -> list[SampledText]:
    """Returns texts of four tokens after two prompts, 0 and 1, drawn from the toy's laws; some end after a 6."""
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


FAVOURED = torch.tensor([3, 1, 5]), torch.tensor([0.5, 0.25, 0.125])


def toy_drafts(num_rows: int) -> list[dict[int, tuple[Tensor, Tensor]]]:
    """Returns drafts that begin at every place of a row, at the first and third of the next, and where no text is."""
    return [
        {0: FAVOURED, 2: FAVOURED, 9: FAVOURED} | ({1: FAVOURED, 3: FAVOURED} if row % 2 else {})
        for row in range(num_rows)
    ]


def toy_laws_along(probs_VV: Tensor) -> chi_square.ReferenceProbs:
    def probs_for(prompt: int, texts: list[Tokens]) -> Iterator[tuple[Tensor, Tensor]]:
        for text in texts:
            before = torch.tensor([prompt, *text[:-1]])
            yield probs_VV[before], before != 4  # what follows a 4 is unclear

    return probs_for


def toy_chances(probs_VV: Tensor, num_rows: int, times: int) -> tuple[Tensor, EvidenceByGrouping]:
    """Returns p-values [times, 3] by prefix, rank and draft of texts drawn from `laws_VV`, and the last judgement."""
    generator = torch.Generator().manual_seed(0)
    chances = []
    for _ in range(times):
        texts = toy_texts(probs_VV, num_rows, generator)
        judged = collect_evidence(texts, 4, toy_laws_along(toy_laws()), generator)
        by_prefix = p_value(*combine_p_values([evidence.p_value for evidence in judged.by_prefix if evidence.freedom]))
        chances.append((by_prefix, judged.by_rank.p_value, judged.by_draft.p_value))
    return torch.tensor(chances), judged


def test_p_values_are_uniform_under_the_law() -> None:
    chances, judged = toy_chances(toy_laws(), num_rows=400, times=50)
    for chance in chances.T:
        assert chance.mean().item() == pytest.approx(0.5, abs=0.11)
        assert (chance < 0.1).float().mean().item() == pytest.approx(0.1, abs=0.11)
        assert chance.min() > 1e-4
    by_prefix = sum(judged.by_prefix, Evidence())
    assert by_prefix.num_unclear > 0
    assert by_prefix.num_samples < judged.by_rank.num_samples < 1_600
    assert judged.by_draft.num_samples < judged.by_rank.num_samples * 0.85
    assert by_prefix.num_excluded == judged.by_rank.num_excluded == 0


def moved(share: float, to_drafted: bool) -> Tensor:
    """Returns the toy's laws, a share of each moved to its likeliest token or to what is drafted."""
    probs_VV = toy_laws()
    if to_drafted:
        there_VV = torch.zeros(7, dtype=torch.float64).scatter(0, FAVOURED[0], FAVOURED[1].double() / 0.875)
    else:
        there_VV = torch.nn.functional.one_hot(probs_VV.argmax(1), 7)
    return (1 - share) * probs_VV + share * there_VV


@pytest.mark.parametrize("way", [0, 1, 2])
def test_a_shift_is_seen_as_often_as_promised(way: int) -> None:
    _, judged = toy_chances(toy_laws(), num_rows=400, times=1)
    evidence = (sum(judged.by_prefix, Evidence()), judged.by_rank, judged.by_draft)[way]
    share = detectable_shift(evidence, 1e-3)
    assert share is not None
    assert 0.03 < share < 0.3
    chances, _ = toy_chances(moved(share, to_drafted=way == 2), num_rows=400, times=20)
    assert (chances[:, way] < 1e-3).float().mean() > 0.7
    chances, _ = toy_chances(moved(share / 4, to_drafted=way == 2), num_rows=400, times=10)
    assert (chances[:, way] < 1e-3).float().mean() < 0.3


def test_where_nothing_can_be_seen() -> None:
    assert detectable_shift(Evidence(), 1e-3) is None
    assert detectable_shift(Evidence(freedom=1, leverage=1.0), 1e-3) is None
    judged = collect_evidence(
        toy_texts(toy_laws(), 8, torch.Generator()), 4, toy_laws_along(toy_laws()), torch.Generator()
    )
    assert [evidence.freedom for evidence in judged.by_prefix] == [0] * 4
    assert judged.by_rank.freedom == judged.by_draft.freedom == 0


def test_scores_are_normal_even_where_little_is_expected() -> None:
    generator = torch.Generator().manual_seed(0)
    trials_C, chances_C = torch.full((60_000,), 40.0, dtype=torch.float64), torch.full((60_000,), 0.1).double()
    counts_C = torch.binomial(trials_C, chances_C, generator=generator)
    scores_C = chi_square._normal_scores(counts_C, trials_C, chances_C, generator).square()
    assert scores_C.mean().item() == pytest.approx(1, abs=0.03)
    assert scores_C.var().item() == pytest.approx(2, abs=0.15)
    far = int((scores_C > 10.83).sum())  # one in a thousand
    assert 35 < far < 90
    # At its largest, Pearson's statistic would be past that level three times as often.
    pearson_C = (counts_C - 4) ** 2 / (40 * 0.1 * 0.9)
    assert int((pearson_C > 10.83).sum()) > 1.5 * far


def test_cells_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    probs_V = torch.tensor([0.02, 0.5, 0.03, 0.25, 0.2])
    # Of 101 the rare two expect 5 together; of 60 they need the next one too; of 12 only the likeliest stands alone.
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
    # 90 heads of 100: one cell, a score of -8.3 give or take the draw within the jump.
    heads = chi_square.chi_square(torch.tensor([90, 10]), torch.tensor([0.5, 0.5]), generator)
    assert heads.freedom == 1
    assert 7.8**2 < heads.statistic < 8.6**2
    assert p_value(3.841, 1) == pytest.approx(0.05, abs=1e-4)
    assert combine_p_values([0.5, 0.0, 1.0])[1] == 6


# --- The model's own word --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "t5"])
def test_own_logits_are_those_after_each_token(architecture: str) -> None:
    target, prompt = tiny_target(architecture), [5, 9, 11]
    texts = [[7, 8, 9], [3], [], [7, 8]] * 5  # more than are fed at once
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


def test_own_laws_and_where_they_are_unclear() -> None:
    probs_TV = torch.tensor([[0.1, 0.5, 0.25, 0.15], [0.3, 0.3001, 0.2999, 0.1001]], dtype=torch.float64)
    logits_TV, blur_T = (1.5 * probs_TV).log() / 2, torch.tensor([1e-5, 1e-5])
    cases: list[tuple[Sampling, list[float], list[bool]]] = [
        (Sampling(temperature=0.5), [0.1, 0.5, 0.25, 0.15], [True, True]),
        (Sampling(temperature=0.5, top_k=2), [0, 2 / 3, 1 / 3, 0], [True, True]),
        (Sampling(temperature=0.5, top_p=0.7), [0, 2 / 3, 1 / 3, 0], [True, True]),
        (Sampling(temperature=0.5, top_k=3, top_p=0.8), [0, 2 / 3, 1 / 3, 0], [True, True]),
    ]
    for sampling, first, is_clear in cases:
        sampled_probs_TV, is_clear_T = reference_probs(logits_TV, sampling, blur_T)
        assert sampled_probs_TV[0].tolist() == pytest.approx(first)
        assert sampled_probs_TV.sum(1).tolist() == pytest.approx([1, 1])
        assert is_clear_T.tolist() == is_clear
    # A blur of 0.001 at this temperature may swap the second and third token of the other law, or move mass by 0.004.
    for sampling, is_clear in (
        (Sampling(temperature=0.5), [True, True]),
        (Sampling(temperature=0.5, top_k=2), [True, False]),
        (Sampling(temperature=0.5, top_k=3), [True, True]),
        (Sampling(temperature=0.5, top_p=0.7), [True, True]),
        (Sampling(temperature=0.5, top_p=0.751), [False, True]),
        (Sampling(temperature=0.5, top_p=0.599), [True, False]),
    ):
        assert reference_probs(logits_TV, sampling, torch.tensor([1e-3, 1e-3]))[1].tolist() == is_clear, sampling
