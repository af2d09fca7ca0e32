"""The teacher store written with its text, against the one that a pass over the finished text gives."""

import json
from pathlib import Path

import pytest
import torch

from data.prompts import load_prompts
from data.pseudo_data import PseudoDataSettings, read_pseudo_data, write_pseudo_data
from data.teacher_store import MARKER, TeacherStoreSettings, open_teacher_store, write_teacher_store
from data.writers import LocalWriter
from data.writers.teacher_outputs import StoreOfText, most_tokens, store_of_text
from draftsmith import Target
from tests.support.text import CHAT_TEMPLATE, VOCAB_SIZE, some_prompts, text_target, trained_tokenizer

LAYERS, TOP_K = (0, 2, 3), 5
SMALL = PseudoDataSettings(max_new_tokens=10, batch_size=3, shard_batches=2, temperature="0,1")


@pytest.fixture(scope="module")
def target() -> Target:
    target = text_target()
    target.model.generation_config.eos_token_id = list(range(3, VOCAB_SIZE, 25))
    return target


def write(target: Target, folder: Path, num_prompts: int = 14, *, shard_mb: int = 1, **changes: float) -> StoreOfText:
    """Writes text and store of a few prompts in one pass."""
    settings = TeacherStoreSettings(layers=LAYERS, top_k=TOP_K, shard_mb=shard_mb, **changes)
    store = StoreOfText(folder=folder / "store", settings=settings)
    prompts = some_prompts(folder, num_prompts)
    store.check(target, prompts, SMALL.max_new_tokens)
    write_pseudo_data(LocalWriter(target, store=settings), prompts, folder / "text", SMALL, store=store)
    return store


def contents(folder: Path) -> dict[str, bytes]:
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in sorted(folder.glob("*/*"))}


def check_equal(store: Path, expected: Path, target: Target) -> None:
    """Compares two stores: float32 outputs that differ by 1e-5 may round to neighbouring bf16 and fp16 numbers."""
    ours, theirs = open_teacher_store(store, target), open_teacher_store(expected, target)
    assert ours.keys == theirs.keys
    assert [ours.manifest[name] for name in ("num_tokens", "num_learnt", "data")] == [
        theirs.manifest[name] for name in ("num_tokens", "num_learnt", "data")
    ]
    assert ours.first_supervised == theirs.first_supervised
    for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(one.tokens_T, other.tokens_T) and torch.equal(one.loss_mask_T, other.loss_mask_T)
        assert ours.where(index) == theirs.where(index)
        for layer in LAYERS:
            torch.testing.assert_close(one.hidden[layer], other.hidden[layer], rtol=1 / 120, atol=1e-4)
        torch.testing.assert_close(one.top_logits_TK, other.top_logits_TK, rtol=0, atol=0.01)
        torch.testing.assert_close(one.log_normaliser_T, other.log_normaliser_T, rtol=1e-4, atol=1e-4)
        assert (one.top_ids_TK == other.top_ids_TK).float().mean() > 0.99, "but for logits that are equal"


def test_store_equals_a_separate_pass(target: Target, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(target, tmp_path)
    out = capsys.readouterr().out
    assert "store: at most" in out and "hidden layers 0 2 3 of width 32 in bf16, top 5 logits" in out
    rows = read_pseudo_data(tmp_path / "text", target)
    write_teacher_store(target, rows, tmp_path / "apart", TeacherStoreSettings(layers=LAYERS, top_k=TOP_K))
    check_equal(tmp_path / "store", tmp_path / "apart", target)
    announced = int(out.split("at most ")[1].split(" tokens")[0].replace(",", ""))
    assert rows.num_tokens < announced < 2 * rows.num_tokens
    write_pseudo_data(target, some_prompts(tmp_path, 14), tmp_path / "plain", SMALL)
    plain = read_pseudo_data(tmp_path / "plain", target)
    assert plain.table.equals(rows.table), "the text is the same as without a store"


def test_every_turn_has_its_outputs(target: Target, tmp_path: Path) -> None:
    rows = [{"turns": [f"What is {row}?", "Shorter.", "Why?"][: 1 + row % 3]} for row in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = load_prompts(str(tmp_path / "rows.jsonl"), trained_tokenizer(CHAT_TEMPLATE), each_turn=True)
    settings = TeacherStoreSettings(layers=LAYERS, top_k=TOP_K)
    store = StoreOfText(folder=tmp_path / "store", settings=settings)
    write_pseudo_data(LocalWriter(target, store=settings), prompts, tmp_path / "text", SMALL, store=store)
    written = read_pseudo_data(tmp_path / "text", target)
    assert len(written) == 5 + 3 + 1
    assert sum(most_tokens(prompt, SMALL.max_new_tokens) for prompt in prompts) >= written.num_tokens
    write_teacher_store(target, written, tmp_path / "apart", TeacherStoreSettings(layers=LAYERS, top_k=TOP_K))
    check_equal(tmp_path / "store", tmp_path / "apart", target)


def test_missing_shards_are_restored_exactly(target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed run leaves outputs of a shard whose text is missing, and a manifest without numbers."""
    monkeypatch.setattr("data.writers.teacher_outputs.MEGABYTE", 30_000)
    write(target, tmp_path)
    whole = contents(tmp_path)
    assert {"store/shard-00000-000.safetensors", "store/shard-00000-001.safetensors"} <= {*whole}, "a shard is packed"
    assert sum(name.startswith("store/shard") for name in whole) < 14, "into fewer files than rows"
    (tmp_path / "text" / "part-00001.parquet").unlink()
    (tmp_path / "store" / "shard-00001-007.safetensors").write_bytes(b"half a shard of a killed run")
    manifest = tmp_path / "store" / MARKER
    begun = json.loads(manifest.read_text()) | {"shards": [], "files": [], "data": None, "is_unfinished": True}
    manifest.write_text(json.dumps(begun | {"num_tokens": 0, "num_learnt": 0}))
    with pytest.raises(ValueError, match=r"store is unfinished; run the same recipes/pseudo_data.py command again"):
        open_teacher_store(tmp_path / "store", target)
    write(target, tmp_path)
    assert contents(tmp_path) == whole
    write(target, tmp_path)
    assert contents(tmp_path) == whole, "a finished run changes nothing"


def test_damage_and_other_settings_are_rejected(target: Target, tmp_path: Path) -> None:
    write(target, tmp_path)
    text, store = tmp_path / "text", tmp_path / "store"
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"store was made with other settings \(shard_mb was 1, is 2\)"):
        write(target, tmp_path, shard_mb=2)
    with pytest.raises(ValueError, match=r"the store may take .* GB, over the limit of 1e-06 GB"):
        write(target, tmp_path, limit_gb=1e-6)
    assert contents(tmp_path) == before
    (store / "shard-00001-000.safetensors").unlink()
    with pytest.raises(ValueError, match=r"outputs of 0 of the \d rows of part-00001.parquet; delete that file in"):
        write(target, tmp_path)
    (text / "part-00001.parquet").unlink()
    write(target, tmp_path)
    assert contents(tmp_path) == before
    for path in store.iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"the text exists already, and was written without the store .*/store; make"):
        write(target, tmp_path)


def test_store_begun_apart_from_its_text_stays_apart(target: Target, tmp_path: Path) -> None:
    settings = TeacherStoreSettings(layers=LAYERS)
    assert store_of_text(tmp_path / "store", settings, tmp_path / "text") is not None
    assert store_of_text(tmp_path / "store", TeacherStoreSettings(), tmp_path / "text") is None
    write(target, tmp_path)
    assert store_of_text(tmp_path / "store", settings, tmp_path / "text") is not None
    assert store_of_text(tmp_path / "apart", settings, tmp_path / "text") is None
    write_teacher_store(target, read_pseudo_data(tmp_path / "text"), tmp_path / "apart", settings)
    assert store_of_text(tmp_path / "apart", settings, tmp_path / "text") is None


def test_encoder_decoders_have_no_store(tmp_path: Path) -> None:
    store = StoreOfText(folder=tmp_path / "store", settings=TeacherStoreSettings(layers=(1,)))
    with pytest.raises(ValueError, match="is an encoder-decoder; the teacher store is for causal targets"):
        store.check(text_target("t5"), [], 4)
