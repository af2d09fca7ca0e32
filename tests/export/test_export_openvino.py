"""Exports for OpenVINO GenAI: the folder, the commands that convert and run it, and rejected input.

What OpenVINO does with them is tested in tests/serving/test_openvino.py.
"""

import ast
import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import draftsmith
from draftsmith import Target
from draftsmith.drafters import dflash, eagle3, early_exit, lm, lookup, medusa, pard
from draftsmith.export import export
from draftsmith.export.launch import read_launch
from draftsmith.export.openvino import CONVERTED_DRAFT, CONVERTED_TARGET, MODEL_FILE
from tests.support.family import built
from tests.support.models import VOCAB_SIZE, tiny_model, tiny_tokenizer

SHAPE = {"num_heads": 4, "num_kv_heads": 2, "head_width": 8, "inner_width": 64}
HEAD = eagle3.Config(layers=(1, 2, 3), draft_vocab=40, width=0, num_draft=3, **SHAPE)
BLOCK = dflash.Config(layers=(1, 3), num_layers=1, block_size=4, mask_token=VOCAB_SIZE - 1, **SHAPE)
SMALL = tiny_model("llama", num_hidden_layers=1).config.to_dict()


def save_target(folder: Path, architecture: str = "llama") -> Target:
    tiny_model(architecture).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return Target.from_pretrained(str(folder), dtype="float32")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return save_target(tmp_path_factory.mktemp("openvino") / "target")


def exported(drafter: Any, folder: Path, **options: str) -> tuple[Path, dict[str, Any]]:
    draftsmith.save(drafter, folder / "artifact", drafter.target)
    out = export(folder / "artifact", "openvino", folder / "out", **options)
    return out, read_launch(out)


def conversions(launch: dict[str, Any]) -> list[list[str]]:
    return [shlex.split(line) for line in launch["convert"].splitlines()]


def run_line(launch: dict[str, Any]) -> str:
    ast.parse(launch["command"])
    return launch["command"].splitlines()[-1]


def test_draft_model_is_written_with_the_commands_that_convert_and_run_it(target: Target, tmp_path: Path) -> None:
    drafter = built(lm, lm.Config(model=SMALL, num_draft=4, length="confidence=0.3"), target)
    out, launch = exported(drafter, tmp_path, quantise="int8")
    assert AutoModelForCausalLM.from_pretrained(out).config.num_hidden_layers == 1
    to_target, to_draft = conversions(launch)
    assert to_target[:5] == ["optimum-cli", "export", "openvino", "-m", target.name]
    assert to_target[-3:] == ["--weight-format", "fp32", str(out / CONVERTED_TARGET)]
    assert to_draft[4] == str(out) and to_draft[-3:] == ["--weight-format", "int8", str(out / CONVERTED_DRAFT)]
    assert launch["target"] == str(out / CONVERTED_TARGET) and "num_assistant_tokens=4" in run_line(launch)
    assert "KV_CACHE_PRECISION': 'f32'" in launch["command"] and "ATTENTION_BACKEND" in launch["command"]
    assert launch["settings"] == {"draft_model": str(out / CONVERTED_DRAFT), "num_assistant_tokens": 4}
    assert any("fixed number of tokens" in note for note in launch["notes"])


def test_converted_target_is_named_and_not_converted_again(target: Target, tmp_path: Path) -> None:
    shape = {"hidden_size": target.hidden_size, "num_hidden_layers": target.num_layers}
    (tmp_path / "converted").mkdir()
    (tmp_path / "converted" / MODEL_FILE).touch()
    (tmp_path / "converted" / "config.json").write_text(json.dumps(shape))
    drafter = lookup.Drafter(lookup.Config(max_ngram=2, min_ngram=2, num_draft=3), target)
    draftsmith.save(drafter, tmp_path / "artifact", target)
    out = export(tmp_path / "artifact", "openvino", tmp_path / "out", target_name=str(tmp_path / "converted"))
    launch = read_launch(out)
    assert "convert" not in launch and launch["target"] == str(tmp_path / "converted")
    assert launch["settings"] == {"prompt_lookup": True, "max_ngram_size": 2, "num_assistant_tokens": 3}
    assert "prompt_lookup=True" in launch["command"] and "max_ngram_size=2" in run_line(launch)
    assert "prompt_lookup" not in run_line(launch)
    assert any("the earliest match" in note for note in launch["notes"])
    (tmp_path / "converted" / "config.json").write_text(json.dumps(shape | {"num_hidden_layers": 9}))
    with pytest.raises(ValueError, match="num_hidden_layers is 9, and target .* has 3"):
        export(tmp_path / "artifact", "openvino", tmp_path / "out", target_name=str(tmp_path / "converted"))


@pytest.mark.parametrize("width", [0, 4])
def test_head_names_the_blocks_whose_outputs_it_reads(target: Target, tmp_path: Path, width: int) -> None:
    """One less than draftsmith's numbers, written into the converted head."""
    out, launch = exported(built(eagle3, replace(HEAD, width=width, num_nodes=10), target), tmp_path)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    _, to_draft, to_layers = conversions(launch)
    assert {"--trust-remote-code", "--disable-convert-tokenizer"} <= set(to_draft)
    assert to_layers[:2] == ["python", "-c"] and 'set_rt_info("0 1 2", ["hidden_layers_list"])' in to_layers[2]
    ast.parse(to_layers[2])
    tree = {"num_assistant_tokens": 10, "branching_factor": 4, "tree_depth": 3}
    expected = tree if width else {"num_assistant_tokens": 3}
    assert {name: value for name, value in launch["settings"].items() if name != "draft_model"} == expected


def test_head_of_the_whole_vocabulary_says_so(target: Target, tmp_path: Path) -> None:
    """optimum-intel leaves the map of a head without one uninitialised."""
    out, _ = exported(built(eagle3, replace(HEAD, draft_vocab=0), target), tmp_path)
    tensors = load_file(out / "model.safetensors")
    assert tensors["d2t"].tolist() == [0] * VOCAB_SIZE and tensors["t2d"].all()


def test_block_is_written_as_for_vllm(target: Target, tmp_path: Path) -> None:
    out, launch = exported(built(dflash, BLOCK, target), tmp_path)
    config = json.loads((out / "config.json").read_text())
    assert config["dflash_config"]["target_layer_ids"] == [0, 2]
    assert launch["settings"]["num_assistant_tokens"] == 3
    assert "scheduler.enable_prefix_caching = False" in launch["command"] and "batch of one" in launch["notes"][0]


def test_fine_tuned_target_is_the_one_that_is_converted(target: Target, tmp_path: Path) -> None:
    drafter = built(early_exit, early_exit.Config(exit_layer=2, tunes=True), target)
    out, launch = exported(drafter, tmp_path)
    to_target, _ = conversions(launch)
    assert to_target[4] == str(out / "target") and (out / "target" / "config.json").is_file()


def test_export_rejects_what_openvino_cannot_run(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpt2 = save_target(tmp_path / "gpt2", "gpt2")
    look_up = lookup.Drafter(lookup.Config(), target)
    cases: dict[str, tuple[Any, dict[str, str], str]] = {
        "medusa": (medusa.Drafter(medusa.Config(), target), {}, "OpenVINO GenAI does not run drafters of family 'medu"),
        "two layers": (built(eagle3, replace(HEAD, layers=(1, 2)), target), {}, "reads 2 hidden layers, .* three"),
        "flags": (
            built(eagle3, replace(HEAD, fusion_norm="whole", norm_output=True), target),
            {},
            "was trained with fusion_norm, norm_output, which OpenVINO GenAI does not compute",
        ),
        "embedding": (built(eagle3, replace(HEAD, layers=(0, 1, 2)), target), {}, "of which 0 is the embedding"),
        "gpt2": (built(eagle3, HEAD, gpt2), {}, "hidden states of llama, .* is of type 'gpt2'"),
        "shortlist": (built(dflash, replace(BLOCK, shortlist=20), target), {}, "has a shortlist; export it --to vllm"),
        "tied": (
            built(pard, pard.Config(model=SMALL, mask_token=VOCAB_SIZE - 1, rank=4), target),
            {},
            "is not an ordinary model",
        ),
        "format": (look_up, {"quantise_target": "q8_0"}, "--quantise-target is 'q8_0'; .* one of fp32, fp16, int8"),
        "no weights": (look_up, {"quantise": "int8"}, "a look-up has no weights"),
        "both": (look_up, {"quantise_target": "int8", "target_name": "x"}, "drop one of the two"),
        "no folder": (look_up, {"target_name": "x"}, "must be a folder with openvino_model.xml"),
    }
    for name, (drafter, _, _) in cases.items():
        draftsmith.save(drafter, tmp_path / "artifacts" / name, drafter.target)
    monkeypatch.setattr(Target, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    for name, (_, options, message) in cases.items():
        with pytest.raises(ValueError, match=message) as error:
            export(tmp_path / "artifacts" / name, "openvino", tmp_path / "out", **options)
        assert "\n" not in str(error.value), name
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
