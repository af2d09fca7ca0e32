"""What a model's configuration tells about whether it can be a target, before its weights load."""

import sys
from typing import Any

from torch import nn

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
    "blt": "reads bytes in patches, whose borders depend on bytes to come",
    "cpmant": "reads every text behind trained tokens of its own",
    "fsmt": "has a decoder that takes a mask and a cache of its own kind",
    "minimax": "keeps the state of its lightning attention in a cache of its own kind",
    "openai-gpt": "keeps no keys and values between tokens",
    "prophetnet": "predicts several tokens at once, with a mask and a cache of its own kind",
    "reformer": "sorts tokens into buckets, which it keeps in a cache of its own kind",
    "seamless_m4t": "has decoders of text and of speech, between which draftsmith cannot choose",
    "seamless_m4t_v2": "has decoders of text and of speech, between which draftsmith cannot choose",
    "voxtral_realtime_text": "reads sound along with every token",
    "xlm": "keeps its keys and values in a dictionary of its own instead of a cache",
    "xlnet": "reads text in permuted order, with a cache of its own kind",
    "qwen4_exp_text": "compresses index keys of several tokens into one, in a cache of its own kind",
    "recurrent_gemma": "keeps its recurrent state in the model instead of a cache",
    "roformer": "takes rotary positions from the length of its cache, which is not a draft's",
    "rwkv": "keeps its recurrent state in a list of its own instead of a cache",
    "xlstm": "keeps its recurrent state in a cache of its own kind",
}
"""By model type, where a whole architecture is left out."""
ENCODERS = {
    "bert",
    "bert-generation",
    "big_bird",
    "camembert",
    "data2vec-text",
    "electra",
    "ernie",
    "megatron-bert",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "roc_bert",
    "roformer",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
}
"""Model types that write text only if their configuration has `is_decoder`."""
NUMBERED_FROM_PADDING = {
    "camembert",
    "data2vec-text",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
}
"""Those whose first position is not 0."""


SIZES = ("vocab_size", "hidden_size", "num_hidden_layers")
"""What every target's configuration has, by these names or as aliases of its own."""


def layer_kinds(config: Any) -> set[str]:
    """Returns the kinds of a text configuration's layers, empty if it does not name them."""
    return set(getattr(config, "layer_types", None) or ())


def has_recurrent_layers(config: Any) -> bool:
    return bool(layer_kinds(config) & RECURRENT)


def problem_of_config(config: Any) -> str | None:
    """Returns why a model of this text configuration cannot be a target, None if nothing is known against it."""
    kinds = layer_kinds(config)
    if (reason := UNSUPPORTED_MODELS.get(config.model_type)) is not None:
        return reason
    if getattr(config, "num_hidden_layers", 1) == 0:
        return "has no blocks: num_hidden_layers is 0 in its config"
    if config.model_type in ENCODERS and not config.is_decoder:
        return "reads text in both directions, since is_decoder is false in its config"
    if config.model_type in NUMBERED_FROM_PADDING:
        return "numbers positions from its padding token's id on, and keeps no list of blocks that can be run in parts"
    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        return "reads text in both directions, since use_bidirectional_attention is true in its config"
    if missing := [name for name in SIZES if getattr(config, name, None) is None]:
        return f"has no {' and '.join(missing)} in its config"
    if known := sorted(kinds & UNSUPPORTED_LAYERS.keys()):
        return UNSUPPORTED_LAYERS[known[0]]
    if unknown := sorted(kinds - ATTENTION - RECURRENT - STATELESS):
        return f"has layers of kind {', '.join(unknown)}, whose state cannot be rewound"
    return None


def problem_of_model(model: Any, config: Any) -> str | None:
    """Returns why a loaded model cannot be a target, None if nothing is known against it."""
    if (problem := problem_of_config(config)) is not None:
        return problem
    if (attention := config._attn_implementation) not in MASKS:
        return f"uses attention {attention!r}, which takes no tree mask; load it with attn_implementation='sdpa'"
    return None


def applies_windows(stack: nn.Module) -> bool:
    """Returns whether a model applies the window that its config may have: some of transformers' own do not."""
    module = sys.modules[type(stack).__module__]
    is_own = module.__name__.startswith("transformers.")
    return not is_own or hasattr(module, "create_sliding_window_causal_mask")
