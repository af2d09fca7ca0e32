"""One text in two vocabularies: what each token spells, which tokens both have, and one's ids for the other's.

`own` is the draft model's vocabulary and `theirs` the target's.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from itertools import groupby
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

BOS, EOS = "begin of text", "end of text"
"""What special tokens of these parts are called, whatever a tokenizer calls them."""
FIRST_CHARACTER = 0x10000
ANCHOR = "\ue000"
"""A character that no vocabulary joins to others, put before what does not begin a text."""
BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}


class Vocabulary:
    """What each token of a vocabulary spells, and the way from text to its ids."""

    def __init__(self, keys: Sequence[bytes | str | None], encode: Callable[[str, bool], list[int]]) -> None:
        self.keys = keys
        """Of each token the bytes that it spells, a special one's name, or None if it stands for nothing."""
        # Of tokens that spell the same the last counts: those of single bytes come first where there are both.
        self.id_of = {key: token for token, key in enumerate(keys) if key is not None}
        self._encode = encode
        self._adds_space = self.text(encode("x", True)).startswith(b" ")

    @staticmethod
    def of(tokenizer: Any, size: int, special: Mapping[int, str]) -> "Vocabulary":
        """Reads a fast tokenizer, for a model of `size` tokens; `special` names some of its special ids.

        It may be of bytes, as GPT-2's, mark spaces, as SentencePiece's do, with tokens for bytes or without, or spell
        its tokens plainly. The tokenizer stays as it is. Raises ValueError for one that is not fast.
        """
        if not hasattr(tokenizer, "backend_tokenizer"):
            raise ValueError(f"{type(tokenizer).__name__} is no fast tokenizer; save one with a tokenizer.json")
        backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True  # what looks like a special token in a text is text
        keys: list[bytes | str | None] = [None] * size
        parts = json.loads(backend.to_str())
        spell, unknown = _speller(parts), _unknown(parts["model"])
        for token, number in backend.get_vocab(with_added_tokens=False).items():
            if number < size:
                keys[number] = spell(token) or None
        for number, added in backend.get_added_tokens_decoder().items():
            if number < size:
                name = added.content if added.special else added.content.encode()
                keys[number] = None if added.content == unknown else name
        for number, part in special.items():
            if number < size:
                keys[number] = part

        def encode(text: str, begins: bool) -> list[int]:
            if begins:
                return backend.encode(text, add_special_tokens=False).ids
            # Some put a space before every text.
            found = backend.encode(ANCHOR + text, add_special_tokens=False)
            return [token for token, (_, end) in zip(found.ids, found.offsets, strict=True) if end > len(ANCHOR)]

        return Vocabulary(keys, encode)

    @staticmethod
    def of_ids(numbers: Iterable[int]) -> "Vocabulary":
        """Returns a vocabulary that has no text: token i is spelled as a character of its own, number `numbers[i]`.

        A number of -1 stands for nothing.
        """
        keys = [chr(FIRST_CHARACTER + number).encode() if number >= 0 else None for number in numbers]
        id_of = {key: token for token, key in enumerate(keys)}
        return Vocabulary(keys, lambda text, begins: [id_of[key] for one in text if (key := one.encode()) in id_of])

    def is_special(self, token: int) -> bool:
        return isinstance(self.keys[token], str)

    def text(self, ids: Iterable[int]) -> bytes:
        """Returns what the ids spell, special ones nothing."""
        return b"".join(key for token in ids if isinstance(key := self.keys[token], bytes))

    def ids(self, text: bytes, *, begins: bool = False) -> list[int]:
        """Returns in this vocabulary what stands somewhere in a text, or, if it `begins` one, at its beginning.

        Bytes that are part of no whole character become tokens of single bytes, where there are such.
        """
        found: list[int] = []
        # Stray bytes are decoded as lone surrogates, from U+DC80 on.
        for part in re.split("([\udc80-\udcff]+)", text.decode("utf-8", errors="surrogateescape")):
            if part and "\udc80" <= part[0] <= "\udcff":
                stray = part.encode("utf-8", errors="surrogateescape")
                found += [self.id_of[key] for byte in stray if (key := bytes([byte])) in self.id_of]
            elif part:
                found += self._encode(part, begins and not found)
        return found

    def opening(self, text: bytes) -> bytes:
        """Returns what a text that begins so reads without the space that this vocabulary puts before every text."""
        return text.removeprefix(b" ") if self._adds_space else text

    def tail(self, ids: Sequence[int], num_bytes: int) -> list[int]:
        """Returns the shortest end of `ids` that spells so many bytes."""
        begin = len(ids)
        while begin > 0 and num_bytes > 0:
            begin -= 1
            num_bytes -= len(self.text(ids[begin : begin + 1]))
        return list(ids[begin:])


class Translation:
    """From one vocabulary to the other by way of the text, of which only the end is looked at again (2502.05202).

    A window of the last ids, whose text is encoded anew, agrees with what stands there but for its ends: the longest
    run that both have tells where the new ids belong.
    """

    def __init__(self, own: Vocabulary, theirs: Vocabulary, lookback: int) -> None:
        self.own, self.theirs, self._lookback = own, theirs, lookback

    def counterparts(self) -> list[int]:
        """Returns the target's id of each token of the draft model that both vocabularies have, -1 for the others."""
        own, theirs = self.own, self.theirs
        return [
            theirs.id_of.get(key, -1) if key is not None and own.id_of[key] == token else -1
            for token, key in enumerate(own.keys)
        ]

    def begin(self, row: Sequence[int]) -> list[int]:
        """Returns the draft model's ids for a text, which begin as its texts do; at least one."""
        ids, bos = _carried_over(row, self.theirs, self.own, begins=True), self.own.id_of.get(BOS)
        if bos is not None and ids[:1] != [bos]:
            ids = [bos, *ids]
        return ids or [0]

    def follow(self, ids: Sequence[int], row: Sequence[int], num_known: int) -> list[int]:
        """Returns the draft model's ids for `row`, given those for its first `num_known`."""
        since, own = num_known - self._lookback, self.own
        if since <= 0:
            return self.begin(row)
        window = own.text(_carried_over(row[since:num_known], self.theirs, own))
        old, new = own.tail(ids, len(window)), _carried_over(row[since:], self.theirs, own)
        at_old, at_new, size = longest_run(old, new)
        joined = [*old[: at_old + size], *new[at_new + size :]]
        # Text that repeats itself, or that this vocabulary cannot spell, may have been joined in the wrong place.
        before = own.text(old)
        before = before[: len(before) - len(window)]
        if size and own.text(joined) == before + own.text(new):
            return [*ids[: len(ids) - len(old)], *joined]
        return self.begin(row)

    def ahead(self, row: Sequence[int], ids: Sequence[int], drafted: Sequence[int]) -> list[int]:
        """Returns the target's ids for what `drafted` adds to the text, which is `row` and, for the draft model, `ids`.

        None if the text goes on otherwise, as it may where a character or a token is still incomplete.
        """
        known = ids[-self._lookback :]
        new = _carried_over([*known, *drafted], self.own, self.theirs, begins=len(known) == len(ids))
        # What the draft model cannot spell, as half a character, is in the row alone.
        old = self.theirs.tail(row, max(len(self.own.text(known)), 1))
        at_old, at_new, size = longest_run(old, new)
        left, added = self.theirs.text(old[at_old + size :]), new[at_new + size :]
        if not left:
            return added
        text = self.theirs.text(added)
        return self.theirs.ids(text[len(left) :]) if text.startswith(left) else []


def longest_run(old: Sequence[int], new: Sequence[int]) -> tuple[int, int, int]:
    """Returns where the longest run that both have begins in each, and its length; of several the first in `old`."""
    match = SequenceMatcher(None, old, new, autojunk=False).find_longest_match()
    return match.a, match.b, match.size


def _carried_over(ids: Sequence[int], source: Vocabulary, goal: Vocabulary, *, begins: bool = False) -> list[int]:
    """Returns what stands for `ids`: special tokens for special ones of the same name, or nothing."""
    found: list[int] = []
    for is_special, part in groupby(ids, source.is_special):
        if is_special:
            found += [goal.id_of[key] for token in part if (key := source.keys[token]) in goal.id_of]
        else:
            text = source.text(part)
            found += goal.ids(source.opening(text) if begins else text, begins=begins)
            begins = False
    return found


def _speller(parts: dict[str, Any]) -> Callable[[str], bytes]:
    """Returns what spells the tokens of a tokenizer.json."""
    steps = json.dumps([parts[name] for name in ("normalizer", "pre_tokenizer", "decoder")], ensure_ascii=False)
    if '"ByteLevel"' in steps:
        # Some vocabularies hold words beside, which are not spelled in that alphabet.
        return lambda token: bytes(map(BYTE_OF.__getitem__, token)) if BYTE_OF.keys() >= set(token) else token.encode()
    marks_spaces, has_bytes = "▁" in steps, '"ByteFallback"' in steps

    def spell(token: str) -> bytes:
        if has_bytes and re.fullmatch("<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return (token.replace("▁", " ") if marks_spaces else token).encode()

    return spell


def _unknown(model: dict[str, Any]) -> str | None:
    """Returns the token of what a tokenizer.json's vocabulary does not hold."""
    return model["vocab"][model["unk_id"]][0] if model.get("unk_id") is not None else model.get("unk_token")
