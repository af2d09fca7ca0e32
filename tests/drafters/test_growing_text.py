"""Text that grows, is taken back and forgotten, against a scan of all its places."""

from collections import Counter

from hypothesis import example, given, settings
from hypothesis import strategies as some

from draftsmith.drafters.suffix.growing_text import GrowingText
from tests.parts.test_suffix_array import DOCUMENTS, TOKENS, VOCAB_SIZE, slow_match

FEW = settings(max_examples=50, deadline=None)
DEPTH = 6
GROWTH = some.lists(
    some.tuples(some.sampled_from(["extend", "cut", "forget"]), some.integers(0, 40), DOCUMENTS), max_size=4
)


def joined(documents: list[list[int]]) -> list[int]:
    return [token for document in documents for token in (*document, VOCAB_SIZE)]


def parted(tokens: list[int]) -> list[list[int]]:
    documents: list[list[int]] = [[]]
    for token in tokens:
        if token == VOCAB_SIZE:
            documents.append([])
        else:
            documents[-1].append(token)
    return documents


@FEW
@given(DOCUMENTS, GROWTH, some.lists(TOKENS, min_size=1, max_size=8), some.integers(1, 9))
@example([[0] * 12], [], [0] * 8, 8)
@example([[0, 1], [2, 0, 1]], [("cut", 5, [[1, 0]])], [1, 2, 0], 4)
@example([[0, 1, 2], [0, 1]], [("forget", 5, [])], [0], 1)
def test_what_is_found_is_what_a_scan_finds(
    first: list[list[int]], growth: list[tuple[str, int, list[list[int]]]], wanted: list[int], longest: int
) -> None:
    text, tokens = GrowingText(DEPTH, VOCAB_SIZE, joined(first)), joined(first)
    for what, number, documents in growth:
        if what == "cut":
            text.cut(number)
            tokens = tokens[:number]
        elif what == "forget":
            text.forget(number)
            while len(tokens) > number:
                tokens = tokens[tokens.index(VOCAB_SIZE, 1) :] if VOCAB_SIZE in tokens[1:] else []
        text.extend(joined(documents)[:-1])
        tokens += joined(documents)[:-1]
        assert text.tokens == tokens
        keys = [tokens[max(end - DEPTH, 0) : end][::-1] for end in text.ends]
        keys = [key[: key.index(VOCAB_SIZE) + 1] if VOCAB_SIZE in key else key for key in keys]
        assert keys == sorted(keys), "sorted by what stands before in the document"
        length, places = text.match(wanted, longest, 1)
        expected, followed = slow_match(parted(tokens), wanted, min(longest, DEPTH), 1)
        assert length == expected
        assert Counter(text.continuations(places, 50)) == followed
        assert all(len(one) <= 2 for one in text.continuations(places, 2))


def test_a_text_finds_what_it_has_said_before_but_not_its_own_end() -> None:
    text = GrowingText(4, VOCAB_SIZE, [0, 1])
    assert text.match(text.tokens, 4, 1) == (0, range(0))
    text.extend([2, 0, 1])
    length, places = text.match(text.tokens, 4, 1)
    assert length == 2 and list(text.continuations(places, 3)) == [(2, 0, 1)]
    assert text.match(text.tokens, 4, 3) == (0, range(0)), "too short"
