"""Tokenizes prompts."""

from transformers import PreTrainedTokenizerBase


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Returns the ids of a text with the tokenizer's special tokens.

    A text that a chat template has formatted begins with the begin-of-text token itself and gets no second one.
    """
    ids, bos = tokenizer(text, verbose=False)["input_ids"], tokenizer.bos_token_id
    return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids
