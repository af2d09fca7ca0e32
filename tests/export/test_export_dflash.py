"""Exports and imports of DFlash drafters: transformers drafts and accepts the same tokens, and every layout comes back.

Shape suffixes: T tokens, W tokens of the shortlist.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import draftsmith
from draftsmith import Target
from draftsmith.drafters.dflash import Config, Drafter
from draftsmith.export import export
from draftsmith.export.launch import read_launch
from tests.export.test_export_acceptance import NUM_NEW, accepted_here, rounds_there, rows_of
from tests.export.test_export_servers import export_drafter, flags
from tests.support.drafters import overfitted_dflash
from tests.support.models import CONTEXT, VOCAB_SIZE, scramble, tiny_model, tiny_tokenizer
from trainers import import_dflash
from trainers.training.run_settings import RunSettings

NUM_LAYERS = 8
SHAPE = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_width": 8, "inner_width": 24}
LAYOUTS = ("vllm", "sglang", "speculators", "transformers")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    folder = tmp_path_factory.mktemp("dflash") / "target"
    tiny_model("llama", num_hidden_layers=NUM_LAYERS).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return Target.from_pretrained(str(folder), dtype="float32")


def drafter_of(target: Target, **changes: Any) -> Drafter:
    """Returns a drafter with random weights, and a shortlist, if any, with gaps."""
    given: dict[str, Any] = {"layers": (2, 4, 6), "mask_token": 63, "block_size": 5, "theta": 5e3} | SHAPE | changes
    drafter = Drafter(Config(**given), target)
    scramble(drafter, seed=1)
    shortlist = drafter.shared_head.shortlist
    if not shortlist.is_whole:
        shortlist.set_tokens(torch.arange(len(shortlist)) * VOCAB_SIZE // len(shortlist))
    return drafter.eval()


def imported(out: Path, target: Target) -> Drafter:
    settings = import_dflash.Settings(head=str(out))
    import_dflash.check(settings, target)  # type: ignore[arg-type]
    return import_dflash.fit(settings, target, [], RunSettings(), out)


# --- transformers --------------------------------------------------------------------------------------------------


def test_transformers_accepts_the_same_tokens_in_every_round(target: Target, tmp_path: Path) -> None:
    """From the second token on, as transformers' first step decodes plainly; the text is plain decoding's."""
    rows = rows_of(4)
    texts = draftsmith.generate(target, rows, max_new_tokens=NUM_NEW, eos_token_id=[]).sequences.tolist()
    # Half of the texts, so that some drafts are wrong.
    drafter = overfitted_dflash(target, texts[:2], num_steps=40, layers=(2, 4, 6), block_size=5, **SHAPE)
    draftsmith.save(drafter, tmp_path / "artifact", target)
    out = export(tmp_path / "artifact", "transformers", tmp_path / "out")
    assert "the first step decodes plainly" in "".join(read_launch(out)["notes"])
    later = accepted_here(
        drafter, [text[: len(row) + 1] for row, text in zip(rows, texts, strict=True)], num_new=NUM_NEW - 1
    )
    there = rounds_there(out, rows)
    assert [rounds[0] for rounds in there] == [(0, 0)] * len(rows)
    # The last rounds may draft beyond the text's end.
    found = [[accepted for _, accepted in rounds[1:]] for rounds in there]
    assert found == later
    assert {drafted for rounds in there for drafted, _ in rounds[1:-1]} == {4}
    flat = [number for row in later for number in row[:-1]]
    assert 0 < sum(flat) < 4 * len(flat), "all or nothing is accepted: no comparison is possible"


# --- Layouts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"stretch": (8.0, 1.0, 4.0, 16.0)},
        {"shortlist": 40, "layers": (1, 8)},
        {"layers": (5,)},
        {"markov_rank": 3},
        {"markov_rank": 3, "confidence": True, "shortlist": 40},
    ],
    ids=["usual", "stretched", "shortlist", "one layer", "bias", "both heads"],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_drafter_is_imported_from_its_export(
    target: Target, tmp_path: Path, layout: str, changes: dict[str, Any]
) -> None:
    """The importer returns a drafter with the same weights and settings."""
    if "markov_rank" in changes and layout == "transformers":
        pytest.skip("transformers drafts without a bias")
    if "shortlist" in changes and layout in ("sglang", "transformers"):
        changes = {"layers": (1, 7)} | {
            name: one for name, one in changes.items() if name in ("markov_rank", "confidence")
        }
    drafter = drafter_of(target, **changes)
    out, _ = export_drafter(drafter, layout, tmp_path)
    again = imported(out, target)
    assert again.config == drafter.config
    state = again.state_dict()
    assert state.keys() == drafter.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in drafter.state_dict().items())


def test_vllm_and_sglang_exports_are_the_same_folder(target: Target, tmp_path: Path) -> None:
    out, launch = export_drafter(drafter_of(target), "vllm", tmp_path)
    other, sglang = export_drafter(drafter_of(target), "sglang", tmp_path / "other")
    config = json.loads((out / "config.json").read_text())
    assert config == json.loads((other / "config.json").read_text())
    assert (out / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert config["architectures"] == ["DFlashDraftModel"] and config["model_type"] == "qwen3"
    assert (config["block_size"], config["num_target_layers"], config["is_causal"]) == (5, NUM_LAYERS, False)
    # Engines number layers by the block whose output they are.
    assert config["dflash_config"] == {
        "mask_token_id": 63,
        "target_layer_ids": [1, 3, 5],
        "causal": False,
        "use_swa": False,
        "sample_from_anchor": False,
    }
    assert config["max_position_embeddings"] == CONTEXT and config["rope_parameters"]["rope_theta"] == 5e3
    assert launch["settings"]["method"] == "dflash" and launch["settings"]["num_speculative_tokens"] == 4
    assert flags(sglang)["--speculative-algorithm"] == "DFLASH"
    assert flags(sglang)["--speculative-num-draft-tokens"] == "5"


def test_drafters_with_a_bias_are_served_as_dspark(target: Target, tmp_path: Path) -> None:
    """As published DSpark drafters, but that the first token is drafted at the first mask, which is said."""
    drafter = drafter_of(target, markov_rank=3, confidence=True)
    out, launch = export_drafter(drafter, "vllm", tmp_path)
    _, sglang = export_drafter(drafter, "sglang", tmp_path / "other")
    nested, _ = export_drafter(drafter, "speculators", tmp_path / "nested")
    heads = {
        "markov_rank": 3,
        "markov_head_type": "vanilla",
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
        "sample_from_anchor": False,
        "block_size": 5,
        "mask_token_id": 63,
    }
    flat = json.loads((out / "config.json").read_text())
    assert flat["architectures"] == ["Qwen3DSparkModel"] and heads.items() <= flat.items()
    assert flat["target_layer_ids"] == flat["dflash_config"]["target_layer_ids"] == [1, 3, 5]
    config = json.loads((nested / "config.json").read_text())
    assert config["speculators_model_type"] == config["speculators_config"]["algorithm"] == "dspark"
    assert heads.items() <= config.items()
    tensors = load_file(out / "model.safetensors")
    assert torch.equal(tensors["markov_head.markov_w1.weight"], drafter.state_dict()["markov.previous.weight"])
    assert tensors["markov_head.markov_w2.weight"].shape == (VOCAB_SIZE, 3)
    assert tensors["confidence_head.proj.weight"].shape == (1, target.hidden_size + 3)
    assert launch["settings"]["method"] == "dspark" and launch["settings"]["num_speculative_tokens"] == 4
    assert "on GPUs only" in "".join(launch["notes"]) and "not run" in launch["checked_with"]
    assert flags(sglang)["--speculative-algorithm"] == "DSPARK"
    assert flags(sglang)["--speculative-num-draft-tokens"] == "5"


@pytest.mark.parametrize("engine", LAYOUTS)
def test_a_confidence_without_bias_is_left_out_and_the_note_says_so(
    target: Target, tmp_path: Path, engine: str
) -> None:
    out, launch = export_drafter(drafter_of(target, confidence=True), engine, tmp_path)
    plain, other = export_drafter(drafter_of(target), engine, tmp_path / "plain")
    assert load_file(out / "model.safetensors").keys() == load_file(plain / "model.safetensors").keys()
    assert "The confidence is left out" in "".join(launch["notes"])
    assert "The confidence is left out" not in "".join(other["notes"])


def test_speculators_export_numbers_layers_as_draftsmith_does(target: Target, tmp_path: Path) -> None:
    out, _ = export_drafter(drafter_of(target, shortlist=40), "speculators", tmp_path)
    config = json.loads((out / "config.json").read_text())
    assert config["aux_hidden_state_layer_ids"] == [2, 4, 6]
    assert config["sliding_window_non_causal"] is True and config["draft_vocab_size"] == 40
    tensors = load_file(out / "model.safetensors")
    ids_W = tensors["d2t"] + torch.arange(40)
    assert torch.equal(ids_W, tensors["t2d"].nonzero()[:, 0])
    assert torch.equal(tensors["lm_head.weight"], target.model.get_output_embeddings().weight[ids_W])


def test_export_of_a_bias_to_transformers_is_a_folder_for_custom_generate(target: Target, tmp_path: Path) -> None:
    """transformers adds no bias by the token before."""
    _, launch = export_drafter(drafter_of(target, markov_rank=3, confidence=True), "transformers", tmp_path)
    assert launch["settings"] == {"custom_generate": str(tmp_path / "out")}


@pytest.mark.parametrize(
    ("engine", "changes", "message"),
    [
        ("sglang", {"shortlist": 40}, "SGLang drafts from the whole vocabulary, and this drafter has a shortlist"),
        ("sglang", {"layers": (2, 8)}, "outputs of all blocks but the last, and this drafter reads hidden layers"),
        ("transformers", {"layers": (2, 8)}, "outputs of all blocks but the last"),
        ("vllm", {"layers": (0, 3)}, "outputs of all blocks, and this drafter reads hidden layers"),
        ("openvino", {"markov_rank": 3}, "OpenVINO GenAI drafts a block's tokens independently of each other"),
    ],
    ids=["shortlist", "last in SGLang", "last in transformers", "embedding", "bias in OpenVINO"],
)
def test_export_rejects_what_an_engine_cannot_run(
    target: Target, tmp_path: Path, engine: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        export_drafter(drafter_of(target, **changes), engine, tmp_path)
    assert not (tmp_path / "out").exists()


# --- Rejected imports ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 48}, "hidden_size is 48; for .* it must be 32"),
        ({"vocab_size": 65}, "vocab_size is 65; for .* it must be 64"),
        ({"block_size": None}, "lacks block_size"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"is_causal": True}, "is_causal is set"),
        ({"dflash_config": {"mask_token_id": 63, "target_layer_ids": [1], "sample_from_anchor": True}}, "sample_from_"),
        ({"dflash_config": {"mask_token_id": 63, "target_layer_ids": [9]}}, r"reads hidden layers \[10\]"),
        ({"dflash_config": {"mask_token_id": 63}}, "does not say which layers"),
        ({"dflash_config": None}, "is of no DFlash drafter|lacks mask_token_id"),
        ({"layer_types": ["sliding_attention"] * 2, "sliding_window": 16}, "layers see the last 16 tokens only"),
        ({"speculators_model_type": "eagle3"}, "type 'eagle3'; expected 'dflash' or 'dspark'"),
        ({"markov_rank": 3, "markov_head_type": "gated"}, "markov_head_type is 'gated'; only 'vanilla'"),
        ({"markov_rank": 3, "dflash_config": {"mask_token_id": 63, "target_layer_ids": [1]}}, "sample_from_anchor is"),
        ({"markov_rank": 3, "enable_confidence_head": True}, "confidence_head_with_markov is None and markov_rank 3"),
        ({"intermediate_size": 25}, r"'layers.0.feed_forward.down.weight' .* has shape \(32, 24\)"),
    ],
    ids=str,
)
def test_import_rejects_unsupported_configurations(
    target: Target, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    out, _ = export_drafter(drafter_of(target), "vllm", tmp_path)
    config = json.loads((out / "config.json").read_text()) | changes
    (out / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    with pytest.raises(ValueError, match=message) as error:
        imported(out, target)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm.weight": None}, "'norm.weight' .* is missing"),
        ({"fc.bias": torch.zeros(32)}, "tensor 'fc.bias' is not part of a DFlash drafter"),
        ({"layers.2.input_layernorm.weight": torch.zeros(32)}, "is not part of the drafter that config.json describes"),
        ({"lm_head.weight": torch.zeros(VOCAB_SIZE, 32)}, "lm_head is not the target's"),
        ({"embed_tokens.weight": torch.zeros(VOCAB_SIZE, 32)}, "embed_tokens is not the target's"),
    ],
    ids=["missing", "bias", "more layers", "head", "embedding"],
)
def test_import_rejects_unexpected_tensors(
    target: Target, tmp_path: Path, changes: dict[str, Tensor | None], message: str
) -> None:
    out, _ = export_drafter(drafter_of(target), "vllm", tmp_path)
    tensors = load_file(out / "model.safetensors") | changes  # type: ignore[operator]
    save_file({name: one for name, one in tensors.items() if one is not None}, out / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        imported(out, target)


def test_import_rejects_truncated_weights(target: Target, tmp_path: Path) -> None:
    out, _ = export_drafter(drafter_of(target), "vllm", tmp_path)
    file = out / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be read"):
        imported(out, target)
