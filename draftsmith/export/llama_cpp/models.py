"""Llama-like models of transformers as llama.cpp reads them: metadata and tensors of a GGUF file.

llama.cpp rotates neighbouring pairs of a head in the architectures `llama` and `eagle3`, transformers the two halves:
the rows of queries and keys are interleaved for those.

Shape suffixes: V vocabulary, D hidden width, H width of a head.
"""

import math
from typing import Any

import torch
from torch import Tensor

from draftsmith.loading.gguf_contents import Value, f32, interleave, text, u32
from draftsmith.loading.model_info import NO_LIMIT, context_length

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""llama.cpp's architecture for the types of transformers' models that can be written."""
PAIRED = ("llama", "eagle3")
"""Architectures that rotate neighbouring pairs."""
READS_LAST = frozenset(
    (
        *("bailingmoe3", "deepseek4", "gemma4", "mimo2", "nemotron-h"),
        *("openai-moe", "qwen35", "qwen35moe", "qwen3next", "qwen4exp"),
    )
)
"""Architectures of which llama.cpp gives drafters the output of the last block; `llama` gives an old buffer instead."""
READS_HIDDEN = READS_LAST | {
    *("hunyuan-dense", "hunyuan-vl", "lfm2", "lfm2moe", "llama", "minimax-01", "minimax-m2"),
    *("muse-glimmer", "nanbeige", "nemotron-h-moe", "qwen3", "qwen3moe"),
}
"""Architectures of which it gives hidden states at all; with others it drafts without them, and worse."""
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
OUTER = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
INNER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""transformers' names within a block, and llama.cpp's."""


def check_model(config: Any, name: str) -> None:
    """Raises ValueError, from a model's configuration alone, unless it can be written as a GGUF file."""
    kind = config.model_type
    remedy = (
        "convert it with llama.cpp's convert_hf_to_gguf.py; a target converted so is named with --target-name FILE.gguf"
    )
    if kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"{name} is a model of type {kind!r}, and draftsmith writes GGUF files of {known}; {remedy}")
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{name} is quantised; name the folder of the model before quantisation, or {remedy}")
    if config.hidden_act != "silu":
        raise ValueError(f"{name}: hidden_act is {config.hidden_act!r}, and llama.cpp computes 'silu'; {remedy}")
    windows = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if windows or (kind == "mistral" and window and window < context_length(config)):
        raise ValueError(
            f"{name} attends to the last {window} tokens only (sliding_window), and llama.cpp's"
            f" {ARCHITECTURES[kind]!r} to all; use a model without, or another engine"
        )
    rope = _rope(config)
    rope_type = rope.get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        known = ", ".join(ROPE_TYPES)
        raise ValueError(
            f"{name}: its rotary positions are of type {rope_type!r}, and {known} can be written; {remedy}"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{name} rotates a part of each head, and llama.cpp's {kind!r} the whole; {remedy}")


def model_values(config: Any) -> dict[str, Value]:
    """Returns the metadata of a model of one of the types in `ARCHITECTURES`."""
    name = ARCHITECTURES[config.model_type]
    rope = _rope(config)
    values = layer_values(
        name,
        context=context_length(config),
        width=config.hidden_size,
        num_blocks=config.num_hidden_layers,
        inner_width=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_width=head_width(config),
        theta=rope["rope_theta"],
        eps=config.rms_norm_eps,
    )
    values[f"{name}.vocab_size"] = u32(config.vocab_size)
    if rope.get("rope_type") in ("linear", "yarn"):
        values[f"{name}.rope.scaling.type"] = text(rope["rope_type"])
        values[f"{name}.rope.scaling.factor"] = f32(rope["factor"])
    if rope.get("rope_type") == "yarn":
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        values[f"{name}.rope.scaling.original_context_length"] = u32(original)
    return values


def layer_values(
    architecture: str,
    *,
    context: int,
    width: int,
    num_blocks: int,
    inner_width: int,
    num_heads: int,
    num_kv_heads: int,
    head_width: int,
    theta: float,
    eps: float,
) -> dict[str, Value]:
    """Returns the metadata that models and heads have alike, under the architecture's name."""
    counts = {
        "context_length": min(context, NO_LIMIT),
        "embedding_length": width,
        "block_count": num_blocks,
        "feed_forward_length": inner_width,
        "attention.head_count": num_heads,
        "attention.head_count_kv": num_kv_heads,
        "attention.key_length": head_width,
        "attention.value_length": head_width,
        "rope.dimension_count": head_width,
    }
    values = {f"{architecture}.{key}": u32(count) for key, count in counts.items()}
    values[f"{architecture}.attention.layer_norm_rms_epsilon"] = f32(eps)
    values[f"{architecture}.rope.freq_base"] = f32(theta)
    return values


def model_tensors(model: Any) -> dict[str, Tensor]:
    """Returns a model's weights under llama.cpp's names; raises ValueError for one that llama.cpp does not know."""
    config = model.config
    head_counts = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    paired = ARCHITECTURES[config.model_type] in PAIRED
    tensors = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module, _, kind = name.removeprefix("model.").rpartition(".")
        number, _, inner = module.removeprefix("layers.").partition(".")
        inside = module.startswith("layers.") and number.isdigit()
        new = (INNER.get(inner) if inside else OUTER.get(module)) or ""
        if not new or kind not in ("weight", "bias"):
            raise ValueError(
                f"tensor {name!r} has no name in llama.cpp's {ARCHITECTURES[config.model_type]!r}; export the model to"
                " another engine"
            )
        if paired and new in head_counts:
            weight = interleave(weight, head_counts[new])
        tensors[f"blk.{number}.{new}.{kind}" if inside else f"{new}.{kind}"] = weight
    rope = _rope(config)
    if rope.get("rope_type") == "llama3":
        length = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        stretch = (rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"], length)
        tensors["rope_freqs.weight"] = stretch_divisors(head_width(config), rope["rope_theta"], stretch)
    return tensors


def head_width(config: Any) -> int:
    """Returns the width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def stretch_divisors(head_width: int, theta: float, stretch: tuple[float, ...]) -> Tensor:
    """Returns the divisors [H / 2] of the rotary frequencies in Llama 3.1's scaling (factor, low, high, length).

    1 for waves that turn more than `high` times in `length` tokens, `factor` for fewer than `low`, and between them
    1 / ((1 - s) / factor + s) with s from 0 at `low` to 1 at `high`.
    """
    factor, low, high, length = stretch
    frequencies = theta ** -(torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)
    turns = length * frequencies / (2 * math.pi)
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - share) / factor + share)).float()


def _rope(config: Any) -> dict[str, Any]:
    return {"rope_theta": getattr(config, "rope_theta", 10_000.0)} | (config.rope_parameters or {})
