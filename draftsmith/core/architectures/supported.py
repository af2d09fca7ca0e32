"""What a model's configuration tells about whether it can be a target, before its weights load."""

from typing import Any

ATTENTION = {"full_attention", "sliding_attention", "chunked_attention", "indexed_attention"}
"""Kinds of layers with attention alone; indexed ones choose the tokens to attend to by keys of their own."""
RECURRENT = {"linear_attention", "conv", "hybrid", "hybrid_sliding"}
"""Kinds of layers with recurrent or convolutional state; hybrid ones attend as well."""
STATELESS = {"mlp", "moe"}
MASKS = {"sdpa", "eager"}
"""Implementations of attention that take a mask of any shape."""
UNSUPPORTED_LAYERS = {
    "compressed_sparse_attention": "compresses keys and values of several tokens into one, which cannot be taken back",
    "heavily_compressed_attention": "compresses keys and values of several tokens into one, which cannot be taken back",
}
UNSUPPORTED_MODELS = {
    "minimax": "keeps the state of its lightning attention in a cache of its own kind",
    "recurrent_gemma": "keeps its recurrent state in the model instead of a cache",
    "rwkv": "keeps its recurrent state in a list of its own instead of a cache",
    "xlstm": "keeps its recurrent state in a cache of its own kind",
}
"""By model type, where a whole architecture is left out; MiniMax with attention alone is of the same type."""


def layer_kinds(config: Any) -> set[str]:
    """Returns the kinds of a text configuration's layers, empty if it does not name them."""
    return set(getattr(config, "layer_types", None) or ())


def has_recurrent_layers(config: Any) -> bool:
    return bool(layer_kinds(config) & RECURRENT)


def problem_of_config(config: Any) -> str | None:
    """Returns why a model of this text configuration cannot be a target, None if nothing is known against it."""
    kinds = layer_kinds(config)
    if (reason := UNSUPPORTED_MODELS.get(config.model_type)) is not None and (kinds & RECURRENT or not kinds):
        return reason
    if known := sorted(kinds & UNSUPPORTED_LAYERS.keys()):
        return UNSUPPORTED_LAYERS[known[0]]
    if unknown := sorted(kinds - ATTENTION - RECURRENT - STATELESS):
        return f"has layers of kind {', '.join(unknown)}, whose state cannot be rewound"
    if "local" in (getattr(config, "attention_layers", None) or ()):
        return "windows its local attention by cache slots, which trees do not fit"
    return None


def problem_of_model(model: Any, config: Any) -> str | None:
    """Returns why a loaded model cannot be a target, None if nothing is known against it."""
    if (problem := problem_of_config(config)) is not None:
        return problem
    if (attention := config._attn_implementation) not in MASKS:
        return f"uses attention {attention!r}, which takes no tree mask; load it with attn_implementation='sdpa'"
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return "is spread over devices by device_map; load it on one device"
    return None
