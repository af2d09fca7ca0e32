"""Configurations of small transformers models to draft with."""

from typing import Any

from transformers import LlamaConfig, PreTrainedConfig, T5Config

from draftsmith import Target
from draftsmith.parts.neural.layers import ffn_width


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
    """Returns a Llama with tied embedding and head; ffn_size 0 means 8/3 of the width, `special` are token ids."""
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


def t5(
    *,
    vocab_size: int,
    width: int,
    num_layers: int,
    num_encoder_layers: int,
    num_heads: int,
    ffn_size: int = 0,
    **special: Any,
) -> T5Config:
    """Returns a gated T5 without dropout, with `num_layers` decoder layers; ffn_size and `special` as for `llama`."""
    return T5Config(
        vocab_size=vocab_size,
        d_model=width,
        d_kv=width // num_heads,
        d_ff=ffn_size or ffn_width(width),
        num_layers=num_encoder_layers,
        num_decoder_layers=num_layers,
        num_heads=num_heads,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        **special,
    )


def for_target(
    target: Target,
    *,
    width: int,
    num_layers: int,
    num_heads: int,
    ffn_size: int,
    num_encoder_layers: int,
    has_own_head: bool,
) -> PreTrainedConfig:
    """Returns a Llama with the target's vocabulary, or a T5 if the target is an encoder-decoder."""
    theirs = target.model.config.get_text_config(decoder=True)
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    special: dict[str, Any] = {name: getattr(theirs, name, None) for name in names}
    shape: dict[str, Any] = {"vocab_size": target.vocab_size, "num_layers": num_layers, "num_heads": num_heads}
    shape |= {"width": width, "ffn_size": ffn_size}
    if target.is_encoder_decoder:
        # T5 rescales the hidden states before a tied head.
        special["tie_word_embeddings"] = has_own_head
        return t5(**shape, num_encoder_layers=num_encoder_layers, **special)
    del special["decoder_start_token_id"]
    return llama(**shape, context_length=target.context_length, **special)


def as_dict(config: PreTrainedConfig) -> dict[str, Any]:
    """Returns the configuration as a dictionary, without dtype and transformers' version."""

    values = {"model_type": config.model_type, **config.to_diff_dict()}
    return {key: value for key, value in values.items() if key not in ("transformers_version", "dtype")}
