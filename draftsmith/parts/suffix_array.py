"""Text sorted by what stands before each place, so that where its last tokens were met before is found by halving.

Read backwards the text's suffixes are its beginnings: this is the suffix array of the reversed text. So matches of any
length lie beside one another, and the longest is found without trying them all.

Shape suffixes: S tokens of the text, V vocabulary, P places in it.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import safetensors
from safetensors import safe_open
from safetensors.numpy import save_file


class SuffixArray:
    """Documents that are searched for the last tokens of a text.

    `tokens_S` (uint16, or uint32 for a vocabulary of 2^16 and more) holds them in turn, each followed by an id outside
    the vocabulary, so that no match and no continuation goes from one into the next. `ends_P` (int32) are the places in
    it, counted from 0, with a token of the same document before and after them, sorted by the tokens before them, read
    backwards; from `firsts_V1[v]` (int64) on they follow token v.
    """

    def __init__(self, tokens_S: np.ndarray, ends_P: np.ndarray, firsts_V1: np.ndarray) -> None:
        self.tokens_S, self.ends_P, self.firsts_V1 = tokens_S, ends_P, firsts_V1
        # Single numbers and short runs are read from these in a third of the time that numpy takes.
        self._tokens, self._ends, self._firsts = tokens_S.data, ends_P.data, firsts_V1.data

    @property
    def vocab_size(self) -> int:
        return len(self.firsts_V1) - 1

    def match(self, text: Sequence[int], longest: int, shortest: int) -> tuple[int, range]:
        """Returns how many of the text's last tokens, at most `longest`, were met before, and where in `ends_P`.

        The length is 0 and there is no place if fewer than `shortest` were.
        """
        wanted = list(text[: -longest - 1 : -1])
        low, high = self._firsts[wanted[0]], self._firsts[wanted[0] + 1]
        place = bisect_left(self._ends, wanted, low, high, key=lambda end: self._before(end, longest))
        # Nothing has more of it in common than one of the two that it would stand between.
        beside = [one for one in (place - 1, place) if low <= one < high]
        length = max((num_common(self._before(self._ends[one], longest), wanted) for one in beside), default=0)
        if length < shortest:
            return 0, range(0)
        shared = wanted[:length]
        begin = bisect_left(self._ends, shared, low, place, key=lambda end: self._before(end, length))
        end = bisect_right(self._ends, shared, place, high, key=lambda end: self._before(end, length))
        return length, range(begin, end)

    def continuations(self, places: Iterable[int], num_tokens: int) -> Iterator[tuple[int, ...]]:
        """Yields what follows each place of `ends_P`, up to `num_tokens` and to the end of its document."""
        for place in places:
            end = self._ends[place]
            tokens = self._tokens[end : end + num_tokens].tolist()
            if max(tokens) >= self.vocab_size:
                tokens = tokens[: next(at for at, token in enumerate(tokens) if token >= self.vocab_size)]
            yield tuple(tokens)

    def _before(self, end: int, num_tokens: int) -> list[int]:
        """Returns up to so many tokens before a place of `tokens_S`, the nearest first."""
        return self._tokens[max(end - num_tokens, 0) : end].tolist()[::-1]

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns what a file of it holds."""
        return {"tokens": self.tokens_S, "ends": self.ends_P, "firsts": self.firsts_V1}

    def write(self, path: Path) -> None:
        save_file(self.arrays(), path)

    @staticmethod
    def read(path: Path, vocab_size: int) -> "SuffixArray":
        """Returns what a file holds, mapped into memory; raises ValueError if it is missing, truncated or odd."""
        try:
            with safe_open(path, framework="pt") as file:  # numpy's would be read at once
                arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(f"{path} is missing or truncated ({error}); the artifact must be made again") from None
        kinds = {name: (array.dtype, array.ndim) for name, array in arrays.items()}
        ids = token_type(vocab_size)
        expected = {"tokens": (ids, 1), "ends": (np.dtype(np.int32), 1), "firsts": (np.dtype(np.int64), 1)}
        if kinds != expected or not _fit(arrays, vocab_size):
            raise ValueError(f"{path} holds no text sorted for a vocabulary of {vocab_size}; it must be made again")
        return SuffixArray(arrays["tokens"], arrays["ends"], arrays["firsts"])


def write_shards(folder: Path, shards: Sequence[SuffixArray]) -> None:
    """Writes each to a file of its own, whose name says how many there are."""
    for number, shard in enumerate(shards):
        shard.write(folder / _file_name(number, len(shards)))


def read_shards(folder: Path, vocab_size: int) -> tuple[SuffixArray, ...]:
    """Returns all that `write_shards` wrote; raises ValueError if one is missing, truncated or odd."""
    named = sorted(path.name for path in folder.glob("shard-*-of-*.safetensors"))
    if not named:
        raise ValueError(f"{folder} holds no shard of a store; the artifact must be made again")
    number = int(named[0].removesuffix(".safetensors").rpartition("-")[2])
    return tuple(SuffixArray.read(folder / _file_name(at, number), vocab_size) for at in range(number))


def empty(vocab_size: int) -> SuffixArray:
    """Returns one of no text."""
    tokens_S, ends_P = np.zeros(0, token_type(vocab_size)), np.zeros(0, np.int32)
    return SuffixArray(tokens_S, ends_P, np.zeros(vocab_size + 1, np.int64))


def token_type(vocab_size: int) -> np.dtype:
    """Returns the smallest type that holds every id and the one that parts documents."""
    return np.dtype(np.uint16 if vocab_size < 2**16 else np.uint32)


def _fit(arrays: dict[str, np.ndarray], vocab_size: int) -> bool:
    """Returns whether the arrays' sizes agree; what the large ones hold is not read."""
    tokens_S, ends_P, firsts_V1 = arrays["tokens"], arrays["ends"], arrays["firsts"]
    if len(firsts_V1) != vocab_size + 1 or (np.diff(firsts_V1) < 0).any():
        return False
    return bool(firsts_V1[0] == 0 and firsts_V1[-1] == len(ends_P) <= len(tokens_S))


def num_common(one: Sequence[int], other: Sequence[int]) -> int:
    """Returns how many tokens both begin with."""
    num_tokens = 0
    for token, its in zip(one, other, strict=False):
        if token != its:
            break
        num_tokens += 1
    return num_tokens


def _file_name(number: int, num_shards: int) -> str:
    return f"shard-{number:04d}-of-{num_shards:04d}.safetensors"
