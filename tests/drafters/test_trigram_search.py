"""Tests of the compiled tri-gram searches and overlays against the slow reference."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from draftsmith.drafters.trigram import Config, compiled
from tests.support.families.trigram_reference import (
    FEW,
    KNOWN,
    RECENT,
    TOKENS,
    Weights,
    all_paths,
    compiled_trigrams,
    extend_paths,
    scores_by_path,
    search,
    successors_of,
)
from tests.support.models import VOCAB_SIZE


@FEW
@given(KNOWN, RECENT)
def test_add_trigrams_equals_the_reference(known: Weights, met: list[list[int]]) -> None:
    quick = compiled_trigrams(known, met)
    assert max(quick.overlay.sizes[2], np.diff(quick.table.begins_K).max(initial=0)) == quick.widest
    tokens_C, weights_C = np.empty(quick.widest, np.int64), np.empty(quick.widest)
    for pair in itertools.product(range(4), repeat=2):
        count = compiled.write_successors(quick, *pair, tokens_C, weights_C)
        found = list(zip(tokens_C[:count].tolist(), weights_C[:count].tolist(), strict=True))
        assert found == successors_of(known, *pair)


def test_overlay_grows() -> None:
    """Some thousand pairs in random order, and one pair that every token follows."""
    rng = np.random.default_rng(0)
    text = rng.integers(0, VOCAB_SIZE, 3_000).tolist()
    many = [token for third in range(VOCAB_SIZE) for token in (7, 7, third)]
    known: Weights = {}
    quick = compiled_trigrams(known, [text, many])
    assert int(quick.overlay.sizes[0]) == len(known) > 1_000 and quick.widest == VOCAB_SIZE
    tokens_C, weights_C = np.empty(quick.widest, np.int64), np.empty(quick.widest)
    for pair in known:
        count = compiled.write_successors(quick, *pair, tokens_C, weights_C)
        assert list(zip(tokens_C[:count].tolist(), weights_C[:count].tolist(), strict=True)) == successors_of(
            known, *pair
        )


@FEW
@given(
    KNOWN, RECENT, TOKENS, TOKENS, some.integers(1, 4), some.integers(1, 30), some.integers(1, 9), some.integers(0, 3)
)
def test_monte_carlo_search_equals_the_reference(
    known: Weights, met: list[list[int]], before: int, pending: int, depth: int, tries: int, kept: int, chance: int
) -> None:
    quick = compiled_trigrams(known, met)
    config = Config(num_iterations=tries, num_sequences=kept, explore=2.0, chance=chance)
    nodes = compiled.monte_carlo_search(quick, before, pending, depth, kept, tries, 2.0, config.explore_base, chance)
    scores = search(known, before, pending, depth, config)
    assert list(scores_by_path(nodes).items()) == list(scores.items())[1:]
    longer = extend_paths(known, before, pending, scores, depth + 1)
    assert list(scores_by_path(compiled.extend_paths(quick, before, nodes, depth + 1)).items()) == list(longer.items())


@FEW
@given(KNOWN, RECENT, TOKENS, TOKENS, some.integers(1, 4), some.integers(1, 30))
def test_likeliest_paths_are_the_best_of_all_paths(
    known: Weights, met: list[list[int]], before: int, pending: int, depth: int, kept: int
) -> None:
    quick = compiled_trigrams(known, met)
    nodes = compiled.likeliest_paths(quick, before, pending, depth, kept)
    found, every = scores_by_path(nodes), all_paths(known, before, pending, depth)
    assert found == pytest.approx({text: every[text] for text in found})
    best = sorted(every.values(), reverse=True)[1 : kept + 1]
    assert list(found.values()) == pytest.approx(best), "in descending order, and none left out is likelier"
    longer = extend_paths(known, before, pending, {(): 1.0, **found}, depth)
    assert scores_by_path(compiled.extend_paths(quick, before, nodes, depth)) == pytest.approx(longer)


@FEW
@given(KNOWN, RECENT, TOKENS, TOKENS, some.integers(1, 4))
def test_greedy_chain_takes_the_heaviest_successors(
    known: Weights, met: list[list[int]], before: int, pending: int, depth: int
) -> None:
    quick = compiled_trigrams(known, met)
    text = [before, pending]
    while len(text) < depth + 2 and (successors := successors_of(known, *text[-2:])):
        text.append(successors[0][0])
    nodes = compiled.greedy_chain(quick, before, pending, depth)
    assert nodes[0].tolist() == text[1:] and nodes[1].tolist() == list(range(-1, len(text) - 2))
    every = all_paths(known, before, pending, depth)
    assert scores_by_path(nodes) == pytest.approx(
        {tuple(text[2:end]): every[tuple(text[2:end])] for end in range(3, len(text) + 1)}
    )


def test_monte_carlo_search_by_hand() -> None:
    """Two successors of weight 0.75 and 0.25, both leaves: c1 = 1, c2 = 8, every reward is 1 plus the weight.

    Third iteration: 1.75 + (1 + ln 11/8) 0.75 sqrt 2 / 2 = 2.449 against 1.25 + (1 + ln 11/8) 0.25 sqrt 2 / 2 = 1.483.
    """
    quick = compiled_trigrams({(1, 2): {3: 0.75, 4: 0.25}}, [])
    shares = [
        scores_by_path(compiled.monte_carlo_search(quick, 1, 2, 1, 9, number, 1.0, 8.0, 0)) for number in (1, 2, 3)
    ]
    assert shares == [{(3,): 1.0}, {(3,): 0.5, (4,): 0.5}, {(3,): pytest.approx(2 / 3), (4,): pytest.approx(1 / 3)}]


def test_uniforms_are_those_of_splitmix64() -> None:
    """The first outputs for seed 1234567, as published with the generator."""
    seed = np.uint64(1234567)
    assert [int(compiled.uniform(seed, index) * 2**53) for index in range(3)] == [
        6457827717110365317 >> 11,
        3203168211198807973 >> 11,
        9817491932198370423 >> 11,
    ]
