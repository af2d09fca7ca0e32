"""Prompts that the target writes itself: from any chat template, unchanged by `kill -9`, read by other recipes."""

import json
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import recipes.own_prompts as recipe
import recipes.pseudo_data
from data.prompts import load_prompts
from data.pseudo_data import read_pseudo_data
from data.sources import RowError
from data.sources.chat import ChatFormat
from data.writers import LocalWriter, PseudoDataSettings
from data.writers.own_prompts import UserTurn, usable_texts
from draftsmith.loading.model_info import read_target_info
from tests.data.writers.openai_server import OpenAIServer
from tests.support.text import (
    CHAT_TEMPLATE,
    EOS_ID,
    VOCAB_SIZE,
    kill_midway,
    save_target,
    text_target,
    trained_tokenizer,
)
from trainers.training.settings import parse_settings

BOS_ID = 1
ENDS = [EOS_ID, *range(3, VOCAB_SIZE, 30)]
"""End tokens with which a tiny model's texts end after some 30 tokens."""
SYSTEM_TEMPLATE = "{% if messages[0].role != 'system' %}<|system|>Be kind.<eos>\n{% endif %}" + CHAT_TEMPLATE
INST_TEMPLATE = "{% for m in messages %}<bos>[INST] {{ m.content }} [/INST]{% endfor %}"
BOS_ENDS_TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content|trim }}\n<bos>{% endfor %}"
NO_SYSTEM_TEMPLATE = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT_TEMPLATE
)


def make_target(folder: Path, template: str | None = CHAT_TEMPLATE, ends: Any = ENDS) -> str:
    """Writes a tiny target with a chat template, whose texts end soon, and returns its path."""
    path = save_target(folder)
    trained_tokenizer(template).save_pretrained(path)
    config = {"eos_token_id": ends, "bos_token_id": BOS_ID}
    (folder / "generation_config.json").write_text(json.dumps(config))
    return path


def run(target: str, output: Path, *flags: str) -> None:
    few = ["--num-prompts", "24", "--batch-size", "4", "--shard-batches", "1", "--max-new-tokens", "100"]
    argv = ["--target", target, "--output", str(output), *few, *flags]
    recipe.main(*parse_settings(recipe.OwnPromptsSettings, description="", argv=argv))


def texts_of(output: Path) -> list[str]:
    rows = [json.loads(line) for line in (output / recipe.PROMPTS).read_text().splitlines()]
    assert all(set(row) == {"turns"} and len(row["turns"]) == 1 for row in rows)
    return [row["turns"][0] for row in rows]


# --- The user's turn ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "system", "begin", "ends", "end_text", "config"),
    [
        (CHAT_TEMPLATE, "", "<|user|>", {EOS_ID}, "", {}),
        (CHAT_TEMPLATE, "Be brief.", "<|system|>Be brief.<eos>\n<|user|>", {EOS_ID}, "", {}),
        (SYSTEM_TEMPLATE, "", "<|system|>Be kind.<eos>\n<|user|>", {EOS_ID}, "", {}),
        # The space before the message may become part of its first word.
        (INST_TEMPLATE, "", "<bos>[INST]", {EOS_ID}, "[/INST]", {"stop_strings": ["[/INST]"]}),
        (BOS_ENDS_TEMPLATE, "", "<|user|>", {BOS_ID, EOS_ID}, "", {"eos_token_id": [BOS_ID, EOS_ID]}),
    ],
)
def test_the_users_turn_is_found_in_the_template(template, system, begin, ends, end_text, config):
    tokenizer = trained_tokenizer(template)
    turn = UserTurn.of(ChatFormat(tokenizer=tokenizer, end_ids=frozenset({EOS_ID})), system, "target T")
    assert tokenizer.decode(turn.begin_ids) == begin
    assert (turn.end_ids, turn.end_text) == (ends, end_text)
    assert json.loads(turn.generation_config or "{}") == config


def test_the_tokenizers_end_token_is_used_where_the_generation_config_names_none():
    turn = UserTurn.of(ChatFormat(tokenizer=trained_tokenizer(CHAT_TEMPLATE)), "", "target T")
    assert json.loads(turn.generation_config) == {"eos_token_id": [EOS_ID]}


@pytest.mark.parametrize(
    ("template", "system", "message"),
    [
        ("<|user|>", "", "target T: the chat template writes a user's message 0 times"),
        (CHAT_TEMPLATE * 2, "", "the chat template writes a user's message 2 times"),
        ("{% for m in messages %}{{ m.content }}<eos>{% endfor %}", "", "writes nothing before the user's message"),
        (INST_TEMPLATE.replace("messages", "messages[-1:]"), "Be brief.", "leaves out the system message; omit"),
        (NO_SYSTEM_TEMPLATE, "Be brief.", "the chat template rejects this conversation: no system role"),
    ],
)
def test_templates_without_a_users_turn_are_refused(template, system, message):
    with pytest.raises(RowError, match=message):
        UserTurn.of(ChatFormat(tokenizer=trained_tokenizer(template)), system, "target T")


def test_texts_that_are_no_prompts_are_left_out_and_counted():
    tokenizer = trained_tokenizer(INST_TEMPLATE)
    turn = UserTurn.of(ChatFormat(tokenizer=tokenizer, end_ids=frozenset({EOS_ID})), "", "target T")
    written = {
        " What is a list?<eos>": "What is a list?",
        "what  is\nA LIST?<eos>": None,  # repeats the first
        "Hello there!<eos>": None,
        "<eos>": None,
        "列表是什么<eos>": "列表是什么",
        "Is this one<pad>cut at a special token?<eos>": "Is this one",
        "This ends with text [/INST] and an answer": "This ends with text",
        "This has no end but is as long as it may be": None,
    }
    longest = max(len(tokenizer(text)["input_ids"]) for text in written)
    last = list(written)[-1]
    ids = {text: tokenizer(text)["input_ids"] for text in written}
    ids[last] = (ids[last] * longest)[:longest]
    rows = [{"ids": [*turn.begin_ids, *ids[text]], "num_prompt_tokens": len(turn.begin_ids)} for text in written]
    texts, left_out = usable_texts(rows, turn, tokenizer, longest)
    assert texts == [text for text in written.values() if text]
    assert left_out == Counter({"shorter than 3 words": 2, "repeated": 1, f"not ended within {longest} tokens": 1})


# --- The recipe --------------------------------------------------------------------------------------------------


def test_the_target_writes_prompts_that_it_then_answers(tmp_path, capsys):
    target, output = make_target(tmp_path / "target", SYSTEM_TEMPLATE), tmp_path / "out"
    run(target, output)
    texts = texts_of(output)
    printed = capsys.readouterr().out
    record = json.loads((output / recipe.RECORD).read_text())
    assert f"{len(texts)} prompts of 24 texts by" in printed
    assert 12 <= len(texts) == record["num_prompts"] < record["num_texts"] == 24
    assert sum(record["left_out"].values()) == 24 - len(texts)
    assert all(f"{count} {reason}" in printed for reason, count in record["left_out"].items())
    assert record["begin_text"] == "<|system|>Be kind.<eos>\n<|user|>"
    samples = read_pseudo_data(output / recipe.SAMPLES)
    assert record["target_fingerprint"] == samples.manifest["target_fingerprint"] is not None
    assert len({tuple(row.tokens_T.tolist()) for row in samples}) > 20, "each text has its own seed"
    tokenizer = trained_tokenizer(SYSTEM_TEMPLATE)
    for source in (output, output / recipe.PROMPTS):
        prompts = load_prompts(str(source), tokenizer)
        expected = {f"<|system|>Be kind.<eos>\n<|user|>{text}<eos>\n<|assistant|>" for text in texts}
        assert {prompt.text for prompt in prompts} == expected
    argv = ["--target", target, "--data", str(output), "--max-new-tokens", "4", "--output", str(tmp_path / "answers")]
    settings = (recipes.pseudo_data.PseudoDataRunSettings, PseudoDataSettings)
    recipes.pseudo_data.main(*parse_settings(*settings, description="", argv=argv))
    assert len(read_pseudo_data(tmp_path / "answers")) == len(texts)


@pytest.mark.parametrize(
    ("template", "ends"),
    [(BOS_ENDS_TEMPLATE, {BOS_ID}), ("{% for m in messages %}Q{{ m.content }}\ne\n{% endfor %}", {})],
)
def test_texts_end_where_the_template_ends_the_users_turn(tmp_path, template, ends):
    """The generation config's end token is another one, which a tiny model hardly ever writes."""
    target, output = make_target(tmp_path / "target", template, ends=EOS_ID), tmp_path / "out"
    if ends:  # make the end token likely
        model = text_target().model
        model.lm_head.weight.data[BOS_ID] = model.lm_head.weight.data[3:].mean(0)
        model.save_pretrained(target)
    run(target, output, "--max-new-tokens", "200", "--max-left-out", "1")
    samples = read_pseudo_data(output / recipe.SAMPLES)
    tokenizer = trained_tokenizer()
    for index, row in enumerate(samples):
        new = row.tokens_T.tolist()[samples.table["num_prompt_tokens"][index].as_py() :]
        ended = len(new) < 200
        if ends:
            assert [token for token in new if token in ends] == ([BOS_ID] if ended and EOS_ID not in new else [])
        elif ended and EOS_ID not in new:
            assert "e" in tokenizer.decode(new[-1]) and "e" not in tokenizer.decode(new[:-1])
    assert len(texts_of(output)) > 0
    if not ends:
        assert not any("e" in text for text in texts_of(output))


@pytest.mark.slow
def test_a_run_continued_after_sigkill_equals_an_uninterrupted_one(tmp_path, capsys):
    target, (interrupted, whole) = make_target(tmp_path / "target"), (tmp_path / "interrupted", tmp_path / "whole")
    flags = ["--num-prompts", "24", "--batch-size", "4", "--shard-batches", "1", "--max-new-tokens", "100"]
    argv = ["--target", target, "--output", str(interrupted), *flags]
    kill_midway("own_prompts", argv, lambda: (interrupted / recipe.SAMPLES / "part-00001.parquet").exists())
    assert not (interrupted / recipe.PROMPTS).exists()
    run(target, interrupted)
    assert "rows exist already" in capsys.readouterr().out
    run(target, whole)
    assert texts_of(interrupted) == texts_of(whole)


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    running = OpenAIServer(text_target())
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


def test_a_server_writes_the_texts(server, tmp_path):
    server.eos = (BOS_ID, *ENDS)
    target, output = make_target(tmp_path / "target", BOS_ENDS_TEMPLATE), tmp_path / "out"
    run(target, output, "--server", server.url, "--top-p", "1")
    begin = trained_tokenizer()("<|user|>")["input_ids"]
    assert len(server.requests) == 24 == len({request["seed"] for request in server.requests})
    asked = {"prompt": begin, "stop_token_ids": [BOS_ID, *ENDS], "temperature": 1.0, "max_tokens": 100}
    assert all(request.items() >= asked.items() for request in server.requests)
    record = json.loads((output / recipe.RECORD).read_text())
    assert (record["server_model"], record["target_fingerprint"]) == ("tiny", None)
    texts = texts_of(output)
    assert len(texts) == record["num_prompts"] >= 12
    (output / recipe.SAMPLES / "part-00002.parquet").unlink()
    run(target, output, "--server", server.url, "--top-p", "1")
    assert texts_of(output) == texts and len(server.requests) == 24 + 4


def test_texts_of_which_too_few_are_prompts_are_refused_and_kept(tmp_path, monkeypatch):
    target, output = make_target(tmp_path / "target"), tmp_path / "out"
    message = r"prompts of 24 texts by .*; left out: \d+ not ended within 20 tokens.*; at most a share of 0\.5 may be"
    with pytest.raises(ValueError, match=message):
        run(target, output, "--max-new-tokens", "20")
    assert not (output / recipe.PROMPTS).exists()
    with pytest.raises(ValueError, match=r"made with other settings \(max_new_tokens was 20, is 100\); name another"):
        run(target, output)
    monkeypatch.setattr(LocalWriter, "write", None)  # nothing is generated again
    run(target, output, "--max-new-tokens", "20", "--max-left-out", "0.95")
    assert 0 < len(texts_of(output)) < 12


def test_no_prompt_at_all_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=": 0 prompts of 24 texts by"):
        run(make_target(tmp_path / "target"), tmp_path / "out", "--max-new-tokens", "1", "--max-left-out", "1")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-prompts", "0"], "num_prompts is 0; it must be at least 1"),
        (["--temperature", "0"], "temperature is 0, with which all texts are the same"),
        (["--temperature", "-1"], "temperature"),
        (["--top-p", "0"], "top_p"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0; it must be at least 1"),
        (["--max-left-out", "2"], "max_left_out is 2.0; it must be 0 to 1"),
        (["--max-new-tokens", "255"], "--max-new-tokens is 255; the target's context has room for "),
        (["--server", "http://127.0.0.1:9", "--device-map", "auto"], "--device-map has no effect with --server"),
        (["--server", "localhost:8000"], "expected an address like http"),
        (["--output", "mine"], "contains other files"),
        (["--target", "data/pocket-seq2seq"], "is an encoder-decoder, which has no user's turn to write"),
        (["--target", "data/pocket"], "target data/pocket has no chat template, so that nothing tells it"),
        (["--target", "plain"], "target plain has no tokenizer, so that nothing tells it"),
    ],
)
def test_mistakes_are_reported_before_weights_load(tmp_path, monkeypatch, capsys, flags, message):
    target = make_target(tmp_path / "target")
    (tmp_path / "data").symlink_to(Path(recipe.__file__).parents[1] / "data")
    save_target(tmp_path / "plain")
    for file in (tmp_path / "plain").glob("tokenizer*"):
        file.unlink()
    assert read_target_info(str(tmp_path / "plain")).tokenizer is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "target" / "model.safetensors").write_bytes(b"not weights")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / recipe.PROMPTS).write_text("prompts of the user")
    with pytest.raises((ValueError, SystemExit)) as error:
        run(target, Path("out"), *flags)
    assert message in capsys.readouterr().err + str(error.value)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "mine" / recipe.PROMPTS).read_text() == "prompts of the user"
