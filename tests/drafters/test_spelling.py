"""Text between two vocabularies: what tokens spell, windows and their edges, characters cut in two."""

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from draftsmith.drafters.translated.spelling import BOS, EOS, Vocabulary, longest_run
from tests.support.text import trained_tokenizer
from tests.support.vocabularies import EXACT, LETTERS, TOKENIZERS, between, tokenizer, vocabulary

PIECES = [*LETTERS, "def ", "    ", "<eos>", "naïve", "日本語", "👩‍💻", "\x00", "�"]


def slow_longest_run(old: list[int], new: list[int]) -> tuple[int, int, int]:
    """Returns the same as `longest_run` by trying all places and lengths."""
    best = (0, 0, 0)
    for at_old, at_new in itertools.product(range(len(old)), range(len(new))):
        size = 0
        while at_old + size < len(old) and at_new + size < len(new) and old[at_old + size] == new[at_new + size]:
            size += 1
        best = (at_old, at_new, size) if size > best[2] else best
    return best


@settings(deadline=None, max_examples=50)
@given(some.lists(some.integers(0, 2), max_size=12), some.lists(some.integers(0, 2), max_size=12))
def test_the_longest_run_is_found(old: list[int], new: list[int]) -> None:
    found, expected = longest_run(old, new), slow_longest_run(old, new)
    assert found[2] == expected[2] and (found == expected or not found[2])


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_spell_the_text(name: str) -> None:
    own = vocabulary(name)
    for text in ("def f(a):\n    return a", "ab é語😀 naïve", "b  a  b\n\n\n"):
        spelled = own.text(own.ids(text.encode())).decode()
        known = text if name in EXACT else "".join(character for character in text if character.encode() in own.id_of)
        assert spelled.removeprefix(" ") == known.removeprefix(" ") or name == "unigram"
    for half in (b"\xf0\x9f", b"\x98\x80 a", b"a \xe8\xaa"):
        spelled = own.text(own.ids(half)).lstrip(b" ")
        assert spelled == half if name in EXACT else half.startswith(spelled) or half.endswith(spelled)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=15)
@given(some.data())
def test_what_follows_a_text_follows_in_the_other_vocabulary(name: str, data: Any) -> None:
    """Text that grows by any number of tokens, some of them not as the tokenizer would have it, halves of characters
    among them, is after each step what it would be if spelled from its beginning."""
    way = between(name, data.draw(some.integers(1, 12)))
    row = way.theirs.ids("".join(data.draw(some.lists(some.sampled_from(PIECES), max_size=30))).encode())
    for _ in range(data.draw(some.integers(0, 3))):
        row.insert(data.draw(some.integers(0, len(row))), data.draw(some.integers(0, len(way.theirs.keys) - 1)))
    num_known = data.draw(some.integers(0, len(row)))
    own = way.begin(row[:num_known])
    while num_known < len(row):
        now = data.draw(some.integers(num_known + 1, len(row)))
        own = way.follow(own, row[:now], num_known)
        num_known = now
        # A text that begins within a character is not given the space that some put before every text.
        assert way.own.text(own).removeprefix(b" ") == way.own.text(way.begin(row[:now])).removeprefix(b" ")
        assert name not in EXACT or way.own.text(own).endswith(way.theirs.text(row[:now]))


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=15)
@given(some.data())
def test_a_right_draft_is_the_text_that_follows(name: str, data: Any) -> None:
    """The target's ids for it begin where its row ends, be that within a character or not."""
    way = between(name)
    text = "".join(data.draw(some.lists(some.sampled_from(LETTERS.replace(" ", "")), min_size=2, max_size=20)))
    row = way.theirs.ids(text.encode())
    known = data.draw(some.integers(1, len(row)))
    own = way.begin(row[:known])
    whole = way.begin(row)
    drafted = whole[len(own) :] if whole[: len(own)] == own else []
    ahead = way.ahead(row[:known], own, drafted)
    if way.own.text(whole).endswith(text.encode()):
        found = way.theirs.text(row[:known] + ahead)
        assert found == text.encode() if drafted else text.encode().startswith(found)


def test_half_characters_go_on_and_special_tokens_stay_special() -> None:
    way = between("bytes-300")
    theirs, emoji = way.theirs, "😀".encode()
    row = theirs.ids(b"x = " + emoji[:2])
    own = way.begin(row)
    assert way.own.text(own) == b"x = " + emoji[:2] and own[0] == way.own.id_of[BOS]
    ahead = way.ahead(row, own, way.own.ids(emoji[2:] + b" y"))
    assert theirs.text(row + ahead) == b"x = " + emoji + b" y"
    # Characters alone: the half is not there until the whole is, and then it is drafted on.
    spelled = between("characters")
    own = spelled.begin(row)
    assert spelled.own.text(own) == b"x = "
    assert theirs.text(row + spelled.ahead(row, own, spelled.own.ids(emoji + b"y"))) == b"x = " + emoji + b"y"
    assert spelled.ahead(row, own, spelled.own.ids("語y".encode())) == []
    row = row + theirs.ids(emoji[2:])
    assert spelled.own.text(spelled.follow(own, row, len(row) - 1)) == b"x = " + emoji
    # A text that looks like a special token is none, and special tokens are what they are in the other vocabulary.
    marked = between("marked")
    assert theirs.id_of[EOS] not in theirs.ids(b"a<eos>b")
    ids = marked.begin([theirs.id_of[BOS], *theirs.ids(b"a<eos>b"), theirs.id_of[EOS]])
    assert ids[0] == marked.own.id_of[BOS] and ids[-1] == marked.own.id_of[EOS]
    assert marked.own.text(ids) == b" a<eos>b" and ids.count(marked.own.id_of[EOS]) == 1
    row = theirs.ids(b"a b")
    assert marked.ahead(row, marked.begin(row), [marked.own.id_of[EOS]]) == [theirs.id_of[EOS]]


def test_which_tokens_both_vocabularies_have() -> None:
    way = between("marked")
    own, theirs = way.own, way.theirs
    of = way.counterparts()
    assert of[own.id_of[BOS]] == theirs.id_of[BOS] and of[own.id_of[EOS]] == theirs.id_of[EOS]
    assert of[tokenizer("marked").convert_tokens_to_ids("▁def")] == trained_tokenizer().convert_tokens_to_ids("Ġdef")
    assert of[tokenizer("marked").convert_tokens_to_ids("<0xE2>")] == theirs.id_of[b"\xe2"]
    assert of[tokenizer("marked").convert_tokens_to_ids("<unk>")] == -1
    # What a letter and a byte spell alike is one token of the target's.
    assert of[tokenizer("marked").convert_tokens_to_ids("<0x61>")] == -1
    assert of[tokenizer("marked").convert_tokens_to_ids("a")] == theirs.id_of[b"a"]
    known = [token for token in of if token >= 0]
    assert len(set(known)) == len(known) > 256


def test_only_fast_tokenizers_are_read() -> None:
    with pytest.raises(ValueError, match="is no fast tokenizer"):
        Vocabulary.of(object(), 3, {})
