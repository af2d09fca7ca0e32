"""The compiled search of tri-grams, and what a text adds to them, against the slow reference."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from draftsmith.drafters.trigram import Config, compiled
from tests.drafters.trigrams import (
    FEW,
    KNOWN,
    RECENT,
    TOKENS,
    Weights,
    all_paths,
    learnt,
    lengthened,
    ranked,
    read,
    search,
)
from tests.support.models import VOCAB_SIZE


@FEW
@given(KNOWN, RECENT)
def test_a_text_adds_to_what_is_known(known: Weights, met: list[list[int]]) -> None:
    quick = learnt(known, met)
    assert max(quick.overlay.sizes[2], np.diff(quick.table.begins_K).max(initial=0)) == quick.widest
    tokens_C, weights_C = np.empty(quick.widest, np.int64), np.empty(quick.widest)
    for pair in itertools.product(range(4), repeat=2):
        count = compiled.following(quick, *pair, tokens_C, weights_C)
        found = list(zip(tokens_C[:count].tolist(), weights_C[:count].tolist(), strict=True))
        assert found == ranked(known, *pair)


def test_an_overlay_grows() -> None:
    """Some thousand pairs, met in an order without rhyme, and one pair that everything follows."""
    rng = np.random.default_rng(0)
    text = rng.integers(0, VOCAB_SIZE, 3_000).tolist()
    many = [token for third in range(VOCAB_SIZE) for token in (7, 7, third)]
    known: Weights = {}
    quick = learnt(known, [text, many])
    assert int(quick.overlay.sizes[0]) == len(known) > 1_000 and quick.widest == VOCAB_SIZE
    tokens_C, weights_C = np.empty(quick.widest, np.int64), np.empty(quick.widest)
    for pair in known:
        count = compiled.following(quick, *pair, tokens_C, weights_C)
        assert list(zip(tokens_C[:count].tolist(), weights_C[:count].tolist(), strict=True)) == ranked(known, *pair)


@FEW
@given(
    KNOWN, RECENT, TOKENS, TOKENS, some.integers(1, 4), some.integers(1, 30), some.integers(1, 9), some.integers(0, 3)
)
def test_the_search_is_that_of_the_reference(
    known: Weights, met: list[list[int]], before: int, pending: int, depth: int, tries: int, kept: int, chance: int
) -> None:
    quick = learnt(known, met)
    config = Config(num_iterations=tries, num_sequences=kept, explore=2.0, chance=chance)
    nodes = compiled.searched(quick, before, pending, depth, kept, tries, 2.0, config.explore_base, chance)
    scores = search(known, before, pending, depth, config)
    assert list(read(nodes).items()) == list(scores.items())[1:]
    longer = lengthened(known, before, pending, scores, depth + 1)
    assert list(read(compiled.lengthened(quick, before, nodes, depth + 1)).items()) == list(longer.items())


@FEW
@given(KNOWN, RECENT, TOKENS, TOKENS, some.integers(1, 4), some.integers(1, 30))
def test_the_likeliest_are_those_of_all_paths(
    known: Weights, met: list[list[int]], before: int, pending: int, depth: int, kept: int
) -> None:
    quick = learnt(known, met)
    nodes = compiled.likeliest(quick, before, pending, depth, kept)
    found, every = read(nodes), all_paths(known, before, pending, depth)
    assert found == pytest.approx({text: every[text] for text in found})
    best = sorted(every.values(), reverse=True)[1 : kept + 1]
    assert list(found.values()) == pytest.approx(best), "in falling order, and none left out is likelier"
    longer = lengthened(known, before, pending, {(): 1.0, **found}, depth)
    assert read(compiled.lengthened(quick, before, nodes, depth)) == pytest.approx(longer)


@FEW
@given(KNOWN, RECENT, TOKENS, TOKENS, some.integers(1, 4))
def test_the_chain_takes_the_heaviest_each_time(
    known: Weights, met: list[list[int]], before: int, pending: int, depth: int
) -> None:
    quick = learnt(known, met)
    text = [before, pending]
    while len(text) < depth + 2 and (successors := ranked(known, *text[-2:])):
        text.append(successors[0][0])
    nodes = compiled.chain(quick, before, pending, depth)
    assert nodes[0].tolist() == text[1:] and nodes[1].tolist() == list(range(-1, len(text) - 2))
    every = all_paths(known, before, pending, depth)
    assert read(nodes) == pytest.approx(
        {tuple(text[2:end]): every[tuple(text[2:end])] for end in range(3, len(text) + 1)}
    )


def test_a_search_by_hand() -> None:
    """Two successors of weight 0.75 and 0.25, both leaves: c1 = 1, c2 = 8, every reward is 1 and the weight.

    Third: 1.75 + (1 + ln 11/8) 0.75 sqrt 2 / 2 = 2.449 against 1.25 + (1 + ln 11/8) 0.25 sqrt 2 / 2 = 1.483.
    """
    quick = learnt({(1, 2): {3: 0.75, 4: 0.25}}, [])
    shares = [read(compiled.searched(quick, 1, 2, 1, 9, number, 1.0, 8.0, 0)) for number in (1, 2, 3)]
    assert shares == [{(3,): 1.0}, {(3,): 0.5, (4,): 0.5}, {(3,): pytest.approx(2 / 3), (4,): pytest.approx(1 / 3)}]


def test_chances_are_splitmix64() -> None:
    """The first outputs from seed 1234567, as published with the generator."""
    seed = np.uint64(1234567)
    assert [int(compiled.uniform(seed, place) * 2**53) for place in range(3)] == [
        6457827717110365317 >> 11,
        3203168211198807973 >> 11,
        9817491932198370423 >> 11,
    ]
