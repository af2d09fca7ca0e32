"""Training that heals a compressed model and leaves alone what is to stay as it was."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class WeightConstraints:
    """What training does not change."""

    keep_zeros: bool = False
    """Whether what is zero in the matrices of `init` stays so, as after pruning of single weights."""
    freeze_ends: bool = False
    """Whether embedding and head stay as they are at first."""


def constrain_weights(model: Any, restraint: WeightConstraints) -> None:
    """Has a model's weights change no further than `restraint` allows; raises ValueError if they are sharded (ZeRO-3).

    A gradient of zero at a weight of zero leaves AdamW nothing to move it by: no moments, nothing to decay.
    """
    if restraint.freeze_ends:
        for end in (model.get_input_embeddings(), model.get_output_embeddings()):
            end.requires_grad_(False)
    for weight in model.parameters() if restraint.keep_zeros else ():
        if weight.numel() == 0:
            raise ValueError("keep_zeros cannot find the zeros of weights that ZeRO-3 shards; take ZeRO-2")
        if weight.ndim == 2 and weight.requires_grad and bool((weight == 0).any()):
            weight.register_hook(_Masked(weight != 0))


class _Masked:
    """Sets the gradient of weights that stay zero to zero."""

    def __init__(self, is_free: Tensor) -> None:
        self._is_free = is_free

    def __call__(self, gradient: Tensor) -> Tensor:
        return gradient * self._is_free.to(gradient.device)
