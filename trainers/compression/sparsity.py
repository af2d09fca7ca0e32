"""Weights set to zero one by one in a model of unchanged shape: smallest magnitude, or Wanda (2306.11695).

Dense kernels multiply by zero as slowly as by anything else: this saves no time without kernels for sparse matrices.

Shape suffixes: B rows, T positions, D hidden width, O outputs and I inputs of a linear layer.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from data.batches import Batch
from draftsmith import Target
from draftsmith.core.tree import chain
from draftsmith.core.views import blocks_of
from trainers.compression.importance import capture_inputs, token_mask

GROUP, KEPT_OF_GROUP = 4, 2
"""Of each four neighbouring inputs two are kept in the pattern that sparse tensor cores multiply."""


@torch.no_grad()
def prune_by_magnitude(model: Any, keep: float, *, is_two_of_four: bool) -> None:
    """Zeroes all but the share `keep` of each linear layer's weights in blocks, by their absolute values."""
    for block in blocks_of(model):
        for linear in linear_layers(model, block):
            _zero(linear, linear.weight.abs().float(), keep, is_two_of_four=is_two_of_four, by_row=False)


@torch.no_grad()
def prune_by_wanda(target: Target, batches: Sequence[Batch], keep: float, *, is_two_of_four: bool) -> None:
    """Zeroes in each row of weights all but the share `keep` with the largest |W_oi| ||X_i||_2, in the target itself.

    Block by block: each one's inputs X are those that the blocks before it yield once they are sparse.
    """
    hidden = [target.read(batch.tokens_BT.to(target.device), (0,))[0] for batch in batches]
    for layer, block in enumerate(tqdm(blocks_of(target.model), desc="wanda", unit="block", mininterval=0.5)):
        squares = {one: one.weight.new_zeros(one.in_features).float() for one in linear_layers(target.model, block)}
        for batch, entry_BTD in zip(batches, hidden, strict=True):
            add = partial(_add_squares, squares, token_mask(batch).to(target.device))
            with capture_inputs({linear: partial(add, linear) for linear in squares}):
                _run(target, batch, layer, entry_BTD)
        for linear, squares_I in squares.items():
            scores_OI = linear.weight.abs().float() * squares_I.sqrt()
            _zero(linear, scores_OI, keep, is_two_of_four=is_two_of_four, by_row=True)
        hidden = [_run(target, batch, layer, entry) for batch, entry in zip(batches, hidden, strict=True)]


def linear_layers(model: Any, block: nn.Module) -> list[nn.Linear]:
    """Returns a block's linear layers; raises ValueError naming the architecture if it has none."""
    found = [module for module in block.modules() if isinstance(module, nn.Linear)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no nn.Linear in its blocks, whose weights could be set to zero")
    return found


def keep_mask(scores_OI: Tensor, keep: float, *, is_two_of_four: bool, by_row: bool) -> Tensor:
    """Returns where the largest scores are [O, I]: two of each four inputs, or a share of each row or of all."""
    if is_two_of_four:
        grouped = scores_OI.unflatten(-1, (-1, GROUP))
        places = grouped.topk(KEPT_OF_GROUP, dim=-1).indices
        return torch.zeros_like(grouped, dtype=torch.bool).scatter_(-1, places, True).flatten(-2)
    flat = scores_OI if by_row else scores_OI.flatten()
    places = flat.topk(round(keep * flat.shape[-1]), dim=-1).indices
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(-1, places, True).view_as(scores_OI)


def num_zeros(model: Any) -> int:
    """Returns how many weights of linear layers in blocks are zero."""
    return sum(int((one.weight == 0).sum()) for block in blocks_of(model) for one in linear_layers(model, block))


def _add_squares(squares: dict[nn.Linear, Tensor], mask_BT: Tensor, linear: nn.Linear, given_BTI: Tensor) -> None:
    squares[linear] += given_BTI[mask_BT].float().square().sum(0)


def _zero(linear: nn.Linear, scores_OI: Tensor, keep: float, *, is_two_of_four: bool, by_row: bool) -> None:
    if is_two_of_four and linear.in_features % GROUP:
        raise ValueError(
            f"a linear layer of {linear.in_features} inputs has no groups of {GROUP}; take another pattern"
        )
    linear.weight.mul_(keep_mask(scores_OI, keep, is_two_of_four=is_two_of_four, by_row=by_row))


def _run(target: Target, batch: Batch, layer: int, entry_BTD: Tensor) -> Tensor:
    """Returns what a block makes of its input."""
    tokens_BT = batch.tokens_BT.to(target.device)
    cache, whole = target.new_cache(len(tokens_BT)), chain(tokens_BT.shape[1], target.device)
    return target.forward(tokens_BT, whole, cache, span=(layer, layer + 1), resume_BND=entry_BTD).hidden_BND
