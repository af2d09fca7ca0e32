"""trainers/compress.py and recipes/compress.py: transformers folders, drafters made of them, and retraining."""

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import draftsmith
from draftsmith import Target
from draftsmith.artifacts.artifact import read_manifest
from draftsmith.core.views import blocks_of
from draftsmith.drafters import layerskip
from recipes.compress import make_artifact
from tests.support.models import prompts, tiny_model, tiny_tokenizer
from tests.support.runs import SMALL, make_data, make_target, trainer_settings
from trainers import distill
from trainers.compress import MARKER, CompressSettings, compress
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Returns a target and its own text on disk."""
    folder = tmp_path_factory.mktemp("source")
    target = make_target(folder / "target", seed=14)
    return {"target": str(folder / "target"), "data": str(make_data(target, folder / "data"))}


def settings(source: dict[str, str], folder: Path, **changes: Any) -> CompressSettings:
    given: dict[str, Any] = {"max_steps": 2, "batch_size": 4, "output": str(folder / "out")}
    return CompressSettings(**{**source, **given, **changes})


def target_of(source: dict[str, str]) -> Target:
    return Target.from_pretrained(source["target"], dtype="float32")


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"method": "influence", "keep": 0.6}, {"num_hidden_layers": 2}),
        ({"method": "angular", "keep": 0.34}, {"num_hidden_layers": 1}),
        ({"method": "even", "keep": 0.6}, {"num_hidden_layers": 2}),
        ({"method": "heads"}, {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}),
        ({"method": "kv_heads"}, {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}),
        ({"method": "neurons", "keep": 0.25}, {"intermediate_size": 12}),
        ({"method": "width"}, {"num_attention_heads": 2, "intermediate_size": 24}),
    ],
)
def test_a_compressed_model_is_an_ordinary_transformers_folder(
    source: dict[str, str], tmp_path: Path, changes: dict[str, Any], kept: dict[str, int]
) -> None:
    folder = compress(settings(source, tmp_path, **changes))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert {name: getattr(model.config, name) for name in kept} == kept
    assert model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=4, do_sample=False).shape == (1, 7)
    before = (Path(source["target"]) / "model.safetensors").stat().st_size
    found = json.loads((folder / MARKER).read_text())
    assert (folder / "model.safetensors").stat().st_size == found["bytes"] < before
    assert found["num_parameters"] == sum(one.numel() for one in model.parameters())
    assert found["source"]["fingerprint"] == target_of(source).fingerprint
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == tiny_tokenizer().get_vocab()
    kept = {name: found[name] for name in ("kept_layers", "kept_heads", "kept_kv_heads", "kept_neurons")}
    assert [len(kept["kept_layers"] or [0] * 3), len(blocks_of(model))] == [len(blocks_of(model))] * 2
    if kept["kept_neurons"]:
        neurons = torch.tensor(kept["kept_neurons"][1])
        theirs = target_of(source).model.model.layers[1].mlp.down_proj.weight
        torch.testing.assert_close(model.model.layers[1].mlp.down_proj.weight, theirs[:, neurons])


@pytest.mark.parametrize(
    ("method", "pattern"),
    [
        ("wanda", "2:4"),
        ("magnitude", "any"),
        pytest.param("wanda", "any", marks=pytest.mark.slow),
        pytest.param("magnitude", "2:4", marks=pytest.mark.slow),
    ],
)
def test_zeros_stay_zero_in_training(source: dict[str, str], tmp_path: Path, method: str, pattern: str) -> None:
    folder = compress(settings(source, tmp_path, method=method, pattern=pattern))
    sparse = {name: one for name, one in load_file(folder / "model.safetensors").items() if "_proj" in name}
    assert json.loads((folder / MARKER).read_text())["num_zeros"] == sum(one.numel() // 2 for one in sparse.values())
    if pattern == "2:4":
        assert all(bool(((one.view(-1, 4) == 0).sum(1) == 2).all()) for one in sparse.values())
    if method == "magnitude":
        return
    run = RunSettings(**source, **SMALL, output=str(tmp_path / "healed"), weight_decay=0.1)
    healed = train(distill, trainer_settings(distill, init=str(folder), keep_zeros=True, freeze_ends=True), run)
    after = load_file(healed / "model.safetensors")
    for name, before in load_file(folder / "model.safetensors").items():
        is_end = "embed_tokens" in name or "lm_head" in name
        assert torch.equal(after[f"model.{name}"], before) == is_end
        if name in sparse:
            assert torch.equal(after[f"model.{name}"] == 0, before == 0)


def test_the_artifact_drafts_and_the_same_command_changes_nothing(
    source: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = settings(source, tmp_path, method="influence", keep=0.6)
    folder = compress(wanted)
    artifact = make_artifact(folder, wanted)
    target = target_of(source)
    drafter = draftsmith.load(artifact, target)
    assert drafter.model.config.num_hidden_layers == 2
    tokens = torch.tensor([prompts(1)[0]])
    own = draftsmith.generate(target, tokens, max_new_tokens=12).sequences
    assert torch.equal(draftsmith.generate(target, tokens, drafter, max_new_tokens=12).sequences, own)
    measured = read_manifest(artifact)["measured_acceptance"]
    assert 0 < measured["acceptance"] <= 1 and 0 <= measured["greedy_agreement"] <= 1
    times = [file.stat().st_mtime_ns for file in sorted(folder.rglob("*"))]
    capsys.readouterr()
    make_artifact(compress(wanted), wanted)
    assert "was already made with these settings" in capsys.readouterr().out
    assert times == [file.stat().st_mtime_ns for file in sorted(folder.rglob("*"))]
    with pytest.raises(ValueError, match=r"was made with other settings \(keep was 0.6, is 0.34\); name another"):
        compress(dataclasses.replace(wanted, keep=0.34))


def test_a_compressed_model_can_be_compressed_further(source: dict[str, str], tmp_path: Path) -> None:
    """Weights keep their dtype, and the second record contains the first."""
    model = tiny_model("llama", seed=14)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    tiny_tokenizer().save_pretrained(tmp_path / "half")
    given = {"target": str(tmp_path / "half"), "data": source["data"]}
    shallow = compress(settings(source, tmp_path, model=given["target"], method="even", keep=0.6))
    narrow = compress(settings(source, tmp_path, model=str(shallow), method="width", output=str(tmp_path / "narrow")))
    found = json.loads((narrow / MARKER).read_text())
    assert found["source"]["compression"]["kept_layers"] == [0, 2] and len(found["kept_heads"]) == 2
    assert {one.dtype for one in load_file(narrow / "model.safetensors").values()} == {torch.bfloat16}


def test_method_mask_removes_the_layers_of_a_searched_mask(
    source: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = target_of(source)
    for name, attention, mlp in (("whole", (0, 1), (1,)), ("halves", (0,), (1,)), ("all", (0, 1, 2), (0, 1, 2))):
        drafter = layerskip.Drafter(layerskip.Config(attention=attention, mlp=mlp), target)
        draftsmith.save(drafter, tmp_path / name, target)
    wanted = settings(source, tmp_path, method="mask", mask=str(tmp_path / "whole"))
    assert json.loads((compress(wanted) / MARKER).read_text())["kept_layers"] == [0, 2]
    assert "skips half of layers 0, which are kept as a whole" in capsys.readouterr().out
    for name, sentence in (("halves", "skips no layer as a whole"), ("all", "skips every layer")):
        with pytest.raises(ValueError, match=sentence):
            compress(dataclasses.replace(wanted, mask=str(tmp_path / name)))


@needs_torchao
@pytest.mark.parametrize("method", ["int8", "int8_dynamic", "int4"])
def test_quantised_models_are_close_to_the_target(source: dict[str, str], tmp_path: Path, method: str) -> None:
    """Folder and artifact contain the same model."""
    wanted = settings(source, tmp_path, method=method)
    folder = compress(wanted)
    target = target_of(source)
    drafter = draftsmith.load(make_artifact(folder, wanted), target)
    tokens = torch.tensor([prompts(1)[0]])
    with torch.inference_mode():
        own = AutoModelForCausalLM.from_pretrained(folder).eval()(input_ids=tokens).logits
        torch.testing.assert_close(own, drafter.model(input_ids=tokens).logits)
    group, steps = (16, 7) if method == "int4" else (32, 127)
    given_OI, held_OI = (one.model.model.layers[1].self_attn.q_proj.weight for one in (target, drafter))
    errors = (held_OI.dequantize() - given_OI).view(-1, group).abs().amax(1)
    assert bool((errors <= 0.51 * given_OI.view(-1, group).abs().amax(1) / steps).all()) and errors.max() > 0
    assert type(drafter.model.lm_head.weight) is torch.nn.Parameter
    assert (
        json.loads((folder / MARKER).read_text())["bytes"] < Path(source["target"], "model.safetensors").stat().st_size
    )
    plain = draftsmith.generate(target, tokens, max_new_tokens=12).sequences
    assert torch.equal(draftsmith.generate(target, tokens, drafter, max_new_tokens=12).sequences, plain)
    with pytest.raises(ValueError, match=r"is quantised and cannot be trained"):
        train(
            distill, trainer_settings(distill, init=str(folder)), RunSettings(**source, output=str(tmp_path / "healed"))
        )
    with pytest.raises(ValueError, match="is quantised already"):
        compress(settings(source, tmp_path, model=str(folder), output=str(tmp_path / "again")))


def test_invalid_settings_raise(source: dict[str, str], tmp_path: Path) -> None:
    for changes, sentence in (
        ({"keep": 1.0}, "keep is 1.0; it must lie between 0 and 1"),
        ({"pattern": "2:4"}, "pattern 2:4 keeps 0.5 of the weights, by magnitude or wanda"),
        ({"pattern": "2:4", "method": "wanda", "keep": 0.25}, "pattern 2:4 keeps 0.5"),
        ({"method": "mask"}, "method mask and --mask ARTIFACT"),
        ({"max_steps": 0}, "max_steps is 0"),
    ):
        with pytest.raises(ValueError, match=sentence):
            settings(source, tmp_path, **changes)
    with pytest.raises(ValueError, match="keep 0.1 leaves 0 of the 3 layers"):
        compress(settings(source, tmp_path, keep=0.1))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="contains other files"):
        compress(settings(source, tmp_path, output=str(tmp_path / "taken")))
    tiny_model("t5").save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="is an encoder-decoder; only causal models are compressed"):
        compress(settings(source, tmp_path, target=str(tmp_path / "t5")))
    tiny_model("llama", vocab_size=32).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="has another vocabulary than target"):
        compress(settings(source, tmp_path, model=str(tmp_path / "other")))
    assert not (tmp_path / "out").exists()
