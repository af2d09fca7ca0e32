"""Fine-tuned targets, which share every unchanged weight with the user's model.

Shape suffixes: R rank, I and O a layer's input and output widths.
"""

import copy
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from draftsmith.core.target import Target
from draftsmith.core.views import LAYER_LISTS, find_child


class FineTunedTarget(Target):
    """A target fine-tuned by a drafter; `base` is the user's target that it was made from."""

    def __init__(self, model: Any, base: Target) -> None:
        super().__init__(model, base.tokenizer, batch_invariant=base.batch_invariant, pack_weights=base.pack_weights)
        self._base = base

    @property
    def base(self) -> Target:
        return self._base


@torch.no_grad()
def fine_tuned_target(target: Target, weights: dict[str, Tensor]) -> FineTunedTarget:
    """Returns a target in which the named parameters of the model have the given values.

    It shares all other parameters with `target`, which stays unchanged. Raises ValueError for names or shapes that the
    model does not have.
    """
    parameters = dict(target.model.named_parameters())
    for name, weight in weights.items():
        if name not in parameters:
            raise ValueError(f"{target.name} has no parameter {name!r} to be fine-tuned")
        if parameters[name].shape != weight.shape:
            raise ValueError(f"{name} is {tuple(parameters[name].shape)} in {target.name}, not {tuple(weight.shape)}")
    model = weight_sharing_copy(target.model, own=weights)
    changed = dict(model.named_parameters())
    for name, weight in weights.items():
        changed[name].copy_(weight)
    return FineTunedTarget(model, target)


def weight_sharing_copy(model: Any, *, own: Collection[str] = ()) -> Any:
    """Returns a copy with modules of its own that shares all parameters but those named in `own`, and all buffers."""
    shared = [parameter for name, parameter in model.named_parameters() if name not in own]
    # deepcopy does not copy the objects that are in its memo.
    return copy.deepcopy(model, {id(tensor): tensor for tensor in [*shared, *model.buffers()]})


def copy_with_own_parameters(model: Any) -> Any:
    """Returns a copy with modules and parameters of its own, which shares the model's buffers."""
    return weight_sharing_copy(model, own=dict(model.named_parameters()))


def linear_layers(target: Target, target_modules: Collection[str] = ()) -> dict[str, nn.Module]:
    """Returns the linear layers of the decoder's blocks, and the LM head unless it is tied, by the model's names.

    `target_modules`, such as ("q_proj", "v_proj"), selects those whose name has one of these as its last part. Raises
    ValueError if there is none.
    """
    decoder = target.model.get_decoder()
    decoder = getattr(decoder, "decoder", decoder)
    blocks = getattr(decoder, find_child(decoder, LAYER_LISTS, "list of blocks"))
    head = target.model.get_output_embeddings()
    inside = {*blocks.modules(), *([head] if head is not None and not has_tied_head(target) else [])}
    found = {
        name: module
        for name, module in target.model.named_modules()
        if module in inside and isinstance(module, nn.Linear | Conv1D)
    }
    selected = {
        name: module
        for name, module in found.items()
        if not target_modules or name.rpartition(".")[2] in target_modules
    }
    if not selected:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in found}))
        raise ValueError(f"{target.name} has no linear layer called {', '.join(target_modules)}; there are {known}")
    return selected


def has_tied_head(target: Target) -> bool:
    """Returns whether LM head and embedding share their weight, so that neither can be changed without the other."""
    head = target.model.get_output_embeddings()
    return head is not None and head.weight is target.model.get_input_embeddings().weight


class Adapter(nn.Module):
    """The factors of a weight's low-rank change, initially zero: W + alpha / rank up down (LoRA, 2106.09685, eq. 3)."""

    def __init__(self, layer: nn.Module, rank: int) -> None:
        super().__init__()
        weight = layer.weight
        assert isinstance(weight, Tensor)
        # GPT-2 stores its weights transposed.
        self.is_transposed = isinstance(layer, Conv1D)
        num_out, num_in = weight.T.shape if self.is_transposed else weight.shape
        self.down = nn.Linear(num_in, rank, bias=False)
        self.up = nn.Linear(rank, num_out, bias=False)
        nn.init.zeros_(self.up.weight)

    def delta(self) -> Tensor:
        """Returns up down [O, I], transposed if the layer stores its weight so."""
        product_OI = self.up.weight @ self.down.weight
        return product_OI.T if self.is_transposed else product_OI


@torch.no_grad()
def merged_weights(
    target: Target, target_modules: Collection[str], adapters: Iterable[Any], *, scale: float
) -> dict[str, Tensor]:
    """Returns the weights of the target's `linear_layers` plus `scale` times their adapters' deltas, by name."""
    weights = {f"{name}.weight": layer.weight for name, layer in linear_layers(target, target_modules).items()}
    pairs = zip(weights.items(), adapters, strict=True)
    return {name: weight + scale * adapter.delta() for (name, weight), adapter in pairs}
