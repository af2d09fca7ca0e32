"""Prompts: all kinds of sources and rows, chat templates and their loss masks, and errors."""

import json
from datetime import date
from pathlib import Path
from typing import Any

import datasets
import pytest

from data.batches import split
from data.prompts import Prompt, TextSettings, load_prompts
from data.sources import BEGINNING, Document, read_source
from data.sources.python_source import source_files, split_files
from tests.support.text import CHAT_TEMPLATE, EOS_ID, MARKED_TEMPLATE, TEXT, trained_tokenizer

CHAT = [
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "Blue."},
    {"role": "user", "content": "And another?"},
    {"role": "assistant", "content": "Red, of course."},
]
TOKENIZER = trained_tokenizer()


def jsonl(path: Path, *rows: Any) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def texts(prompts: list[Prompt]) -> list[str]:
    return [prompt.text for prompt in prompts]


# --- Sources -----------------------------------------------------------------------------------------------------


def test_rows_of_text_are_used_unchanged(tmp_path):
    rows = [{"prompt": "def f("}, {"text": "import os\n", "category": "code"}, {"question": "why?", "question_id": 7}]
    source = jsonl(tmp_path / "rows.jsonl", *rows[:2], "", rows[2], {"turns": ["first", "second"], "category": 3})
    prompts = load_prompts(source, TOKENIZER)
    assert texts(prompts) == ["def f(", "import os\n", "why?", "first"]
    assert [prompt.ids for prompt in prompts] == [TOKENIZER(text)["input_ids"] for text in texts(prompts)]
    assert [prompt.category for prompt in prompts] == [None, "code", None, "3"]
    assert [prompt.source.rpartition(":")[2] for prompt in prompts] == ["1", "2", "4", "5"]
    assert all(prompt.loss_mask is None for prompt in prompts)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"add_generation_prompt": False}, "holds 'add_generation_prompt', which is no argument"),
        ({"messages": []}, "holds 'messages', which is no"),
        ({"tools": []}, "holds 'tools', which is no"),
        ({"a": float("nan")}, "names must be text, and values what JSON has"),
        ({"a": date(2026, 1, 1)}, "and values what JSON has"),
        ({1: 2}, "names must be text, and values what JSON has"),
    ],
)
def test_template_arguments_that_cannot_be_passed_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        TextSettings(chat_template_kwargs=given)
    assert TextSettings(chat_template_kwargs={"documents": [], "a": [1, {"b": None}]})


@pytest.mark.parametrize("given", [{"max_prompts": -1}, {"prompt_tokens": 0}])
def test_negative_numbers_of_prompts_are_named(tmp_path, given):
    (tmp_path / "a.txt").write_text("some text")
    with pytest.raises(ValueError, match="max_prompts is .* and prompt_tokens .*; they must be at least 0"):
        load_prompts(str(tmp_path / "a.txt"), trained_tokenizer(), **given)


def test_rows_with_several_turns_are_reported(tmp_path, capsys):
    load_prompts(jsonl(tmp_path / "rows.jsonl", {"turns": ["a", "b"]}, {"turns": ["c"]}), TOKENIZER)
    assert "1 of 2 rows have several turns" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["parquet", "json", "folder of files", "saved", "saved with splits"])
def test_other_formats_give_the_same_prompts_as_jsonl(tmp_path, form):
    rows = [{"prompt": text} for text in ("one", "two", "three")]
    source = tmp_path / "there"
    if form == "parquet":
        source = source.with_suffix(".parquet")
        datasets.Dataset.from_list(rows).to_parquet(source)
    elif form == "json":
        source = source.with_suffix(".json")
        source.write_text(json.dumps(rows))
    elif form == "folder of files":
        source.mkdir()
        jsonl(source / "a.jsonl", *rows[:2])
        datasets.Dataset.from_list(rows[2:]).to_parquet(source / "b.parquet")
    elif form == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(source)
    else:
        datasets.DatasetDict(train=datasets.Dataset.from_list(rows)).save_to_disk(source)
    assert texts(load_prompts(str(source), TOKENIZER)) == ["one", "two", "three"]


def test_prompts_of_text_files_start_at_paragraphs(tmp_path):
    (tmp_path / "a.txt").write_text("alpha " * 30 + "\n\n" + "beta " * 30 + "\n\n" + "gamma\n")
    (tmp_path / "b.md").write_text("delta")
    prompts = load_prompts(str(tmp_path), TOKENIZER, prompt_tokens=8)
    found = {prompt.text.split()[0]: prompt.ids for prompt in prompts}
    assert sorted(found) == ["alpha", "beta", "delta"], "gamma is too short, delta is a whole file"
    assert len(found["alpha"]) == len(found["beta"]) == 8
    has_bos = {word: ids[0] == TOKENIZER.bos_token_id for word, ids in found.items()}
    assert has_bos == {"alpha": True, "beta": False, "delta": True}


def test_document_starts_at_functions_and_decorators():
    text = "import os\n\x0c\n@cache\ndef f():\n    pass\n\nclass A:\n    async def g(self):\n        pass\n"
    starts = Document(name="a.py", text=text).starts()
    assert [text[start:].split("\n")[0] for start in starts] == ["import os", "@cache", "    async def g(self):"]
    assert Document(name="a.py", text="def f(:").starts() == [0]


@pytest.mark.slow
def test_python_source_is_held_out_by_default():
    train, held_out = split_files(source_files(), held_out_share=0.02, seed=0)
    for source, files in (("python-source", held_out), ("python-source:train", train)):
        found = {file.name: file.text for file in files}
        prompts = load_prompts(source, TOKENIZER, max_prompts=30, prompt_tokens=24, seed=1)
        assert len(prompts) == 30
        assert {len(prompt.ids) for prompt in prompts} == {24}
        for prompt in prompts:
            name, _, line = prompt.source.rpartition(":")
            rest = "\n".join(found[name].split("\n")[int(line) - 1 :])
            assert rest.startswith(prompt.text)
            assert line == "1" or prompt.text.lstrip().startswith(("def ", "async def ", "@"))
            assert (prompt.ids[0] == TOKENIZER.bos_token_id) == (line == "1")
    beginnings = {file.text[:BEGINNING] for file in train}
    documents = read_source("python-source")
    assert len(documents) > 20
    assert not [document for document in documents if document.text[:BEGINNING] in beginnings]


def test_sampled_prompts_depend_on_the_seed(tmp_path):
    source = jsonl(tmp_path / "rows.jsonl", *({"prompt": f"row {number}"} for number in range(50)))
    first, again, other = (texts(load_prompts(source, TOKENIZER, max_prompts=9, seed=seed)) for seed in (1, 1, 2))
    assert len(first) == 9
    assert first == again
    assert set(first) != set(other)
    assert texts(load_prompts(source, TOKENIZER)) == [f"row {number}" for number in range(50)]


def test_repeated_prompts_are_dropped(tmp_path, capsys):
    prompts = load_prompts(jsonl(tmp_path / "rows.jsonl", *({"prompt": text} for text in "abab")), TOKENIZER)
    assert texts(prompts) == ["a", "b"]
    assert "2 repeated" in capsys.readouterr().out


def test_long_prompts_are_rejected_dropped_or_truncated(tmp_path):
    source = jsonl(tmp_path / "rows.jsonl", {"prompt": "short"}, {"prompt": TEXT[:2000]})
    with pytest.raises(ValueError, match=r"rows.jsonl:2 has [\d,]+ tokens and at most 20 fit.*--long-prompts"):
        load_prompts(source, TOKENIZER, max_prompt_tokens=20)
    assert len(load_prompts(source, TOKENIZER, max_prompt_tokens=20, long_prompts="drop")) == 1
    cut = load_prompts(source, TOKENIZER, max_prompt_tokens=20, long_prompts="cut")
    assert cut[1].ids == TOKENIZER(TEXT[:2000])["input_ids"][:20]


@pytest.mark.parametrize("name", ["rows.jsonl", "a.txt"])
def test_training_texts_are_split_into_pieces(tmp_path, name):
    """Both rows and documents; the pieces of one text are held out together."""
    (tmp_path / name).write_text(json.dumps({"text": TEXT[:2000]}) if name.endswith("jsonl") else TEXT[:2000])
    (whole,) = load_prompts(str(tmp_path / name), TOKENIZER, keep_answers=True)
    pieces = load_prompts(str(tmp_path / name), TOKENIZER, max_prompt_tokens=20, keep_answers=True)
    assert {len(piece.ids) for piece in pieces[:-1]} == {20}
    assert [token for piece in pieces for token in piece.ids] == whole.ids
    keys = [piece.key for piece in pieces]
    assert len(set(keys)) == len(keys) > 5
    others = [str(number) for number in range(20)]
    for seed in range(8):
        train, _ = split([*keys, *others], held_out_share=0.5, seed=seed)
        assert len({index in train for index in range(len(keys))}) == 1
    train, held_out = split(keys, held_out_share=0.2, seed=0)
    assert train and held_out, "a single document is split between both"


# --- Conversations -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKED_TEMPLATE])
def test_loss_mask_covers_the_assistants_tokens(tmp_path, template, capsys):
    tokenizer = trained_tokenizer(template)
    source = jsonl(tmp_path / "chat.jsonl", {"messages": CHAT})
    (row,) = load_prompts(source, tokenizer, keep_answers=True)
    assert row.loss_mask is not None
    supervised = [token for token, flag in zip(row.ids, row.loss_mask, strict=True) if flag]
    assert tokenizer.decode(supervised) == "Blue.<eos>Red, of course.<eos>"
    assert row.ids == tokenizer.apply_chat_template(CHAT, return_dict=False)
    assert f"covers {len(supervised)} of {len(row.ids)} tokens" in capsys.readouterr().out


def test_prompt_of_a_conversation_ends_at_the_last_user_turn(tmp_path):
    tokenizer = trained_tokenizer(CHAT_TEMPLATE)
    human = [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in CHAT]
    source = jsonl(tmp_path / "chat.jsonl", {"messages": CHAT}, {"conversations": human}, {"question": "And another?"})
    first, question = load_prompts(source, tokenizer)
    assert first.text.endswith("<|user|>And another?<eos>\n<|assistant|>")
    assert first.loss_mask is None
    assert EOS_ID in first.ids
    assert question.text == "<|user|>And another?<eos>\n<|assistant|>"


def test_load_prompts_rejects_unsuitable_chat_templates(tmp_path):
    source = jsonl(tmp_path / "chat.jsonl", {"messages": CHAT})
    with pytest.raises(ValueError, match=r"chat.jsonl:1: a conversation, but the tokenizer has no chat template; use"):
        load_prompts(source, TOKENIZER)
    unstable = "{{ messages | length }}" + CHAT_TEMPLATE
    with pytest.raises(ValueError, match=r"renders turn 2 differently from its generation prompt"):
        load_prompts(source, trained_tokenizer(unstable), keep_answers=True)
    refusing = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"rejects this conversation: roles must alternate"):
        load_prompts(source, trained_tokenizer(refusing))


def test_load_prompts_rejects_data_without_supervised_tokens(tmp_path):
    source = jsonl(tmp_path / "chat.jsonl", {"messages": CHAT[:1]})
    with pytest.raises(ValueError, match=r"no assistant turn to train on"):
        load_prompts(source, trained_tokenizer(CHAT_TEMPLATE), keep_answers=True)
    empty = MARKED_TEMPLATE.replace("{% generation %}", "{% generation %}{% endgeneration %}", 1).replace(
        "<eos>{% endgeneration %}\n", "<eos>\n"
    )
    source = jsonl(tmp_path / "chat.jsonl", {"messages": CHAT[:2]})
    with pytest.raises(ValueError, match=r"leaves no token of the assistant's turns"):
        load_prompts(source, trained_tokenizer(empty), keep_answers=True)
    source = jsonl(tmp_path / "long.jsonl", {"messages": [{"role": "user", "content": TEXT[:800]}, CHAT[1]]})
    cut = {"max_prompt_tokens": 20, "long_prompts": "cut"}
    with pytest.raises(ValueError, match=r"long.jsonl:1: its answer lies beyond 20 tokens\); none is left"):
        load_prompts(source, trained_tokenizer(CHAT_TEMPLATE), keep_answers=True, **cut)


# --- Errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', r"bad.jsonl:2: not valid JSON"),
        ("[1, 2]", r"bad.jsonl:2: expected an object"),
        ('{"prompt": "  "}', r"bad.jsonl:2: `prompt` is empty"),
        ('{"prompt": 3}', r"bad.jsonl:2: `prompt` should be text"),
        ('{"promt": "a", "id": 1}', r"bad.jsonl:2: found the keys promt, id; expected one of messages.*prompt"),
        ('{"turns": "a"}', r"bad.jsonl:2: `turns` should be a list of texts"),
        ('{"messages": [{"role": "user"}]}', r"bad.jsonl:2: a message needs `role` and `content`"),
        ('{"messages": []}', r"bad.jsonl:2: a conversation should be a list"),
        ('{"messages": [{"role": "system", "content": "a"}]}', r"bad.jsonl:2: the conversation has no user turn"),
    ],
)
def test_load_prompts_names_an_invalid_row(tmp_path, line, message):
    """More than half of the rows cannot be used."""
    source = jsonl(tmp_path / "bad.jsonl", {"prompt": "fine"}, line, line)
    with pytest.raises(ValueError, match=message):
        load_prompts(source, trained_tokenizer(CHAT_TEMPLATE))


def test_load_prompts_rejects_missing_and_empty_sources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "binary.txt").write_bytes(b"\xff\x01")
    (tmp_path / "nothing").mkdir()
    for source, message in {
        "nowhere.jsonl": "no such file or folder: 'nowhere.jsonl'",
        "./nowhere": "no such file or folder",
        "runs/pseudo-data": "no such file or folder",
        "": "no data given",
        "empty.jsonl": "empty.jsonl is empty",
        "blank.jsonl": "blank.jsonl: no prompts",
        "broken.parquet": "broken.parquet is not a complete Parquet file",
        "binary.txt": r"binary.txt is not UTF-8 text \(byte 0\)",
        "nothing": "nothing contains no data: expected",
        "python-source:test": "unknown part 'test'",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_prompts(source, TOKENIZER)
    with pytest.raises(ValueError, match=r"prompts need a tokenizer"):
        load_prompts("python-source", None)


def test_offline_mode_disables_the_hub(monkeypatch):
    monkeypatch.setenv("DRAFTSMITH_OFFLINE", "1")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("the hub was accessed"))
    with pytest.raises(
        ValueError, match=r"'someone/something:test' is no local file or folder, and.*DRAFTSMITH_OFFLINE"
    ):
        load_prompts("someone/something:test", TOKENIZER)


def test_hub_names_include_configuration_and_split(monkeypatch):
    loaded = []

    def load_dataset(*names, split):
        loaded.append((*names, split))
        return datasets.Dataset.from_list([{"question": "why?"}])

    monkeypatch.delenv("DRAFTSMITH_OFFLINE", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for source in ("owner/name", "owner/name:test", "owner/name/main:test"):
        assert texts(load_prompts(source, TOKENIZER)) == ["why?"]
    assert loaded == [("owner/name", None, "train"), ("owner/name", None, "test"), ("owner/name", "main", "test")]
