"""Translates token ids between the draft model's vocabulary and the target's, by the text that tokens stand for."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from itertools import groupby
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

BOS, EOS = "begin of text", "end of text"
"""Names of these special tokens, whatever a tokenizer calls them."""
FIRST_CHARACTER = 0x10000
ANCHOR = "\ue000"
"""A character that no vocabulary merges with others, put before text that does not begin a document."""
BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}


class Vocabulary:
    """The bytes of each token of a vocabulary, and its encoder."""

    def __init__(self, keys: Sequence[bytes | str | None], encode: Callable[[str, bool], list[int]]) -> None:
        self.keys = keys
        """Each token's bytes, the name of a special token, or None for a token that stands for no text."""
        # Of tokens with the same bytes the last is used: tokens of single bytes come first in vocabularies with both.
        self.id_of = {key: token for token, key in enumerate(keys) if key is not None}
        self._encode = encode
        self._adds_space = self.text(encode("x", True)).startswith(b" ")

    @staticmethod
    def of(tokenizer: Any, size: int, special: Mapping[int, str]) -> "Vocabulary":
        """Returns the vocabulary of a fast tokenizer, for a model of `size` tokens; `special` names its special ids.

        Supported are byte-level tokenizers (GPT-2), those that mark spaces, with byte fallback or without
        (SentencePiece), and plain ones. The tokenizer is not changed. Raises ValueError for one that is not fast.
        """
        if not hasattr(tokenizer, "backend_tokenizer"):
            raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer; use one saved with a tokenizer.json")
        backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True  # special tokens spelled out in a text are text
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
            # Some tokenizers put a space before every text.
            found = backend.encode(ANCHOR + text, add_special_tokens=False)
            return [token for token, (_, end) in zip(found.ids, found.offsets, strict=True) if end > len(ANCHOR)]

        return Vocabulary(keys, encode)

    @staticmethod
    def of_ids(numbers: Iterable[int]) -> "Vocabulary":
        """Returns a vocabulary without text: token i stands for a character of its own, number `numbers[i]`.

        A token with number -1 stands for no text.
        """
        keys = [chr(FIRST_CHARACTER + number).encode() if number >= 0 else None for number in numbers]
        id_of = {key: token for token, key in enumerate(keys)}
        return Vocabulary(keys, lambda text, begins: [id_of[key] for one in text if (key := one.encode()) in id_of])

    def is_special(self, token: int) -> bool:
        """Returns whether the token is a named special token."""
        return isinstance(self.keys[token], str)

    def text(self, ids: Iterable[int]) -> bytes:
        """Returns the bytes of the tokens; special ones have none."""
        return b"".join(key for token in ids if isinstance(key := self.keys[token], bytes))

    def ids(self, text: bytes, *, begins: bool = False) -> list[int]:
        """Returns the ids of a piece of text, which `begins` a document or not.

        Bytes of incomplete characters become tokens of single bytes, if the vocabulary has them.
        """
        found: list[int] = []
        # Bytes of incomplete characters are decoded as lone surrogates, from U+DC80 on.
        for part in re.split("([\udc80-\udcff]+)", text.decode("utf-8", errors="surrogateescape")):
            if part and "\udc80" <= part[0] <= "\udcff":
                stray = part.encode("utf-8", errors="surrogateescape")
                found += [self.id_of[key] for byte in stray if (key := bytes([byte])) in self.id_of]
            elif part:
                found += self._encode(part, begins and not found)
        return found

    def opening(self, text: bytes) -> bytes:
        """Returns the beginning of a document without the space that this vocabulary's tokenizer puts before it."""
        return text.removeprefix(b" ") if self._adds_space else text

    def tail(self, ids: Sequence[int], num_bytes: int) -> list[int]:
        """Returns the shortest suffix of `ids` with at least `num_bytes` bytes."""
        begin = len(ids)
        while begin > 0 and num_bytes > 0:
            begin -= 1
            num_bytes -= len(self.text(ids[begin : begin + 1]))
        return list(ids[begin:])


class Translation:
    """Translates between the draft model's and the target's ids, re-encoding only the end of the text (2502.05202).

    The text of the last `lookback` ids is encoded again with the new text. The result agrees with the known ids except
    near its ends: the longest common run shows where the new ids belong.
    """

    def __init__(self, draft: Vocabulary, target: Vocabulary, lookback: int) -> None:
        self.draft, self.target, self._lookback = draft, target, lookback

    def counterparts(self) -> list[int]:
        """Returns the target's id of each token of the draft model, -1 for tokens that the target does not have."""
        draft, target = self.draft, self.target
        return [
            target.id_of.get(key, -1) if key is not None and draft.id_of[key] == token else -1
            for token, key in enumerate(draft.keys)
        ]

    def to_draft_ids(self, row: Sequence[int]) -> list[int]:
        """Returns the draft model's ids of a text, with its begin-of-text token; at least one."""
        ids, bos = _convert(row, self.target, self.draft, begins=True), self.draft.id_of.get(BOS)
        if bos is not None and ids[:1] != [bos]:
            ids = [bos, *ids]
        return ids or [0]

    def extend_draft_ids(self, ids: Sequence[int], row: Sequence[int], num_known: int) -> list[int]:
        """Returns the draft model's ids of `row`, given those of its first `num_known` tokens."""
        since, draft = num_known - self._lookback, self.draft
        if since <= 0:
            return self.to_draft_ids(row)
        window = draft.text(_convert(row[since:num_known], self.target, draft))
        old, new = draft.tail(ids, len(window)), _convert(row[since:], self.target, draft)
        at_old, at_new, size = longest_run(old, new)
        joined = [*old[: at_old + size], *new[at_new + size :]]
        # Repetitive text, or text outside the vocabulary, may have been joined at the wrong position.
        before = draft.text(old)
        before = before[: len(before) - len(window)]
        if size and draft.text(joined) == before + draft.text(new):
            return [*ids[: len(ids) - len(old)], *joined]
        return self.to_draft_ids(row)

    def new_target_ids(self, row: Sequence[int], ids: Sequence[int], drafted: Sequence[int]) -> list[int]:
        """Returns the target's ids of the text that `drafted` adds, given the text so far in both vocabularies.

        The list is empty if the texts differ, which can happen at an incomplete character or token.
        """
        known = ids[-self._lookback :]
        new = _convert([*known, *drafted], self.draft, self.target, begins=len(known) == len(ids))
        # Text outside the draft model's vocabulary, such as half a character, is in the row only.
        old = self.target.tail(row, max(len(self.draft.text(known)), 1))
        at_old, at_new, size = longest_run(old, new)
        left, added = self.target.text(old[at_old + size :]), new[at_new + size :]
        if not left:
            return added
        text = self.target.text(added)
        return self.target.ids(text[len(left) :]) if text.startswith(left) else []


def longest_run(old: Sequence[int], new: Sequence[int]) -> tuple[int, int, int]:
    """Returns the start of the longest common run in each list, and its length; of several the first in `old`."""
    match = SequenceMatcher(None, old, new, autojunk=False).find_longest_match()
    return match.a, match.b, match.size


def _convert(ids: Sequence[int], source: Vocabulary, goal: Vocabulary, *, begins: bool = False) -> list[int]:
    """Returns the ids in another vocabulary; special tokens become those of the same name, or are dropped."""
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
    """Returns the function from a token to its bytes, for a tokenizer.json."""
    steps = json.dumps([parts[name] for name in ("normalizer", "pre_tokenizer", "decoder")], ensure_ascii=False)
    if '"ByteLevel"' in steps:
        # Some vocabularies also have words that are not written in the byte alphabet.
        return lambda token: bytes(map(BYTE_OF.__getitem__, token)) if BYTE_OF.keys() >= set(token) else token.encode()
    marks_spaces, has_bytes = "▁" in steps, '"ByteFallback"' in steps

    def spell(token: str) -> bytes:
        if has_bytes and re.fullmatch("<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return (token.replace("▁", " ") if marks_spaces else token).encode()

    return spell


def _unknown(model: dict[str, Any]) -> str | None:
    """Returns the unknown token of a tokenizer.json, None if it has none."""
    return model["vocab"][model["unk_id"]][0] if model.get("unk_id") is not None else model.get("unk_token")
