"""Constraints on the weights of a compressed model in training: zeros that stay zero, and frozen embeddings."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class WeightConstraints:
    """Weights that training does not change."""

    keep_zeros: bool = False
    """Keep the zeros in the matrices of --init, as after pruning of single weights."""
    freeze_ends: bool = False
    """Freeze the embedding and the LM head."""


def constrain_weights(model: Any, constraints: WeightConstraints) -> None:
    """Applies the constraints to a model; raises ValueError if zeros are to be kept and ZeRO-3 shards the weights.

    With a gradient of zero, AdamW does not move a weight of zero: its moments and its decay are zero.
    """
    if constraints.freeze_ends:
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.requires_grad_(False)
    for weight in model.parameters() if constraints.keep_zeros else ():
        if weight.numel() == 0:
            raise ValueError("keep_zeros needs unsharded weights, and ZeRO-3 shards them; use ZeRO-2")
        if weight.ndim == 2 and weight.requires_grad and bool((weight == 0).any()):
            weight.register_hook(_MaskGradient(weight != 0))


class _MaskGradient:
    """Gradient hook that zeroes the gradient of weights that stay zero."""

    def __init__(self, is_trained: Tensor) -> None:
        self._is_trained = is_trained

    def __call__(self, gradient: Tensor) -> Tensor:
        return gradient * self._is_trained.to(gradient.device)
