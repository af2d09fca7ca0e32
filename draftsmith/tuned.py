"""Targets that a drafter has changed: they share with the user's model every weight that is not changed."""

import copy

import torch
from torch import Tensor

from draftsmith.target import Target


@torch.no_grad()
def tuned(target: Target, weights: dict[str, Tensor]) -> Target:
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
    kept = [parameter for name, parameter in parameters.items() if name not in weights]
    # deepcopy takes what its memo holds as copied already.
    model = copy.deepcopy(target.model, {id(parameter): parameter for parameter in [*kept, *target.model.buffers()]})
    changed = dict(model.named_parameters())
    for name, weight in weights.items():
        changed[name].copy_(weight)
    return Target(model, target.tokenizer)
