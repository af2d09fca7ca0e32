"""Tiny random targets of several architectures, with MTP heads in their checkpoints as published ones have them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from draftsmith.loading.precision import cast
from tests.support.models import CONTEXT, VOCAB_SIZE, WIDTH, scramble, tiny_tokenizer

NUM_LAYERS = 2
_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LINEAR = {f"linear_num_{kind}_heads": 2 for kind in ("key", "value")}
_LINEAR |= {f"linear_{kind}_head_dim": 8 for kind in ("key", "value")}
_EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
_ROUTED = _EXPERTS | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"], "head_dim": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_next": _HYBRID | _LINEAR | _EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 16},
    "qwen3_5_text": _HYBRID | _LINEAR,
    "deepseek_v3": _ROUTED
    | {"num_key_value_heads": 4, "first_k_dense_replace": 1, "q_lora_rank": 12, "kv_lora_rank": 8}
    | {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8},
    "glm4_moe": _ROUTED | {"head_dim": 8, "first_k_dense_replace": 1, "use_qk_norm": True},
    "mimo": {},
    "mimo_v2_flash": _ROUTED
    | {"head_dim": 8, "v_head_dim": 4, "sliding_window": 6}
    | {"layer_types": ["full_attention", "sliding_attention"], "mlp_layer_types": ["dense", "sparse"]},
}
_ONE_LAYER: dict[str, dict[str, Any]] = {
    "qwen3_next": {"layer_types": ["full_attention"]},
    "qwen3_5_text": {"layer_types": ["full_attention"]},
    "deepseek_v3": {"first_k_dense_replace": 0},
    "glm4_moe": {"first_k_dense_replace": 0},
    "mimo": {"layer_types": ["full_attention"]},
    "mimo_v2_flash": {"layer_types": ["sliding_attention"], "mlp_layer_types": ["dense"]},
}
"""What the configuration of a model of one layer, a head's, has in place of the target's."""


NUM_PREDICTED = dict.fromkeys(CONFIGS, "") | dict.fromkeys(
    ("deepseek_v3", "glm4_moe", "mimo"), "num_nextn_predict_layers"
)
"""The key of the number of heads in config.json, if it has one."""


def write_target(
    folder: Path,
    architecture: str,
    *,
    dtype: torch.dtype = torch.float32,
    num_shards: int = 1,
    num_heads: int = 1,
    seed: int = 3,
    **sizes: int,
) -> dict[str, Tensor]:
    """Writes a target and its MTP heads, and returns the heads' tensors by their names in the checkpoint.

    `sizes` replace those of the configuration. A target of MiMo-7B is one of Qwen2's by its configuration, which
    transformers loads without code of the folder, and names the architecture by which vLLM knows it.

    The layer's tensors are those of an ordinary layer as transformers saves it. A second shard has the head's last
    tensors beside some of the target's.
    """
    model = _model(architecture, dtype, seed, **sizes)
    model.save_pretrained(folder)
    if NUM_PREDICTED[architecture]:
        file = folder / "config.json"
        config = json.loads(file.read_text()) | {NUM_PREDICTED[architecture]: num_heads}
        if architecture == "mimo":
            config["architectures"] = ["MiMoForCausalLM"]
        file.write_text(json.dumps(config))
    tiny_tokenizer().save_pretrained(folder)
    head: dict[str, Tensor] = {}
    for number in range(num_heads):
        ordinary = folder / "one-layer"
        changes = sizes | _ONE_LAYER[architecture] | {"num_hidden_layers": 1}
        _model(architecture, dtype, seed + 1 + number, **changes).save_pretrained(ordinary)
        layer = load_file(ordinary / "model.safetensors")
        for file in ordinary.iterdir():
            file.unlink()
        ordinary.rmdir()
        head |= head_tensors(architecture, layer, model, seed + number, number)
    tensors = load_file(folder / "model.safetensors") | head
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return head
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        own = names[len(names) * shard // num_shards : len(names) * (shard + 1) // num_shards]
        save_file({name: tensors[name] for name in own}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(own, file)
    index = {"metadata": {"total_size": sum(one.nbytes for one in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return head


def head_tensors(
    architecture: str, layer: dict[str, Tensor], model: Any, seed: int, number: int = 0
) -> dict[str, Tensor]:
    """Returns a head's tensors by the names that published checkpoints of the architecture have."""
    generator = torch.Generator().manual_seed(seed)
    dtype, width = model.get_input_embeddings().weight.dtype, model.config.hidden_size
    norms = [(1 + 0.2 * torch.randn(width, generator=generator)).to(dtype) for _ in range(2)]
    projection = (torch.randn(width, 2 * width, generator=generator) / width**0.5).to(dtype)
    block = {name.removeprefix("model.layers.0."): one for name, one in layer.items() if ".layers.0." in name}
    norm = layer["model.norm.weight"]
    if architecture in ("qwen3_next", "qwen3_5_text"):
        outer = {"fc": projection, "pre_fc_norm_embedding": norms[0], "pre_fc_norm_hidden": norms[1], "norm": norm}
        outer = {f"mtp.{name}.weight": tensor for name, tensor in outer.items()}
        return outer | {f"mtp.layers.0.{name}": tensor for name, tensor in block.items()}
    outer = {"eh_proj": projection, "enorm": norms[0], "hnorm": norms[1]}
    if architecture == "mimo":
        prefix = f"model.mtp_layers.{number}."
        outer = {"input_proj": projection, "token_layernorm": norms[0], "hidden_layernorm": norms[1]}
        outer["final_layernorm"] = norm
    elif architecture == "mimo_v2_flash":
        prefix = f"model.mtp.layers.{number}."
        outer["final_layernorm"] = norm
        block = {name.replace("post_attention_layernorm", "pre_mlp_layernorm"): one for name, one in block.items()}
    else:
        prefix = f"model.layers.{NUM_LAYERS + number}."
        outer["shared_head.norm"] = norm
        outer["embed_tokens"] = model.get_input_embeddings().weight.detach().clone()
        outer["shared_head.head"] = model.get_output_embeddings().weight.detach().clone()
    tensors = {f"{prefix}{name}.weight": tensor for name, tensor in outer.items()}
    return tensors | {prefix + name: tensor for name, tensor in block.items()}


def _model(architecture: str, dtype: torch.dtype, seed: int, **changes: Any) -> Any:
    config = AutoConfig.for_model(
        "qwen2" if architecture == "mimo" else architecture, **_SIZES | CONFIGS[architecture] | changes
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    scramble(model, seed=seed)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.linspace(-0.3, 0.3, len(buffer)))
    model.generation_config = GenerationConfig(pad_token_id=0)
    return cast(model, dtype)
