"""Text that is searched for its own last tokens, or another text's, while it grows.

Its places are kept sorted by the tokens before them, read backwards, as those of draftsmith/parts/suffix_array.py are. What
was met before any place in a range of them is one string, and how many there are is what a counted suffix tree would
have at that string's node.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence

from draftsmith.parts.suffix_array import num_common


class GrowingText:
    """Documents, each parted from the next by `separator`, an id that is no token's.

    `tokens` holds them in turn, `ends` the places with a token of the same document before and after them, sorted by up
    to `depth` tokens before them, the nearest first.
    """

    def __init__(self, depth: int, separator: int, tokens: Sequence[int] = ()) -> None:
        self.depth, self.separator = depth, separator
        self.tokens = list(tokens)
        self.ends = sorted(filter(self._is_between, range(1, len(self.tokens))), key=self._before)

    def extend(self, tokens: Iterable[int]) -> None:
        """Takes up more tokens, each by a search among the places: O(depth log n) comparisons."""
        for token in tokens:
            self.tokens.append(token)
            end = len(self.tokens) - 1
            if end > 0 and self._is_between(end):
                self.ends.insert(bisect_right(self.ends, self._before(end), key=self._before), end)

    def cut(self, num_tokens: int) -> None:
        """Takes back all tokens after the first `num_tokens`."""
        if num_tokens < len(self.tokens):
            del self.tokens[num_tokens:]
            self.ends = [end for end in self.ends if end < num_tokens]

    def forget(self, num_tokens: int) -> None:
        """Drops the oldest documents, so that at most `num_tokens` tokens are left."""
        num_over = len(self.tokens) - num_tokens
        if num_over > 0:
            # The separator stays: what stands before the places after it, as far as it matters, stays the same.
            parts = (at for at in range(num_over, len(self.tokens)) if self.tokens[at] == self.separator)
            first = next(parts, len(self.tokens))
            del self.tokens[:first]
            self.ends = [end - first for end in self.ends if end > first]

    def match(self, text: list[int], longest: int, shortest: int) -> tuple[int, range]:
        """Returns how many of the text's last tokens, at most `longest`, were met before, and where in `ends`.

        The length is 0 and there is no place if fewer than `shortest` were.
        """
        wanted = text[: -min(longest, self.depth) - 1 : -1]
        place = bisect_left(self.ends, wanted, key=self._before)
        length = max(
            (num_common(self._before(end), wanted) for end in self.ends[max(place - 1, 0) : place + 1]), default=0
        )
        if length < shortest:
            return 0, range(0)
        shared = wanted[:length]
        begin = bisect_left(self.ends, shared, 0, place, key=lambda end: self._before(end)[:length])
        end = bisect_right(self.ends, shared, place, key=lambda end: self._before(end)[:length])
        return length, range(begin, end)

    def continuations(self, places: Iterable[int], num_tokens: int) -> Iterator[tuple[int, ...]]:
        """Yields what follows each place of `ends`, up to `num_tokens` and to the end of its document."""
        for place in places:
            end = self.ends[place]
            tokens = self.tokens[end : end + num_tokens]
            if self.separator in tokens:
                del tokens[tokens.index(self.separator) :]
            yield tuple(tokens)

    def _is_between(self, end: int) -> bool:
        return self.separator not in self.tokens[end - 1 : end + 1]

    def _before(self, end: int) -> list[int]:
        """Returns up to `depth` tokens before a place, the nearest first."""
        return self.tokens[max(end - self.depth, 0) : end][::-1]
