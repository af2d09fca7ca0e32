"""Low-rank changes of a target while they are trained: peft's layers, run over factors that belong to a drafter."""

from collections.abc import Iterable
from typing import Any

import torch

from draftsmith import Target
from draftsmith.parts.self_drafting.fine_tuned import Tuned, matrices, twin


def attach_adapters(
    base: Target, modules: tuple[str, ...], adapters: Iterable[Any], *, rank: int, alpha: float, dropout: float
) -> Tuned:
    """Returns a target with peft's layers around its linear layers called so; every other weight is `base`'s own.

    The factors are those of `adapters`, one for each of the layers.
    """
    from peft import LoraConfig, inject_adapter_in_model

    layers, adapters = list(matrices(base, modules)), list(adapters)
    lora = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=layers,
        fan_in_fan_out=any(adapter.is_transposed for adapter in adapters),
    )
    model = inject_adapter_in_model(lora, twin(base.model), "default")
    for name, adapter in zip(layers, adapters, strict=True):
        layer = model.get_submodule(name)
        layer.lora_A["default"], layer.lora_B["default"] = adapter.down, adapter.up
        # The drafter tells its dropout when it trains. The head runs again in the backward pass: no other mask there.
        adapter.dropout = torch.nn.Dropout(0.0 if layer is model.get_output_embeddings() else dropout)
        layer.lora_dropout["default"] = adapter.dropout
    return Tuned(model.eval(), base)
