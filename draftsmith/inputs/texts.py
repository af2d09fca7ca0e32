"""Texts: their tokens, and the rows of a batch in which they are written, which come and go."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Returns the ids of a text with the tokenizer's special tokens.

    A text that a chat template has formatted begins with the begin-of-text token itself and gets no second one. Raises
    ValueError for text that was not UTF-8 where it came from.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text is not UTF-8: character {error.start} is {text[error.start]!r}") from None
    ids, bos = tokenizer(text, verbose=False)["input_ids"], tokenizer.bos_token_id
    return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids


@dataclass(kw_only=True, eq=False)
class Text:
    """One row of a batch."""

    index: int
    """Number of its prompt in the call."""
    ids: list[int]
    """Its prompt and the new tokens so far; the last one is pending."""
    limit: int
    """Most tokens that it may have."""
    identity: tuple[int, int] = (0, 0)
    """Its seed, and its index among the rows with this seed."""
    processors: Sequence[Any] = ()
    """Logits processors of a text that comes to a batch, of the same kinds as those of the others."""
    is_running: bool = True
    is_written: bool = False
    """True once it has all its tokens; where outputs are recorded, it runs until the last of them is fed."""
    outputs: Any = None
    """The recorded outputs of a text that ended."""


def replace_ended(texts: list[Text], new: list[Text]) -> list[int | None]:
    """Puts `new` in place of texts that ended, then running ones from the end of the list; drops the ended ones.

    Returns for each entry the index of its text in the former list, None for a new one.
    """
    origins: list[int | None] = list(range(len(texts)))
    ended = [row for row, text in enumerate(texts) if not text.is_running]
    for row, text in zip(ended, new, strict=False):
        texts[row], origins[row] = text, None
    for row in reversed(ended[len(new) :]):
        last, origin = texts.pop(), origins.pop()
        if row < len(texts):
            texts[row], origins[row] = last, origin
    return origins
