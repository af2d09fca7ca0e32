"""Prompts are tokenized with one begin-of-text token."""

from draftsmith.inputs.texts import encode_text
from tests.support.text import trained_tokenizer


def test_encode_text_adds_no_second_bos_to_a_formatted_text() -> None:
    tokenizer = trained_tokenizer()
    assert encode_text(tokenizer, "") == []
    tokenizer.add_bos_token = True
    tokenizer.update_post_processor()
    bos = tokenizer.bos_token_id
    plain, formatted = (encode_text(tokenizer, text) for text in ("a b", "<bos>a b"))
    assert plain == formatted == [bos, *tokenizer("a b", add_special_tokens=False)["input_ids"]]
    assert tokenizer("<bos>a b")["input_ids"][:2] == [bos, bos], "the tokenizer by itself adds one"
