"""Conversations answered turn by turn: the target's own answers are the history of later turns."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch

from data.batches import split
from data.prompts import Prompt, load_prompts
from data.pseudo_data import read_pseudo_data, write_pseudo_data
from data.sources.conversation import split_turns
from data.turns import TurnsLeftOut, expand_turns, next_prompt
from data.writers import Completion, LocalWriter, PseudoDataSettings
from draftsmith import Target
from tests.support.models import tiny_model
from tests.support.text import CHAT_TEMPLATE, CONTEXT, EOS_ID, VOCAB_SIZE, trained_tokenizer

TOKENIZER = trained_tokenizer(CHAT_TEMPLATE)
SMALL = PseudoDataSettings(max_new_tokens=8, batch_size=3, shard_batches=2)


@pytest.fixture(scope="module")
def target() -> Target:
    return Target(tiny_model("llama", vocab_size=VOCAB_SIZE, max_position_embeddings=CONTEXT), TOKENIZER)


def load(path: Path, *rows: dict[str, Any], **options: Any) -> list[Prompt]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_prompts(str(path), TOKENIZER, each_turn=True, **options)


def conversations(folder: Path, num_rows: int = 8, **options: Any) -> list[Prompt]:
    """Returns prompts of one, two and three turns."""
    asked = ("Why?", "Shorter, please.", "Now in French.")
    rows = [{"turns": [f"What is {row}? {asked[row % 3]}", *asked[1 : 1 + row % 3]]} for row in range(num_rows)]
    return load(folder / "rows.jsonl", *rows, **options)


def message(role: str, content: str = "x", **others: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **others}


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in pyarrow.parquet.read_table(folder).to_pylist()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.parquet"))}


def greedy(target: Target, ids: list[int]) -> list[int]:
    given = torch.tensor([ids])
    out = target.model.generate(given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=8)
    return out[0, len(ids) :].tolist()


USER, ASSISTANT, SYSTEM = message("user"), message("assistant"), message("system")


@pytest.mark.parametrize(
    ("messages", "first", "later"),
    [
        ([USER], [USER], []),
        ([USER, ASSISTANT], [USER], []),
        ([SYSTEM, USER, ASSISTANT, USER, ASSISTANT, USER], [SYSTEM, USER], [[USER], [USER]]),
        ([USER, USER, ASSISTANT, USER, USER], [USER, USER], [[USER, USER]]),
        ([ASSISTANT, USER, ASSISTANT, USER], [ASSISTANT, USER], [[USER]]),
        ([USER, ASSISTANT, ASSISTANT, SYSTEM, ASSISTANT, USER], [USER], [[SYSTEM, USER]]),
        ([USER, ASSISTANT, SYSTEM], [USER], []),
    ],
)
def test_split_turns_leaves_out_recorded_answers(messages, first, later):
    assert split_turns(messages) == (first, later)


def test_split_turns_keeps_conversations_with_tools_whole():
    call = message("assistant", "", tool_calls=[{"name": "f"}])
    messages = [USER, call, message("tool"), ASSISTANT, USER]
    assert split_turns(messages) == (messages, [])


def test_each_turn_is_a_row_with_the_targets_answers_as_history(target, tmp_path):
    system = {"system": "Be brief."}
    recorded = [message("user", "Hello"), message("assistant", "recorded"), message("user", "And then?")]
    prompts = load(
        tmp_path / "rows.jsonl",
        {"turns": ["Why?", "Shorter, please.", "Now in French."], "category": "writing", **system},
        {"messages": recorded},
        {"question": "Alone?"},
    )
    write_pseudo_data(target, prompts, tmp_path / "out", SMALL)
    rows = rows_of(tmp_path / "out")
    three, two, one = (prompt.key for prompt in prompts)
    assert rows.keys() == {three, f"{three}.1", f"{three}.2", two, f"{two}.1", one}
    for key, start, asked in (
        (three, "<|system|>Be brief.<eos>\n", ["Why?", "Shorter, please.", "Now in French."]),
        (two, "", ["Hello", "And then?"]),
        (one, "", ["Alone?"]),
    ):
        history = start
        for turn, text in enumerate(asked):
            row = rows[f"{key}.{turn}" if turn else key]
            history += f"<|user|>{text}<eos>\n<|assistant|>"
            ids = TOKENIZER(history)["input_ids"]
            assert row["ids"][: row["num_prompt_tokens"]] == ids
            answer = row["ids"][row["num_prompt_tokens"] :]
            assert answer == greedy(target, ids)
            history += TOKENIZER.decode(answer, skip_special_tokens=True) + "<eos>\n"
    assert {rows[key]["category"] for key in rows if key.startswith(three)} == {"writing"}
    assert rows[f"{three}.2"]["source"].endswith("rows.jsonl:1, turn 3")
    written = read_pseudo_data(tmp_path / "out", target)
    assert written.num_supervised == sum(len(row["ids"]) - row["num_prompt_tokens"] for row in rows.values())


def test_answers_enter_the_history_without_their_end_token(tmp_path):
    (prompt,) = load(tmp_path / "rows.jsonl", {"turns": ["a", "b"]})
    words = TOKENIZER("seven")["input_ids"]
    for answer in (words, [*words, EOS_ID]):
        found = next_prompt(prompt, answer, TurnsLeftOut())
        assert (
            found is not None and found.text == "<|user|>a<eos>\n<|assistant|>seven<eos>\n<|user|>b<eos>\n<|assistant|>"
        )
        assert next_prompt(found, answer, TurnsLeftOut()) is None


def test_turns_that_do_not_fit_are_left_out_and_counted(target, tmp_path, capsys):
    prompts = load(
        tmp_path / "rows.jsonl", {"turns": ["a", "b " * 60, "c"]}, {"turns": ["d", "e"]}, max_prompt_tokens=60
    )
    write_pseudo_data(target, prompts, tmp_path / "out", SMALL)
    assert rows_of(tmp_path / "out").keys() == {prompts[0].key, prompts[1].key, f"{prompts[1].key}.1"}
    printed = capsys.readouterr().out
    assert "2 of 5 turns are left out" in printed and "rows.jsonl:1, turn 2 has" in printed
    assert "at most 60 fit" in printed
    assert len(expand_turns(target, prompts, 8)) == 3


@pytest.mark.parametrize("temperature", ["0", "0,1"])
def test_a_continued_run_writes_the_same_turns(target, tmp_path, temperature):
    settings = PseudoDataSettings(max_new_tokens=8, batch_size=3, shard_batches=2, temperature=temperature)
    prompts = conversations(tmp_path, 14)
    write_pseudo_data(target, prompts, tmp_path / "out", settings)
    whole = contents(tmp_path / "out")
    assert len(whole) == 3
    for name in whole:
        (tmp_path / "out" / name).unlink()
        write_pseudo_data(target, prompts, tmp_path / "out", settings)
        assert contents(tmp_path / "out") == whole
    table = pyarrow.parquet.read_table(tmp_path / "out").to_pylist()
    assert len({row["key"] for row in table}) == len(table) == 14 + 9 + 4
    batches = {(row["batch"], row["seed"], row["temperature"], row["key"].count(".")) for row in table}
    assert len(batches) == len({index for index, *_ in batches}), "a batch has one index, seed and temperature"
    assert json.loads((tmp_path / "out" / "_pseudo_data.json").read_text())["num_turns"] == 27


def test_a_run_of_the_earlier_version_is_not_mixed_with_turns(target, tmp_path):
    """It read the first turns only; without later turns the manifest is as it was, and the run continues."""
    prompts = conversations(tmp_path)
    first_turns = load_prompts(str(tmp_path / "rows.jsonl"), TOKENIZER)
    write_pseudo_data(target, first_turns, tmp_path / "out", SMALL)
    assert "num_turns" not in json.loads((tmp_path / "out" / "_pseudo_data.json").read_text())
    with pytest.raises(ValueError, match=r"other settings \(num_turns was null, is 15; prompts was .*\); name another"):
        write_pseudo_data(target, prompts, tmp_path / "out", SMALL)
    alone = load(tmp_path / "alone.jsonl", {"turns": ["What is 0? Why?"]})
    assert alone == load_prompts(str(tmp_path / "alone.jsonl"), TOKENIZER)
    assert alone[0].key == first_turns[0].key


def test_expand_turns_returns_the_prompts_of_pseudo_data(target, tmp_path):
    prompts = conversations(tmp_path)
    write_pseudo_data(target, prompts, tmp_path / "out", SMALL)
    rows = rows_of(tmp_path / "out")
    expanded = expand_turns(target, prompts, 8)
    assert [prompt.key for prompt in expanded] == [
        f"{prompt.key}.{turn}" if turn else prompt.key
        for row, prompt in enumerate(prompts)
        for turn in range(1 + row % 3)
    ]
    for prompt in expanded:
        assert prompt.ids == rows[prompt.key]["ids"][: rows[prompt.key]["num_prompt_tokens"]]
    assert expand_turns(target, expanded[:1], 8) == expanded[:1]


def test_turns_of_a_conversation_stay_together_in_the_split(target, tmp_path):
    prompts = conversations(tmp_path, 60)
    keys = [prompt.key for prompt in expand_turns(target, prompts, 2)]
    parts = [{keys[index].partition(".")[0] for index in part} for part in split(keys, held_out_share=0.3)]
    assert len(parts[0]) > 10 and len(parts[1]) > 5 and parts[0].isdisjoint(parts[1])


def test_conversations_with_the_same_first_turn_are_both_kept(tmp_path):
    rows = [{"turns": ["Why?", "Shorter."]}, {"turns": ["Why?", "Longer."]}, {"turns": ["Why?", "Longer."]}]
    first, second = load(tmp_path / "rows.jsonl", *rows)
    assert first.ids == second.ids and first.key != second.key


def test_only_the_first_turn_is_read_without_a_chat_template_and_from_cut_prompts(tmp_path, capsys):
    conversations(tmp_path, 3)
    prompts = load_prompts(str(tmp_path / "rows.jsonl"), trained_tokenizer(), each_turn=True)
    assert all(prompt.conversation is None for prompt in prompts)
    assert (
        "2 of 3 rows have several turns; only the first of each is used, since the tokenizer has no chat template"
        in (capsys.readouterr().out)
    )
    cut = conversations(tmp_path, 3, max_prompt_tokens=9, long_prompts="cut")
    assert all(prompt.conversation is None and len(prompt.ids) == 9 for prompt in cut)
    assert "the first turn of 2 conversations is cut; their later turns are left out" in capsys.readouterr().out


@pytest.mark.parametrize(("num_turns", "num_shards_at_once", "expected"), [(1, 2, 2), (3, 2, 6), (3, 1, 1)])
def test_more_shards_of_conversations_are_written_at_once(
    num_turns: int, num_shards_at_once: int, expected: int, target: Target, tmp_path: Path
) -> None:
    """A shard whose turn ends waits for its longest answer, in which others keep a server busy."""

    class WaitingWriter(LocalWriter):
        def __init__(self) -> None:
            super().__init__(target)
            self.num_shards_at_once, self.threads = num_shards_at_once, set[int]()
            self.all_have_come, self.alone = threading.Barrier(expected), threading.Lock()

        def write(self, shard: Any, settings: PseudoDataSettings) -> Iterator[list[Completion]]:
            if threading.get_ident() not in self.threads:
                self.threads.add(threading.get_ident())
                self.all_have_come.wait(timeout=30)  # fails if fewer shards are written at once
            with self.alone:
                yield from list(super().write(shard, settings))

    rows = [{"turns": [f"What is {row}?", "Why?", "Shorter."][:num_turns]} for row in range(8)]
    writer = WaitingWriter()
    settings = PseudoDataSettings(max_new_tokens=4, batch_size=1, shard_batches=1)
    write_pseudo_data(writer, load(tmp_path / "rows.jsonl", *rows), tmp_path / "out", settings)
    assert len(writer.threads) == expected and len(rows_of(tmp_path / "out")) == 8 * num_turns
