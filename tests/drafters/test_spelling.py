"""Tests of the translation between vocabularies: tokens' bytes, growing text, and incomplete characters."""

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from draftsmith.drafters.translated.spelling import BOS, EOS, Vocabulary, longest_run
from tests.support.families.vocabularies import EXACT, LETTERS, TOKENIZERS, between, tokenizer, vocabulary
from tests.support.text import trained_tokenizer

PIECES = [*LETTERS, "def ", "    ", "<eos>", "naïve", "日本語", "👩‍💻", "\x00", "�"]


def slow_longest_run(old: list[int], new: list[int]) -> tuple[int, int, int]:
    """Returns the result of `longest_run` by trying all positions and lengths."""
    best = (0, 0, 0)
    for at_old, at_new in itertools.product(range(len(old)), range(len(new))):
        size = 0
        while at_old + size < len(old) and at_new + size < len(new) and old[at_old + size] == new[at_new + size]:
            size += 1
        best = (at_old, at_new, size) if size > best[2] else best
    return best


@settings(deadline=None, max_examples=50)
@given(some.lists(some.integers(0, 2), max_size=12), some.lists(some.integers(0, 2), max_size=12))
def test_longest_run_equals_a_search(old: list[int], new: list[int]) -> None:
    found, expected = longest_run(old, new), slow_longest_run(old, new)
    assert found[2] == expected[2] and (found == expected or not found[2])


@pytest.mark.parametrize("name", TOKENIZERS)
def test_text_and_ids_are_inverse(name: str) -> None:
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
def test_extend_draft_ids_equals_a_new_translation(name: str, data: Any) -> None:
    """For text that grows by any number of tokens, including non-canonical ones and incomplete characters."""
    way = between(name, data.draw(some.integers(1, 12)))
    row = way.target.ids("".join(data.draw(some.lists(some.sampled_from(PIECES), max_size=30))).encode())
    for _ in range(data.draw(some.integers(0, 3))):
        row.insert(data.draw(some.integers(0, len(row))), data.draw(some.integers(0, len(way.target.keys) - 1)))
    num_known = data.draw(some.integers(0, len(row)))
    own = way.to_draft_ids(row[:num_known])
    while num_known < len(row):
        now = data.draw(some.integers(num_known + 1, len(row)))
        own = way.extend_draft_ids(own, row[:now], num_known)
        num_known = now
        # Text that begins within a character does not get the space that some tokenizers put before every text.
        assert way.draft.text(own).removeprefix(b" ") == way.draft.text(way.to_draft_ids(row[:now])).removeprefix(b" ")
        assert name not in EXACT or way.draft.text(own).endswith(way.target.text(row[:now]))


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=15)
@given(some.data())
def test_new_target_ids_continue_the_text(name: str, data: Any) -> None:
    """The target's ids of a correct draft begin where its row ends, also within a character."""
    way = between(name)
    text = "".join(data.draw(some.lists(some.sampled_from(LETTERS.replace(" ", "")), min_size=2, max_size=20)))
    row = way.target.ids(text.encode())
    known = data.draw(some.integers(1, len(row)))
    own = way.to_draft_ids(row[:known])
    whole = way.to_draft_ids(row)
    drafted = whole[len(own) :] if whole[: len(own)] == own else []
    ahead = way.new_target_ids(row[:known], own, drafted)
    if way.draft.text(whole).endswith(text.encode()):
        found = way.target.text(row[:known] + ahead)
        assert found == text.encode() if drafted else text.encode().startswith(found)


def test_incomplete_characters_and_special_tokens_are_translated() -> None:
    way = between("bytes-300")
    theirs, emoji = way.target, "😀".encode()
    row = theirs.ids(b"x = " + emoji[:2])
    own = way.to_draft_ids(row)
    assert way.draft.text(own) == b"x = " + emoji[:2] and own[0] == way.draft.id_of[BOS]
    ahead = way.new_target_ids(row, own, way.draft.ids(emoji[2:] + b" y"))
    assert theirs.text(row + ahead) == b"x = " + emoji + b" y"
    # A vocabulary of characters has no half characters; the whole one can be drafted.
    spelled = between("characters")
    own = spelled.to_draft_ids(row)
    assert spelled.draft.text(own) == b"x = "
    assert (
        theirs.text(row + spelled.new_target_ids(row, own, spelled.draft.ids(emoji + b"y"))) == b"x = " + emoji + b"y"
    )
    assert spelled.new_target_ids(row, own, spelled.draft.ids("語y".encode())) == []
    row = row + theirs.ids(emoji[2:])
    assert spelled.draft.text(spelled.extend_draft_ids(own, row, len(row) - 1)) == b"x = " + emoji
    # Text that looks like a special token is text, and special tokens become those of the other vocabulary.
    marked = between("marked")
    assert theirs.id_of[EOS] not in theirs.ids(b"a<eos>b")
    ids = marked.to_draft_ids([theirs.id_of[BOS], *theirs.ids(b"a<eos>b"), theirs.id_of[EOS]])
    assert ids[0] == marked.draft.id_of[BOS] and ids[-1] == marked.draft.id_of[EOS]
    assert marked.draft.text(ids) == b" a<eos>b" and ids.count(marked.draft.id_of[EOS]) == 1
    row = theirs.ids(b"a b")
    assert marked.new_target_ids(row, marked.to_draft_ids(row), [marked.draft.id_of[EOS]]) == [theirs.id_of[EOS]]


def test_counterparts_are_the_shared_tokens() -> None:
    way = between("marked")
    own, theirs = way.draft, way.target
    of = way.counterparts()
    assert of[own.id_of[BOS]] == theirs.id_of[BOS] and of[own.id_of[EOS]] == theirs.id_of[EOS]
    assert of[tokenizer("marked").convert_tokens_to_ids("▁def")] == trained_tokenizer().convert_tokens_to_ids("Ġdef")
    assert of[tokenizer("marked").convert_tokens_to_ids("<0xE2>")] == theirs.id_of[b"\xe2"]
    assert of[tokenizer("marked").convert_tokens_to_ids("<unk>")] == -1
    # A letter and a byte with the same text have one counterpart only.
    assert of[tokenizer("marked").convert_tokens_to_ids("<0x61>")] == -1
    assert of[tokenizer("marked").convert_tokens_to_ids("a")] == theirs.id_of[b"a"]
    known = [token for token in of if token >= 0]
    assert len(set(known)) == len(known) > 256


def test_vocabulary_rejects_a_slow_tokenizer() -> None:
    with pytest.raises(ValueError, match="is not a fast tokenizer"):
        Vocabulary.of(object(), 3, {})
