"""Pairs for encoder-decoders: recognised and given columns, labels with an end token, truncated sources."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import pytest
from tokenizers import processors

import data.sources
from data.examples import open_examples
from data.prompts import Prompt, load_prompts
from data.sources.pairs import Columns, split_columns
from data.sources.python_source import SourceFile, docstring_pairs, split_files
from draftsmith.loading.model_info import NO_LIMIT, TargetInfo, read_target_info
from tests.support.models import tiny_config
from tests.support.text import EOS_ID, VOCAB_SIZE, trained_tokenizer

TOKENIZER = trained_tokenizer()
ARTICLES = [
    {"article": f"The {name} are on the loose. " * 3, "highlights": f"{name} escape .\nNobody hurt .", "id": name}
    for name in ("lions", "tigers", "bears", "foxes")
]


@cache
def read(architecture: str) -> TargetInfo:
    """Returns the information on a target from a folder with only a configuration."""
    with TemporaryDirectory() as folder:
        tiny_config(architecture, vocab_size=VOCAB_SIZE).save_pretrained(folder)
        return read_target_info(folder)


def info(tokenizer: Any = TOKENIZER, *, architecture: str = "t5", **changes: Any) -> TargetInfo:
    return replace(read(architecture), tokenizer=tokenizer, name="tiny", **changes)


def sources(source: Any, tokenizer: Any = TOKENIZER, **options: Any) -> list[Prompt]:
    return load_prompts(str(source), tokenizer, is_encoder_decoder=True, **options)


def jsonl(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("form", ["saved dict", "saved", "jsonl", "parquet", "folder"])
def test_articles_are_sources_and_highlights_labels(tmp_path: Path, form: str) -> None:
    """CNN/DailyMail as saved by `datasets`, and in files."""
    path, made = tmp_path / "cnn", datasets.Dataset.from_list(ARTICLES)
    if form == "saved dict":
        rest = datasets.Dataset.from_list([{"article": "No.", "highlights": "No.", "id": "0"}])
        datasets.DatasetDict(train=made, validation=rest, test=rest).save_to_disk(path)
    elif form == "saved":
        made.save_to_disk(path)
    elif form == "jsonl":
        path = jsonl(tmp_path / "cnn.jsonl", *ARTICLES)
    elif form == "parquet":
        path = tmp_path / "cnn.parquet"
        made.to_parquet(path)
    else:
        path.mkdir()
        made.to_parquet(path / "train-00000.parquet")
    prompts = sources(path)
    assert [TOKENIZER.decode(prompt.ids) for prompt in prompts] == [row["article"] for row in ARTICLES]
    assert [prompt.label for prompt in prompts] == [None] * 4, "prompts have no labels"
    examples = open_examples(str(path), info())
    assert examples.keys == [prompt.key for prompt in prompts], "the same rows are held out as of pseudo-data"
    for index, row in enumerate(ARTICLES):
        one = examples[index]
        assert TOKENIZER.decode(one.source_S) == row["article"]
        assert one.tokens_T.tolist() == [0, *TOKENIZER(row["highlights"])["input_ids"], EOS_ID]
        assert one.loss_mask_T.tolist() == [False] + [True] * (len(one.tokens_T) - 1)


@pytest.mark.parametrize(("source", "label"), [("document", "summary"), ("text", "summary"), ("source", "target")])
def test_other_column_names_are_recognised(tmp_path: Path, source: str, label: str) -> None:
    rows = [{"prompt": "unused", source: f"read {number}", label: f"write {number}"} for number in range(3)]
    examples = open_examples(str(jsonl(tmp_path / "rows.jsonl", *rows)), info())
    assert [TOKENIZER.decode(examples[at].source_S) for at in range(3)] == ["read 0", "read 1", "read 2"]
    assert [TOKENIZER.decode(examples[at].tokens_T[1:-1]) for at in range(3)] == ["write 0", "write 1", "write 2"]


def test_columns_and_prefix_are_given_after_the_data(tmp_path: Path) -> None:
    rows = [{"en": f"one {number}", "de": f"eins {number}", "article": "no"} for number in range(3)]
    path = jsonl(tmp_path / "rows.jsonl", *rows)
    for columns, prefix in (("en,de", ""), ("en, de,to German: ", "to German: ")):
        examples = open_examples(f"{path}@{columns}", info())
        assert TOKENIZER.decode(examples[1].source_S) == f"{prefix}one 1"
        assert TOKENIZER.decode(examples[1].tokens_T[1:-1]) == "eins 1"
    assert split_columns("owner/name:test@a,b") == ("owner/name:test", Columns(source="a", label="b"))
    assert split_columns("owner/name@v2") == ("owner/name@v2", None)
    (tmp_path / "x@a,b").mkdir()
    assert split_columns(str(tmp_path / "x@a,b")) == (str(tmp_path / "x@a,b"), None), "a folder has this name"


def test_sources_without_labels_are_prompts(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", {"article": "first"}, {"article": "second"})
    assert [TOKENIZER.decode(prompt.ids) for prompt in sources(path)] == ["first", "second"]
    path = jsonl(tmp_path / "other.jsonl", {"prompt": "this", "source": "a file name"})
    assert [prompt.text for prompt in sources(path)] == ["this"]
    assert load_prompts(str(jsonl(tmp_path / "c.jsonl", ARTICLES[0] | {"text": "plain"})), TOKENIZER)[0].text == "plain"


def test_truncated_sources_keep_the_tokenizers_end_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As T5's tokenizer adds an end token to every text; the result equals the tokenizer's own truncation."""
    ending = trained_tokenizer()
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", EOS_ID)]
    )
    path = jsonl(tmp_path / "rows.jsonl", *ARTICLES)
    for tokenizer in (TOKENIZER, ending):
        expected = [tokenizer(row["article"], truncation=True, max_length=10)["input_ids"] for row in ARTICLES]
        assert [prompt.ids for prompt in sources(path, tokenizer, max_prompt_tokens=10)] == expected
        assert "4 of 4 sources were cut to 10 tokens" in capsys.readouterr().out
        tokenizer.model_max_length = 10
        examples = open_examples(str(path), info(tokenizer))
        assert [examples[at].source_S.tolist() for at in range(4)] == expected
        assert examples[0].tokens_T.tolist().count(EOS_ID) == 1
        assert len(examples[0].tokens_T) > 11, "labels are not truncated to the encoder's input length"
        tokenizer.model_max_length = NO_LIMIT
    with pytest.raises(ValueError, match=r"rows.jsonl:1 has \d+ tokens and at most 10 fit"):
        sources(path, max_prompt_tokens=10, long_prompts="refuse")
    assert len(sources(jsonl(path, *ARTICLES, {"article": "short"}), max_prompt_tokens=10, long_prompts="drop")) == 1


def test_rows_with_an_empty_column_are_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*ARTICLES, {"article": " ", "highlights": "a"}, {"article": "b", "highlights": None}]
    path = jsonl(tmp_path / "rows.jsonl", *rows)
    assert len(open_examples(str(path), info())) == 4
    assert "2 of 6 rows cannot be used" in capsys.readouterr().out
    assert len(sources(path)) == 5


def test_functions_of_held_out_files_are_not_training_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    def function(name: str) -> str:
        return f'def {name}(value):\n    """Returns {name} of it."""\n    return {name}.of(value)\n'

    files = [
        SourceFile(name=f"lib/{number}.py", text=function(f"own_{number}") + function("copied") + "# x\n" * 200)
        for number in range(200)
    ]
    monkeypatch.setattr(data.sources, "source_files", lambda: files)
    # Bypasses the cache, which other tests share.
    monkeypatch.setattr(data.sources, "_docstring_rows", data.sources._docstring_rows.__wrapped__)
    made = json.loads((data.sources.POCKET / "pocket.json").read_text())["settings"]
    train, held_out = split_files(files, held_out_share=made["held_out_share"], seed=made["seed"])
    assert held_out
    examples = open_examples("python-docstrings:train", info())
    assert len(examples) == len(train) + 1, "a function in every file appears once"
    first = docstring_pairs(train)[0]
    assert TOKENIZER.decode(examples[0].source_S) == first[0]
    assert TOKENIZER.decode(examples[0].tokens_T[1:-1]) == first[1]
    prompts = sources("python-docstrings")
    assert [prompt.text for prompt in prompts] == [docstring_pairs([file])[0][0] for file in held_out]
    assert {prompt.key for prompt in prompts}.isdisjoint(examples.keys)
    assert len(load_prompts("python-docstrings:train", TOKENIZER, is_encoder_decoder=True, max_prompts=7)) == 7


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (ARTICLES, "@body,title", r"rows.jsonl:1: there is no column 'body'; it has article, highlights, id"),
        ([ARTICLES[0], *[{"article": "a"}] * 2], "", r"rows.jsonl:2: there is no column 'highlights'"),
        ([{"article": ["a"], "highlights": "b"}], "", r"rows.jsonl:1: `article` should be text, found \['a'\]"),
        (
            [{"prompt": "a"}],
            "",
            r"has no labels: give pairs \(article/highlights, .*rows.jsonl@source,",
        ),
        (ARTICLES, "@,highlights", r"expected a source column and a label column after @"),
    ],
)
def test_open_examples_rejects_invalid_pairs(tmp_path: Path, rows: list, columns: str, message: str) -> None:
    path = jsonl(tmp_path / "rows.jsonl", *rows)
    with pytest.raises(ValueError, match=message):
        open_examples(f"{path}{columns}", info())


def test_open_examples_rejects_columns_for_texts_and_causal_targets(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one text\n\nof two paragraphs")
    with pytest.raises(ValueError, match=r"a.txt has no labels: give pairs .* recipes/pseudo_data.py"):
        open_examples(str(tmp_path / "a.txt"), info())
    assert sources(tmp_path / "a.txt", prompt_tokens=4), "it can be a source"
    with pytest.raises(ValueError, match=r"names columns, and .*a.txt contains texts, which have none"):
        open_examples(f"{tmp_path / 'a.txt'}@a,b", info())
    path = jsonl(tmp_path / "rows.jsonl", *ARTICLES)
    with pytest.raises(ValueError, match=r"names source and label columns, which only an encoder-decoder"):
        open_examples(f"{path}@article,highlights", info(architecture="llama"))
    with pytest.raises(ValueError, match=r"rows.jsonl:1: found the keys article, highlights, id; expected one of"):
        open_examples(str(path), info(architecture="llama"))
    with pytest.raises(ValueError, match=r"tiny has no decoder_start_token_id"):
        open_examples(str(path), info(decoder_start_token_id=None))
