"""Reads published EAGLE-3 heads, as the EAGLE repository, SpecForge (SGLang) and speculators write them.

All name the same weights; speculators nests the layer's configuration and calls the layer `layers.0`, the others
`midlayer`. The fused hidden layers are listed in either of two ways: at the top level with draftsmith's numbers, or in
`eagle_config` by the index of the block whose output they are, which is one less.

Shape suffixes: W draft vocabulary.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from draftsmith.artifacts.published.folders import read_config

LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
NAMES = {
    "fc": "fusion",
    "norm": "norm",
    "lm_head": "head",
    "embed_tokens": "embedding",
    "input_norm": "fusion_norms.0",
    "hidden_norm": "feature_norm",
    "input_layernorm": "token_norm",
    "post_attention_layernorm": "feed_forward_norm",
    "self_attn.q_proj": "attention.query",
    "self_attn.k_proj": "attention.key",
    "self_attn.v_proj": "attention.value",
    "self_attn.o_proj": "attention.output",
    "mlp.gate_proj": "feed_forward.gate",
    "mlp.up_proj": "feed_forward.up",
    "mlp.down_proj": "feed_forward.down",
}
"""Published names, without the layer's prefix and `.weight`, and the drafter's names."""
OUTER = ("fc", "norm", "lm_head", "embed_tokens", "input_norm")
"""Published names without a layer prefix."""


def read_shape(folder: Path, target: Any) -> dict[str, Any]:
    """Returns the values of the drafter's configuration that config.json determines.

    `target` gives name, hidden_size, vocab_size and num_layers. Raises ValueError for anything but an EAGLE-3 head for
    this target.
    """
    config = _read_config(folder)
    layer = config.get("transformer_layer_config", config)
    missing = {"hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"} - layer.keys()
    if missing:
        raise ValueError(f"{folder}/config.json lacks {', '.join(sorted(missing))}")
    required: dict[str, Any] = {"hidden_size": target.hidden_size, "vocab_size": target.vocab_size}
    required |= {"num_hidden_layers": 1, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    for key, value in required.items():
        if layer.get(key, value) != value:
            raise ValueError(f"{folder}: {key} is {layer[key]!r}; for {target.name} it must be {value!r}")
    if (config.get("target_hidden_size") or target.hidden_size) != target.hidden_size:
        raise ValueError(
            f"{folder}: target_hidden_size is {config['target_hidden_size']}; {target.name} has {target.hidden_size}"
        )
    if layer.get("sliding_window") and layer.get("use_sliding_window", True):
        raise ValueError(f"{folder}: sliding_window is {layer['sliding_window']}; only full attention is supported")
    theta, stretch = read_rotary(layer, folder)
    num_heads = layer["num_attention_heads"]
    draft_vocab = config.get("draft_vocab_size") or target.vocab_size
    return {
        "layers": _layers(config, folder, target.num_layers),
        "num_heads": num_heads,
        "num_kv_heads": layer.get("num_key_value_heads") or num_heads,
        "head_width": layer.get("head_dim") or layer["hidden_size"] // num_heads,
        "inner_width": layer["intermediate_size"],
        "draft_vocab": 0 if draft_vocab == target.vocab_size else draft_vocab,
        "theta": theta,
        "stretch": stretch,
        "eps": layer.get("rms_norm_eps", 1e-6),
        "fusion_norm": "each" if config.get("fc_norm") else "whole" if config.get("norm_before_fc") else "none",
        "norm_output": bool(config.get("norm_output")),
        "norm_residual": bool(config.get("norm_before_residual")),
    }


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Returns the head's tensors by the drafter's names; raises ValueError for a tensor that no EAGLE-3 head has."""
    tensors = {}
    for name, tensor in read_tensors(folder).items():
        inner = name.removesuffix(".weight").removeprefix("midlayer.").removeprefix("layers.0.")
        if name in ("d2t", "t2d"):
            tensors[name] = tensor.long() if name == "d2t" else tensor.bool()
        elif inner.startswith("fc_norm.") and name.endswith(".weight"):
            tensors[f"fusion_norms.{inner.removeprefix('fc_norm.')}.weight"] = tensor
        elif inner in NAMES and name.endswith(".weight"):
            tensors[f"{NAMES[inner]}.weight"] = tensor
        else:
            raise ValueError(f"{folder}: tensor {name!r} is not part of an EAGLE-3 head")
    return tensors


def add_vocabulary(tensors: dict[str, Tensor], folder: Path, *, num_tokens: int, vocab_size: int) -> None:
    """Adds d2t [W] or t2d [V] where it is missing; raises ValueError if they are invalid or contradict each other.

    Token w of the `num_tokens` draft tokens is token d2t[w] + w of the target's vocabulary; t2d is True for these.
    """
    if "d2t" not in tensors and num_tokens < vocab_size:
        raise ValueError(f"{folder}: d2t, which maps the {num_tokens} draft tokens to the target's, is missing")
    offsets_W = tensors.setdefault("d2t", torch.zeros(num_tokens, dtype=torch.long))
    ids_W = offsets_W + torch.arange(len(offsets_W))
    if (ids_W.diff() <= 0).any() or ids_W.min() < 0 or ids_W.max() >= vocab_size:
        raise ValueError(f"{folder}: d2t must map to ascending token ids below {vocab_size}")
    t2d = torch.zeros(vocab_size, dtype=torch.bool).index_fill(0, ids_W, True)
    if not torch.equal(tensors.setdefault("t2d", t2d), t2d):
        raise ValueError(f"{folder}: d2t and t2d contain different tokens")


def _read_config(folder: Path) -> dict[str, Any]:
    config = read_config(folder, kind="head", speculators=("eagle3",))
    if "speculators_model_type" in config and "norm_before_residual" not in config:
        # vLLM's default is true and that of the speculators library false.
        raise ValueError(
            f"{folder}/config.json lacks norm_before_residual, whose default differs between its readers; add it"
        )
    return config


def _layers(config: dict[str, Any], folder: Path, num_layers: int) -> tuple[int, ...]:
    """Returns the fused hidden layers in draftsmith's numbering."""
    found = {tuple(config[LAYER_IDS])} if config.get(LAYER_IDS) else set()
    if nested := (config.get("eagle_config") or {}).get(LAYER_IDS):
        found.add(tuple(block + 1 for block in nested))
    if len(found) > 1:
        raise ValueError(f"{folder}: {LAYER_IDS} at the top level and in eagle_config are different layers")
    layers = found.pop() if found else (2, num_layers // 2, num_layers - 3)
    if max(layers) > num_layers:
        raise ValueError(f"{folder} reads hidden layers {list(layers)}; the target has {num_layers}")
    return layers


def read_rotary(layer: dict[str, Any], folder: Path) -> tuple[float, tuple[float, ...]]:
    """Returns (theta, stretch) of the rotary positions, from the keys of either transformers 4 or 5."""
    rope = (layer.get("rope_scaling") or {}) | (layer.get("rope_parameters") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = float(rope.get("rope_theta") or layer.get("rope_theta") or 10_000.0)
    if kind == "default":
        return theta, ()
    if kind != "llama3":
        raise ValueError(f"{folder}: rotary positions are of type {kind!r}; 'default' and 'llama3' are supported")
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return theta, tuple(float(rope[key]) for key in keys)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Returns all tensors of the folder's safetensors files, or of its pytorch_model.bin, unpickled as weights only."""
    files = sorted(folder.glob("*.safetensors"))
    pickled = folder / "pytorch_model.bin"
    try:
        if files:
            return {name: tensor for file in files for name, tensor in load_file(file).items()}
        if pickled.is_file():
            return torch.load(pickled, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, OSError) as error:
        raise ValueError(f"the weights in {folder} cannot be read: {error}") from error
    raise ValueError(f"{folder} has neither a safetensors file nor pytorch_model.bin")
