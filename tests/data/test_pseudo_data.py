"""Pseudo-data: the target's own text, unchanged by `kill -9`, the same from a server as from draftsmith's loop."""

import dataclasses
import importlib
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import pyarrow.parquet
import pytest
import torch
import transformers

import data.shards
import data.writers.server_pool
import draftsmith
import recipes.pseudo_data as recipe
from data.prompts import load_prompts
from data.pseudo_data import MARKER, plan_batches, read_pseudo_data, write_pseudo_data
from data.writers import LocalWriter, PseudoDataSettings
from data.writers.server import ServerWriter
from draftsmith import Target
from draftsmith.loading.model_info import read_target_info
from tests.data.writers.openai_server import OpenAIServer
from tests.support.models import SEQ2SEQ
from tests.support.runs import locked_by_another_run
from tests.support.text import (
    CHAT_TEMPLATE,
    CONTEXT,
    EOS_ID,
    VOCAB_SIZE,
    kill_midway,
    save_target,
    some_prompts,
    text_target,
    trained_tokenizer,
    write_prompts,
)
from trainers.training.settings import parse_settings

SETTINGS = (recipe.PseudoDataRunSettings, PseudoDataSettings)
SMALL = PseudoDataSettings(max_new_tokens=12, batch_size=3, shard_batches=2)


@pytest.fixture(scope="module")
def target() -> Target:
    return text_target()


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return pyarrow.parquet.read_table(folder).to_pylist()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.parquet"))}


# --- Contents ----------------------------------------------------------------------------------------------------


def test_rows_contain_the_targets_greedy_text_and_provenance(target, tmp_path):
    prompts = some_prompts(tmp_path, 10)
    write_pseudo_data(target, prompts, tmp_path / "out", SMALL)
    rows = {row["key"]: row for row in rows_of(tmp_path / "out")}
    assert set(rows) == {prompt.key for prompt in prompts}
    for prompt in prompts:
        row = rows[prompt.key]
        ids = torch.tensor([prompt.ids])
        mask = torch.ones_like(ids)
        expected = target.model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=12)[0].tolist()
        assert row["ids"] == expected
        assert row["num_prompt_tokens"] == len(prompt.ids)
        assert row["text"] == target.tokenizer.decode(expected[len(prompt.ids) :])
        assert (row["source"], row["target_fingerprint"]) == (prompt.source, target.fingerprint)
        assert (row["tokenizer_hash"], row["temperature"], row["ended"]) == (target.tokenizer_hash, 0.0, False)
    written = read_pseudo_data(tmp_path / "out", target)
    for index, key in enumerate(written.keys):
        example = written[index]
        assert example.key == key
        assert example.tokens_T.tolist() == rows[key]["ids"]
        assert (~example.loss_mask_T).sum() == rows[key]["num_prompt_tokens"]
        assert example.loss_mask_T[rows[key]["num_prompt_tokens"] :].all()
    assert written.num_supervised == 12 * len(prompts)
    assert written.num_tokens == sum(len(row["ids"]) for row in rows.values())


def test_generation_config_is_applied_and_recorded(tmp_path):
    target, prompts = text_target(), some_prompts(tmp_path, 4)
    write_pseudo_data(target, prompts, tmp_path / "plain", SMALL)
    assert "generation_config" not in json.loads((tmp_path / "plain" / MARKER).read_text())
    penalty = {"repetition_penalty": 1.4}
    target.model.generation_config.update(**penalty)
    for name, given in (("own", "model"), ("named", json.dumps(penalty))):
        settings = dataclasses.replace(SMALL, generation_config=given)
        write_pseudo_data(target, prompts, tmp_path / name, settings)
        recorded = json.loads((tmp_path / name / MARKER).read_text())["generation_config"]
        assert recorded.items() >= penalty.items()
        for row in rows_of(tmp_path / name):
            ids = torch.tensor([row["ids"][: row["num_prompt_tokens"]]])
            expected = target.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12)
            assert row["ids"] == expected[0].tolist()
    assert rows_of(tmp_path / "own") != rows_of(tmp_path / "plain")
    with pytest.raises(ValueError, match="made with other settings"):
        write_pseudo_data(target, prompts, tmp_path / "own", SMALL)
    several = dataclasses.replace(SMALL, generation_config='{"num_return_sequences": 2}', temperature="1")
    with pytest.raises(ValueError, match="num_return_sequences is 2; pseudo-data has one row a prompt"):
        write_pseudo_data(target, prompts, tmp_path / "several", several)


def test_rows_end_at_the_end_of_text_token(tmp_path):
    target = text_target()
    target.model.generation_config.eos_token_id = list(range(3, VOCAB_SIZE, 2))
    write_pseudo_data(target, some_prompts(tmp_path, 8), tmp_path / "out", SMALL)
    for row in rows_of(tmp_path / "out"):
        written = row["ids"][row["num_prompt_tokens"] :]
        assert row["ended"] == (written[-1] % 2 == 1 and written[-1] >= 3)
        assert row["ended"] or len(written) == 12
        assert not any(token % 2 == 1 and token >= 3 for token in written[:-1])


def test_plan_batches_contains_every_prompt_once_with_little_padding(tmp_path):
    prompts = some_prompts(tmp_path, 60)
    settings = PseudoDataSettings(temperature="0,0.7,1", batch_size=5)
    plan = plan_batches(prompts, settings)
    assert sorted(prompt.key for batch in plan for prompt in batch.prompts) == sorted(prompt.key for prompt in prompts)
    assert [batch.index for batch in plan] == list(range(len(plan)))
    assert len({batch.seed for batch in plan}) == len(plan)
    assert plan == plan_batches(prompts, settings)
    longest = [len(batch.prompts[0].ids) for batch in plan]
    assert longest == sorted(longest, reverse=True)
    by_temperature = {value: sum(len(w.prompts) for w in plan if w.temperature == value) for value in (0.0, 0.7, 1.0)}
    assert by_temperature == {0.0: 20, 0.7: 20, 1.0: 20}
    num_padding = sum(len(batch.prompts[0].ids) - len(prompt.ids) for batch in plan for prompt in batch.prompts)
    unsorted = [prompts[begin : begin + 5] for begin in range(0, 60, 5)]
    num_unsorted = sum(max(len(p.ids) for p in batch) - len(prompt.ids) for batch in unsorted for prompt in batch)
    assert num_padding < num_unsorted / 3


def test_drafter_does_not_change_greedy_text(target, tmp_path):
    lookup = draftsmith.artifacts.families.find("lookup")
    artifact = tmp_path / "artifact"
    draftsmith.save(lookup.Drafter(lookup.Config(), target), artifact, target=target, record={})
    prompts = some_prompts(tmp_path, 7)
    write_pseudo_data(target, prompts, tmp_path / "plain", SMALL)
    write_pseudo_data(LocalWriter(target, draft=str(artifact)), prompts, tmp_path / "drafted", SMALL)
    assert rows_of(tmp_path / "plain") == rows_of(tmp_path / "drafted")
    # By the verifier coupled sampled text is the same too, also in other batches.
    coupled = replace(SMALL, temperature="1", verifier="coupled")
    write_pseudo_data(target, prompts, tmp_path / "sampled", coupled)
    drafted = replace(coupled, batch_size=coupled.batch_size + 3)
    write_pseudo_data(LocalWriter(target, draft=str(artifact)), prompts, tmp_path / "drafted-sampled", drafted)
    sampled = {row["key"]: row["ids"] for row in read_pseudo_data(tmp_path / "sampled").table.to_pylist()}
    found = {row["key"]: row["ids"] for row in read_pseudo_data(tmp_path / "drafted-sampled").table.to_pylist()}
    assert sampled == found != {row["key"]: row["ids"] for row in rows_of(tmp_path / "plain")}


def test_batch_invariant_text_is_the_same_in_other_batches(target, tmp_path):
    prompts = some_prompts(tmp_path, 4)
    settings = replace(SMALL, batch_invariant=True)
    write_pseudo_data(target, prompts, tmp_path / "first", settings)
    write_pseudo_data(target, prompts, tmp_path / "second", replace(settings, batch_size=3))
    first, second = (
        {row["key"]: row["ids"] for row in read_pseudo_data(tmp_path / name).table.to_pylist()}
        for name in ("first", "second")
    )
    assert first == second
    assert json.loads((tmp_path / "first" / MARKER).read_text())["batch_invariant"] is True


# --- Encoder-decoders --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", SEQ2SEQ)
def test_encoder_decoder_completes_each_source_from_its_start_token(architecture, tmp_path):
    target = text_target(architecture)
    target.model.generation_config.eos_token_id = list(range(3, VOCAB_SIZE, 5))
    prompts = some_prompts(tmp_path, 8)
    write_pseudo_data(target, prompts, tmp_path / "out", SMALL)
    rows = {row["key"]: row for row in rows_of(tmp_path / "out")}
    written = read_pseudo_data(tmp_path / "out", target)
    assert len(written) == len(prompts) and {row["ended"] for row in rows.values()} == {True, False}
    for prompt in prompts:
        ids = torch.tensor([prompt.ids])
        expected = target.model.generate(ids, attention_mask=ids.ge(0), do_sample=False, max_new_tokens=12)[0].tolist()
        assert (rows[prompt.key]["ids"], rows[prompt.key]["num_prompt_tokens"]) == (expected, 1)
        assert rows[prompt.key]["source_ids"] == prompt.ids
        one = written[written.keys.index(prompt.key)]
        assert (one.tokens_T.tolist(), one.source_S.tolist()) == (expected, prompt.ids)
        assert one.loss_mask_T.tolist() == [False] + [True] * (len(expected) - 1)
        assert rows[prompt.key]["text"] == target.tokenizer.decode(expected[1:])
    whole = contents(tmp_path / "out")
    (tmp_path / "out" / "part-00001.parquet").unlink()
    write_pseudo_data(target, prompts, tmp_path / "out", SMALL)
    assert contents(tmp_path / "out") == whole


def test_read_rejects_rows_of_another_architecture(target, tmp_path):
    """Both have the same tokenizer, and data from a server has no fingerprint."""
    other = text_target("t5")
    write_pseudo_data(other, some_prompts(tmp_path, 5), tmp_path / "out", SMALL)
    write_pseudo_data(target, some_prompts(tmp_path, 5), tmp_path / "causal", SMALL)
    for folder, wanted in ((tmp_path / "out", "llama"), (tmp_path / "causal", "t5")):
        target_info = read_target_info(save_target(tmp_path / wanted, wanted))
        kind = "an encoder-decoder" if wanted == "t5" else "a causal model"
        with pytest.raises(ValueError, match=rf"was made by another target .* is {kind}"):
            read_pseudo_data(folder, target_info)
    assert len(read_pseudo_data(tmp_path / "out", read_target_info(str(tmp_path / "t5")))) == 5


def test_recipe_uses_articles_as_sources_for_an_encoder_decoder(tmp_path, monkeypatch, capsys):
    """Long ones are truncated to the tokenizer's maximum; servers support causal targets only."""
    monkeypatch.chdir(tmp_path)
    path = save_target(tmp_path / "target", "bart")
    pairs = [{"article": f"{number} " * 400, "highlights": "unused"} for number in range(5)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    flags = ["--target", path, "--data", "pairs.jsonl", "--max-new-tokens", "8", "--output", "out"]
    recipe.main(*parse_settings(*SETTINGS, description="", argv=flags))
    assert f"5 of 5 sources were cut to {CONTEXT} tokens" in capsys.readouterr().out
    tokenizer = trained_tokenizer()
    articles = {tuple(tokenizer(pair["article"])["input_ids"][:CONTEXT]) for pair in pairs}
    assert {tuple(row["source_ids"]) for row in rows_of(tmp_path / "out")} == articles
    flags += ["--server", "http://localhost:1"]
    with pytest.raises(ValueError, match=r"--server supports causal targets, and .* is an encoder-decoder"):
        recipe.main(*parse_settings(*SETTINGS, description="", argv=flags))


def test_recipe_passes_template_arguments_and_records_them(tmp_path):
    path = save_target(tmp_path / "target")
    template = "{{ mood | default('calm') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    trained_tokenizer(template).save_pretrained(path)
    (tmp_path / "rows.jsonl").write_text('{"question": "why?"}\n')
    flags = ["--target", path, "--data", str(tmp_path / "rows.jsonl"), "--max-new-tokens", "4"]
    for mood, kwargs in (("calm", []), ("glad", ["--chat-template-kwargs", '{"mood": "glad"}'])):
        output = tmp_path / mood
        recipe.main(*parse_settings(*SETTINGS, description="", argv=[*flags, "--output", str(output), *kwargs]))
        (row,) = rows_of(output)
        assert trained_tokenizer().decode(row["ids"][: row["num_prompt_tokens"]]) == f"{mood}why?"
        manifest = json.loads((output / "_pseudo_data.json").read_text())
        assert manifest.get("chat_template_kwargs") == ({"mood": "glad"} if kwargs else None)


# --- Continuation after an interruption ---------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", ["0", "0,1"])
def test_write_restores_a_missing_shard_exactly(target, tmp_path, temperature):
    settings = PseudoDataSettings(max_new_tokens=8, batch_size=3, shard_batches=2, temperature=temperature, top_p=0.9)
    prompts = some_prompts(tmp_path, 14)
    write_pseudo_data(target, prompts, tmp_path / "out", settings)
    whole = contents(tmp_path / "out")
    assert len(whole) == 3
    (tmp_path / "out" / "part-00001.parquet").unlink()
    (tmp_path / "out" / ".part-00001.parquet.part-1").write_bytes(b"half")
    with pytest.raises(
        ValueError, match=r"is unfinished: 1 of 3 shards are missing; run the same recipes/pseudo_data.py"
    ):
        read_pseudo_data(tmp_path / "out")
    write_pseudo_data(target, prompts, tmp_path / "out", settings)
    assert contents(tmp_path / "out") == whole
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["_pseudo_data.json", *whole]


def test_run_continued_after_sigkill_equals_an_uninterrupted_one(tmp_path, capsys):
    path = save_target(tmp_path / "target")
    source = str(write_prompts(tmp_path / "prompts.jsonl", 20))
    flags = ["--target", path, "--data", source, "--max-new-tokens", "64", "--batch-size", "2", "--shard-batches", "1"]
    flags += ["--temperature", "0,1", "--seed", "5", "--max-prompts", "0", "--output"]
    interrupted, whole = tmp_path / "interrupted", tmp_path / "whole"
    kill_midway("pseudo_data", [*flags, str(interrupted)], lambda: (interrupted / "part-00002.parquet").exists())
    recipe.main(*parse_settings(*SETTINGS, description="", argv=[*flags, str(interrupted)]))
    assert "rows exist already" in capsys.readouterr().out
    recipe.main(*parse_settings(*SETTINGS, description="", argv=[*flags, str(whole)]))
    assert rows_of(interrupted) == rows_of(whole)
    assert contents(interrupted) == contents(whole)


@pytest.mark.parametrize("recipe_name", ["pseudo_data", "teacher_store"])
def test_continued_run_renders_the_date_of_the_first(tmp_path, monkeypatch, recipe_name):
    """The template writes the date; a run that is continued on the next day writes the same shards."""
    path, out = save_target(tmp_path / "target"), tmp_path / "out"
    dated_template = "{{ strftime_now('%d %b %Y') }}" + CHAT_TEMPLATE
    trained_tokenizer(dated_template).save_pretrained(path)
    turns = [[{"role": "user", "content": f"n {row}"}, {"role": "assistant", "content": "yes"}] for row in range(4)]
    source = tmp_path / "chats.jsonl"
    source.write_text("".join(json.dumps({"messages": one}) + "\n" for one in turns))
    flags = ["--target", path, "--data", str(source), "--batch-size", "1", "--output", str(out)]
    if recipe_name == "pseudo_data":
        flags += ["--max-new-tokens", "2", "--shard-batches", "1"]
    module = importlib.import_module(f"recipes.{recipe_name}")
    settings = [hint for name, hint in get_type_hints(module.main).items() if name != "return"]
    for day in (1, 2):
        today = SimpleNamespace(now=lambda day=day: datetime(2030, 1, day), fromisoformat=datetime.fromisoformat)
        monkeypatch.setattr(data.shards, "datetime", today)
        monkeypatch.setattr(transformers.utils.chat_template_utils, "datetime", today)
        module.main(*parse_settings(*settings, description="", argv=flags))
        shards = {file: file.read_bytes() for file in out.iterdir() if file.suffix in (".parquet", ".safetensors")}
        if day == 1:
            first = shards
            next(iter(shards)).unlink()
    assert shards == first
    if recipe_name == "pseudo_data":
        assert "template_time" in json.loads((out / "_pseudo_data.json").read_text())
        texts = [trained_tokenizer().decode(row["ids"]) for row in rows_of(out)]
        assert all(text.startswith("01 Jan 2030") for text in texts)


def test_a_run_begun_by_an_earlier_version_is_continued(target, tmp_path, capsys):
    """Format 1 drew a batch's rows from one generator; its greedy rows are the same."""
    prompts, out = some_prompts(tmp_path, 14), tmp_path / "out"
    settings = PseudoDataSettings(max_new_tokens=4, batch_size=3, shard_batches=2, temperature="0,1")
    write_pseudo_data(target, prompts, out, settings)
    whole = contents(out)
    manifest = json.loads((out / "_pseudo_data.json").read_text())
    assert manifest["format"] == 2
    (out / "_pseudo_data.json").write_text(json.dumps(manifest | {"format": 1}))
    write_pseudo_data(target, prompts, out, settings)
    assert "earlier version" not in capsys.readouterr().out, "nothing is missing"
    (out / "part-00001.parquet").unlink()
    write_pseudo_data(target, prompts, out, settings)
    assert "begun by an earlier version; rows sampled from now on have a seed each" in capsys.readouterr().out
    assert contents(out) == whole and json.loads((out / "_pseudo_data.json").read_text())["format"] == 1
    assert len(read_pseudo_data(out, target)) == 14


def test_sampled_rows_do_not_depend_on_the_batch_size(target, tmp_path):
    """Rows of a shard take the places of those that end, and each has its own seed."""
    texts = []
    for batch_size in (2, 8):
        settings = PseudoDataSettings(max_new_tokens=8, batch_size=8, shard_batches=1, temperature="1")
        (batch,) = plan_batches(some_prompts(tmp_path, 8), settings)
        settings = dataclasses.replace(settings, batch_size=batch_size)
        (found,) = LocalWriter(target).write([batch], settings)
        texts.append([completion.ids for completion in found])
    assert texts[0] == texts[1] and len({tuple(ids) for ids in texts[0]}) > 4


# --- Errors ------------------------------------------------------------------------------------------------------


def test_write_rejects_a_folder_of_another_run_or_other_files(target, tmp_path):
    prompts = some_prompts(tmp_path, 5)
    write_pseudo_data(target, prompts, tmp_path / "out", SMALL)
    before = contents(tmp_path / "out")
    other = PseudoDataSettings(max_new_tokens=13, batch_size=3, shard_batches=2, temperature="1")
    with pytest.raises(ValueError, match=r"other settings \(max_new_tokens was 12, is 13; temperature was \[0.0\], is"):
        write_pseudo_data(target, prompts, tmp_path / "out", other)
    with pytest.raises(ValueError, match=r"other settings.*num_prompts was 5, is 4"):
        write_pseudo_data(target, prompts[:4], tmp_path / "out", SMALL)
    with pytest.raises(ValueError, match=r"other settings.*target_fingerprint was"):
        write_pseudo_data(text_target(seed=1), prompts, tmp_path / "out", SMALL)
    assert contents(tmp_path / "out") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("text")
    with pytest.raises(ValueError, match=r"mine contains other files"):
        write_pseudo_data(target, prompts, tmp_path / "mine", SMALL)


def test_write_rejects_a_folder_that_another_run_uses(target, tmp_path):
    with locked_by_another_run(tmp_path / "out"), pytest.raises(ValueError, match="out is in use by another run"):
        write_pseudo_data(target, some_prompts(tmp_path, 5), tmp_path / "out", SMALL)
    write_pseudo_data(target, some_prompts(tmp_path, 5), tmp_path / "out", SMALL)


def test_recipe_continues_after_kill_before_the_manifest(tmp_path):
    """A run killed between the folder's creation and its manifest does not block the folder."""
    path, source = save_target(tmp_path / "target"), str(write_prompts(tmp_path / "prompts.jsonl", 4))
    (tmp_path / "out").mkdir()
    for name in (".lock", "._pseudo_data.json.part-1"):
        (tmp_path / "out" / name).touch()
    flags = ["--target", path, "--data", source, "--max-new-tokens", "2", "--output", str(tmp_path / "out")]
    recipe.main(*parse_settings(*SETTINGS, description="", argv=flags))
    names = [path.name for path in sorted((tmp_path / "out").iterdir())]
    assert names == ["_pseudo_data.json", "part-00000.parquet"]


@pytest.mark.parametrize(
    ("num_shards", "message"),
    [
        ("2", "num_shards is '2', expected int"),
        (None, "num_shards is None, expected int"),
        (0, "num_shards is 0"),
        (10**12, "num_shards is 1000000000000"),
    ],
)
def test_read_names_a_damaged_manifest(target, tmp_path, num_shards, message):
    write_pseudo_data(target, some_prompts(tmp_path, 2), tmp_path / "out", PseudoDataSettings(max_new_tokens=4))
    file = tmp_path / "out" / MARKER
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_shards": num_shards}))
    with pytest.raises(ValueError, match=f"{MARKER} is damaged: {message}"):
        read_pseudo_data(tmp_path / "out", target)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("ids", [[3, None], [4]], "ids has values that are missing or negative"),
        ("ids", [[3, -7], [4]], "ids has values that are missing or negative"),
        ("ids", [[3, 9999], [4]], "ids has token 9999, and the vocabulary has"),
        ("ids", [None, [4]], "1 rows have no ids"),
        ("num_prompt_tokens", [-5, 1], "num_prompt_tokens has values that are missing or negative"),
        ("key", [None, "k"], "1 rows have no key"),
    ],
)
def test_read_names_a_shard_whose_columns_do_not_fit(target, tmp_path, name, values, message):
    write_pseudo_data(target, some_prompts(tmp_path, 2), tmp_path / "out", PseudoDataSettings(max_new_tokens=4))
    (file,) = (tmp_path / "out").glob("*.parquet")
    table = pyarrow.parquet.read_table(file)
    column = pyarrow.array(values, table.schema.field(name).type)
    pyarrow.parquet.write_table(table.set_column(table.schema.get_field_index(name), name, column), file)
    with pytest.raises(ValueError, match=rf"part-00000.parquet is damaged \({message}"):
        read_pseudo_data(tmp_path / "out", target)


def test_read_rejects_damaged_data_and_other_targets(target, tmp_path):
    write_pseudo_data(target, some_prompts(tmp_path, 5), tmp_path / "out", SMALL)
    with pytest.raises(ValueError, match=r"out was made by another target"):
        read_pseudo_data(tmp_path / "out", text_target(seed=1))
    with pytest.raises(ValueError, match=r"out was made with another tokenizer"):
        read_pseudo_data(tmp_path / "out", Target(target.model, trained_tokenizer(vocab_size=300)))
    with pytest.raises(ValueError, match=r"nowhere is not a folder; make one with recipes/pseudo_data.py"):
        read_pseudo_data(tmp_path / "nowhere")
    shard = tmp_path / "out" / "part-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"part-00000.parquet is damaged .*; delete it and run the command again"):
        read_pseudo_data(tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"temperature": "hot"}, "temperature is 'hot'; expected a number"),
        ({"temperature": "-1"}, "temperature is -1.0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"generation_config": '{"min_q": 1}'}, "no setting 'min_q'; did you mean 'min_p'?"),
        ({"generation_config": "nowhere.json"}, "generation config 'nowhere.json' cannot be read"),
        ({"verifier": "token"}, "verifier is 'token'; it must be auto or coupled"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
    ],
)
def test_settings_out_of_range_are_rejected(settings, message):
    with pytest.raises(ValueError, match=message):
        PseudoDataSettings(**settings)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temprature", "1"], "unknown setting '--temprature' on the command line; did you mean --temperature?"),
        (["--top-p", "2"], "top_p is 2.0; it must be above 0 and at most 1"),
        (["--data", "nothing.jsonl"], "no such file or folder: 'nothing.jsonl'"),
        (["--max-new-tokens", str(CONTEXT - 5)], "set --long-prompts to drop or cut"),
        (["--output", "mine"], "mine contains other files"),
        (["--server", "http://localhost:1", "--draft", "a"], "--draft has no effect with --server"),
        (["--server", "http://localhost:1", "--verifier", "coupled"], "--verifier coupled has no effect with --server"),
        (["--server", "http://localhost:1"], "no valid answer from http://localhost:1/v1/models"),
        (["--target", "./nowhere"], "target './nowhere' "),
        (["--max-new-tokens", str(CONTEXT)], f"leaves no room for a prompt in a context of {CONTEXT}"),
        (["--draft", "nowhere"], "artifact nowhere: no such folder"),
    ],
)
def test_recipe_rejects_invalid_input_before_loading_weights(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    path = save_target(tmp_path / "target")
    (tmp_path / "target" / "model.safetensors").write_bytes(b"not weights")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("text")
    base = ["--target", path, "--data", str(write_prompts(tmp_path / "prompts.jsonl", 3)), "--output", "out"]
    with pytest.raises((ValueError, SystemExit)) as error:
        recipe.main(*parse_settings(*SETTINGS, description="", argv=base + flags))
    output = capsys.readouterr().err + str(error.value)
    assert message in output
    assert not (tmp_path / "out").exists()


# --- Servers -----------------------------------------------------------------------------------------------------


@pytest.fixture
def server(target, monkeypatch) -> Iterator[OpenAIServer]:
    monkeypatch.setattr(data.writers.server_pool, "FIRST_WAIT_S", 0.01)
    running = OpenAIServer(target)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


def test_server_writes_the_same_text_as_the_local_loop(target, server, tmp_path):
    prompts = some_prompts(tmp_path, 11)
    write_pseudo_data(target, prompts, tmp_path / "local", SMALL)
    server.num_failures = 4
    writer = ServerWriter(server.url + "/v1/", target.tokenizer, num_in_flight=6)
    write_pseudo_data(writer, prompts, tmp_path / "served", SMALL)
    for local, served in zip(rows_of(tmp_path / "local"), rows_of(tmp_path / "served"), strict=True):
        assert (local["key"], local["ids"], local["seed"]) == (served["key"], served["ids"], served["seed"])
        assert (served["target"], served["target_fingerprint"], served["is_retokenized"]) == ("tiny", None, False)
    assert server.max_active > 1
    assert len(server.requests) == 11 + 4
    assert {request["model"] for request in server.requests} == {"tiny"}
    assert read_pseudo_data(tmp_path / "served", target).keys == read_pseudo_data(tmp_path / "local").keys


def test_server_gets_the_generation_config_in_its_own_names(target, server, tmp_path):
    prompts, writer = some_prompts(tmp_path, 2), ServerWriter(server.url, target.tokenizer)
    given = '{"repetition_penalty": 1.1, "min_p": 0.1, "min_new_tokens": 3, "eos_token_id": 2}'
    write_pseudo_data(writer, prompts, tmp_path / "out", dataclasses.replace(SMALL, generation_config=given))
    expected = {"repetition_penalty": 1.1, "min_p": 0.1, "min_tokens": 3, "stop_token_ids": [2]}
    assert all(request.items() >= expected.items() for request in server.requests)
    for config, message in (("model", "'model' is not supported with a server"), ('{"typical_p": 0.5}', "typical_p")):
        with pytest.raises(ValueError, match=message):
            write_pseudo_data(writer, prompts, tmp_path / "no", dataclasses.replace(SMALL, generation_config=config))
    assert not (tmp_path / "no").exists()


def test_server_answers_each_turn(target, server, tmp_path):
    rows = [{"turns": [f"What is {row}?", "Shorter, please.", "Why?"][: 1 + row % 3]} for row in range(7)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = load_prompts(str(tmp_path / "rows.jsonl"), trained_tokenizer(CHAT_TEMPLATE), each_turn=True)
    write_pseudo_data(target, prompts, tmp_path / "local", SMALL)
    write_pseudo_data(ServerWriter(server.url, target.tokenizer), prompts, tmp_path / "served", SMALL)
    local, served = ({row["key"]: row["ids"] for row in rows_of(tmp_path / name)} for name in ("local", "served"))
    assert local == served and len(local) == 7 + 4 + 2


def test_served_samples_depend_on_the_seed_alone(target, server, tmp_path):
    prompts = some_prompts(tmp_path, 9)
    settings = PseudoDataSettings(max_new_tokens=12, batch_size=3, shard_batches=1, temperature="1", seed=7)
    write_pseudo_data(ServerWriter(server.url, target.tokenizer), prompts, tmp_path / "out", settings)
    whole = contents(tmp_path / "out")
    (tmp_path / "out" / "part-00001.parquet").unlink()
    num_requests = len(server.requests)
    write_pseudo_data(ServerWriter(server.url, target.tokenizer, num_in_flight=1), prompts, tmp_path / "out", settings)
    assert contents(tmp_path / "out") == whole
    assert len(server.requests) == num_requests + 3
    assert len({request["seed"] for request in server.requests}) == 9


def test_served_text_is_marked_as_retokenized(target, server, tmp_path):
    server.returns_ids, server.eos = False, (EOS_ID,)
    prompts = some_prompts(tmp_path, 5)
    write_pseudo_data(ServerWriter(server.url, target.tokenizer, as_text=True), prompts, tmp_path / "out", SMALL)
    assert {request["prompt"] for request in server.requests} == {prompt.text for prompt in prompts}
    for row in rows_of(tmp_path / "out"):
        assert row["is_retokenized"]
        written = row["ids"][row["num_prompt_tokens"] :]
        assert target.tokenizer.decode(written, skip_special_tokens=True) == row["text"].removesuffix("<eos>")
        assert row["ended"] == (written[-1] == EOS_ID)


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({}, "<turn>"),
        ({"stop_reason": None}, "<eos>"),
        ({"stop_reason": 384}, "<turn>"),
        ({"matched_stop": 384}, "<turn>"),
        ({"matched_stop": "<turn>"}, "<turn>"),
        ({"stop_reason": "\n\n"}, None),
    ],
)
def test_served_text_ends_with_the_token_that_ended_it(target, server, tmp_path, extra, expected):
    """384 is the end of a turn, which the chat template writes, beside the tokenizer's own end token."""
    tokenizer = trained_tokenizer("{% for m in messages %}{{ m.content }}<turn>\n{% endfor %}")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    server.returns_ids, server.eos, server.extra = False, tuple(range(VOCAB_SIZE)), extra
    writer = ServerWriter(server.url, tokenizer, end_ids=(EOS_ID, 384))
    write_pseudo_data(writer, some_prompts(tmp_path, 1), tmp_path / "out", SMALL)
    (row,) = rows_of(tmp_path / "out")
    assert row["ended"] == (expected is not None)
    assert row["text"].endswith(expected or "")
    assert row["text"].count("<eos>") + row["text"].count("<turn>") == (expected is not None)


def test_server_errors_are_reported(target, server, tmp_path):
    writer = ServerWriter(server.url, target.tokenizer, attempts=3)
    server.num_failures, server.status = 1, 400
    with pytest.raises(ValueError, match=r'rejected the request: 400 \{"error": "out of luck"\}'):
        write_pseudo_data(writer, some_prompts(tmp_path, 1), tmp_path / "out", SMALL)
    assert len(server.requests) == 1, "a rejected request is not repeated"
    server.num_failures, server.status = 3, 503
    with pytest.raises(ValueError, match=r"no valid answer .* after 3 attempts: 503"):
        write_pseudo_data(writer, some_prompts(tmp_path, 1), tmp_path / "out", SMALL)
    server.truncates = True
    with pytest.raises(ValueError, match=r"no valid answer .* after 3 attempts: IncompleteRead"):
        write_pseudo_data(writer, some_prompts(tmp_path, 1), tmp_path / "out", SMALL)
    with pytest.raises(ValueError, match=r"expected an address like http"):
        ServerWriter("localhost:8000", target.tokenizer)
    with pytest.raises(ValueError, match=r"no valid answer from http://127.0.0.1:9/v1/models"):
        ServerWriter("http://127.0.0.1:9", target.tokenizer)
