"""Tests of GrowingText against a scan of all positions."""

from collections import Counter

from hypothesis import example, given, settings
from hypothesis import strategies as some

from draftsmith.drafters.suffix.growing_text import GrowingText
from tests.support.families.retrieval import DOCUMENTS, TOKENS, VOCAB_SIZE, slow_match

FEW = settings(max_examples=50, deadline=None)
DEPTH = 6
CHANGES = some.lists(
    some.tuples(some.sampled_from(["extend", "truncate", "keep_last"]), some.integers(0, 40), DOCUMENTS), max_size=4
)


def join_documents(documents: list[list[int]]) -> list[int]:
    return [token for document in documents for token in (*document, VOCAB_SIZE)]


def split_documents(tokens: list[int]) -> list[list[int]]:
    documents: list[list[int]] = [[]]
    for token in tokens:
        if token == VOCAB_SIZE:
            documents.append([])
        else:
            documents[-1].append(token)
    return documents


@FEW
@given(DOCUMENTS, CHANGES, some.lists(TOKENS, min_size=1, max_size=8), some.integers(1, 9))
@example([[0] * 12], [], [0] * 8, 8)
@example([[0, 1], [2, 0, 1]], [("truncate", 5, [[1, 0]])], [1, 2, 0], 4)
@example([[0, 1, 2], [0, 1]], [("keep_last", 5, [])], [0], 1)
def test_match_and_continuations_equal_a_scan(
    first: list[list[int]], changes: list[tuple[str, int, list[list[int]]]], wanted: list[int], longest: int
) -> None:
    text, tokens = GrowingText(DEPTH, VOCAB_SIZE, join_documents(first)), join_documents(first)
    for change, number, documents in changes:
        if change == "truncate":
            text.truncate(number)
            tokens = tokens[:number]
        elif change == "keep_last":
            text.keep_last(number)
            while len(tokens) > number:
                tokens = tokens[tokens.index(VOCAB_SIZE, 1) :] if VOCAB_SIZE in tokens[1:] else []
        text.extend(join_documents(documents)[:-1])
        tokens += join_documents(documents)[:-1]
        assert text.tokens == tokens
        keys = [tokens[max(end - DEPTH, 0) : end][::-1] for end in text.ends]
        keys = [key[: key.index(VOCAB_SIZE) + 1] if VOCAB_SIZE in key else key for key in keys]
        assert keys == sorted(keys), "sorted by the tokens before them in the document"
        length, entries = text.match(wanted, longest, 1)
        expected, followed = slow_match(split_documents(tokens), wanted, min(longest, DEPTH), 1)
        assert length == expected
        assert Counter(text.continuations(entries, 50)) == followed
        assert all(len(one) <= 2 for one in text.continuations(entries, 2))


def test_match_finds_earlier_text_but_not_the_end_itself() -> None:
    text = GrowingText(4, VOCAB_SIZE, [0, 1])
    assert text.match(text.tokens, 4, 1) == (0, range(0))
    text.extend([2, 0, 1])
    length, entries = text.match(text.tokens, 4, 1)
    assert length == 2 and list(text.continuations(entries, 3)) == [(2, 0, 1)]
    assert text.match(text.tokens, 4, 3) == (0, range(0)), "too short"
