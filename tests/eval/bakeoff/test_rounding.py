"""Tests of measured rounding: gaps at first differences, exact in float32 and nonzero in bfloat16."""

import math

import pytest
import torch

from data import POCKET
from draftsmith import Target
from eval.bakeoff.measure import DecodingRequest, draftsmith_method
from eval.bakeoff.rounding import GapReader, first_difference, measured_rounding
from tests.support.models import prompts, tiny_target


def test_first_difference() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 4, 3]) == 1
    assert first_difference([1, 2, 3], [1, 2]) == 2


@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_gap_reader_returns_differences_of_plain_logits(architecture: str) -> None:
    """Against logits of one forward of the whole text; texts that only end differently have no gap."""
    target, ids = tiny_target(architecture), prompts(3)
    plain = draftsmith_method(target)(DecodingRequest(prompts=ids, temperature=0.0, max_new_tokens=6, seed=0)).rows
    others = [list(row) for row in plain]
    others[0][4], others[2] = (plain[0][4] + 1) % target.vocab_size, plain[2][:3]
    read = GapReader({"plain": target})
    gap, endless = read("plain", ids, plain, others)
    assert endless == math.inf
    with torch.inference_mode():
        if target.is_encoder_decoder:
            start = [[target.decoder_start_token_id, *plain[0][:4]]]
            logits = target.model(torch.tensor(ids[:1]), decoder_input_ids=torch.tensor(start)).logits
        else:
            logits = target.model(torch.tensor([ids[0] + plain[0][:4]])).logits
    expected = logits[0, -1, plain[0][4]] - logits[0, -1, others[0][4]]
    assert gap == pytest.approx(float(expected), abs=1e-4) and gap > 0
    assert read("plain", ids, plain, plain) == []


def test_measured_rounding_is_small_in_float32_and_larger_in_bfloat16() -> None:
    found = []
    for dtype in ("float32", "bfloat16"):
        target = Target.from_pretrained(POCKET, dtype=dtype)
        ids = [list(range(100, 108)), list(range(200, 203))]
        texts = draftsmith_method(target)(DecodingRequest(prompts=ids, temperature=0.0, max_new_tokens=16, seed=0)).rows
        found.append(measured_rounding(target, ids, texts, [2, 8]))
    assert 0 <= found[0] < 1e-3 < found[1] < 1


@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_gaps_and_rounding_are_read_after_logits_processors(architecture: str) -> None:
    """A suppressed token is infinitely far away; in float32 processed logits differ by rounding alone."""
    target, ids = tiny_target(architecture), prompts(3)
    request = DecodingRequest(prompts=ids, temperature=0.0, max_new_tokens=6, seed=0)
    likeliest = draftsmith_method(target)(request).rows[0][0]
    config = {"suppress_tokens": [likeliest], "repetition_penalty": 1.5}
    plain = draftsmith_method(target, config=config)(request).rows
    others = [[likeliest, *plain[0][1:]], *plain[1:]]
    assert GapReader({"plain": target}, config)("plain", ids, plain, others) == [math.inf]
    assert 0 <= measured_rounding(target, ids, plain, [2, 4], config) < 1e-3
