"""Tests of greedy identity: where texts differ, and whether that is a numeric tie or an error."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import draftsmith
from draftsmith import Target
from draftsmith.core.tree import Draft, Verdict
from draftsmith.drafters import lookup
from draftsmith.verify.paths import walk
from eval.certificate.identity import GreedySettings, explain
from eval.certificate.reference import reference_logits
from eval.certificate.sampled import SampledTestSettings
from eval.lossless import LOSSLESS, NOT_LOSSLESS, certify, lines
from tests.eval.test_lossless import greedy_tests, loader, replace_verifier, some_prompts
from tests.support.models import tiny_model, tiny_target


def model_with_rival(difference: float) -> tuple[Any, int, int]:
    """Returns a model, a token of its greedy text, and one whose logits are smaller by a factor 1 - `difference`."""
    model = tiny_model("llama")
    text = model.generate(torch.tensor([some_prompts(1, vocab_size=64)[0].ids]), max_new_tokens=12)[0]
    frequent, rival = int(text[9:].mode().values), max(set(range(64)) - set(text.tolist()))
    with torch.no_grad():
        model.lm_head.weight[rival] = model.lm_head.weight[frequent] * (1 - difference)
    return model, frequent, rival


@pytest.mark.parametrize(
    ("difference", "is_tie"),
    [
        pytest.param(0.0, True, marks=pytest.mark.slow),
        (6e-7, True),
        (1e-5, False),
        pytest.param(1e-2, False, marks=pytest.mark.slow),
    ],
)
def test_certify_separates_numeric_ties_from_errors(
    difference: float, is_tie: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, frequent, rival = model_with_rival(difference)
    target = Target(model)
    draftsmith.save(lookup.Drafter(lookup.Config(), target), tmp_path / "lookup", target=target)

    def prefer_the_rival(scores_BNV: Tensor, draft: Draft, uniforms_BU: Tensor) -> Verdict:
        choice_BN = scores_BNV.argmax(-1)
        return walk(torch.where(choice_BN == frequent, rival, choice_BN), draft)

    replace_verifier(monkeypatch, prefer_the_rival, for_greedy=True)
    settings = GreedySettings(dtypes=("float32",), batch_sizes=(3,), max_new_tokens=12)
    sampled = SampledTestSettings(
        samplings=("temperature=1",), num_rows=1200, num_tokens=3, sampled_prompts=1, rows_at_once=400
    )
    certificate = certify(loader(model), [tmp_path / "lookup"], some_prompts(vocab_size=64), sampled, settings)
    plain, ours, transformers = greedy_tests(certificate)
    assert (plain["ties"], plain["errors"], plain["verdict"]) == ([], [], "passed")
    for test in (ours, transformers):
        found, none = (test["ties"], test["errors"]) if is_tie else (test["errors"], test["ties"])
        assert found and not none
        assert test["verdict"] == ("passed" if is_tie else "failed")
        for one in found:
            assert one["tokens"] == [rival, frequent]
            assert (one["gap_float64"] <= one["tolerance"]) == is_tie
            assert one["num_not_compared"] == 12 - one["position"]
        assert test["num_samples"] == 3 * 12 - sum(one["num_not_compared"] for one in found)
    assert certificate["verdict"] == (LOSSLESS if is_tie else NOT_LOSSLESS)
    shown = [
        line for line in lines(certificate, "markdown") if line.startswith("- numeric tie" if is_tie else "- ERROR")
    ]
    assert len(shown) == len(ours["ties"] + ours["errors"]) * 2
    assert f"{rival} and {frequent}, gap" in shown[0]


def test_explain_equal_logits_of_unlikely_tokens_are_an_error() -> None:
    """Two tokens with equal logits may both be far below the largest logit."""
    model, frequent, rival = model_with_rival(0.0)
    target, prompt = Target(model), some_prompts(1, vocab_size=64)[0].ids
    logits_V = next(reference_logits(target, prompt, [[frequent, frequent]]))[-1]
    assert int(logits_V.argmax()) not in (frequent, rival)
    exact, texts = loader(model), ([frequent, frequent, rival, 5], [frequent, frequent, frequent, 5])
    difference = explain(target, prompt, *texts, exact=lambda: exact("float64"), tie_tolerance=8)
    assert not difference["is_tie"]
    assert difference["gap"] == pytest.approx(float(logits_V.max() - logits_V[rival]))


def test_explain_texts_of_different_length_are_an_error() -> None:
    target = tiny_target("llama")
    for found, expected, tokens, left in (([4, 7], [4, 7, 9], [None, 9], 1), ([4, 7, 9], [4, 7], [9, None], 0)):
        difference = explain(target, [3, 5], found, expected, exact=lambda: target, tie_tolerance=8)
        assert (difference["position"], difference["tokens"], difference["num_not_compared"]) == (2, tokens, left)
        assert (difference["is_tie"], difference["gap"]) == (False, None)


def test_explain_tie_must_hold_in_both_dtypes() -> None:
    """A tie in the run's dtype is an error if the logits differ in float64."""
    near, far = Target(model_with_rival(0.0)[0]), Target(model_with_rival(1e-2)[0])
    _, frequent, rival = model_with_rival(0.0)
    prompt = some_prompts(1, vocab_size=64)[0].ids
    text = near.model.generate(torch.tensor([prompt]), max_new_tokens=12)[0, len(prompt) :].tolist()
    before = text[: text.index(frequent)]
    for own, exact, is_tie in ((near, near, True), (near, far, False), (far, near, False)):
        difference = explain(
            own, prompt, [*before, rival], [*before, frequent], exact=lambda e=exact: e, tie_tolerance=8
        )
        assert difference["is_tie"] == is_tie
