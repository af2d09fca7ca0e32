"""Targets spread over devices: by `device_map`, with weights on disk, and by tensor parallelism of two processes."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import draftsmith
from data.pseudo_data import read_pseudo_data
from data.teacher_store import open_teacher_store
from draftsmith import Target
from draftsmith.core.tree import chain
from draftsmith.loading.placement.spread import check_spread, spread_of
from tests.support.models import prompts
from tests.support.runs import command, logged, make_data, make_target, run
from tests.support.text import save_target, write_prompts

ON_DISK = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
ON_DISK |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return make_target(tmp_path_factory.mktemp("spread") / "target")


def spread(plain: Target) -> Target:
    return Target.from_pretrained(plain.name, dtype="float32", device_map=ON_DISK)


def test_a_target_with_blocks_on_disk_is_the_same(plain: Target) -> None:
    target = spread(plain)
    assert (spread_of(target.model), str(target.device)) == ("device_map", "cpu")
    assert target.fingerprint == plain.fingerprint
    assert any(weight.is_meta for weight in target.model.parameters()), "nothing is on disk"
    assert not target.abilities.cannot_split and not target.abilities.cannot_train
    rows = prompts(5, seed=1)
    for drafter in (None, "lookup"):
        texts = []
        for one in (plain, target):
            family = draftsmith.artifacts.families.find(drafter) if drafter else None
            drafting = family.Drafter(family.Config(), one) if family else None
            texts.append(draftsmith.generate(one, rows, drafting, max_new_tokens=8).sequences)
        assert torch.equal(*texts)
    ids_1T = torch.tensor([rows[0]])
    with torch.inference_mode():
        ours, theirs = (one.read(ids_1T, (0, 1, 3)) for one in (target, plain))
    for layer, states in theirs.items():
        torch.testing.assert_close(ours[layer], states)


def test_sublayers_of_a_target_spread_by_device_map_are_not_skipped(plain: Target) -> None:
    """A copy of a block would run the block that it was copied from."""
    target = spread(plain)
    tokens_1N = torch.tensor([[5, 6]])
    with pytest.raises(ValueError, match="is spread over devices by device_map, so no sublayer can be skipped"):
        target.forward(tokens_1N, chain(2), target.new_cache(1), skipped=frozenset({("mlp", 1)}))


@pytest.mark.parametrize(
    ("device_map", "tensor_parallel", "ranks", "message"),
    [
        ("auto", True, 2, "--device-map and --tensor-parallel cannot be combined"),
        ("", True, 1, "there is one process; start several"),
        ("auto", False, 2, "--device-map auto takes all devices, and there are 2 processes"),
        ("automatic", False, 1, "--device-map is 'automatic'; expected auto, balanced"),
        ("[1]", False, 1, r"--device-map is '\[1\]'; expected auto"),
    ],
    ids=["both", "alone", "shared", "misspelt", "list"],
)
def test_a_spread_that_cannot_be_is_rejected(
    monkeypatch: pytest.MonkeyPatch, device_map: str, tensor_parallel: bool, ranks: int, message: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    with pytest.raises(ValueError, match=message):
        check_spread(device_map, tensor_parallel=tensor_parallel)


def test_a_model_that_cannot_be_shared_is_rejected_before_weights_load(
    plain: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    (tmp_path / "model").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_text((Path(plain.name) / name).read_text())
    with pytest.raises(ValueError, match="has num_attention_heads 4, which 3 processes cannot share"):
        Target.from_pretrained(tmp_path / "model", tensor_parallel=True)


def test_device_map_is_read_from_text_and_files(tmp_path: Path) -> None:
    (tmp_path / "map.yaml").write_text("model.layers.0: cpu\n")
    check_spread(str(tmp_path / "map.yaml"), tensor_parallel=False)
    check_spread("{model.layers.0: 0, model.layers.1: cpu}", tensor_parallel=False)


# --- Two processes -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_text_and_store_of_a_tensor_parallel_target(tmp_path: Path) -> None:
    """In float32 the same tokens; hidden states are sums of two ranks, rounded to bf16."""
    path, source = save_target(tmp_path / "target"), str(write_prompts(tmp_path / "prompts.jsonl", 9))
    flags: dict[str, Any] = {"target": path, "data": source, "max_new_tokens": 12, "batch_size": 3}
    flags |= {"shard_batches": 2, "temperature": "0,1", "layers": 2, "store_top_k": 5}
    for name, launcher, more in (("one", (), {}), ("two", TORCHRUN, {"tensor_parallel": "true"})):
        outputs = {"output": tmp_path / name, "store_output": tmp_path / f"{name}-store"}
        done = run(command("pseudo_data", *launcher, **flags, **outputs, **more), tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
    target = Target.from_pretrained(path)
    one, two = (read_pseudo_data(tmp_path / name, target) for name in ("one", "two"))
    assert one.table.equals(two.table)
    words = command("teacher_store", *TORCHRUN, target=path, data=tmp_path / "two", layers=2, top_k=5)
    done = run([*words, "--output", str(tmp_path / "apart"), "--tensor-parallel"], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = open_teacher_store(tmp_path / "one-store", target)
    for name in ("two-store", "apart"):
        for ours, theirs in zip(open_teacher_store(tmp_path / name, target), expected, strict=True):
            torch.testing.assert_close(ours.hidden[2], theirs.hidden[2], rtol=1 / 120, atol=1e-4)
            torch.testing.assert_close(ours.top_logits_TK, theirs.top_logits_TK, rtol=0, atol=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["medusa", "eagle3"])
def test_training_on_a_tensor_parallel_target(tmp_path: Path, recipe: str) -> None:
    """The losses are those of two ranks that each have the whole target."""
    target = make_target(tmp_path / "target")
    make_data(target, tmp_path / "data")
    flags: dict[str, Any] = {"target": tmp_path / "target", "data": tmp_path / "data", "max_steps": 6, "batch_size": 4}
    flags |= {"eval_steps": 3, "save_steps": 3, "log_steps": 1, "warmup_steps": 2}
    for name, more in (("whole", {}), ("shared", {"tensor_parallel": "true"})):
        done = run(command(recipe, *TORCHRUN, **flags, **more, output=tmp_path / name), tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
    whole, shared = (logged(tmp_path / name, "loss", "eval_acceptance") for name in ("whole", "shared"))
    assert len(whole) >= 6
    for expected, found in zip(whole, shared, strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("shared", "whole"))
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-2, atol=1e-3)
    manifest = json.loads((tmp_path / "shared" / "draft_config.json").read_text())
    assert manifest["target"]["fingerprint"] == target.fingerprint


@pytest.mark.slow
def test_training_that_cannot_be_tensor_parallel_is_rejected(tmp_path: Path) -> None:
    target = make_target(tmp_path / "target")
    make_data(target, tmp_path / "data")
    flags = {"target": tmp_path / "target", "data": tmp_path / "data", "tensor_parallel": "true"}
    for recipe, message in (
        ("early_exit", "runs or tunes the target's own blocks"),
        ("ngram", "is built without gradient"),
    ):
        done = run(command(recipe, *TORCHRUN, **flags, output=tmp_path / recipe), tmp_path)
        assert done.returncode != 0 and message in done.stderr
        assert not (tmp_path / recipe).exists()
