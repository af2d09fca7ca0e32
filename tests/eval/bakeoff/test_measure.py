"""Tests of timed decoding: methods take turns, states are reset, results hold new tokens only."""

from dataclasses import replace

import pytest
import torch

from draftsmith.core.stats import GenerationStats
from eval.bakeoff.measure import (
    DecodingMethod,
    DecodingRequest,
    DecodingResult,
    draftsmith_method,
    measure,
    transformers_method,
)
from eval.bakeoff.pairwise import PairSettings, compare_pair
from tests.eval.test_compare import some_prompts
from tests.support.models import prompts, tiny_target


def test_measure_rotates_methods_and_compares_with_the_first() -> None:
    order = []

    def method(name: str, token: int) -> DecodingMethod:
        def decode(request: DecodingRequest) -> DecodingResult:
            order.append(name)
            stats = GenerationStats(num_rows=1, steps=2, new_tokens=3, drafted=[2, 1], accepted=[1])
            return DecodingResult(rows=[[token] * 3 for _ in request.prompts], stats=stats)

        return DecodingMethod(name=name, decode=decode)

    requests = [DecodingRequest(prompts=[[1], [2]], temperature=0.0, max_new_tokens=3, seed=0)] * 2
    tallies = measure([method("a", 1), method("b", 1), method("c", 2)], requests, torch.device("cpu"), first=1)
    assert order == ["b", "c", "a", "c", "a", "b"]
    assert [tallies[name].is_identical for name in "abc"] == [True, True, False]
    assert (tallies["a"].tokens, tallies["a"].steps) == (12, 4)
    assert (tallies["a"].drafted, tallies["a"].accepted) == ([4, 2], [2])


class StatefulDecoder:
    """Returns the prompts that it has decoded since `forget` was called."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def forget(self) -> None:
        self.seen = []

    def decode(self, request: DecodingRequest) -> DecodingResult:
        seen, self.seen = list(self.seen), [*self.seen, *request.prompts[0]]
        return DecodingResult(rows=[seen])


def test_measure_resets_state_between_rounds_and_methods() -> None:
    requests = [DecodingRequest(prompts=[[token]], temperature=0.0, max_new_tokens=3, seed=0) for token in (1, 2, 3)]
    alone, shared = StatefulDecoder(), StatefulDecoder()
    for _ in range(2):
        tallies = measure([DecodingMethod(name="a", decode=alone.decode, drafter=alone)], requests, torch.device("cpu"))
        assert tallies["a"].tokens == 0 + 1 + 2, "state is kept within a round"
    pair = [DecodingMethod(name=name, decode=shared.decode, drafter=shared) for name in "ab"]
    assert [tally.tokens for tally in measure(pair, requests, torch.device("cpu")).values()] == [0, 0]


@pytest.mark.parametrize("architecture", ["llama", "t5"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_decoding_methods_return_new_tokens_only(architecture: str, temperature: float) -> None:
    target = tiny_target(architecture)
    request = DecodingRequest(prompts=prompts(3), temperature=temperature, max_new_tokens=5, seed=1)
    before = torch.get_rng_state()
    theirs = transformers_method(target)(request)
    assert torch.equal(before, torch.get_rng_state())
    ours = draftsmith_method(target)(request)
    assert [len(row) for row in ours.rows] == [len(row) for row in theirs.rows] == [5, 5, 5]
    stream = draftsmith_method(target)(replace(request, stream_size=2))
    assert stream.num_batches == 1.5 and [len(row) for row in stream.rows] == [5, 5, 5]
    if temperature == 0:
        assert ours.rows == theirs.rows == stream.rows
        penalised = draftsmith_method(target, config={"suppress_tokens": ours.rows[0][:1]})
        assert ours.rows != penalised(request).rows == penalised(replace(request, stream_size=2)).rows


def test_compare_pair_reports_speeds_and_ratio() -> None:
    target = tiny_target("llama")
    methods = [
        DecodingMethod(name="ours", decode=draftsmith_method(target)),
        DecodingMethod(name="theirs", decode=transformers_method(target)),
    ]
    line = compare_pair(*methods, target, some_prompts(2), PairSettings(rounds=2, max_new_tokens=4))
    assert line.startswith("ours ")
    assert "theirs" in line
    assert "in 2 rounds); output identical" in line
