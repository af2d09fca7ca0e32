"""Tokenizes prompts."""

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
