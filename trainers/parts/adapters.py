"""Training of a target's low-rank adapters (LoRA): peft's layers, whose factors belong to a drafter."""

from collections.abc import Iterable
from typing import Any

import torch

from draftsmith import Target
from draftsmith.parts.self_drafting.fine_tuned import FineTunedTarget, linear_layers, weight_sharing_copy


def attach_adapters(
    base: Target, modules: tuple[str, ...], adapters: Iterable[Any], *, rank: int, alpha: float, dropout: float
) -> FineTunedTarget:
    """Returns a target with peft's layers around the linear layers named by `modules`, all other weights shared.

    `adapters` holds the low-rank factors, one adapter for each of these layers.
    """
    from peft import LoraConfig, inject_adapter_in_model

    layers, adapters = list(linear_layers(base, modules)), list(adapters)
    lora = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=layers,
        fan_in_fan_out=any(adapter.is_transposed for adapter in adapters),
    )
    model = inject_adapter_in_model(lora, weight_sharing_copy(base.model), "default")
    for name, adapter in zip(layers, adapters, strict=True):
        layer = model.get_submodule(name)
        layer.lora_A["default"], layer.lora_B["default"] = adapter.down, adapter.up
        # train() of the drafter switches this dropout on. The head runs again in the backward pass, where another
        # dropout mask would give another loss.
        adapter.dropout = torch.nn.Dropout(0.0 if layer is model.get_output_embeddings() else dropout)
        layer.lora_dropout["default"] = adapter.dropout
    return FineTunedTarget(model.eval(), base)
