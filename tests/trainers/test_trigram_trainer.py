"""Tri-gram counts against counters on random corpora: in chunks, within a budget, and after an interruption."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from safetensors.numpy import save_file

import draftsmith
from data.pseudo_data import read_pseudo_data
from draftsmith.artifacts.artifact import read_manifest
from draftsmith.drafters.trigram.compiled import Table
from tests.support import runs
from tests.support.models import VOCAB_SIZE
from tests.support.runs import make_data, make_target, trainer_settings
from trainers import trigram
from trainers.corpora.corpus import documents
from trainers.training.loop import train
from trainers.trigram import build, count

CORPUS = some.lists(some.lists(some.integers(0, 3), max_size=9), max_size=8)
FEW = settings(max_examples=80, deadline=None)
Successors = dict[tuple[int, int], list[tuple[int, float]]]


def count_chunks(texts: Sequence[Sequence[int]], folder: Path, size: int, vocab_size: int = 4) -> list[Path]:
    """Returns the chunk files of these texts."""
    arrays = [np.array(text, np.int64) for text in texts]
    files = []
    for begin in range(0, len(arrays), size):
        files.append(folder / f"{len(files)}.safetensors")
        save_file(count(arrays[begin : begin + size], vocab_size=vocab_size), files[-1])
    return files


def count_successors(texts: Sequence[Sequence[int]]) -> dict[tuple[int, int], Counter[int]]:
    following: dict[tuple[int, int], Counter[int]] = defaultdict(Counter)
    for text in texts:
        for first, second, third in zip(text, text[1:], text[2:], strict=False):
            following[first, second][third] += 1
    return following


def expected(texts: Sequence[Sequence[int]], most: int) -> Successors:
    """Returns the most frequent successors of each pair, ties going to smaller ids."""
    return {
        pair: [
            (token, float(np.float32(times / after.total())))
            for token, times in sorted(after.items(), key=lambda one: (-one[1], one[0]))[:most]
        ]
        for pair, after in sorted(count_successors(texts).items())
    }


def read(table: Table, vocab_size: int = 4) -> Successors:
    assert [array.dtype for array in table] == [np.int64, np.int64, np.int32, np.float32]
    return {
        divmod(key, vocab_size): list(
            zip(table.tokens_S[begin:end].tolist(), table.weights_S[begin:end].tolist(), strict=True)
        )
        for key, begin, end in zip(table.keys_K.tolist(), table.begins_K[:-1], table.begins_K[1:], strict=True)
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parts")


@FEW
@given(CORPUS, some.integers(1, 4), some.integers(1, 4), some.integers(1, 12))
def test_the_table_equals_counters(folder: Path, texts: list[list[int]], size: int, most: int, at_a_time: int) -> None:
    """For any chunk size and any number of tri-grams merged at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trigram, "MERGE_SIZE", at_a_time)
        table = build(count_chunks(texts, folder, size), 4, most)
    assert list(read(table).items()) == list(expected(texts, most).items())


@pytest.mark.parametrize(
    "texts", [[], [[]], [[2]], [[2, 2]], [[1] * 30], [[3, 3, 3], [3, 3, 3]], [[0, 0], [0, 0, 0]], [[3, 0], [1, 2, 3]]]
)
def test_edge_case_corpora(tmp_path: Path, texts: list[list[int]]) -> None:
    """No text, too little, all tokens equal, and texts whose boundaries must not be crossed."""
    table = build(count_chunks(texts, tmp_path, 1), 4, 12)
    assert read(table) == expected(texts, 12)


@FEW
@given(CORPUS, some.integers(1, 4), some.integers(1, 400))
def test_a_budget_drops_the_rarest_pairs(folder: Path, texts: list[list[int]], size: int, budget: int) -> None:
    left, kept = budget, []
    after = count_successors(texts)
    for pair in sorted(after, key=lambda pair: (-after[pair].total(), pair)):
        left -= 16 + 8 * min(2, len(after[pair]))
        if left < 0:
            break
        kept.append(pair)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trigram, "MERGE_SIZE", 1)
        table = build(count_chunks(texts, folder, size), 4, 2, budget)
    whole = expected(texts, 2)
    assert read(table) == {pair: whole[pair] for pair in sorted(kept)}


def test_budget_keeps_no_smaller_pair_after_one_that_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three pairs occur twice, each in a block by itself: the first takes 24 of 54 bytes, the others 32 and 24."""
    twice = [[0, 0, 1], [1, 1, 2], [1, 1, 3], [2, 2, 3], [0, 0, 1], [2, 2, 3]]
    often = [*([0, 1, token] for token in range(4)), *([1, 2, token] for token in range(3))]
    monkeypatch.setattr(trigram, "MERGE_SIZE", 1)
    files = count_chunks([*twice, *often], tmp_path, 99)
    assert len(list(trigram.merge_counts(files, 4))) == 4
    table = build(files, 4, 12, 48 + 40 + 54)
    assert list(read(table)) == [(0, 0), (0, 1), (1, 2)]


def test_a_budget_prints_what_it_drops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = count_chunks([[0, 1, 2, 0, 1, 2, 0, 1], [3, 3, 3]], tmp_path, 2)
    assert len(build(files, 4, 12, 4 * 24).keys_K) == 4
    assert capsys.readouterr().out == ""
    table = build(files, 4, 12, 2 * 24 + 23)
    assert read(table) == {(0, 1): [(2, 1.0)], (1, 2): [(0, 1.0)]}
    printed = capsys.readouterr().out
    assert "keeps 2 of 4 pairs of tokens, with 2 successors; dropped pairs occurred at most 2 times" in printed


# --- Runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny target in `target` and its text in `data`."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("runs")
    make_data(make_target(root / "target"), root / "data", num_rows=20)
    return root


run_settings = partial(runs.run_settings, batch_size=4, max_held_out=2)


def test_a_run_counts_the_targets_text(run_folder: Path) -> None:
    """Prompts are context only: the first supervised token is preceded by two prompt tokens."""
    output = train(trigram, trainer_settings(trigram, num_sequences=5, bump=0.0), run_settings(run_folder, "run"))
    target = draftsmith.Target.from_pretrained(str(run_folder / "target"), dtype="float32")
    drafter = draftsmith.load(output, target)
    assert drafter.config.num_sequences == 5 and drafter.config.bump == 0
    rows = list(map(read_pseudo_data(run_folder / "data").__getitem__, range(20)))
    texts = [text.tolist() for text in documents(rows, context=2)]
    assert all(len(text) <= 18 for text in texts)
    found, every = read(drafter.table, VOCAB_SIZE), expected(texts, 12)
    assert set(found) <= set(every) and len(found) > 0.8 * len(every), "all but what was held out"
    acceptance = read_manifest(output)["measured_acceptance"]["acceptance"]
    assert 0 <= acceptance <= 5


def test_an_interrupted_build_ends_with_the_same_bytes(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = trainer_settings(trigram, part_documents=6)
    whole = train(trigram, chosen, run_settings(run_folder, "whole"))
    calls = []

    def stopped(texts: Any, vocab_size: int) -> dict[str, np.ndarray]:
        calls.append(len(texts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return count(texts, vocab_size=vocab_size)

    monkeypatch.setattr(trigram, "count", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(trigram, chosen, run_settings(run_folder, "killed"))
    assert len(list((run_folder / "killed" / "parts").glob("*.safetensors"))) == 2
    killed = train(trigram, chosen, run_settings(run_folder, "killed"))
    assert calls[:3] == [6, 6, 6] and sum(calls[2:]) == sum(calls) - 12, "parts that are there are not made again"
    names = sorted(file.name for file in whole.glob("*.npy"))
    assert len(names) == 4
    assert [(killed / name).read_bytes() for name in names] == [(whole / name).read_bytes() for name in names]


def test_a_vocabulary_too_large_to_count_raises(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trigram, "LARGEST_VOCABULARY", VOCAB_SIZE - 1)
    with pytest.raises(ValueError, match=f"the target has {VOCAB_SIZE} tokens; at most"):
        train(trigram, trigram.Settings(), run_settings(run_folder, "large"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_successors": 0}, "num_successors is 0; it must be at least 1"),
        ({"part_documents": 0}, "part_documents is 0"),
        ({"budget_mb": -1.0}, "budget_mb is -1.0; it must be at least 0"),
        ({"maker": "random"}, "maker is 'random'"),
    ],
)
def test_invalid_settings_raise(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_settings(trigram, **changes)
