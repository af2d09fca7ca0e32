"""Texts for a plan: their forms, their errors, and contexts of given lengths."""

import json
from pathlib import Path
from typing import Any

import pytest

import draftsmith
from draftsmith.cli import main
from draftsmith.drafters import lookup
from draftsmith.planning.contexts import contexts, read_texts
from tests.support.text import CHAT_TEMPLATE, TEXT, save_target, trained_tokenizer


def written(path: Path, *rows: Any) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_requests_and_conversations_go_through_the_chat_template(tmp_path: Path) -> None:
    tokenizer = trained_tokenizer(CHAT_TEMPLATE)
    conversation = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]
    path = written(
        tmp_path / "a.jsonl",
        {"question": "hello", "answer": "world"},
        {"turns": ["hello", "more"]},
        {"messages": conversation},
        {"conversations": [{"from": "human", "value": "hello"}]},
        {"text": "hello"},
    )
    texts = read_texts(path, tokenizer)
    decoded = [tokenizer.decode(ids) for ids in texts.prompts]
    assert decoded[0] == decoded[1] == decoded[2] == decoded[3]
    assert "hello" in decoded[0] and decoded[0].endswith("<|assistant|>") and decoded[4] == "hello"
    assert "world" in tokenizer.decode(texts.wholes[0]) and texts.wholes[0] == texts.wholes[2]


def test_contexts_end_with_prompts_and_begin_with_earlier_texts(tmp_path: Path) -> None:
    tokenizer = trained_tokenizer()
    path = written(tmp_path / "a.jsonl", *({"prompt": f"def f{n}(x):", "completion": " return x"} for n in range(9)))
    texts = read_texts(path, tokenizer)
    rows = contexts(texts, 40, 3)
    assert [len(row) for row in rows] == [40, 40, 40] and len({tuple(row) for row in rows}) == 3
    assert tokenizer.decode(rows[1]).endswith("def f2(x): return xdef f3(x):")
    document = read_texts(written(tmp_path / "b.py", "import json\n" * 30), tokenizer)
    assert document.is_document and [len(row) for row in contexts(document, 40, 2)] == [40, 40]
    with pytest.raises(ValueError, match="a context of 9,000 cannot be filled; give more text or shorter"):
        contexts(texts, 9_000, 1)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["{"], "a.jsonl:1 is not valid JSON"),
        ([{"body": "x"}], "a.jsonl:1 has none of messages"),
        ([{"messages": [{"role": "user"}]}], "messages must be a text, or a list of messages"),
        ([], "has no rows"),
    ],
    ids=["json", "key", "message", "empty"],
)
def test_rows_that_cannot_be_read_are_named(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_texts(written(tmp_path / "a.jsonl", *rows), trained_tokenizer(CHAT_TEMPLATE))


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file; give a text file, or JSON lines"):
        read_texts(str(tmp_path / "none"), trained_tokenizer())
    with pytest.raises(ValueError, match="a folder; give a text file"):
        read_texts(str(tmp_path), trained_tokenizer())


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_the_command_writes_a_plan_and_names_wrong_arguments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = save_target(tmp_path / "target")
    draft = str(tmp_path / "draft")
    loaded = draftsmith.Target.from_pretrained(target)
    draftsmith.save(lookup.Drafter(lookup.Config(), loaded), tmp_path / "draft", loaded)
    (tmp_path / "text.txt").write_text(TEXT[:4000])
    given = ["plan", draft, "--target", target, "--data", str(tmp_path / "text.txt")]
    small = ["--batch-sizes", "1,2", "--lengths", "0..2", "--num-texts", "2", "--num-tokens", "8", "--repeats", "1"]
    main([*given, *small, "--contexts", "16,32"])
    printed = capsys.readouterr().out
    folder = tmp_path / "draft-plan"
    record = json.loads((folder / "plan.json").read_text())
    assert "context 16" in printed and "vLLM: " in printed
    assert len(record["cells"]) == 4 and record["grid"]["lengths"] == [0, 1, 2]
    for engine in record["engines"].values():
        assert not engine["file"] or (folder / engine["file"]).is_file()
    assert "--lengths is '0..x'; give whole numbers from 0" in error_of(capsys, *given, "--lengths", "0..x")
    assert "has room" not in error_of(capsys, *given, "--contexts", "250")
    assert "--repeats is 0; it must be from 1" in error_of(capsys, *given, "--repeats", "0")
    assert "did you mean --contexts?" in error_of(capsys, *given, "--context", "4")
    assert "contains other files" in error_of(capsys, *given, *small, "--contexts", "16", "--output", draft)
