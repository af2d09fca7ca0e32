"""A suffix array of the reversed text that stays sorted while text is appended.

Positions are sorted by the tokens before them, read backwards, as in draftsmith/parts/suffix_array.py. The number of
positions after a string is the count of that string's node in a counted suffix tree.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence

from draftsmith.parts.suffix_array import longest_match


class GrowingText:
    """Documents separated by `separator`, an id outside the vocabulary, to which tokens can be appended.

    `tokens` holds the documents one after the other, `ends` the positions with a token of the same document before and
    after them, sorted by up to `depth` tokens before them, the nearest first.
    """

    def __init__(self, depth: int, separator: int, tokens: Sequence[int] = ()) -> None:
        self.depth, self.separator = depth, separator
        self.tokens = list(tokens)
        self.ends = sorted(filter(self._is_between, range(1, len(self.tokens))), key=self._key)

    def extend(self, tokens: Iterable[int]) -> None:
        """Appends tokens; the position of each is found by binary search, in O(depth log n) comparisons."""
        for token in tokens:
            self.tokens.append(token)
            end = len(self.tokens) - 1
            if end > 0 and self._is_between(end):
                self.ends.insert(bisect_right(self.ends, self._key(end), key=self._key), end)

    def truncate(self, num_tokens: int) -> None:
        """Drops all tokens after the first `num_tokens`."""
        if num_tokens < len(self.tokens):
            del self.tokens[num_tokens:]
            self.ends = [end for end in self.ends if end < num_tokens]

    def keep_last(self, num_tokens: int) -> None:
        """Drops the oldest documents until at most `num_tokens` tokens are left."""
        num_over = len(self.tokens) - num_tokens
        if num_over > 0:
            # The separator stays, so that no later position gets another order.
            separators = (at for at in range(num_over, len(self.tokens)) if self.tokens[at] == self.separator)
            first = next(separators, len(self.tokens))
            del self.tokens[:first]
            self.ends = [end - first for end in self.ends if end > first]

    def match(self, text: list[int], longest: int, shortest: int) -> tuple[int, range]:
        """Returns the length of the longest match of the text's last tokens, and the entries of `ends` after it.

        At most `longest` tokens are matched; if fewer than `shortest` match, the length is 0 and the range empty.
        """
        wanted = text[: -min(longest, self.depth) - 1 : -1]
        return longest_match(self.ends, self._before, wanted, shortest, 0, len(self.ends))

    def continuations(self, entries: Iterable[int], num_tokens: int) -> Iterator[tuple[int, ...]]:
        """Yields up to `num_tokens` tokens of the same document from the position of each entry of `ends`."""
        for entry in entries:
            end = self.ends[entry]
            tokens = self.tokens[end : end + num_tokens]
            if self.separator in tokens:
                del tokens[tokens.index(self.separator) :]
            yield tuple(tokens)

    def _is_between(self, end: int) -> bool:
        return self.separator not in self.tokens[end - 1 : end + 1]

    def _before(self, end: int, num_tokens: int) -> list[int]:
        """Returns up to `num_tokens` tokens before a position, the nearest first."""
        return self.tokens[max(end - num_tokens, 0) : end][::-1]

    def _key(self, end: int) -> list[int]:
        return self._before(end, self.depth)
