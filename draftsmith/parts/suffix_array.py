"""A suffix array of the reversed text: positions sorted by the tokens before them, read backwards.

All positions after the same last tokens are adjacent in it, whatever their number, so that binary search finds the
longest match without trying every length.

Shape suffixes: S tokens of the text, P positions in it, V vocabulary.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import safetensors
from safetensors import safe_open
from safetensors.numpy import save_file

from draftsmith.artifacts.files import inside


class SuffixArray:
    """Documents sorted for finding the last tokens of a text in them.

    `tokens_S` (uint16, or uint32 for a vocabulary of 2^16 and more) holds the documents one after the other, each
    followed by a separator, an id outside the vocabulary, so that no match or continuation crosses a document's end.
    `ends_P` (int32) are the positions in it, from 0, with a token of the same document before and after them, sorted by
    the tokens before them, read backwards; those after token v begin at `firsts_V1[v]` (int64).
    """

    def __init__(self, tokens_S: np.ndarray, ends_P: np.ndarray, firsts_V1: np.ndarray) -> None:
        self.tokens_S, self.ends_P, self.firsts_V1 = tokens_S, ends_P, firsts_V1
        # Reading single numbers and short slices from a memoryview takes a third of the time that numpy takes.
        self._tokens, self._ends, self._firsts = tokens_S.data, ends_P.data, firsts_V1.data

    @property
    def vocab_size(self) -> int:
        return len(self.firsts_V1) - 1

    def match(self, text: Sequence[int], longest: int, shortest: int) -> tuple[int, range]:
        """Returns the length of the longest match of the text's last tokens, and the entries of `ends_P` after it.

        At most `longest` tokens are matched; if fewer than `shortest` match, the length is 0 and the range empty.
        """
        wanted = list(text[: -longest - 1 : -1])
        low, high = self._firsts[wanted[0]], self._firsts[wanted[0] + 1]
        return longest_match(self._ends, self._before, wanted, shortest, low, high)

    def continuations(self, entries: Iterable[int], num_tokens: int) -> Iterator[tuple[int, ...]]:
        """Yields up to `num_tokens` tokens of the same document from the position of each entry of `ends_P`."""
        for entry in entries:
            end = self._ends[entry]
            tokens = self._tokens[end : end + num_tokens].tolist()
            if max(tokens) >= self.vocab_size:
                tokens = tokens[: next(at for at, token in enumerate(tokens) if token >= self.vocab_size)]
            yield tuple(tokens)

    def _before(self, end: int, num_tokens: int) -> list[int]:
        """Returns up to `num_tokens` tokens before a position of `tokens_S`, the nearest first."""
        return self._tokens[max(end - num_tokens, 0) : end].tolist()[::-1]

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the arrays by their names in a file."""
        return {"tokens": self.tokens_S, "ends": self.ends_P, "firsts": self.firsts_V1}

    def write(self, path: Path) -> None:
        """Writes the arrays to a safetensors file."""
        save_file(self.arrays(), path)

    @staticmethod
    def read(path: Path, vocab_size: int) -> "SuffixArray":
        """Returns a file's suffix array, memory-mapped; raises ValueError if it is missing, truncated or invalid."""
        try:
            with safe_open(inside(path.parent, path.name), framework="pt") as file:  # with "np" it would be read whole
                arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(f"{path} is missing or truncated ({error}); the artifact must be made again") from None
        kinds = {name: (array.dtype, array.ndim) for name, array in arrays.items()}
        ids = token_type(vocab_size)
        expected = {"tokens": (ids, 1), "ends": (np.dtype(np.int32), 1), "firsts": (np.dtype(np.int64), 1)}
        if kinds != expected or not _fit(arrays, vocab_size):
            raise ValueError(f"{path} is no suffix array for a vocabulary of {vocab_size}; make the artifact again")
        return SuffixArray(arrays["tokens"], arrays["ends"], arrays["firsts"])


def write_shards(folder: Path, shards: Sequence[SuffixArray]) -> None:
    """Writes each shard to a file whose name gives its number and the number of shards."""
    for number, shard in enumerate(shards):
        shard.write(folder / _file_name(number, len(shards)))


def read_shards(folder: Path, vocab_size: int) -> tuple[SuffixArray, ...]:
    """Returns the shards that `write_shards` wrote; raises ValueError if one is missing, truncated or invalid."""
    named = sorted(path.name for path in folder.glob("shard-*-of-*.safetensors"))
    if not named:
        raise ValueError(f"{folder} contains no shard of a datastore; the artifact must be made again")
    number = int(named[0].removesuffix(".safetensors").rpartition("-")[2])
    return tuple(SuffixArray.read(folder / _file_name(at, number), vocab_size) for at in range(number))


def empty(vocab_size: int) -> SuffixArray:
    """Returns the suffix array of no text."""
    tokens_S, ends_P = np.zeros(0, token_type(vocab_size)), np.zeros(0, np.int32)
    return SuffixArray(tokens_S, ends_P, np.zeros(vocab_size + 1, np.int64))


def token_type(vocab_size: int) -> np.dtype:
    """Returns the smallest integer type that holds every token id and the separator of documents."""
    return np.dtype(np.uint16 if vocab_size < 2**16 else np.uint32)


def _fit(arrays: dict[str, np.ndarray], vocab_size: int) -> bool:
    """Returns whether the arrays' sizes agree; the contents of the large ones are not read."""
    tokens_S, ends_P, firsts_V1 = arrays["tokens"], arrays["ends"], arrays["firsts"]
    if len(firsts_V1) != vocab_size + 1 or (firsts_V1[1:] < firsts_V1[:-1]).any():
        return False
    return bool(firsts_V1[0] == 0 and firsts_V1[-1] == len(ends_P) <= len(tokens_S))


def longest_match(
    ends: Sequence[int], before: Callable[[int, int], list[int]], wanted: list[int], shortest: int, low: int, high: int
) -> tuple[int, range]:
    """Returns the length of the longest match, and the entries of `ends` from `low` to `high` that follow it.

    `before(end, n)` returns up to n tokens before a position, the nearest first, by which `ends` are sorted; `wanted`
    are the tokens to match, the last first. If fewer than `shortest` match, the length is 0 and the range empty.
    """
    entry = bisect_left(ends, wanted, low, high, key=lambda end: before(end, len(wanted)))
    # No entry has more in common with `wanted` than its neighbours in the sorted order.
    neighbours = [one for one in (entry - 1, entry) if low <= one < high]
    length = max((num_common(before(ends[one], len(wanted)), wanted) for one in neighbours), default=0)
    if length < shortest:
        return 0, range(0)
    shared = wanted[:length]
    first = bisect_left(ends, shared, low, entry, key=lambda end: before(end, length))
    last = bisect_right(ends, shared, entry, high, key=lambda end: before(end, length))
    return length, range(first, last)


def num_common(one: Sequence[int], other: Sequence[int]) -> int:
    """Returns the length of the longest common prefix."""
    num_tokens = 0
    for token, its in zip(one, other, strict=False):
        if token != its:
            break
        num_tokens += 1
    return num_tokens


def _file_name(number: int, num_shards: int) -> str:
    return f"shard-{number:04d}-of-{num_shards:04d}.safetensors"
