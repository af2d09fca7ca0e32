"""Structured pruning: fewer layers, fewer attention heads, narrower feed-forward layers.

The result is an ordinary model of the same architecture with a smaller configuration.
"""

import copy
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from draftsmith.core.views import ATTENTIONS, MLPS, blocks_of, find_child

PER_LAYER = ("layer_types", "no_rope_layers", "mlp_layer_types")
"""Configuration lists with an entry for each layer."""
INTO_ATTENTION, OUT_OF_ATTENTION = ("q_proj", "k_proj", "v_proj"), "o_proj"
INTO_MLP, OUT_OF_MLP = ("gate_proj", "up_proj"), "down_proj"


def num_kept(keep: float, total: int, what: str, *, is_exact: bool = False) -> int:
    """Returns the number kept of `total`, rounded unless `is_exact`; raises ValueError if it is none or all."""
    exact = Fraction(keep).limit_denominator(10_000) * total
    number = round(exact)
    if is_exact and exact.denominator != 1:
        raise ValueError(f"keep {keep:g} leaves {float(exact):.2f} of the {total} {what}; it must be a whole number")
    if not 0 < number < total:
        raise ValueError(f"keep {keep:g} leaves {number} of the {total} {what}; it must keep some and remove some")
    return number


def drop_least_influential(influences: Sequence[float], number: int) -> list[int]:
    """Returns the layers kept, in order, without the least influential.

    The first layer is always kept, and the last one too if `number` is at least two.
    """
    last = len(influences) - 1
    ends = [0, last] if number > 1 else [0]
    others = sorted((layer for layer in range(last + 1) if layer not in ends), key=lambda layer: -influences[layer])
    return sorted([*ends, *others[: number - len(ends)]])


def drop_span(distances: Sequence[float], number: int, num_layers: int) -> list[int]:
    """Returns the layers kept without the span over which the hidden states rotate least.

    `distances[start]` is the distance from the input of layer `start` to the output of the span's last layer
    (2403.17887, section 3.2); the first layer is always kept, and the last one too
    if `number` is at least two.
    """
    size = num_layers - number
    starts = range(1, num_layers - size) if number > 1 else range(1, num_layers - size + 1)
    start = min(starts, key=distances.__getitem__)
    return [layer for layer in range(num_layers) if not start <= layer < start + size]


def evenly_spaced(number: int, num_layers: int) -> list[int]:
    """Returns `number` evenly spaced layers, always with the first, and with the last if `number` is at least two."""
    return [round(layer) for layer in torch.linspace(0, num_layers - 1, number).tolist()] if number > 1 else [0]


def top_indices_in_groups(scores: Tensor, number: int, num_groups: int) -> list[int]:
    """Returns the indices of the `number` largest scores within each of `num_groups` equal groups, ascending."""
    grouped = scores.view(num_groups, -1)
    indices = grouped.topk(number, dim=1).indices.sort(dim=1).values
    return (indices + torch.arange(num_groups, device=scores.device)[:, None] * grouped.shape[1]).flatten().tolist()


def head_counts(model: Any) -> tuple[int, int, int]:
    """Returns (query heads, key-value heads, head width), the same in all layers."""
    text = model.config.get_text_config(decoder=True)
    num_heads = int(text.num_attention_heads)
    num_kv_heads = int(getattr(text, "num_key_value_heads", None) or num_heads)
    return num_heads, num_kv_heads, int(getattr(text, "head_dim", None) or text.hidden_size // num_heads)


def keep_layers(model: Any, kept: Sequence[int]) -> Any:
    """Returns a model with the layers `kept` and all other modules; the given model is not changed."""
    config = copy.deepcopy(model.config)
    text = config.get_text_config(decoder=True)
    num_layers, text.num_hidden_layers = text.num_hidden_layers, len(kept)
    for name in PER_LAYER:
        values = getattr(text, name, None)
        if isinstance(values, list | tuple) and len(values) == num_layers:
            setattr(text, name, [values[layer] for layer in kept])
    prefix, new_index = _prefix(model), {str(layer): str(index) for index, layer in enumerate(kept)}
    weights = {}
    for name, weight in model.state_dict().items():
        if not name.startswith(prefix):
            weights[name] = weight
            continue
        layer, _, rest = name.removeprefix(prefix).partition(".")
        if layer in new_index:
            weights[f"{prefix}{new_index[layer]}.{rest}"] = weight
    return _build_model(model, config, weights)


def narrow(
    model: Any,
    *,
    heads: Sequence[Sequence[int]] | None = None,
    kv_heads: Sequence[Sequence[int]] | None = None,
    neurons: Sequence[Sequence[int]] | None = None,
) -> Any:
    """Returns a model with these query heads, key-value heads and neurons of each layer, None for all.

    Every layer must keep equally many, and every key-value head equally many query heads. Raises ValueError naming the
    architecture if its projections are not found.
    """
    check_projections(model)
    num_heads, num_kv_heads, width = head_counts(model)
    config = copy.deepcopy(model.config)
    text = config.get_text_config(decoder=True)
    text.head_dim, text.num_attention_heads, text.num_key_value_heads = width, num_heads, num_kv_heads
    text.num_attention_heads = len(heads[0]) if heads is not None else num_heads
    text.num_key_value_heads = len(kv_heads[0]) if kv_heads is not None else num_kv_heads
    text.intermediate_size = len(neurons[0]) if neurons is not None else text.intermediate_size
    weights, prefix = dict(model.state_dict()), _prefix(model)
    for layer, block in enumerate(blocks_of(model)):
        attention = f"{prefix}{layer}.{find_child(block, ATTENTIONS, 'attention')}"
        mlp = f"{prefix}{layer}.{find_child(block, MLPS, 'MLP')}"
        if heads is not None:
            rows = _head_rows(heads[layer], width)
            _select(weights, f"{attention}.q_proj", rows, 0)
            _select(weights, f"{attention}.{OUT_OF_ATTENTION}", rows, 1)
        if kv_heads is not None:
            for name in INTO_ATTENTION[1:]:
                _select(weights, f"{attention}.{name}", _head_rows(kv_heads[layer], width), 0)
        if neurons is not None:
            for name in INTO_MLP:
                _select(weights, f"{mlp}.{name}", list(neurons[layer]), 0)
            _select(weights, f"{mlp}.{OUT_OF_MLP}", list(neurons[layer]), 1)
    return _build_model(model, config, weights)


def check_projections(model: Any) -> None:
    """Raises ValueError naming the architecture unless all blocks have Llama's projections as linear layers."""
    for block in blocks_of(model):
        parts = (
            (getattr(block, find_child(block, ATTENTIONS, "attention")), (*INTO_ATTENTION, OUT_OF_ATTENTION)),
            (getattr(block, find_child(block, MLPS, "MLP")), (*INTO_MLP, OUT_OF_MLP)),
        )
        for part, names in parts:
            missing = [name for name in names if not isinstance(getattr(part, name, None), nn.Linear)]
            if missing:
                raise ValueError(
                    f"{type(model).__name__} cannot be narrowed: its {type(part).__name__} has no {missing[0]}; remove"
                    " whole layers instead"
                )


def _prefix(model: Any) -> str:
    """Returns the prefix of the names of all weights in blocks."""
    blocks = blocks_of(model)
    return next(name for name, module in model.named_modules() if module is blocks) + "."


def _head_rows(heads: Sequence[int], width: int) -> list[int]:
    return [head * width + offset for head in heads for offset in range(width)]


def _select(weights: dict[str, Tensor], name: str, indices: list[int], dim: int) -> None:
    index = torch.tensor(indices, device=weights[f"{name}.weight"].device)
    weights[f"{name}.weight"] = weights[f"{name}.weight"].index_select(dim, index)
    if dim == 0 and f"{name}.bias" in weights:
        weights[f"{name}.bias"] = weights[f"{name}.bias"].index_select(0, index)


def _build_model(model: Any, config: Any, weights: dict[str, Tensor]) -> Any:
    """Returns a model in evaluation mode with this configuration and these weights, on the device of `model`."""
    pruned = AutoModelForCausalLM.from_config(config, dtype=model.dtype).to(model.device).eval()
    try:
        pruned.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split()[:40])
        raise ValueError(f"{type(model).__name__} cannot be pruned in this way: {reason}") from None
    pruned.generation_config = copy.deepcopy(model.generation_config)
    return pruned
