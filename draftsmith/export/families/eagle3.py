"""EAGLE-3 heads as published: one folder that vLLM and SGLang load alike, or one of the speculators library.

Which hidden layers are fused is said in two ways: in the list at the top as we count, in that of `eagle_config` by the
block, counted from 0, whose output it is. vLLM goes by the first, SGLang by the second.

Shape suffixes: W draft vocabulary.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftsmith.core.model_info import NO_LIMIT
from draftsmith.export.given import Given
from draftsmith.export.launch import Launch, for_sglang, for_vllm
from draftsmith.export.tensors import Kinds, write_tensors

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
"""Published names, less what stands before and `.weight` behind, and ours."""
OUTER = ("fc", "norm", "lm_head", "embed_tokens", "input_norm")
"""Those outside the layer."""
COUNTED_OTHERWISE = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "gpt_oss")
"""Targets for which SGLang counts the layers in yet another way."""


def vllm(given: Given, folder: Path) -> Launch:
    """Writes the folder for both servers."""
    _write(given, folder, flat_config(given), "midlayer")
    settings = {"method": "eagle3", "model": str(given.output), "num_speculative_tokens": given.config.num_draft}
    notes = ("vLLM drafts chains, not trees.",) if given.config.width else ()
    asks = f"vLLM's class for {given.target_config.model_type} models must give it hidden layers (SupportsEagle3)."
    return for_vllm(given, settings | {"draft_tensor_parallel_size": 1}, notes=(*notes, asks))


def sglang(given: Given, folder: Path) -> Launch:
    """Writes the same folder, which SGLang reads with the target's embedding and the residual as it is."""
    config = given.config
    if config.own_embedding:
        raise ValueError("SGLang puts the target's embedding in place of the head's own; export it --to vllm")
    if config.norm_residual:
        raise ValueError(
            "SGLang knows no head whose residual stream begins normed (norm_residual); export it --to vllm"
        )
    if config.layers[0] == 0 or config.layers[-1] == given.facts.num_layers:
        raise ValueError(
            f"SGLang gives a head the outputs of blocks, the last one's not, and this one reads hidden layers"
            f" {list(config.layers)} of {given.facts.num_layers}; export it --to vllm"
        )
    kind = given.target_config.model_type
    if kind in COUNTED_OTHERWISE and config.layers != _usual_layers(given):
        raise ValueError(
            f"SGLang counts the layers of {kind} in a way of its own; train the head on {list(_usual_layers(given))},"
            " which it takes unasked"
        )
    _write(given, folder, flat_config(given), "midlayer")
    width, num_draft = max(config.width, 1), config.num_draft
    settings = {"algorithm": "EAGLE3", "draft-model-path": str(given.output), "num-steps": num_draft}
    settings |= {"eagle-topk": width, "num-draft-tokens": config.num_nodes + 1 if config.width else num_draft + 1}
    return for_sglang(given, settings)


def speculators(given: Given, folder: Path) -> Launch:
    """Writes a folder of the speculators library, for training on and for vLLM.

    The embedding is always in it: where it is missing the library starts one at random.
    """
    _write(given, folder, nested_config(given), "layers.0", with_embedding=True)
    settings = {"method": "eagle3", "model": str(given.output), "num_speculative_tokens": given.config.num_draft}
    return for_vllm(given, settings | {"draft_tensor_parallel_size": 1})


def flat_config(given: Given) -> dict[str, Any]:
    """Returns the configuration that vLLM and SGLang read, every flag written out."""
    layers = {}
    if given.target_config.model_type not in COUNTED_OTHERWISE or given.config.layers != _usual_layers(given):
        layers = {
            LAYER_IDS: list(given.config.layers),
            "eagle_config": {"use_aux_hidden_state": True, LAYER_IDS: [layer - 1 for layer in given.config.layers]},
        }
    whole = {"architectures": ["LlamaForCausalLMEagle3"], **_layer(given), **_flags(given), **layers}
    return whole | {"target_hidden_size": given.facts.hidden_size, "num_aux_hidden_states": len(given.config.layers)}


def nested_config(given: Given) -> dict[str, Any]:
    """Returns the configuration of the speculators library."""
    proposal = {"proposal_type": "greedy", "speculative_tokens": given.config.num_draft}
    return {
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "architectures": ["Eagle3DraftModel"],
        **_flags(given),
        "target_hidden_size": None,
        LAYER_IDS: list(given.config.layers),
        "dtype": str(given.drafter.target.dtype).removeprefix("torch."),
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal | {"verifier_accept_k": 1, "accept_tolerance": 0.0}],
            "verifier": {"name_or_path": given.target_name, "architectures": given.target_config.architectures},
        },
        "transformer_layer_config": _layer(given),
    }


def tensors_of(given: Given, layer: str) -> dict[str, Tensor]:
    """Returns the head's weights by their published names, `layer` standing before those of the layer."""
    drafter = given.drafter
    theirs = {ours: name for name, ours in NAMES.items()}
    tensors = {}
    for name, tensor in drafter.state_dict().items():
        ours = name.removesuffix(".weight")
        if name in ("d2t", "t2d"):
            if len(drafter.d2t) < len(drafter.t2d):
                tensors[name] = tensor
        elif ours.startswith("fusion_norms.") and given.config.fusion_norm == "each":
            tensors[f"fc_norm.{ours.removeprefix('fusion_norms.')}.weight"] = tensor
        else:
            published = theirs[ours]
            tensors[f"{'' if published in OUTER else layer + '.'}{published}.weight"] = tensor
    return tensors


def kinds(whole: dict[str, Any], layer: str, dtype: torch.dtype, *, has_embedding: bool) -> Kinds:
    """Returns the tensors that loaders want of a head with such a config.json, worked out from that alone."""
    inner = whole.get("transformer_layer_config", whole)
    width, inside, vocab_size = inner["hidden_size"], inner["intermediate_size"], inner["vocab_size"]
    queries, keys = (inner[name] * inner["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    num_fused, num_tokens = whole.get("num_aux_hidden_states") or len(whole[LAYER_IDS]), whole["draft_vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "fc": (width, num_fused * width),
        "norm": (width,),
        "lm_head": (num_tokens, width),
        **{f"{layer}.{name}": (width,) for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm")},
        f"{layer}.self_attn.q_proj": (queries, 2 * width),
        f"{layer}.self_attn.k_proj": (keys, 2 * width),
        f"{layer}.self_attn.v_proj": (keys, 2 * width),
        f"{layer}.self_attn.o_proj": (width, queries),
        f"{layer}.mlp.gate_proj": (inside, width),
        f"{layer}.mlp.up_proj": (inside, width),
        f"{layer}.mlp.down_proj": (width, inside),
    }
    if whole["norm_before_fc"]:
        shapes["input_norm"] = (num_fused * width,)
    if whole["fc_norm"]:
        shapes |= {f"fc_norm.{place}": (width,) for place in range(num_fused)}
    if has_embedding:
        shapes["embed_tokens"] = (vocab_size, width)
    found = {f"{name}.weight": (shape, dtype) for name, shape in shapes.items()}
    if num_tokens < vocab_size:
        found |= {"d2t": ((num_tokens,), torch.int64), "t2d": ((vocab_size,), torch.bool)}
    return found


def check_vocabulary(tensors: dict[str, Tensor]) -> None:
    """Raises ValueError unless d2t, which adds to draft tokens, and t2d, which marks the target's, name the same."""
    if "d2t" not in tensors:
        return
    ids_W = tensors["d2t"] + torch.arange(len(tensors["d2t"]))
    if not torch.equal(ids_W, tensors["t2d"].nonzero()[:, 0]):
        raise ValueError("d2t and t2d of the head do not name the same tokens in ascending order; train it again")


def _write(given: Given, folder: Path, config: dict[str, Any], layer: str, *, with_embedding: bool = False) -> None:
    tensors = tensors_of(given, layer)
    if with_embedding and not given.config.own_embedding:
        tensors["embed_tokens.weight"] = given.drafter.target.model.get_input_embeddings().weight
    check_vocabulary(tensors)
    has_embedding = with_embedding or given.config.own_embedding
    write_tensors(folder, tensors, kinds(config, layer, given.drafter.target.dtype, has_embedding=has_embedding))
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def _flags(given: Given) -> dict[str, Any]:
    config = given.config
    return {
        "draft_vocab_size": config.draft_vocab or given.facts.vocab_size,
        "norm_before_residual": config.norm_residual,
        "norm_before_fc": config.fusion_norm == "whole",
        "fc_norm": config.fusion_norm == "each",
        "norm_output": config.norm_output,
    }


def _layer(given: Given) -> dict[str, Any]:
    """Returns the configuration of a Llama of one layer."""
    config, facts = given.config, given.facts
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.theta}
    if config.stretch:
        factor, low, high, length = config.stretch
        rope |= {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high}
        rope |= {"original_max_position_embeddings": int(length)}
    ends = {"max_position_embeddings": facts.context_length} if facts.context_length < NO_LIMIT else {}
    return ends | {
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": facts.hidden_size,
        "intermediate_size": config.inner_width,
        "num_hidden_layers": 1,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_width,
        "vocab_size": facts.vocab_size,
        "rms_norm_eps": config.eps,
        "rope_parameters": rope,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "dtype": str(given.drafter.target.dtype).removeprefix("torch."),
    }


def _usual_layers(given: Given) -> tuple[int, ...]:
    """Returns what servers fuse of a target of so many blocks if they are told nothing."""
    num_layers = given.facts.num_layers
    return 2, num_layers // 2, num_layers - 3


WRITERS = {"vllm": vllm, "sglang": sglang, "speculators": speculators}
