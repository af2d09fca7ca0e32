"""Small transformers models to draft with: their configurations, and how a drafter keeps those."""

from typing import Any

from transformers import LlamaConfig, PreTrainedConfig

from draftsmith.drafters.blocks import ffn_width


def llama(
    *,
    vocab_size: int,
    width: int,
    num_layers: int,
    num_heads: int,
    context_length: int,
    ffn_size: int = 0,
    **special: Any,
) -> LlamaConfig:
    """Returns a Llama whose head is its embedding; ffn_size 0 is the usual one, `special` are ids as `bos_token_id`."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=ffn_size or ffn_width(width),
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=context_length,
        tie_word_embeddings=True,
        **special,
    )


def as_dict(config: PreTrainedConfig) -> dict[str, Any]:
    """Returns what a model of this configuration is made from again, whatever its dtype and transformers' version."""
    values = {"model_type": config.model_type, **config.to_diff_dict()}
    return {key: value for key, value in values.items() if key not in ("transformers_version", "dtype")}
