"""The teacher store and the live teacher: equal batches, the format on disk, and continuation after `kill -9`."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import recipes.teacher_store as recipe
from data.batches import Example, collate, example
from data.examples import open_examples, usable_rows
from data.pseudo_data import read_pseudo_data, write_pseudo_data
from data.shards import first_run_time
from data.teacher import complete
from data.teacher_store import MARKER, TeacherStoreSettings, open_teacher_store, write_teacher_store
from data.writers import PseudoDataSettings
from draftsmith import Target
from tests.support.runs import locked_by_another_run
from tests.support.text import (
    CONTEXT,
    VOCAB_SIZE,
    kill_midway,
    save_target,
    some_prompts,
    text_target,
    trained_tokenizer,
)
from trainers.training.settings import parse_settings

LAYERS, TOP_K = (0, 2, 3), 5
ALL = TeacherStoreSettings(layers=LAYERS, top_k=TOP_K, batch_size=4)
SETTINGS = (recipe.TeacherStoreRunSettings, TeacherStoreSettings)


@pytest.fixture(scope="module")
def target() -> Target:
    return text_target()


@pytest.fixture(scope="module")
def rows(target, tmp_path_factory) -> list[Example]:
    folder = tmp_path_factory.mktemp("rows")
    settings = PseudoDataSettings(max_new_tokens=10, temperature="1")
    write_pseudo_data(target, some_prompts(folder, 13), folder / "out", settings)
    return list(read_pseudo_data(folder / "out", target))


def write(target: Target, rows: list[Example], folder: Path, settings: TeacherStoreSettings = ALL) -> Path:
    write_teacher_store(target, rows, folder, settings)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


# --- Store and live teacher ---------------------------------------------------------------------------------------


def test_store_and_live_teacher_give_the_same_batches(target, rows, tmp_path):
    stored = open_teacher_store(write(target, rows, tmp_path / "store"), target)
    assert stored.keys == [row.key for row in rows]
    for begin in range(0, len(rows), 5):
        live = complete(collate(rows[begin : begin + 5]), target, LAYERS, TOP_K)
        from_store = collate([stored[index] for index in range(begin, min(begin + 5, len(rows)))])
        batch = complete(from_store, target, LAYERS, TOP_K)
        assert torch.equal(batch.tokens_BT, live.tokens_BT)
        assert torch.equal(batch.loss_mask_BT, live.loss_mask_BT)
        assert torch.equal(batch.lengths_B, live.lengths_B)
        assert batch.keys == live.keys
        real_BT = torch.arange(live.tokens_BT.shape[1]) < live.lengths_B[:, None]
        assert set(batch.hidden) == set(live.hidden) == set(LAYERS)
        for layer in LAYERS:
            # bf16 keeps 8 bits: half a unit in the last place is 1/256 of the value at most
            torch.testing.assert_close(
                batch.hidden[layer][real_BT], live.hidden[layer][real_BT], rtol=1 / 250, atol=1e-5
            )
            assert batch.hidden[layer].dtype == live.hidden[layer].dtype == target.dtype
        assert torch.equal(batch.top_ids_BTK[real_BT], live.top_ids_BTK[real_BT])
        # fp16 keeps 11 bits of log-probabilities, here of at most 8
        torch.testing.assert_close(batch.top_logits_BTK[real_BT], live.top_logits_BTK[real_BT], rtol=0, atol=8 / 2**11)
        torch.testing.assert_close(batch.log_normaliser_BT[real_BT], live.log_normaliser_BT[real_BT], rtol=0, atol=1e-5)


def test_narrowed_store_reads_only_what_is_wanted(target, rows, tmp_path, monkeypatch):
    stored = open_teacher_store(write(target, rows, tmp_path / "store"), target)
    narrowed, whole = stored.reading(LAYERS[:1], top=False), stored[3]
    slices = []

    class Counted:
        def __init__(self, shard):
            self.shard = shard

        def get_slice(self, name):
            slices.append(name)
            return self.shard.get_slice(name)

    monkeypatch.setattr(narrowed, "_shards", [Counted(shard) for shard in stored._shards])
    row = narrowed[3]
    assert sorted(slices) == sorted(["tokens", "loss_mask", f"hidden.{LAYERS[0]}"])
    assert row.hidden.keys() == {LAYERS[0]} and torch.equal(row.hidden[LAYERS[0]], whole.hidden[LAYERS[0]])
    assert row.top_ids_TK is None and torch.equal(row.tokens_T, whole.tokens_T)
    assert narrowed.fingerprint == stored.fingerprint and stored[3].hidden.keys() == set(LAYERS)


def test_complete_returns_the_models_own_outputs(target, rows):
    batch = complete(collate(rows[:4]), target, (0, 3), TOP_K)
    for row, length in enumerate(batch.lengths_B.tolist()):
        with torch.no_grad():
            out = target.model(input_ids=batch.tokens_BT[row : row + 1, :length], output_hidden_states=True)
        torch.testing.assert_close(batch.hidden[0][row, :length], out.hidden_states[0][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            target.norm(batch.hidden[3])[row, :length], out.hidden_states[3][0], rtol=1e-4, atol=1e-4
        )
        top = out.logits[0].topk(TOP_K)
        assert torch.equal(batch.top_ids_BTK[row, :length], top.indices)
        torch.testing.assert_close(batch.top_logits_BTK[row, :length], top.values, rtol=1e-4, atol=1e-4)
        normaliser = out.logits[0].logsumexp(-1)
        torch.testing.assert_close(batch.log_normaliser_BT[row, :length], normaliser, rtol=1e-4, atol=1e-4)
        tail = 1 - (batch.top_logits_BTK - batch.log_normaliser_BT[..., None]).exp().sum(-1)
        expected = 1 - out.logits[0].softmax(-1).gather(-1, top.indices).sum(-1)
        torch.testing.assert_close(tail[row, :length], expected, rtol=0, atol=1e-5)


def test_complete_runs_the_target_only_for_missing_outputs(target, rows, tmp_path, monkeypatch):
    stored = open_teacher_store(write(target, rows, tmp_path / "store"), target)
    batch = collate([stored[0], stored[1]])
    layers_read = []
    read = Target.read
    monkeypatch.setattr(
        Target, "read", lambda self, ids, layers, *more: layers_read.append(layers) or read(self, ids, layers, *more)
    )
    fewer = complete(batch, target, (2,), 3)
    assert layers_read == []
    assert (set(fewer.hidden), fewer.top_ids_BTK.shape[-1]) == ({2}, 3)
    assert torch.equal(fewer.top_ids_BTK, batch.top_ids_BTK[..., :3])
    assert complete(batch, target).top_ids_BTK is None
    more = complete(batch, target, (1, 2), 9)
    assert layers_read == [(1, 3)]
    assert (set(more.hidden), more.top_ids_BTK.shape[-1]) == ({1, 2}, 9)


def test_store_without_outputs_does_not_run_the_target(target, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(Target, "read", lambda *_, **__: pytest.fail("the target was run"))
    stored = open_teacher_store(write(target, rows, tmp_path / "store", TeacherStoreSettings()), target)
    for row, again in zip(rows, stored, strict=True):
        assert torch.equal(row.tokens_T, again.tokens_T)
        assert torch.equal(row.loss_mask_T, again.loss_mask_T)
        assert (again.key, again.hidden, again.top_ids_TK) == (row.key, {}, None)


# --- On disk -----------------------------------------------------------------------------------------------------


def test_shards_are_safetensors_with_documented_tensors(target, rows, tmp_path):
    folder = write(target, rows, tmp_path / "store")
    num_tokens = sum(len(row.tokens_T) for row in rows)
    shard = load_file(folder / "shard-00000.safetensors")
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in shard.items()}
    assert found == {
        "tokens": (torch.int32, (num_tokens,)),
        "loss_mask": (torch.bool, (num_tokens,)),
        "offsets": (torch.int64, (len(rows) + 1,)),
        **{f"hidden.{layer}": (torch.bfloat16, (num_tokens, target.hidden_size)) for layer in LAYERS},
        "top_log_probs": (torch.float16, (num_tokens, TOP_K)),
        "top_ids": (torch.int32, (num_tokens, TOP_K)),
        "log_normaliser": (torch.float32, (num_tokens,)),
    }


def test_write_prints_the_size_first(target, rows, tmp_path, capsys, monkeypatch):
    printed = []
    read = Target.read
    monkeypatch.setattr(Target, "read", lambda *a, **k: printed.append(capsys.readouterr().out) or read(*a, **k))
    folder = write(target, rows, tmp_path / "store")
    assert "hidden layers 0 2 3 of width 32 in bf16, top 5 logits" in printed[0]
    announced = float(printed[0].split(": ")[-1].split(" GB")[0]) * 1e9
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert size == pytest.approx(announced, rel=0.02)


def test_write_rejects_a_store_over_the_limit(target, rows, tmp_path):
    with pytest.raises(ValueError, match=r"would take [\d.e-]+ GB, over the limit of 1e-05 GB; store fewer layers"):
        write(target, rows, tmp_path / "store", TeacherStoreSettings(layers=LAYERS, limit_gb=1e-5))
    assert not (tmp_path / "store").exists()


def test_small_shards_have_the_same_rows(target, rows, tmp_path, monkeypatch):
    whole = open_teacher_store(write(target, rows, tmp_path / "whole"), target)
    monkeypatch.setattr("data.teacher_store.MEGABYTE", 20_000)
    sharded = open_teacher_store(
        write(target, rows, tmp_path / "sharded", TeacherStoreSettings(layers=LAYERS, top_k=5, shard_mb=1)), target
    )
    assert len(contents(tmp_path / "sharded")) > 3
    assert sharded.fingerprint != whole.fingerprint
    for one, other in zip(whole, sharded, strict=True):
        assert (one.key, one.tokens_T.tolist()) == (other.key, other.tokens_T.tolist())
        torch.testing.assert_close(one.hidden[3], other.hidden[3], rtol=1 / 120, atol=1e-4)


# --- Continuation after an interruption ---------------------------------------------------------------------------


def test_write_restores_a_missing_shard_exactly(target, rows, tmp_path, monkeypatch):
    monkeypatch.setattr("data.teacher_store.MEGABYTE", 40_000)
    settings = TeacherStoreSettings(layers=LAYERS, top_k=TOP_K, shard_mb=1)
    folder = write(target, rows, tmp_path / "store", settings)
    before = contents(folder)
    (folder / "shard-00001.safetensors").unlink()
    (folder / ".shard-00001.safetensors.part-1").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"is unfinished: 1 of .* run the same recipes/teacher_store.py command again"):
        open_teacher_store(folder, target)
    write(target, rows, folder, settings)
    assert contents(folder) == before
    assert sorted(path.name for path in folder.iterdir()) == [*before, "teacher_store.json"]


def test_run_continued_after_sigkill_equals_an_uninterrupted_one(tmp_path, capsys):
    path = save_target(tmp_path / "target")
    target = Target.from_pretrained(path)
    settings = PseudoDataSettings(max_new_tokens=1, batch_size=64)
    write_pseudo_data(target, some_prompts(tmp_path, 250), tmp_path / "data", settings)
    flags = ["--target", path, "--data", str(tmp_path / "data"), "--layers", "1", "2", "3", "--top-k", "300"]
    flags += ["--shard-mb", "1", "--batch-size", "1", "--output"]
    interrupted, whole = tmp_path / "interrupted", tmp_path / "whole"
    kill_midway("teacher_store", [*flags, str(interrupted)], lambda: (interrupted / "shard-00001.safetensors").exists())
    capsys.readouterr()
    recipe.main(*parse_settings(*SETTINGS, description="", argv=[*flags, str(interrupted)]))
    assert "shards exist already" in capsys.readouterr().out
    recipe.main(*parse_settings(*SETTINGS, description="", argv=[*flags, str(whole)]))
    assert len(contents(whole)) > 5
    assert contents(interrupted) == contents(whole)
    assert len(open_teacher_store(interrupted, target)) == len(read_pseudo_data(tmp_path / "data"))


def test_shards_of_earlier_versions_without_origins_are_read(target, rows, tmp_path):
    folder = write(target, rows, tmp_path / "store")
    shard = folder / "shard-00000.safetensors"
    save_file(load_file(shard), shard, metadata={"keys": json.dumps([row.key for row in rows])})
    stored = open_teacher_store(folder, target)
    assert stored.keys == [row.key for row in rows]
    assert stored.where(0) == rows[0].key and stored[0].where == ""


# --- Errors ------------------------------------------------------------------------------------------------------


def test_write_rejects_a_folder_that_another_run_uses(target, rows, tmp_path):
    with locked_by_another_run(tmp_path / "store"), pytest.raises(ValueError, match="store is in use by another run"):
        write(target, rows, tmp_path / "store")


def test_store_of_another_target_or_settings_is_rejected(target, rows, tmp_path):
    folder = write(target, rows, tmp_path / "store")
    with pytest.raises(ValueError, match=r"store was made by another target"):
        open_teacher_store(folder, text_target(seed=1))
    with pytest.raises(ValueError, match=r"store was made with another tokenizer"):
        open_teacher_store(folder, Target(target.model, trained_tokenizer(vocab_size=300)))
    before = contents(folder)
    with pytest.raises(ValueError, match=r"other settings \(layers was \[0, 2, 3\], is \[1\]; top_k was 5, is 0\)"):
        write(target, rows, folder, TeacherStoreSettings(layers=(1,), batch_size=4))
    with pytest.raises(ValueError, match=r"other settings.*data was"):
        write(target, rows[:-1], folder)
    assert contents(folder) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("text")
    with pytest.raises(ValueError, match=r"mine contains other files"):
        write(target, rows, tmp_path / "mine")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": "x"}, "layers is 'x', expected list"),
        ({"layers": [99, "x"]}, r"layers is \[99, 'x'\]"),
        ({"top_k": None}, "top_k is None, expected int"),
        ({"shards": [[0]]}, r"a shard has the rows \[0\], after 0"),
        ({"shards": []}, "it names no shard"),
        ({"tokenizer_hash": 5}, "tokenizer_hash is 5, expected str or null"),
        ({"template_time": "noon"}, "template_time is 'noon', expected a time"),
    ],
    ids=str,
)
def test_open_names_a_damaged_manifest(target, rows, tmp_path, changes, message):
    file = write(target, rows, tmp_path / "store") / MARKER
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=f"teacher_store.json is damaged: {message}"):
        (first_run_time(tmp_path / "store", MARKER), open_teacher_store(tmp_path / "store", target))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("tokens", None, "tokens is missing, expected I32"),
        ("loss_mask", lambda mask: mask.float(), "loss_mask has F32 .*, expected BOOL"),
        ("hidden.2", lambda states: states[:, :7].contiguous(), r"hidden.2 has BF16 \[\d+, 7\], expected BF16"),
        ("offsets", lambda offsets: -offsets, "offsets are no numbers that ascend from 0"),
        ("offsets", lambda offsets: offsets[:3].clone(), r"tokens has I32 .*, expected I32 \["),
    ],
    ids=["missing", "dtype", "width", "descending", "short"],
)
def test_open_names_a_shard_whose_tensors_do_not_fit(target, rows, tmp_path, name, change, message):
    file = write(target, rows, tmp_path / "store") / "shard-00000.safetensors"
    with safe_open(file, framework="pt") as opened:
        tensors, metadata = {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata()  # noqa: SIM118
    changed = {} if change is None else {name: change(tensors[name])}
    save_file({key: one for key, one in tensors.items() if key != name} | changed, file, metadata=metadata)
    with pytest.raises(ValueError, match=rf"00000.safetensors is damaged \({message}"):
        open_teacher_store(tmp_path / "store", target)


@pytest.mark.parametrize("num_bytes", [4, 100, -1])
def test_open_names_a_truncated_shard(target, rows, tmp_path, num_bytes):
    folder = write(target, rows, tmp_path / "store")
    shard = folder / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:num_bytes])
    with pytest.raises(
        ValueError, match=r"shard-00000.safetensors is damaged \(.*\); delete it and run the command again"
    ):
        open_teacher_store(folder, target)
    (folder / "teacher_store.json").write_text("{")
    with pytest.raises(ValueError, match=r"teacher_store.json is damaged: not valid JSON"):
        open_teacher_store(folder, target)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": (4,)}, "hidden layer 4 does not exist; .* has layers 0 to 3"),
        ({"layers": (-1,)}, "hidden layer -1 does not exist"),
        ({"layers": (1, 1)}, "a layer is repeated"),
        ({"top_k": VOCAB_SIZE + 1}, f"it must be 0 to {VOCAB_SIZE}"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_write_rejects_settings_that_do_not_fit_the_target(target, rows, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        write(target, rows, tmp_path / "store", TeacherStoreSettings(**settings))
    assert not (tmp_path / "store").exists()


def test_write_rejects_rows_that_do_not_fit_the_target(target, rows, tmp_path):
    for row, message in {
        example([5, 6, 7], [True, False, False], "k1"): "the loss mask of row k1 is all zero",
        example([5, VOCAB_SIZE], None, "k2"): f"token id {VOCAB_SIZE} is outside",
        example(
            [5] * (CONTEXT + 1), None, "k3"
        ): f"{CONTEXT + 1} tokens is longer than the target's context of {CONTEXT}",
    }.items():
        with pytest.raises(ValueError, match=message):
            write(target, [*rows, row], tmp_path / "store", TeacherStoreSettings())
    with pytest.raises(ValueError, match=r"there are no rows"):
        write(target, [], tmp_path / "store")


# --- Examples for training ---------------------------------------------------------------------------------------


def test_usable_rows_names_the_origin_of_rows_left_out(target, tmp_path, capsys):
    """In texts, in the target's own text, and in a store of either."""
    (tmp_path / "rows.jsonl").write_text(
        '{"prompt": "def f(", "completion": "x): pass"}\n{"text": "a"}\n{"text": "b c"}\n'
    )
    texts = open_examples(str(tmp_path / "rows.jsonl"), target)
    first = texts.first_supervised[0]
    assert usable_rows(texts, "texts", max_length=CONTEXT) == [0, 2]
    assert "texts: 1 of 3 rows cannot be used" in capsys.readouterr().out
    assert usable_rows(texts, "texts", max_length=first + 1) == [0, 2]
    assert usable_rows(texts, "texts", max_length=first, max_left_out=1.0) == [2]
    assert f"rows.jsonl:1: its answer lies beyond {first} tokens" in capsys.readouterr().out
    write(target, [texts[0], texts[2]], tmp_path / "store")
    stored = open_examples(str(tmp_path / "store"), target)
    assert [stored.first_supervised[0], stored.where(1)] == [first, f"{tmp_path / 'rows.jsonl'}:3"]
    prompts = some_prompts(tmp_path, 3)
    write_pseudo_data(target, prompts, tmp_path / "data", PseudoDataSettings(max_new_tokens=4))
    written = open_examples(str(tmp_path / "data"), target)
    assert [written[at].where for at in range(3)] == [written.where(at) for at in range(3)]
    longest = max(len(prompt.ids) for prompt in prompts)
    assert len(usable_rows(written, "data", max_length=longest, max_left_out=1.0)) < 3
    assert sorted(written.first_supervised) == sorted(len(prompt.ids) for prompt in prompts)
    assert "prompts.jsonl:" in capsys.readouterr().out


def test_open_examples_reads_stores_and_texts(target, rows, tmp_path, capsys):
    write(target, rows, tmp_path / "store")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("some words to train on  " * 100)
    stored = open_examples(str(tmp_path / "store"), target)
    assert stored.keys == [row.key for row in rows]
    assert "the loss mask covers 130 of" in capsys.readouterr().out
    texts = open_examples(str(tmp_path / "text"), target)
    assert [len(one.tokens_T) for one in (texts[0],)] == [CONTEXT]
    assert texts[0].loss_mask_T.all()
    assert "(100.0%)" in capsys.readouterr().out
    assert stored.fingerprint != texts.fingerprint
    with pytest.raises(
        ValueError, match=r"no such file or folder: 'runs/nothing'; make training data with recipes/pseudo_data.py"
    ):
        open_examples("runs/nothing", target)
