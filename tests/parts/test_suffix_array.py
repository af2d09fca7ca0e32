"""Tests of suffix arrays against a scan of all positions: order, matches, continuations and files."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as some
from safetensors.numpy import load_file, save_file

from draftsmith.parts.suffix_array import SuffixArray, token_type
from tests.support.families.retrieval import DOCUMENTS, TOKENS, VOCAB_SIZE, slow_match
from trainers.corpora.suffix_arrays import build

FEW = settings(max_examples=60, deadline=None)


def sorted_text(documents: list[list[int]], vocab_size: int = VOCAB_SIZE) -> SuffixArray:
    return build([np.array(document, np.int64) for document in documents], vocab_size)


@FEW
@given(DOCUMENTS, some.lists(TOKENS, min_size=1, max_size=8), some.integers(1, 9), some.integers(1, 9))
@example([], [0], 4, 1)
@example([[0]], [0], 4, 1)
@example([[0], [1, 2], []], [0], 4, 1)
@example([[0, 1], [2, 0, 1]], [1, 2, 0], 4, 1)
@example([[1, 2], [0, 1]], [2, 0], 4, 2)
@example([[0] * 12], [0] * 8, 8, 2)
@example([[0] * 12, [0] * 12], [0] * 3, 16, 2)
@example([[0, 1, 2, 0, 1, 2]], [0, 1], 2, 2)
def test_match_and_continuations_equal_a_scan(
    documents: list[list[int]], text: list[int], longest: int, shortest: int
) -> None:
    array = sorted_text(documents)
    length, entries = array.match(text, max(longest, shortest), shortest)
    expected, followed = slow_match(documents, text, max(longest, shortest), shortest)
    assert length == expected
    assert Counter(array.continuations(entries, 20)) == followed
    for tokens, short in zip(array.continuations(entries, 20), array.continuations(entries, 2), strict=True):
        assert short == tokens[:2]


@FEW
@given(some.lists(some.lists(some.sampled_from([0, 1, 255, 256, 257, 65_534]), max_size=9), max_size=5))
@pytest.mark.parametrize("vocab_size", [65_535, 65_536, 100_000])
def test_build_sorts_multibyte_ids_as_numbers(vocab_size: int, documents: list[list[int]]) -> None:
    array = sorted_text(documents, vocab_size)
    assert array.tokens_S.dtype == (np.uint16 if vocab_size == 65_535 else np.uint32)
    assert array.tokens_S.tolist() == [token for document in documents for token in (*document, vocab_size)]
    tokens = array.tokens_S.tolist()
    positions = [at for at in range(1, len(tokens)) if vocab_size not in tokens[at - 1 : at + 1]]
    assert array.ends_P.tolist() == sorted(positions, key=lambda position: tokens[:position][::-1])
    last = [tokens[position - 1] for position in array.ends_P.tolist()]
    assert [int(array.firsts_V1[token]) for token in (0, 255, 256)] == [
        sum(one < token for one in last) for token in (0, 255, 256)
    ]


def test_suffix_array_by_hand() -> None:
    """Sorts the positions of "a b a c | b a b |": 1, 3 and 7 follow a, 2 and 6 follow b."""
    a, b, c, separator = 0, 1, 2, 3
    array = sorted_text([[a, b, a, c], [b, a, b]])
    assert array.tokens_S.tolist() == [a, b, a, c, separator, b, a, b, separator]
    assert array.ends_P.tolist() == [1, 3, 7, 2, 6], "read backwards: a, aba, ab| before them; then ba and b|"
    assert array.firsts_V1.tolist() == [0, 3, 5, 5]
    assert array.match([c, b, a], 16, 2) == (2, range(1, 3))
    assert list(array.continuations(range(1, 3), 10)) == [(c,), (b,)]
    assert array.match([a, c], 16, 1) == (0, range(0)), "nothing follows c in its document"


def test_build_rejects_a_token_outside_the_vocabulary() -> None:
    with pytest.raises(ValueError, match="token id 3 is outside the vocabulary of 3"):
        sorted_text([[0, 1], [2, 3]])


def test_read_returns_what_was_written_and_rejects_invalid_files(tmp_path: Path) -> None:
    array = sorted_text([[0, 1, 2, 0, 1], [2, 2]])
    path = tmp_path / "whole.safetensors"
    array.write(path)
    found = SuffixArray.read(path, VOCAB_SIZE)
    for name, values in found.arrays().items():
        assert np.array_equal(values, array.arrays()[name]) and values.dtype == array.arrays()[name].dtype
    assert found.match([0, 1], 16, 2) == array.match([0, 1], 16, 2)

    whole, arrays = path.read_bytes(), load_file(path)
    cut, odd = tmp_path / "cut.safetensors", tmp_path / "odd.safetensors"
    for num_bytes in (0, 4, 40, len(whole) - 1):
        cut.write_bytes(whole[:num_bytes])
        with pytest.raises(ValueError, match="cut.safetensors is missing or truncated"):
            SuffixArray.read(cut, VOCAB_SIZE)
    with pytest.raises(ValueError, match="none.safetensors is missing or truncated"):
        SuffixArray.read(tmp_path / "none.safetensors", VOCAB_SIZE)
    falling = arrays["firsts"].copy()
    falling[1] = 9
    for changes in (
        {"tokens": arrays["tokens"].astype(np.uint32)},
        {"tokens": arrays["tokens"][:1]},
        {"ends": arrays["ends"][:-1]},
        {"ends": arrays["ends"].astype(np.int64)},
        {"firsts": arrays["firsts"][:-1]},
        {"firsts": falling},
        {"more": arrays["ends"]},
    ):
        save_file(arrays | changes, odd)
        with pytest.raises(ValueError, match="odd.safetensors is no suffix array for a vocabulary of 3"):
            SuffixArray.read(odd, VOCAB_SIZE)
    save_file({"tokens": arrays["tokens"]}, odd)
    with pytest.raises(ValueError, match="odd.safetensors is no suffix array"):
        SuffixArray.read(odd, VOCAB_SIZE)
    with pytest.raises(ValueError, match="for a vocabulary of 4"):
        SuffixArray.read(path, 4)
    assert [token_type(size).itemsize for size in (65_535, 65_536)] == [2, 4]
