"""The transformers configuration of a head's decoder layers, as engines read it."""

from typing import Any

from draftsmith.export.source import ExportSource
from draftsmith.loading.model_info import NO_LIMIT


def decoder_config(source: ExportSource, *, model_type: str, num_layers: int) -> dict[str, Any]:
    """Returns the configuration of a drafter's layers as a model of this type, with the target's vocabulary."""
    config, target_info = source.config, source.target_info
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.theta}
    if config.stretch:
        factor, low, high, length = config.stretch
        rope |= {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high}
        rope |= {"original_max_position_embeddings": int(length)}
    context = {"max_position_embeddings": target_info.context_length} if target_info.context_length < NO_LIMIT else {}
    return context | {
        "model_type": model_type,
        "hidden_act": "silu",
        "hidden_size": target_info.hidden_size,
        "intermediate_size": config.inner_width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_width,
        "vocab_size": target_info.vocab_size,
        "rms_norm_eps": config.eps,
        "rope_parameters": rope,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "dtype": str(source.drafter.target.dtype).removeprefix("torch."),
    }
