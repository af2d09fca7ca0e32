"""Published EAGLE-3 heads: every layout of a head is imported as the same drafter; unsupported heads are rejected.

Shape suffixes: B rows, N nodes, V vocabulary.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import draftsmith
from draftsmith import Target
from draftsmith.artifacts.artifact import read_manifest
from draftsmith.drafters.eagle3 import Config, Drafter
from tests.support.family import Watched, texts
from tests.support.models import VOCAB_SIZE, WIDTH, padded, prompts, scramble, tiny_model
from tests.support.runs import SMALL, make_data, make_target
from trainers import import_eagle3
from trainers.import_eagle3 import Settings, fit
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings

NUM_LAYERS = 8
TARGET = Target(tiny_model("llama", num_hidden_layers=NUM_LAYERS))
ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE["original_max_position_embeddings"] = 16


def head(**changes: Any) -> Drafter:
    """Returns a head with random weights and 40 of the 64 tokens, which fuses the usual layers of published heads."""
    shape: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "head_width": 8, "inner_width": 24, "eps": 1e-5}
    config = Config(**{"layers": (2, 4, 5), "draft_vocab": 40, "theta": 5e3} | shape | changes)
    drafter = Drafter(config, TARGET)
    scramble(drafter, seed=1)
    drafter.set_vocabulary(torch.arange(len(drafter.d2t)) * VOCAB_SIZE // len(drafter.d2t))
    return drafter.eval()


def published_tensors(drafter: Drafter, layer: str) -> dict[str, Tensor]:
    """Returns the head's tensors by their published names, with `layer` as the layer's prefix."""
    attention, feed_forward = drafter.attention, drafter.feed_forward
    weights = {
        "fc": drafter.fusion,
        "norm": drafter.norm,
        "lm_head": drafter.head,
        f"{layer}.hidden_norm": drafter.feature_norm,
        f"{layer}.input_layernorm": drafter.token_norm,
        f"{layer}.post_attention_layernorm": drafter.feed_forward_norm,
        f"{layer}.self_attn.q_proj": attention.query,
        f"{layer}.self_attn.k_proj": attention.key,
        f"{layer}.self_attn.v_proj": attention.value,
        f"{layer}.self_attn.o_proj": attention.output,
        f"{layer}.mlp.gate_proj": feed_forward.gate,
        f"{layer}.mlp.up_proj": feed_forward.up,
        f"{layer}.mlp.down_proj": feed_forward.down,
    }
    tensors = {f"{name}.weight": module.weight.detach().clone() for name, module in weights.items()}
    return tensors | {"d2t": drafter.d2t.clone(), "t2d": drafter.t2d.clone()}


def flat_config(**changes: Any) -> dict[str, Any]:
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": WIDTH,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5000.0,
        "rope_scaling": None,
        "vocab_size": VOCAB_SIZE,
        "draft_vocab_size": 40,
    }
    return config | changes


def nested_config(**changes: Any) -> dict[str, Any]:
    """Returns the configuration as speculators 0.9 writes it."""
    layer = flat_config(rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    for key in ("draft_vocab_size", "architectures", "rope_theta", "rope_scaling"):
        del layer[key]
    config = {
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "architectures": ["Eagle3DraftModel"],
        "draft_vocab_size": 40,
        "norm_before_residual": False,
        "norm_before_fc": False,
        "fc_norm": False,
        "norm_output": False,
        "target_hidden_size": None,
        "eagle_aux_hidden_state_layer_ids": [2, 4, 5],
        "speculators_config": {"algorithm": "eagle3", "verifier": {"name_or_path": "org/target"}},
        "transformer_layer_config": layer,
    }
    return config | changes


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], *, pickled: bool = False) -> Settings:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        half = len(tensors) // 2
        for number, names in enumerate((list(tensors)[:half], list(tensors)[half:]), start=1):
            save_file({name: tensors[name] for name in names}, folder / f"model-{number:05d}-of-00002.safetensors")
    return Settings(head=str(folder))


def import_head(settings: Settings) -> Drafter:
    return fit(settings, TARGET, [], RunSettings(), Path())


def drafts(drafter: Drafter) -> list[Any]:
    """Returns the texts and drafts of greedy trees and of sampled chains."""
    ids, mask = padded(prompts(3))
    found: list[Any] = []
    for width, temperature in ((4, 0.0), (0, 1.0)):
        one = Drafter(dataclasses.replace(drafter.config, width=width), TARGET)
        one.load_state_dict(drafter.state_dict())
        watched = Watched(one.eval())
        given = {"attention_mask": mask, "max_new_tokens": 8, "temperature": temperature, "seed": 0}
        found += [texts(draftsmith.generate(TARGET, ids, watched, **given)), watched.drafts]
    return found


def check_equal(one: Drafter, other: Drafter) -> None:
    """Asserts that configurations, weights, vocabularies and drafts are equal."""
    assert one.config == other.config
    state = other.state_dict()
    assert state.keys() == one.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in one.state_dict().items())
    assert drafts(one) == drafts(other)


def test_fit_reads_the_same_head_from_every_layout(tmp_path: Path) -> None:
    source = head()
    embedding = {"embed_tokens.weight": TARGET.model.get_input_embeddings().weight.detach().clone()}
    flat, nested = published_tensors(source, "midlayer"), published_tensors(source, "layers.0")
    ids = "eagle_aux_hidden_state_layer_ids"
    layouts = {
        "original": write(tmp_path / "original", flat_config(), flat, pickled=True),
        "SpecForge": write(tmp_path / "sf", flat_config(eagle_config={ids: [1, 3, 4]}), flat | embedding),
        "both servers": write(tmp_path / "both", flat_config(**{ids: [2, 4, 5]}, eagle_config={ids: [1, 3, 4]}), flat),
        "speculators": write(tmp_path / "speculators", nested_config(), nested | embedding),
        "without t2d": write(tmp_path / "t2d", flat_config(), {name: t for name, t in flat.items() if name != "t2d"}),
    }
    for settings in layouts.values():
        import_eagle3.check(settings, TARGET)  # type: ignore[arg-type]
        assert import_eagle3.needs(settings, TARGET).layers == (2, 4, 5)
        check_equal(import_head(settings), source)


@pytest.mark.parametrize("layers", [(2, 4, 5), (1, 8)])
def test_fit_reads_options_of_published_heads(tmp_path: Path, layers: tuple[int, ...]) -> None:
    """EAGLE-3.1, other norms, a trained embedding, Llama 3's positions, the whole vocabulary, other layers."""
    embedding = torch.randn(VOCAB_SIZE, WIDTH, generator=torch.Generator().manual_seed(0))
    new = head(layers=layers, fusion_norm="each", norm_output=True, stretch=(8.0, 1.0, 4.0, 16.0))
    tensors = published_tensors(new, "layers.0")
    tensors |= {f"fc_norm.{at}.weight": norm.weight.detach() for at, norm in enumerate(new.fusion_norms)}
    config = nested_config(fc_norm=True, norm_output=True, eagle_aux_hidden_state_layer_ids=list(layers))
    config["transformer_layer_config"]["rope_parameters"] = ROPE | {"rope_theta": 5000.0}
    check_equal(import_head(write(tmp_path / "new", config, tensors)), new)

    other_options = head(layers=layers, fusion_norm="whole", norm_residual=True, own_embedding=True, draft_vocab=0)
    other_options.embedding.weight.data.copy_(embedding)
    tensors = published_tensors(other_options, "midlayer")
    tensors |= {"input_norm.weight": other_options.fusion_norms[0].weight.detach(), "embed_tokens.weight": embedding}
    del tensors["d2t"], tensors["t2d"]
    ids = {"eagle_aux_hidden_state_layer_ids": [layer - 1 for layer in layers]}
    config = flat_config(norm_before_fc=True, norm_before_residual=True, draft_vocab_size=None, eagle_config=ids)
    check_equal(import_head(write(tmp_path / "other", config, tensors)), other_options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 65}, "vocab_size is 65; for .* it must be 64"),
        ({"hidden_size": 64}, "hidden_size is 64; for .* it must be 32"),
        ({"num_hidden_layers": 2}, "num_hidden_layers is 2"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"target_hidden_size": 64}, "target_hidden_size is 64; .* has 32"),
        ({"sliding_window": 128}, "sliding_window is 128; only full attention"),
        ({"rope_scaling": {"type": "yarn"}}, "rotary positions are of type 'yarn'"),
        ({"eagle_aux_hidden_state_layer_ids": [2, 4, 9]}, "the target has 8"),
        (
            {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [2, 4, 5]}}
            | {"eagle_aux_hidden_state_layer_ids": [2]},
            "different layers",
        ),
        ({"speculators_model_type": "dflash"}, "type 'dflash'"),
        ({"speculators_model_type": "eagle3"}, "lacks norm_before_residual"),
        ({"intermediate_size": 25}, r"'feed_forward.down.weight' .* has shape \(32, 24\)"),
        ({"fc_norm": True}, "'fusion_norms.0.weight' .* is missing"),
        ({"draft_vocab_size": 41}, r"'head.weight' .* has shape \(40, 32\)"),
    ],
)
def test_fit_rejects_unsupported_configurations(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    settings = write(tmp_path / "head", flat_config(**changes), published_tensors(head(), "midlayer"))
    with pytest.raises(ValueError, match=message):
        import_head(settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm.weight": None}, "'norm.weight' .* is missing"),
        ({"d2t": None}, "d2t, which maps the 40 draft tokens to the target's, is missing"),
        ({"fc.bias": torch.zeros(WIDTH)}, "tensor 'fc.bias' is not part of an EAGLE-3 head"),
        ({"model.norm.weight": torch.zeros(WIDTH)}, "tensor 'model.norm.weight' is not part"),
        ({"fc.weight": torch.zeros(WIDTH, WIDTH)}, r"'fusion.weight' .* has shape \(32, 32\)"),
        ({"d2t": torch.arange(40)[None].flip(1)[0]}, "must map to ascending token ids below 64"),
        ({"t2d": torch.zeros(VOCAB_SIZE, dtype=torch.bool)}, "contain different tokens"),
        ({"fc_norm.0.weight": torch.ones(WIDTH)}, "is not part of the head that its configuration describes"),
    ],
)
def test_fit_rejects_unexpected_tensors(tmp_path: Path, changes: dict[str, Tensor | None], message: str) -> None:
    tensors = published_tensors(head(), "midlayer") | changes  # type: ignore[operator]
    settings = write(tmp_path / "head", flat_config(), {name: t for name, t in tensors.items() if t is not None})
    with pytest.raises(ValueError, match=message):
        import_head(settings)


def test_fit_rejects_folders_without_a_head(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no config.json"):
        import_head(Settings(head=str(tmp_path)))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        import_head(Settings(head=str(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps(flat_config()))
    with pytest.raises(ValueError, match="neither a safetensors file nor"):
        import_head(Settings(head=str(tmp_path)))
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="cannot be read"):
        import_head(Settings(head=str(tmp_path)))
    with pytest.raises(ValueError, match="num_draft is 0"):
        Settings(head="", num_draft=0)
    with pytest.raises(ValueError, match="width is -1"):
        Settings(head="", width=-1)


def test_train_writes_an_artifact_with_measured_acceptance(tmp_path: Path) -> None:
    target = make_target(tmp_path / "target")
    make_data(target, tmp_path / "data")
    ids = {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]}
    settings = write(tmp_path / "head", flat_config(**ids), published_tensors(head(), "midlayer"))
    paths = {"target": str(tmp_path / "target"), "data": str(tmp_path / "data"), "output": str(tmp_path / "out")}
    output = train(import_eagle3, settings, RunSettings(**paths | SMALL))
    manifest = read_manifest(output)
    assert manifest["measured_acceptance"].keys() == {"acceptance"} | {f"head{k}_accuracy" for k in range(5)}
    loaded = draftsmith.load(output, Target.from_pretrained(str(tmp_path / "target"), dtype="float32"))
    assert torch.equal(loaded.fusion.weight, head().fusion.weight)
