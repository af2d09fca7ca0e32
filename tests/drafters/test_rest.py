"""Tests of REST: drafts against a scan of all documents, and how its datastore is built, resumed and checked."""

import json
import os
import signal
import subprocess
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as some

import draftsmith
from data.batches import example
from data.pseudo_data import read_pseudo_data
from data.teacher_store import TeacherStoreSettings, write_teacher_store
from draftsmith import Target
from draftsmith.artifacts.artifact import read_manifest
from draftsmith.drafters import rest
from draftsmith.drafters.rest import UNSEEN, Config, Drafter
from draftsmith.parts import suffix_array
from draftsmith.parts.trie import TokenTree
from tests.support import runs
from tests.support.families.retrieval import DOCUMENTS, TOKENS, paths_of, shards_for, slow_match
from tests.support.families.retrieval import VOCAB_SIZE as FEW_TOKENS
from tests.support.family import Watched, check_family, texts
from tests.support.models import SEQ2SEQ, VOCAB_SIZE, greedy_by_transformers, padded, prompts, tiny_target
from tests.support.runs import command, environment, make_data, make_target, trainer_settings
from trainers import rest as trainer
from trainers.corpora import corpus, suffix_arrays
from trainers.corpora.suffix_arrays import build, group_texts
from trainers.training.loop import train


def drafter_with_datastore(target: Target) -> Drafter:
    """Returns a drafter with a datastore."""
    config = Config(min_match=1, max_match=6, max_matches=8, num_draft=5, num_nodes=8)
    return Drafter(config, target, shards_for(target))


EXAMPLE = drafter_with_datastore


def test_family(tmp_path: Path) -> None:
    check_family(rest, drafter_with_datastore, tmp_path)


def slow_tree(config: Config, documents: list[list[int]], text: list[int], budget: int) -> dict[tuple, float]:
    """Returns the probability of every prefix of what follows the longest match, the likeliest first."""
    _, followed = slow_match(documents, text, config.max_match, config.min_match)
    counts: Counter[tuple[int, ...]] = Counter()
    for tokens, number in followed.items():
        for end in range(min(len(tokens), budget, config.num_draft) + 1):
            counts[tokens[:end]] += number
    probabilities = {(): 1.0}
    for prefix in sorted(counts, key=len):
        if prefix:
            probabilities[prefix] = probabilities[prefix[:-1]] * counts[prefix] / (counts[prefix[:-1]] + UNSEEN)
    del probabilities[()]
    return dict(sorted(probabilities.items(), key=lambda item: -item[1]))


def tree_of(drafter: Drafter, text: list[int], budget: int) -> tuple[TokenTree, dict[tuple, float]]:
    tree = drafter.tree(text, budget)
    return tree, dict(zip(paths_of(tree), tree.weights, strict=True))


@hypothesis_settings(max_examples=40, deadline=None)
@given(
    DOCUMENTS,
    some.lists(TOKENS, min_size=1, max_size=5),
    some.integers(0, 6),
    some.integers(1, 8),
    some.sampled_from([0.0, 0.1, 0.4]),
)
def test_tree_keeps_the_likeliest_prefixes(
    documents: list[list[int]], text: list[int], cut: int, num_nodes: int, min_chance: float
) -> None:
    """With the documents in one shard or two; of equally likely prefixes any may be kept, but never before a parent."""
    config = Config(max_match=4, num_draft=3, num_nodes=num_nodes, min_chance=min_chance)
    expected = slow_tree(config, documents, text, 2)
    likely = [one for one in expected.values() if one >= min_chance][:num_nodes]
    found = []
    for groups in ([documents], [documents[:cut], documents[cut:]]):
        shards = tuple(build([np.array(one, np.int64) for one in group], FEW_TOKENS) for group in groups)
        tree, probabilities = tree_of(Drafter(config, tiny_target("llama"), shards), text, 2)
        assert sorted(probabilities.values(), reverse=True) == pytest.approx(likely)
        assert all(one == pytest.approx(expected[prefix]) for prefix, one in probabilities.items())
        assert all(parent <= node for node, parent in enumerate(tree.parents))
        found.append(sorted(probabilities.values()))
    assert found[0] == pytest.approx(found[1])


def test_tree_by_hand() -> None:
    """1 2 was followed by 3 4 twice and by 3 5 once; 2 alone was also followed by 6."""
    documents = [[1, 2, 3, 4], [7, 1, 2, 3, 4], [1, 2, 3, 5], [8, 2, 6]]
    drafter = Drafter(Config(), tiny_target("llama"), (build([np.array(one) for one in documents], VOCAB_SIZE),))
    third = 3 / 5
    _, found = tree_of(drafter, [9, 1, 2], 10)
    assert found == pytest.approx({(3,): third, (3, 4): third * 2 / 5, (3, 5): third * 1 / 5})
    assert tree_of(drafter, [1, 2], 1)[1] == pytest.approx({(3,): third}), "no deeper than the budget"
    assert tree_of(drafter, [5, 2], 10)[1] == {}, "a single token is too short a match"
    assert tree_of(drafter, [3, 4], 10)[1] == {}, "nothing follows the match"


def test_many_matches_are_read_evenly_spread() -> None:
    """Of ninety matches, sorted by the token before, which decides what follows, a third of each kind is read."""
    documents = [np.array([before, 9, 9, before]) for before in (1, 2, 3) for _ in range(30)]
    whole, halves = (build(documents, VOCAB_SIZE),), [documents[at::2] for at in (0, 1)]
    for shards in (whole, tuple(build(half, VOCAB_SIZE) for half in halves)):
        drafter = Drafter(Config(max_matches=30), tiny_target("llama"), shards)
        _, found = tree_of(drafter, [9, 9], 10)
        assert found == pytest.approx(dict.fromkeys([(1,), (2,), (3,)], 10 / 32))
    nine = tuple(build(documents[at : at + 10], VOCAB_SIZE) for at in range(0, 90, 10))
    _, found = tree_of(Drafter(Config(max_matches=4), tiny_target("llama"), nine), [9, 9], 10)
    # Matches 0, 23, 46 and 69 of the ninety are read.
    assert found == pytest.approx({(1,): 2 / 6, (2,): 1 / 6, (3,): 1 / 6})


def test_stored_text_is_drafted_completely() -> None:
    target = tiny_target("llama")
    (text,) = greedy_by_transformers("llama", 1, 20)
    drafter = Drafter(Config(num_draft=6, num_nodes=6, min_chance=0), target, (build([np.array(text)], VOCAB_SIZE),))
    out = draftsmith.generate(target, torch.tensor([text[:9]]), drafter, max_new_tokens=20)
    assert texts(out) == [text] and out.stats.steps == 3, "twice six drafted tokens and one more, and the rest"


def test_finished_rows_are_not_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    target = tiny_target("llama")
    drafter, rows = Watched(drafter_with_datastore(target)), prompts(2)
    looked_up = []
    inner = drafter.inner.tree
    monkeypatch.setattr(drafter.inner, "tree", lambda text, budget: looked_up.append(text[0]) or inner(text, budget))
    ids, mask = padded(rows)
    plain = texts(draftsmith.generate(target, ids, attention_mask=mask, max_new_tokens=20))
    end = next(token for token in plain[0][len(rows[0]) :] if token not in plain[1][len(rows[1]) :])
    out = draftsmith.generate(target, ids, drafter, attention_mask=mask, max_new_tokens=20, eos_token_id=end)
    assert texts(out)[1] == plain[1] and texts(out)[0] == plain[0][: len(texts(out)[0])]
    counts = Counter(looked_up)
    assert 0 < counts[rows[0][0]] < counts[rows[1][0]]


@pytest.mark.parametrize("architecture", SEQ2SEQ)
def test_encoder_decoder_gets_the_likeliest_path(architecture: str) -> None:
    target = tiny_target(architecture)
    for num_rows in (1, 5):
        ids, mask = padded(prompts(num_rows), side="left")
        watched = Watched(drafter_with_datastore(target))
        out = draftsmith.generate(target, ids, watched, attention_mask=mask, max_new_tokens=20)
        assert texts(out) == greedy_by_transformers(architecture, num_rows, 20)
        assert watched.num_drafted > 0


def test_empty_datastore_drafts_nothing() -> None:
    target = tiny_target("llama")
    for shards in ((), (build([], VOCAB_SIZE),), (build([np.array([4])], VOCAB_SIZE),)):
        out = draftsmith.generate(target, torch.tensor([[4, 4]]), Drafter(Config(), target, shards), max_new_tokens=4)
        assert out.stats.steps == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_match": 3, "max_match": 2}, "min_match 3 must be at least 1 and at most max_match 2"),
        ({"min_match": 0}, "min_match 0 must be at least 1"),
        ({"max_matches": 0}, "max_matches is 0; it must be at least 1"),
        ({"num_draft": 0}, "num_draft is 0; it must be at least 1"),
        ({"num_nodes": 0}, "num_nodes is 0; it must be at least 1"),
        ({"min_chance": 1.0}, "min_chance is 1.0; it must be at least 0 and below 1"),
    ],
)
def test_config_rejects_invalid_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**changes)
    with pytest.raises(ValueError, match=message):
        trainer_settings(trainer, **changes)


# --- Building the datastore ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny target in `target` and its text in `data`."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("runs")
    make_data(make_target(root / "target"), root / "data", num_rows=20)
    return root


run_settings = partial(runs.run_settings, batch_size=4)


def shards_of(output: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(output.glob("shard-*"))]


def test_datastore_holds_the_targets_text(folder: Path) -> None:
    output = train(trainer, trainer_settings(trainer, context=2, shard_tokens=100), run_settings(folder, "run"))
    target = draftsmith.Target.from_pretrained(str(folder / "target"), dtype="float32")
    drafter = draftsmith.load(output, target)
    rows = read_pseudo_data(folder / "data", target)
    held_out = {text.tobytes() for text in corpus.documents(rows, 2)}
    found = []
    for shard in drafter.shards:
        assert len(shard.tokens_S) <= 100
        ends = np.flatnonzero(shard.tokens_S == VOCAB_SIZE)
        found += [one[one < VOCAB_SIZE].astype(np.int64).tobytes() for one in np.split(shard.tokens_S, ends + 1)[:-1]]
    assert len(drafter.shards) > 1 and len(set(found)) == len(found)
    assert set(found) < held_out and len(held_out) - len(found) == 1, "all but the held-out row"
    assert not (output / "parts").exists()
    assert read_manifest(output)["measured_acceptance"]["acceptance"] >= 0
    assert train(trainer, trainer_settings(trainer, context=2, shard_tokens=100), run_settings(folder, "run")) == output


def test_resumed_build_gives_the_same_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(trainer, trainer_settings(trainer, shard_tokens=60), run_settings(folder, "whole"))
    built: list[int] = []

    def interrupted_build(texts: list[np.ndarray], vocab_size: int) -> Any:
        if len(built) == 2:
            raise KeyboardInterrupt
        built.append(len(texts))
        return build(texts, vocab_size)

    monkeypatch.setattr(suffix_arrays, "build", interrupted_build)
    with pytest.raises(KeyboardInterrupt):
        train(trainer, trainer_settings(trainer, shard_tokens=60), run_settings(folder, "broken"))
    monkeypatch.undo()
    kept = sorted((folder / "broken" / "parts").glob("*.safetensors"))
    times = [path.stat().st_mtime_ns for path in kept]
    watched = []
    monkeypatch.setattr(suffix_arrays, "build", lambda texts, size: watched.append(texts) or build(texts, size))
    broken = train(trainer, trainer_settings(trainer, shard_tokens=60), run_settings(folder, "broken"))
    assert len(times) == 2 and len(watched) == len(shards_of(whole)) - 2
    assert shards_of(broken) == shards_of(whole)


@pytest.mark.slow
def test_killed_build_resumes_to_the_same_bytes(folder: Path) -> None:
    """A process killed at a random moment after its second shard, and the same command again."""
    run = run_settings(folder, "killed")
    words = command("rest", target=run.target, data=run.data, output=run.output, batch_size=4, shard_tokens=18)
    process = subprocess.Popen(words, env=environment(), start_new_session=True, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (Path(run.output) / "parts" / "0001.safetensors").exists():
        time.sleep(0.001)
    time.sleep(int.from_bytes(os.urandom(2), "big") / 2**16 / 20)
    os.killpg(process.pid, signal.SIGKILL)
    _, error = process.communicate()
    assert process.returncode == -signal.SIGKILL, error
    whole = train(trainer, trainer_settings(trainer, shard_tokens=18), run_settings(folder, "unbroken"))
    assert shards_of(train(trainer, trainer_settings(trainer, shard_tokens=18), run)) == shards_of(whole)


def words(ids: list[int]) -> str:
    return " ".join(f"w{token}" for token in ids)


def test_build_reads_every_kind_of_data(folder: Path, tmp_path: Path) -> None:
    """The same text as JSONL, Parquet, a folder of text and a teacher store."""
    target = draftsmith.Target.from_pretrained(str(folder / "target"), dtype="float32")
    rows = [[number, *range(3, 12), number] for number in range(20, 30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": words(ids)}) + "\n" for ids in rows))
    pyarrow.parquet.write_table(pyarrow.table({"text": [words(ids) for ids in rows]}), tmp_path / "rows.parquet")
    (tmp_path / "texts").mkdir()
    for number, ids in enumerate(rows):
        (tmp_path / "texts" / f"{number}.txt").write_text(words(ids))
    write_teacher_store(
        target,
        [example(ids, None, str(ids)) for ids in rows],
        tmp_path / "store",
        TeacherStoreSettings(layers=(), top_k=2),
    )
    for name in ("rows.jsonl", "rows.parquet", "texts", "store"):
        run = run_settings(folder, f"from-{name}", data=str(tmp_path / name), max_held_out=1)
        output = train(trainer, trainer.Settings(), run)
        (shard,) = draftsmith.load(output, target).shards
        documents = "".join(f" {token} " for token in shard.tokens_S).split(f" {VOCAB_SIZE} ")
        found = [list(map(int, text.split())) for text in documents if text]
        assert len(found) >= 5 and all(ids in rows for ids in found), name


def test_build_keeps_within_its_budget(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = train(trainer, trainer_settings(trainer, budget_mb=0.001), run_settings(folder, "budget"))
    assert "the budget keeps" in capsys.readouterr().out
    target = draftsmith.Target.from_pretrained(str(folder / "target"), dtype="float32")
    (shard,) = draftsmith.load(output, target).shards
    assert 700 < shard.tokens_S.nbytes + shard.ends_P.nbytes <= 1000
    with pytest.raises(ValueError, match="no document fits into the budget of 1 tokens"):
        train(trainer, trainer_settings(trainer, budget_mb=1e-5), run_settings(folder, "tiny"))


@hypothesis_settings(max_examples=100, deadline=None)
@given(some.lists(some.integers(0, 30), max_size=10), some.integers(2, 12))
def test_group_texts_limits_the_tokens_of_a_group(lengths: list[int], shard_tokens: int) -> None:
    whole = np.arange(sum(lengths))
    groups = group_texts(np.split(whole, np.cumsum(lengths))[:-1], shard_tokens)
    pieces = [piece for group in groups for piece in group]
    assert np.array_equal(np.concatenate([*pieces, []]), whole)
    sizes = [sum(len(piece) + 1 for piece in group) for group in groups]
    assert all(size <= shard_tokens for size in sizes)
    for group, size, following in zip(groups, sizes, groups[1:], strict=False):
        assert group and size + len(following[0]) + 1 > shard_tokens, "the next text does not fit"


def test_trainer_rejects_invalid_settings() -> None:
    for changes in ({"budget_mb": -1.0}, {"context": -1}):
        with pytest.raises(ValueError, match="it must be at least 0"):
            trainer_settings(trainer, **changes)
    for size in (1, 2**29):
        with pytest.raises(ValueError, match=f"shard_tokens is {size}; it must lie between 2 and"):
            trainer_settings(trainer, shard_tokens=size)


def test_load_rejects_an_incomplete_datastore(tmp_path: Path) -> None:
    target = tiny_target("llama")
    draftsmith.save(drafter_with_datastore(target), tmp_path / "artifact", target=target)
    first, second = sorted((tmp_path / "artifact").glob("shard-*"))
    assert [path.name for path in (first, second)] == [
        "shard-0000-of-0002.safetensors",
        "shard-0001-of-0002.safetensors",
    ]
    whole = second.read_bytes()
    second.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="shard-0001-of-0002.safetensors is missing or truncated"):
        draftsmith.load(tmp_path / "artifact", target)
    second.unlink()
    with pytest.raises(ValueError, match="shard-0001-of-0002.safetensors is missing"):
        draftsmith.load(tmp_path / "artifact", target)
    first.unlink()
    with pytest.raises(ValueError, match="shard-0000-of-0002.safetensors is missing"):
        draftsmith.load(tmp_path / "artifact", target)
    with pytest.raises(ValueError, match="contains no shard of a datastore"):
        suffix_array.read_shards(tmp_path / "artifact", target.vocab_size)
