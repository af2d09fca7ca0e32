"""Targets that a drafter has changed: they share with the user's model every weight that is not changed.

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


class Tuned(Target):
    """A target changed by a drafter, and the user's own that it was made from."""

    def __init__(self, model: Any, base: Target) -> None:
        super().__init__(model, base.tokenizer)
        self._base = base

    @property
    def base(self) -> Target:
        return self._base


@torch.no_grad()
def tuned(target: Target, weights: dict[str, Tensor]) -> Tuned:
    """Returns a target of its own whose parameters called so, by the model's names for them, have these values.

    All other parameters are the very ones of `target`, which stays as it is. Raises ValueError for names or shapes
    that the model does not have.
    """
    parameters = dict(target.model.named_parameters())
    for name, weight in weights.items():
        if name not in parameters:
            raise ValueError(f"{target.name} has no parameter {name!r} to be tuned")
        if parameters[name].shape != weight.shape:
            raise ValueError(f"{name} is {tuple(parameters[name].shape)} in {target.name}, not {tuple(weight.shape)}")
    model = twin(target.model, own=weights)
    changed = dict(model.named_parameters())
    for name, weight in weights.items():
        changed[name].copy_(weight)
    return Tuned(model, target)


def twin(model: Any, *, own: Collection[str] = ()) -> Any:
    """Returns a copy whose modules are its own and whose parameters and buffers, save those called so, the model's."""
    shared = [parameter for name, parameter in model.named_parameters() if name not in own]
    # deepcopy takes what its memo holds as copied already.
    return copy.deepcopy(model, {id(tensor): tensor for tensor in [*shared, *model.buffers()]})


def matrices(target: Target, called: Collection[str] = ()) -> dict[str, nn.Module]:
    """Returns the linear layers of the decoder's blocks and the output head, unless tied, by the model's names.

    With `called` only those whose name ends so, as in ("q_proj", "v_proj"). Raises ValueError if there is none.
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
    kept = {name: module for name, module in found.items() if not called or name.rpartition(".")[2] in called}
    if not kept:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in found}))
        raise ValueError(f"{target.name} has no linear layer called {', '.join(called)}; there are {known}")
    return kept


def has_tied_head(target: Target) -> bool:
    """Returns whether the output head is the embedding, so that one cannot be changed without the other."""
    head = target.model.get_output_embeddings()
    return head is not None and head.weight is target.model.get_input_embeddings().weight


class Adapter(nn.Module):
    """The factors of a matrix's change, zero at first: W + alpha / rank up down (LoRA, 2106.09685, equation 3)."""

    def __init__(self, layer: nn.Module, rank: int) -> None:
        super().__init__()
        weight = layer.weight
        assert isinstance(weight, Tensor)
        # GPT-2 keeps its matrices the other way round.
        self.is_transposed = isinstance(layer, Conv1D)
        num_out, num_in = weight.T.shape if self.is_transposed else weight.shape
        self.down = nn.Linear(num_in, rank, bias=False)
        self.up = nn.Linear(rank, num_out, bias=False)
        nn.init.zeros_(self.up.weight)

    def change(self) -> Tensor:
        """Returns up down [O, I], or as the layer keeps it."""
        product_OI = self.up.weight @ self.down.weight
        return product_OI.T if self.is_transposed else product_OI


@torch.no_grad()
def merged(target: Target, called: Collection[str], adapters: Iterable[Any], *, scale: float) -> dict[str, Tensor]:
    """Returns the target's matrices called so with `scale` times their adapters' changes, by the model's names."""
    weights = {f"{name}.weight": layer.weight for name, layer in matrices(target, called).items()}
    pairs = zip(weights.items(), adapters, strict=True)
    return {name: weight + scale * adapter.change() for (name, weight), adapter in pairs}
