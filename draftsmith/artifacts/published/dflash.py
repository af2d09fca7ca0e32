"""Published DFlash drafters: the tensors' names, and the three layouts of config.json that they come in.

The flat one is that of the DFlash repository, which vLLM and SGLang read; the others are those of the speculators
library and of transformers. The fused layers are numbered by the index of the block whose output they are, which is one
less than draftsmith's number, and in speculators by draftsmith's numbers.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from draftsmith.artifacts.published.eagle3 import read_rotary, read_tensors
from draftsmith.artifacts.published.folders import read_config

TRANSFORMERS_TYPE = "muse_glimmer_assistant"
"""The model type of the one class of transformers 5.23 that DFlash drafters load as."""
NAMES = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "feed_forward_norm",
    "self_attn.q_proj": "attention.query",
    "self_attn.k_proj": "attention.key",
    "self_attn.v_proj": "attention.value",
    "self_attn.o_proj": "attention.output",
    "self_attn.q_norm": "attention.query_norm",
    "self_attn.k_norm": "attention.key_norm",
    "mlp.gate_proj": "feed_forward.gate",
    "mlp.up_proj": "feed_forward.up",
    "mlp.down_proj": "feed_forward.down",
}
"""A layer's published names, without `.weight`, and the drafter's names."""
OUTER = {
    "fc": "fusion",
    "hidden_norm": "fusion_norm",
    "norm": "norm",
    "markov_head.markov_w1": "markov.previous",
    "markov_head.markov_w2": "markov.next",
    "confidence_head.proj": "confidence",
}
"""The other published names, and the drafter's; the last three are DSpark's heads."""
DSPARK = "dspark"
"""The type, in speculators, of DFlash drafters with DSpark's heads."""
IN_TRANSFORMERS = {"fc": "encoder.fc", "hidden_norm": "encoder.output_norm_enc"}
"""Names that transformers writes in their place."""
OF_TARGET = ("embed_tokens", "lm_head", "verifier_lm_head", "verifier_norm")
"""Copies of the target's tensors, which a drafter has itself."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """What a drafter's config.json says."""

    shape: dict[str, Any]
    """The values of the drafter's configuration."""
    draft_vocab: int
    """Size of its draft vocabulary, 0 for the target's."""


def published_name(ours: str, *, in_transformers: bool = False) -> str:
    """Returns the published name of a tensor of the drafter."""
    inner, _, kind = ours.rpartition(".")
    if inner.startswith("layers."):
        _, number, name = inner.split(".", 2)
        return f"layers.{number}.{_inverse(NAMES)[name]}.{kind}"
    published = _inverse(OUTER)[inner]
    return f"{IN_TRANSFORMERS.get(published, published) if in_transformers else published}.{kind}"


def read(folder: Path, target: Any) -> Published:
    """Returns what config.json says of a drafter in any of the layouts.

    `target` gives name, hidden_size, vocab_size, num_layers and context_length. Raises ValueError for anything but a
    DFlash drafter for this target that draftsmith can run.
    """
    config = _read_config(folder)
    layer = config.get("transformer_layer_config", config)
    own = {**config, **(config.get("dflash_config") or {})}
    missing = {"hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"} - layer.keys()
    missing |= {"block_size", "mask_token_id"} - {name for name in own if own[name] is not None}
    if missing:
        raise ValueError(f"{folder}/config.json lacks {', '.join(sorted(missing))}")
    required: dict[str, Any] = {"hidden_size": target.hidden_size, "vocab_size": target.vocab_size}
    required |= {"hidden_act": "silu", "attention_bias": False}
    for key, value in required.items():
        if layer.get(key, value) != value:
            raise ValueError(f"{folder}: {key} is {layer[key]!r}; for {target.name} it must be {value!r}")
    if (own.get("target_hidden_size") or target.hidden_size) != target.hidden_size:
        raise ValueError(
            f"{folder}: target_hidden_size is {own['target_hidden_size']}; {target.name} has {target.hidden_size}"
        )
    heads = _heads(own, folder)
    if heads:
        # DSpark's drafters draft from the first token's slot too, unless they say otherwise.
        own = {"sample_from_anchor": True} | own
    for key in ("sample_from_anchor", "causal", "is_causal"):
        if own.get(key):
            raise ValueError(f"{folder}: {key} is set; only blocks whose tokens see each other both ways are supported")
    _check_windows(layer, own, folder, target)
    theta, stretch = read_rotary(layer, folder)
    num_heads, draft_vocab = layer["num_attention_heads"], own.get("draft_vocab_size") or target.vocab_size
    shape = {
        "layers": _layers(config, own, folder, target),
        "mask_token": own["mask_token_id"],
        "num_layers": layer["num_hidden_layers"],
        "num_heads": num_heads,
        "num_kv_heads": layer.get("num_key_value_heads") or num_heads,
        "head_width": layer.get("head_dim") or layer["hidden_size"] // num_heads,
        "inner_width": layer["intermediate_size"],
        "block_size": own["block_size"],
        "theta": theta,
        "stretch": stretch,
        "eps": layer.get("rms_norm_eps", 1e-6),
        **heads,
    }
    return Published(shape=shape, draft_vocab=0 if draft_vocab == target.vocab_size else draft_vocab)


def _heads(own: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Returns the settings of DSpark's heads, none if the drafter has none; raises ValueError for other forms."""
    rank = own.get("markov_rank") or 0
    is_confident = bool(own.get("enable_confidence_head"))
    if own.get("speculators_model_type") != DSPARK and not rank and not is_confident:
        return {}
    if rank and (kind := own.get("markov_head_type", "vanilla")) != "vanilla":
        raise ValueError(f"{folder}: markov_head_type is {kind!r}; only 'vanilla' is supported")
    if is_confident and bool(own.get("confidence_head_with_markov")) != (rank > 0):
        raise ValueError(
            f"{folder}: confidence_head_with_markov is {own.get('confidence_head_with_markov')!r} and markov_rank"
            f" {rank}; only confidences that read the token before if there is a bias are supported"
        )
    return {"markov_rank": rank, "confidence": is_confident}


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Returns the drafter's tensors by its own names, with d2t, t2d and what the target has itself under theirs.

    Raises ValueError for a tensor that no DFlash drafter has.
    """
    from_transformers = {theirs: name for name, theirs in IN_TRANSFORMERS.items()}
    tensors = {}
    for name, tensor in read_tensors(folder).items():
        inner = name.removesuffix(".weight")
        inner = from_transformers.get(inner, inner)
        outer, _, kind = name.rpartition(".")
        layer, _, rest = inner.removeprefix("layers.").partition(".")
        if name in ("d2t", "t2d") or inner in OF_TARGET:
            tensors[inner] = tensor
        elif inner in OUTER and name.endswith(".weight"):
            tensors[f"{OUTER[inner]}.weight"] = tensor
        elif inner.startswith("layers.") and layer.isdigit() and rest in NAMES and name.endswith(".weight"):
            tensors[f"layers.{layer}.{NAMES[rest]}.weight"] = tensor
        elif kind == "bias" and OUTER.get(outer) == "confidence":
            tensors["confidence.bias"] = tensor
        else:
            raise ValueError(f"{folder}: tensor {name!r} is not part of a DFlash drafter")
    return tensors


def _inverse(names: dict[str, str]) -> dict[str, str]:
    return {ours: published for published, ours in names.items()}


def _read_config(folder: Path) -> dict[str, Any]:
    config = read_config(folder, kind="drafter", speculators=("dflash", DSPARK))
    layouts = ("speculators_model_type" in config, "dflash_config" in config, "target_layer_ids" in config)
    if not any(layouts):
        raise ValueError(
            f"{folder}/config.json is of no DFlash drafter: it has neither dflash_config, nor"
            " speculators_model_type, nor target_layer_ids"
        )
    return config


def _layers(config: dict[str, Any], own: dict[str, Any], folder: Path, target: Any) -> tuple[int, ...]:
    """Returns the fused hidden layers in draftsmith's numbering."""
    ids, more = own.get("target_layer_ids"), 1
    if "speculators_model_type" in config:
        ids, more = config.get("aux_hidden_state_layer_ids"), 0
    if not ids:
        raise ValueError(f"{folder}/config.json does not say which layers of the target the drafter reads")
    layers = tuple(layer + more for layer in ids)
    if max(layers) > target.num_layers:
        raise ValueError(f"{folder} reads hidden layers {list(layers)}; {target.name} has {target.num_layers}")
    return layers


def _check_windows(layer: dict[str, Any], own: dict[str, Any], folder: Path, target: Any) -> None:
    """Raises ValueError for layers that see a part of a block, or of texts as long as the target's can be."""
    types = layer.get("layer_types") or ["sliding_attention" if own.get("use_swa") else "full_attention"]
    if "sliding_attention" not in types:
        return
    # Where no flag says otherwise, engines let a sliding layer see the block's earlier tokens only.
    says_both_ways = False in (own.get("is_causal"), own.get("causal")) or own.get("sliding_window_non_causal")
    if not says_both_ways and own.get("model_type") != TRANSFORMERS_TYPE:
        raise ValueError(
            f"{folder}: sliding layers are causal; only blocks that see each other both ways are supported"
        )
    window = own.get("swa_window_size") or layer.get("sliding_window")
    if window and window < target.context_length:
        raise ValueError(
            f"{folder}: layers see the last {window} tokens only, and {target.name} reads {target.context_length}; only"
            " layers that see the whole text are supported"
        )
