"""MTP heads in checkpoints: what is read comes back tensor for tensor, in the same files, and faults are named."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DeepseekV3ForCausalLM

import draftsmith
from data.pseudo_data import read_pseudo_data
from draftsmith import Target
from draftsmith.drafters.mtp import Drafter
from draftsmith.export import export
from draftsmith.export.launch import read_launch
from draftsmith.loading.model_info import read_target_info
from tests.drafters.test_mtp import FAST, FORMS, imported, small
from tests.export.test_export_acceptance import NUM_NEW, accepted_here, rounds_there
from tests.export.test_export_servers import export_drafter, flags, speculative_config
from tests.support.families.mtp_targets import write_target
from tests.support.family import texts
from tests.support.models import scramble
from tests.support.runs import SMALL, make_data, make_target, run_settings, trainer_settings
from trainers import import_mtp, mtp
from trainers.training.loop import train


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Returns all tensors of a checkpoint; asserts that its index, if it has one, names their files."""
    files = {file.name: load_file(file) for file in sorted(folder.glob("*.safetensors"))}
    if (index := folder / "model.safetensors.index.json").exists():
        weight_map = json.loads(index.read_text())["weight_map"]
        assert weight_map == {name: file for file, tensors in files.items() for name in tensors}
    return {name: tensor for tensors in files.values() for name, tensor in tensors.items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one
    )


# --- Written back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "num_shards"), [(torch.float32, 3), (torch.bfloat16, 1)], ids=["shards", "bf16"])
@pytest.mark.parametrize("architecture", FORMS)
def test_imported_head_is_exported_as_it_was(
    tmp_path: Path, architecture: str, dtype: torch.dtype, num_shards: int
) -> None:
    """Every tensor of the checkpoint is the same, those that routers keep in float32 among them."""
    write_target(tmp_path / "target", architecture, dtype=dtype, num_shards=num_shards)
    target = Target.from_pretrained(str(tmp_path / "target"))
    assert target.dtype == dtype
    out, _ = export_drafter(imported(target), "vllm", tmp_path)
    before, after = tensors_of(tmp_path / "target"), tensors_of(out)
    assert equal(before, after)
    router = [name for name in before if "e_score" in name]
    assert all(before[name].dtype == torch.float32 for name in router)
    assert len(router) == {"qwen3_next": 0, "qwen3_5_text": 0, "mimo": 0, "mimo_v2_flash": 1}.get(architecture, 2)


@pytest.mark.parametrize("architecture", ["deepseek_v3", "mimo_v2_flash", "mimo"])
def test_several_heads_are_read_and_written(tmp_path: Path, architecture: str) -> None:
    """Imported heads come back as they were; trained ones are written over them, the others being left as they are."""
    heads = write_target(tmp_path / "target", architecture, num_shards=3, num_heads=3)
    target = Target.from_pretrained(str(tmp_path / "target"))
    drafter = imported(target)
    assert drafter.config.num_heads == 3 and len(drafter.heads) == 3
    out, launch = export_drafter(drafter, "vllm", tmp_path / "same")
    assert equal(tensors_of(tmp_path / "target"), tensors_of(out))
    assert any("vLLM drafts with the first head alone" in note for note in launch["notes"])
    two = imported(target, num_heads=2)
    scramble(two, seed=9)
    out, launch = export_drafter(two, "sglang", tmp_path / "two")
    assert any("has 3 MTP heads, of which the first 2 were trained" in note for note in launch["notes"])
    before, after = tensors_of(tmp_path / "target"), tensors_of(out)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    third = {"deepseek_v3": "model.layers.4.", "mimo_v2_flash": "model.mtp.layers.2."}
    kept = {name for name in heads if name.startswith(third.get(architecture, "model.mtp_layers.2."))}
    kept |= {name for name in heads if name.endswith(("embed_tokens.weight", "head.head.weight", "correction_bias"))}
    assert changed == heads.keys() - kept
    again = imported(Target.from_pretrained(str(out)), num_heads=2)
    assert again.config == two.config and equal(dict(again.state_dict()), dict(two.state_dict()))
    with pytest.raises(ValueError, match="num_heads is 4; .* has 3 that can be read"):
        imported(target, num_heads=4)
    four = Drafter(dataclasses.replace(drafter.config, num_heads=4), target).eval()
    with pytest.raises(ValueError, match="has 4 MTP heads, and the checkpoint of .* 3 that can be replaced"):
        export_drafter(four, "vllm", tmp_path / "four")


@pytest.mark.parametrize("architecture", FAST)
def test_trained_head_is_written_in_place_of_the_checkpoints(tmp_path: Path, architecture: str) -> None:
    """The new checkpoint's other tensors are the target's, and its head is imported as the drafter."""
    head = write_target(tmp_path / "target", architecture, num_shards=3)
    target = Target.from_pretrained(str(tmp_path / "target"))
    drafter = imported(target, num_draft=4)
    scramble(drafter, seed=9)
    out, launch = export_drafter(drafter, "vllm", tmp_path)
    other, sglang = export_drafter(drafter, "sglang", tmp_path / "sglang")
    before, after = tensors_of(tmp_path / "target"), tensors_of(out)
    assert equal(after, tensors_of(other))
    copies = [name for name in head if "embed_tokens" in name or "shared_head.head" in name]
    fixed = [name for name in head if name in copies or "e_score" in name]
    assert {name for name in before if not torch.equal(before[name], after[name])} == head.keys() - set(fixed)
    served = Target.from_pretrained(str(out))
    assert served.fingerprint == target.fingerprint and served.tokenizer_hash == target.tokenizer_hash
    again = imported(served, num_draft=4)
    assert again.config == drafter.config and equal(dict(again.state_dict()), dict(drafter.state_dict()))
    assert launch["target"] == str(out) and f"vllm serve {out} " in launch["command"]
    config = speculative_config(launch)
    assert config == {"method": "mtp", "num_speculative_tokens": 4, "draft_sample_method": "probabilistic"}
    assert flags(sglang) == {
        "--model-path": str(other),
        "--speculative-algorithm": "NEXTN",
        "--speculative-num-steps": "4",
        "--speculative-eagle-topk": "1",
        "--speculative-num-draft-tokens": "5",
    }


def test_second_head_of_a_checkpoint_is_left_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = write_target(tmp_path / "target", "qwen3_5_text")
    file = tmp_path / "target" / "model.safetensors"
    second = {name.replace("layers.0.", "layers.1."): one + 1 for name, one in head.items() if "layers.0." in name}
    save_file(load_file(file) | second, file, metadata={"format": "pt"})
    target = Target.from_pretrained(str(tmp_path / "target"))
    drafter = imported(target)
    assert "has 2 MTP heads; the first is imported" in capsys.readouterr().out
    out, launch = export_drafter(drafter, "vllm", tmp_path)
    assert equal(tensors_of(out), tensors_of(tmp_path / "target"))
    assert any("has 2 MTP heads, of which the first was trained" in note for note in launch["notes"])


def test_target_without_a_head_is_served_by_no_engine(tmp_path: Path) -> None:
    target = make_target(tmp_path / "target")
    drafter = Drafter(small(target), target).eval()
    for engine, name in (("vllm", "vLLM"), ("sglang", "SGLang")):
        with pytest.raises(ValueError, match=f"has no MTP head, and {name} reads heads of LlamaForCausalLM from it"):
            export_drafter(drafter, engine, tmp_path)
        assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"llama.cpp does not run drafters of family 'mtp'; export it --to vllm or"):
        export(tmp_path / "artifact", "llama.cpp", tmp_path / "out")
    assert "custom_generate" in read_launch(export(tmp_path / "artifact", "transformers", tmp_path / "out"))["settings"]


@pytest.mark.slow
def test_transformers_accepts_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`use_mtp` drafts one token in every step but the first; transformers is told that the head is layer 2, not 61."""
    monkeypatch.setattr(DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.2\..*"])
    write_target(tmp_path / "target", "deepseek_v3")
    target = Target.from_pretrained(str(tmp_path / "target"))
    make_data(target, tmp_path / "data", temperature="0", num_rows=12, max_new_tokens=NUM_NEW)
    train(import_mtp, import_mtp.Settings(), run_settings(tmp_path, "imported"))
    start = {"start_from": str(tmp_path / "imported"), "max_steps": 60, "learning_rate": 1e-2}
    settings = trainer_settings(mtp, num_draft=1, num_steps=1)
    artifact = train(mtp, settings, run_settings(tmp_path, "trained", **SMALL | start))
    out = export(artifact, "transformers", tmp_path / "out")
    assert "use_mtp=True" in read_launch(out)["command"]
    rows = [one.tokens_T[~one.loss_mask_T].tolist() for one in list(read_pseudo_data(tmp_path / "data"))[:4]]
    plain = draftsmith.generate(target, rows, max_new_tokens=1, eos_token_id=[])
    there = [[accepted for _, accepted in rounds[1:]] for rounds in rounds_there(out, rows)]
    here = accepted_here(draftsmith.load(artifact, target), texts(plain), num_new=NUM_NEW - 1)
    # The last rounds may draft beyond the text's end.
    assert [rounds[: len(other) - 1] for rounds, other in zip(there, here, strict=True)] == [one[:-1] for one in here]
    assert 0 < sum(map(sum, here)) < sum(map(len, here))


# --- Faults of checkpoints -----------------------------------------------------------------------------------------


def change(tensors: dict[str, Tensor], name: str, new: Callable[[Tensor], Tensor] | None) -> None:
    if new is None:
        del tensors[name]
    else:
        tensors[name] = new(tensors[name])


FAULTS: dict[str, tuple[str, str, Callable[[Tensor], Tensor] | None, str]] = {
    "no layer norm": (
        "qwen3_5_text",
        "mtp.layers.0.input_layernorm.weight",
        None,
        "input_layernorm.weight is missing: the MTP head is read as a layer of Qwen3_5For",
    ),
    "no norm": ("qwen3_5_text", "mtp.pre_fc_norm_hidden.weight", None, "mtp.pre_fc_norm_hidden.weight is missing"),
    "no last norm": (
        "deepseek_v3",
        "model.layers.2.shared_head.norm.weight",
        None,
        "shared_head.norm.weight is missing",
    ),
    "wrong projection": (
        "qwen3_5_text",
        "mtp.fc.weight",
        lambda one: one[:, :-1].contiguous(),
        "mtp.fc.weight is of another shape",
    ),
    "wrong layer": (
        "deepseek_v3",
        "model.layers.2.self_attn.o_proj.weight",
        lambda one: one[:-1],
        "model.layers.2.self_attn.o_proj.weight is of another shape",
    ),
    "other LM head": (
        "deepseek_v3",
        "model.layers.2.shared_head.head.weight",
        lambda one: one + 1,
        "shared_head.head.weight is not the target's LM head",
    ),
    "not finite": ("qwen3_5_text", "mtp.norm.weight", lambda one: one * torch.nan, "mtp.norm.weight is not finite"),
    "no expert": (
        "deepseek_v3",
        "model.layers.2.mlp.experts.3.up_proj.weight",
        None,
        "2.mlp.experts.3.up_proj.weight is missing: the MTP head is read as a layer of Deepseek",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_of_a_checkpoint_is_named(tmp_path: Path, fault: str) -> None:
    architecture, name, new, message = FAULTS[fault]
    write_target(tmp_path / "target", architecture)
    file = tmp_path / "target" / "model.safetensors"
    tensors = load_file(file)
    change(tensors, name, new)
    save_file(tensors, file, metadata={"format": "pt"})
    target = Target.from_pretrained(str(tmp_path / "target"))
    with pytest.raises(ValueError, match=message):
        imported(target)


def test_unknown_tensor_of_a_layer_is_named(tmp_path: Path) -> None:
    """As of a quantised checkpoint, whose scales are tensors."""
    write_target(tmp_path / "target", "qwen3_5_text")
    file = tmp_path / "target" / "model.safetensors"
    scale = {"mtp.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1)}
    save_file(load_file(file) | scale, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="mlp.up_proj.weight_scale_inv is unknown: the MTP head"):
        imported(Target.from_pretrained(str(tmp_path / "target")))


def test_target_without_a_head_is_named_before_its_weights_load(tmp_path: Path) -> None:
    make_target(tmp_path / "target")
    info = read_target_info(str(tmp_path / "target"))
    with pytest.raises(ValueError, match=r"has no MTP head of a known form, mtp.\* .*; train one from nothing with"):
        import_mtp.check(import_mtp.Settings(), info)
    mtp.check(mtp.Settings(), info)
    with pytest.raises(ValueError, match="target org/name is not a local folder, .* download it"):
        import_mtp.check(import_mtp.Settings(), dataclasses.replace(info, name="org/name"))
    (tmp_path / "target" / "model.safetensors.index.json").write_text('{"weight_map": 1}')
    with pytest.raises(ValueError, match="has no weight_map of tensors and their files"):
        mtp.check(mtp.Settings(), info)
