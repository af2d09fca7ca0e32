"""Forms of rows: the whole text of a row is read, and unused fields are reported."""

import json
from typing import Any

import pytest

from data.prompts import load_prompts
from data.sources import Row
from data.sources.forms import RowText, read_text
from tests.support.text import CHAT_TEMPLATE, EOS_ID, trained_tokenizer


def read(as_chat: bool = True, **fields: Any) -> RowText:
    return read_text(Row(where="rows.jsonl:1", fields=fields), as_chat=as_chat)


def said(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]


QUESTION, ANSWER = "Translate to French.", "la mer"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"instruction": QUESTION, "input": "the sea", "output": ANSWER}, said(f"{QUESTION}\n\nthe sea", ANSWER)),
        ({"instruction": QUESTION, "input": "", "output": ANSWER}, said(QUESTION, ANSWER)),
        (
            {"instruction": QUESTION, "context": "the sea", "response": ANSWER, "category": "closed_qa"},
            said(f"{QUESTION}\n\nthe sea", ANSWER),
        ),
        (
            {"question": "Where?", "context": "At sea.", "answers": {"text": ["at sea"], "answer_start": [0]}},
            said("Where?\n\nAt sea.", "at sea"),
        ),
        ({"query": QUESTION, "response": ANSWER}, said(QUESTION, ANSWER)),
        ({"question": "6 * 7?", "answer": 42}, said("6 * 7?", "42")),
        ({"prompt": QUESTION, "response": ANSWER}, said(QUESTION, ANSWER)),
        ({"input": QUESTION, "output": ANSWER}, said(QUESTION, ANSWER)),
        (
            {"system_prompt": "Be brief.", "question": QUESTION, "response": ANSWER},
            [{"role": "system", "content": "Be brief."}, *said(QUESTION, ANSWER)],
        ),
        (
            {
                "system": "Be brief.",
                "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}],
            },
            [{"role": "system", "content": "Be brief."}, *said("Hi", "Ho")],
        ),
        ({"prompt": said("Hi"), "completion": said("", "Ho")[1:]}, said("Hi", "Ho")),
        ({"prompt": said("Hi"), "chosen": said("", "Ho")[1:], "rejected": said("", "No")[1:]}, said("Hi", "Ho")),
        ({"prompt": "Hi", "chosen": said("Hi", "Ho"), "rejected": said("Hi", "No, not now")}, said("Hi", "Ho")),
        ({"messages": json.dumps(said("Hi", "Ho"))}, said("Hi", "Ho")),
    ],
)
def test_read_text_returns_the_whole_conversation(fields: dict[str, Any], expected: list[dict[str, Any]]) -> None:
    found = read(**fields)
    assert (found.messages, found.unused) == (expected, ())


@pytest.mark.parametrize(
    ("fields", "text", "answer"),
    [
        ({"prompt": "The sky is", "completion": " blue."}, "The sky is", " blue."),
        ({"prompt": "The sky is", "chosen": " blue.", "rejected": " dark green."}, "The sky is", " blue."),
        ({"instruction": QUESTION, "input": "the sea", "output": ANSWER}, f"{QUESTION}\n\nthe sea", f"\n\n{ANSWER}"),
        ({"system": "Be brief.", "prompt": QUESTION}, f"Be brief.\n\n{QUESTION}", None),
        ({"text": "as it stands"}, "as it stands", None),
    ],
)
def test_read_text_returns_plain_text_and_its_continuation(
    fields: dict[str, str], text: str, answer: str | None
) -> None:
    found = read(as_chat=False, **fields)
    assert (found.text, found.answer, found.messages, found.unused) == (text, answer, None, ())


def test_read_text_names_unused_fields_with_words() -> None:
    found = read(question="Why?", hint="Look at the sky.", notes=["a b", "c"], id="ab-12", difficulty=3, extra=None)
    assert found.unused == ("hint", "notes")
    assert read(messages=said("Name a colour."), prompt="Name a colour.", prompt_id="x").unused == ()


def test_load_prompts_reports_unused_fields_once(tmp_path, capsys) -> None:
    rows = [{"question": f"Why {number}?", "hint": "Look at the sky."} for number in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    load_prompts(str(tmp_path / "rows.jsonl"), trained_tokenizer(CHAT_TEMPLATE))
    assert capsys.readouterr().out.count("contain text that is not used: hint (3 rows)") == 1


def test_keep_answers_supervises_the_continuation_of_plain_text(tmp_path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "The sky is", "completion": " blue."}) + "\n")
    tokenizer = trained_tokenizer()
    (row,) = load_prompts(str(tmp_path / "rows.jsonl"), tokenizer, keep_answers=True)
    assert row.loss_mask is not None
    supervised = [token for token, flag in zip(row.ids, row.loss_mask, strict=True) if flag]
    assert (row.text, tokenizer.decode(supervised)) == ("The sky is blue.", " blue.<eos>")
    assert row.ids[-1] == EOS_ID


def test_text_that_begins_with_bos_gets_no_second_one(tmp_path) -> None:
    tokenizer = trained_tokenizer()
    tokenizer.add_bos_token = True
    tokenizer.update_post_processor()
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id, "this tokenizer adds it"
    (tmp_path / "rows.jsonl").write_text('{"text": "<bos>formatted"}\n{"text": "plain"}\n')
    for row in load_prompts(str(tmp_path / "rows.jsonl"), tokenizer):
        assert row.ids.count(tokenizer.bos_token_id) == 1
