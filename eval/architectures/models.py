"""Tiny random models of every causal and encoder-decoder architecture of the installed transformers.

A variant's name is the architecture's `model_type`, `@seq2seq` where that architecture has both kinds of model, and
`+name` for a switch of its configuration.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from draftsmith.core.architectures.supported import ENCODERS

VOCAB_SIZE, CONTEXT, WINDOW = 160, 256, 24
_TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | {
    f"{kind}_token_{what}": VOCAB_SIZE - number
    for number, kind in enumerate(("image", "video", "audio", "vision_start", "vision_end"), start=1)
    for what in ("id", "index")
}

_WIDTHS = dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "word_embed_proj_dim", "embedding_size"), 32)
_DEPTHS = dict.fromkeys(
    ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "num_blocks"), 4
) | {"num_decoder_layers": 4, "num_encoder_layers": 2}
_HEADS = dict.fromkeys(
    (
        "num_attention_heads",
        "n_head",
        "n_heads",
        "num_heads",
        "encoder_attention_heads",
        "decoder_attention_heads",
        "num_encoder_attention_heads",
        "num_decoder_attention_heads",
        "swa_num_attention_heads",
    ),
    4,
) | dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"), 2)
_HEAD_WIDTHS = dict.fromkeys(
    ("head_dim", "d_kv", "kv_channels", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "swa_head_dim"), 8
) | {"rotary_dim": 4, "query_pre_attn_scalar": 8, "attention_head_dim": 8, "swa_v_head_dim": 8, "dim_head": 8}
_INNER = dict.fromkeys(
    (
        "intermediate_size",
        "ffn_dim",
        "d_ff",
        "decoder_ffn_dim",
        "encoder_ffn_dim",
        "n_inner",
        "dff",
        "dim_ff",
        "shared_intermediate_size",
        "intermediate_size_mlp",
        "dense_intermediate_size",
    ),
    48,
) | dict.fromkeys(
    (
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "moe_shared_expert_intermediate_size",
        "expert_ffn_hidden_size",
        "ffn_hidden_size",
        "moe_ffn_hidden_size",
    ),
    24,
)
_EXPERTS = (
    dict.fromkeys(
        (
            "num_experts",
            "num_local_experts",
            "n_routed_experts",
            "moe_num_experts",
            "num_routed_experts",
        ),
        4,
    )
    | dict.fromkeys(
        (
            "num_experts_per_tok",
            "moe_topk",
            "moe_top_k",
            "top_k_experts",
            "num_experts_per_token",
            "moe_k",
            "num_selected_experts",
        ),
        2,
    )
    | {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "num_shared_experts": 1, "first_k_dense_replace": 1}
)
# With few index heads many scores would be 0, and ties are broken by chance.
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "index_topk": 16, "index_n_heads": 8, "index_head_dim": 16}
_RECURRENT = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_d_head": 16,
    "mamba_n_heads": 4,
    "mamba_d_ssm": 64,
    "mamba_chunk_size": 16,
    "mamba_dt_rank": 4,
    "ssm_state_size": 8,
    "state_size": 8,
    "chunk_size": 16,
    "lru_width": 32,
    "conv_L_cache": 3,
    "block_size": 16,
}
_LENGTHS = dict.fromkeys(
    ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_length_positions", "n_ctx"), CONTEXT
) | {"max_target_positions": CONTEXT, "sliding_window": WINDOW, "attention_chunk_size": WINDOW, "window_size": WINDOW}
_OTHER = {
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "laurel_rank": 8,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "vocab_size": VOCAB_SIZE,
    "decoder_vocab_size": VOCAB_SIZE,
    "tie_word_embeddings": False,
}
SIZES = (
    _TOKENS | _WIDTHS | _DEPTHS | _HEADS | _HEAD_WIDTHS | _INNER | _EXPERTS | _LATENT | _RECURRENT | _LENGTHS | _OTHER
)

_MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_HYBRID = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
# What an architecture needs beside the sizes above.
CHANGES: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "layer_types": _MIXED,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]} for kind in _MIXED
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "dots3_note_text": {"num_key_value_heads": 4, "n_routed_experts": 4, "moe_intermediate_size": 24},
    "falcon": {"new_decoder_architecture": False, "multi_query": True},
    "gemma3n_text": {
        "num_hidden_layers": 6,
        "layer_types": [*_MIXED, *_MIXED[:2]],
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.0] * 6,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    **{name: {"is_decoder": True} for name in ENCODERS},
    "big_bird": {"is_decoder": True, "attention_type": "original_full"},
    "bailing_hybrid": {"layer_types": _HYBRID, "n_group": 1, "num_group": 1, "topk_group": 1},
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"layer_types": _HYBRID},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "kimi_linear": {"kda_head_dim": 8, "layer_types": _HYBRID},
    "nemotron_h": {"n_groups": 1, "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention", "linear_attention", "indexed_attention"],
        "indexer_n_heads": 8,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "hc_lowrank": 8,
        "output_gate_type": "sigmoid",
    },
    "mistral4": {"head_dim": 16},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "hidden_size": 256},
    "qwen2_5_vl_text": {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}},
    "xlm": {"emb_dim": 32},
    "zamba2": {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
_LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 128,
    "rope_theta": 10000.0,
}
# Switches of a configuration that change how text is read.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "axk1": {"equalwidth": {"v_head_dim": 16}},
    "big_bird": {"sparse": {"attention_type": "block_sparse", "block_size": 8, "num_random_blocks": 1}},
    "bloom": {"postln": {"apply_residual_connection_post_layernorm": True}},
    "cohere": {"qknorm": {"use_qk_norm": True}},
    "deepseek_v2": {
        "equalwidth": {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16},
        "lite": {"q_lora_rank": None},
    },
    "deepseek_v3": {
        "equalwidth": {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16},
        "yarn": {"rope_parameters": _YARN},
    },
    "deepseek_v32": {"equalwidth": {"v_head_dim": 16}},
    "dots1": {"window": {"layer_types": _MIXED}},
    "exaone4": {"full": {"sliding_window": None, "layer_types": ["full_attention"] * 4}},
    "falcon": {
        "alibi": {"alibi": True},
        "new": {"new_decoder_architecture": True, "num_kv_heads": 2},
        "sequential": {"parallel_attn": False},
    },
    "gemma3_text": {"bidirectional": {"use_bidirectional_attention": True}},
    "gemma4_text": {
        "kv": {"attention_k_eq_v": True, "num_global_key_value_heads": 1},
        "moe": {"enable_moe_block": True},
        "samedim": {"global_head_dim": 8},
        "shared": {"layer_types": _MIXED, "num_kv_shared_layers": 2},
        "sharedsamedim": {"layer_types": _MIXED, "num_kv_shared_layers": 2, "global_head_dim": 8},
    },
    "glm4_moe_lite": {"equalwidth": {"v_head_dim": 16}},
    "glm_moe_dsa": {"equalwidth": {"v_head_dim": 16}},
    "gpt2": {
        "inverse": {"scale_attn_by_inverse_layer_idx": True},
        "crossinverse": {"scale_attn_by_inverse_layer_idx": True, "add_cross_attention": True},
    },
    "gpt_bigcode": {"mha": {"multi_query": False}},
    "gpt_neox": {"sequential": {"use_parallel_residual": False}},
    "granite": {"scaled": {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0}},
    "granitemoe": {"scaled": {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0}},
    "granitemoehybrid": {"attention": {"layer_types": ["attention"] * 4}},
    "hunyuan_v1_dense": {
        "dynamic": {"rope_parameters": {"rope_type": "dynamic", "alpha": 4.0, "factor": 1.0, "rope_theta": 10000.0}}
    },
    "jamba": {"attention": {"attn_layer_period": 1, "attn_layer_offset": 0}},
    "lfm2": {"attention": {"layer_types": ["full_attention"] * 4}},
    "llama": {
        "dynamic": {
            "max_position_embeddings": 48,
            "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
        },
        "linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
        "llama3": {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
                "rope_theta": 10000.0,
            }
        },
        "yarn": {"rope_parameters": _YARN},
    },
    "llama4_text": {"full": {"layer_types": ["full_attention"] * 4}},
    "longcat_flash": {"equalwidth": {"v_head_dim": 16}},
    "longt5": {"tglobal": {"encoder_attention_type": "transient-global"}},
    "mimo_v2_flash": {"equalwidth": {"v_head_dim": 8}},
    "minicpm3": {"equalwidth": {"v_head_dim": 16}},
    "minimax": {"attention": {"layer_types": ["full_attention"] * 4}},
    "minimax_m2": {"window": {"sliding_window": WINDOW}},
    "mistral": {"nowindow": {"sliding_window": None}},
    "mixtral": {"window": {"sliding_window": WINDOW}},
    "mpt": {"noalibi": {"attn_config": {"alibi": False}}},
    "nemotron_h": {"attention": {"layer_types": ["full_attention", "mlp"] * 2}},
    "olmo": {"clip": {"clip_qkv": 0.5}},
    "opt": {"postnorm": {"do_layer_norm_before": False}, "350m": {"word_embed_proj_dim": 16}},
    "pegasus_x": {"local": {"stagger_local_blocks": False, "block_size": 8}},
    "persimmon": {"qk": {"qk_layernorm": True}},
    "phi3": {
        "partial": {"partial_rotary_factor": 0.5},
        "longrope": {"original_max_position_embeddings": 128, "rope_parameters": _LONGROPE},
    },
    "phi4_multimodal": {"longrope": {"original_max_position_embeddings": 128, "rope_parameters": _LONGROPE}},
    "phimoe": {
        "longrope": {
            "original_max_position_embeddings": 128,
            "rope_parameters": _LONGROPE | {"short_mscale": 1.1, "long_mscale": 1.2},
        }
    },
    "qwen2": {"window": {"use_sliding_window": True, "max_window_layers": 2}},
    "qwen2_moe": {"window": {"use_sliding_window": True, "max_window_layers": 2}},
    "qwen3": {"window": {"use_sliding_window": True, "max_window_layers": 2}, "yarn": {"rope_parameters": _YARN}},
    "qwen3_moe": {"window": {"use_sliding_window": True, "max_window_layers": 2}},
    "smollm3": {"window": {"use_sliding_window": True, "layer_types": _MIXED}},
    "stablelm": {"parallel": {"use_parallel_residual": True}},
    "starcoder2": {"window": {"sliding_window": WINDOW}},
    "t5": {"gated": {"feed_forward_proj": "gated-gelu"}},
    "xglm": {"odd": {"d_model": 33, "attention_heads": 3}},
    "youtu": {"equalwidth": {"v_head_dim": 16}},
}


WRAPPERS = (
    "gemma3",
    "gemma4",
    "kimi_k25",
    "llama4",
    "mistral3",
    "mistral4",
    "mistral_large4",
    "qwen2_5_vl",
    "qwen3_5",
    "qwen3_vl",
    "qwen3_vl_moe",
)
"""Architectures of text with images that are decoded from their wrapper's folder too; others have no model of text."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """An architecture, one of its kinds of model and a switch of its configuration."""

    model_type: str
    is_seq2seq: bool
    switch: str = ""
    is_both: bool = False
    """True if the architecture has a causal model and an encoder-decoder."""
    is_wrapper: bool = False
    """True for a model of text with images, sound or video, of which the text is decoded."""

    @property
    def name(self) -> str:
        kind = "@wrapper" if self.is_wrapper else "@seq2seq" if self.is_seq2seq and self.is_both else ""
        return f"{self.model_type}{kind}" + (f"+{self.switch}" if self.switch else "")


def variants() -> list[Variant]:
    """Returns every variant of the installed transformers, by name."""
    causal = set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    seq2seq = set(modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)
    found = []
    for is_seq2seq, names in ((False, causal), (True, seq2seq)):
        for name in names:
            is_both = name in causal and name in seq2seq
            switches = ["", *VARIANTS.get(name, {})] if is_seq2seq is (name not in causal) else [""]
            found += [
                Variant(model_type=name, is_seq2seq=is_seq2seq, switch=switch, is_both=is_both) for switch in switches
            ]
    found += [Variant(model_type=name, is_seq2seq=False, is_wrapper=True) for name in WRAPPERS]
    return sorted(found, key=lambda one: one.name)


def tiny_config(variant: Variant) -> Any:
    """Returns the variant's configuration with small sizes."""
    kind = CONFIG_MAPPING[variant.model_type]
    return _tiny(kind, VARIANTS.get(variant.model_type, {}).get(variant.switch, {}))


def _tiny(kind: Any, changes: dict[str, Any]) -> Any:
    default = kind()
    known = set(default.to_dict())
    settings = {key: value for key, value in SIZES.items() if key in known}
    if "kv_lora_rank" in known and "num_key_value_heads" in known:
        settings["num_key_value_heads"] = settings["num_attention_heads"]  # latent attention has one of each
    for name in getattr(kind, "sub_configs", None) or {}:
        part = getattr(default, name, None)
        if isinstance(part, PreTrainedConfig):
            settings[name] = _tiny(type(part), {}).to_dict()
    return kind(**settings | CHANGES.get(kind.model_type, {}) | changes)


def tiny_model(variant: Variant, *, seed: int = 0) -> Any:
    """Returns a float32 model with random weights, biases and norms included, that never ends a text.

    Raises whatever transformers raises for a model that it cannot make.
    """
    config = tiny_config(variant)
    auto = AutoModelForSeq2SeqLM if variant.is_seq2seq else AutoModelForCausalLM
    auto = AutoModelForMultimodalLM if variant.is_wrapper else auto
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # some models draw norms, biases or decays
        model = auto.from_config(config, dtype=torch.float32).eval()
    _randomise(model, seed=seed)
    start = 2 if config.is_encoder_decoder else None  # not padding, which some models count no position for
    model.generation_config = GenerationConfig(pad_token_id=0, decoder_start_token_id=start)
    return model


@torch.no_grad()
def _randomise(model: PreTrainedModel, *, seed: int) -> None:
    """Adds noise to norms and biases, whose defaults hide errors, and makes the text vary."""
    generator = torch.Generator().manual_seed(seed)
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue  # computed, and saved in no checkpoint
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim < 2:
            if not parameter.isfinite().all():
                parameter.zero_()
            parameter += 0.2 * noise
        else:
            parameter.copy_(1.5 * noise / parameter.shape[-1] ** 0.5)
        if "EncDecAttention.o." in name or "encoder_attn.out_proj" in name:
            parameter *= 0.1  # cross-attention is the same at every step
    if embedding is not None:
        embedding.weight *= 0.3
    if head is not None and embedding is not None and head.weight is not embedding.weight:
        head.weight *= 2 / 1.5
