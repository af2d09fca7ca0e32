"""Unstructured and 2:4 pruning of single weights, by magnitude or Wanda (2306.11695).

Dense kernels do not skip zeros: this saves no time without kernels for sparse matrices.

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
"""In the pattern of sparse tensor cores, two of every four neighbouring inputs are kept."""


@torch.no_grad()
def prune_by_magnitude(model: Any, keep: float, *, is_two_of_four: bool) -> None:
    """Zeroes all but the fraction `keep` of each linear layer's weights in blocks, by absolute value."""
    for block in blocks_of(model):
        for linear in linears_of_block(model, block):
            _zero(linear, linear.weight.abs().float(), keep, is_two_of_four=is_two_of_four, by_row=False)


@torch.no_grad()
def prune_by_wanda(target: Target, batches: Sequence[Batch], keep: float, *, is_two_of_four: bool) -> None:
    """Zeroes in each row of weights all but the fraction `keep` with the largest |W_oi| ||X_i||_2, in place.

    Works block by block: a block's inputs X are the outputs of the sparse blocks before it.
    """
    hidden = [target.read(batch.tokens_BT.to(target.device), (0,))[0] for batch in batches]
    for layer, block in enumerate(tqdm(blocks_of(target.model), desc="wanda", unit="block", mininterval=0.5)):
        squares = {one: one.weight.new_zeros(one.in_features).float() for one in linears_of_block(target.model, block)}
        for batch, input_BTD in zip(batches, hidden, strict=True):
            add = partial(_add_squares, squares, token_mask(batch).to(target.device))
            with capture_inputs({linear: partial(add, linear) for linear in squares}):
                _run(target, batch, layer, input_BTD)
        for linear, squares_I in squares.items():
            scores_OI = linear.weight.abs().float() * squares_I.sqrt()
            _zero(linear, scores_OI, keep, is_two_of_four=is_two_of_four, by_row=True)
        hidden = [_run(target, batch, layer, input_BTD) for batch, input_BTD in zip(batches, hidden, strict=True)]


def linears_of_block(model: Any, block: nn.Module) -> list[nn.Linear]:
    """Returns a block's linear layers; raises ValueError naming the architecture if it has none."""
    layers = [module for module in block.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no nn.Linear in its blocks; its weights cannot be set to zero")
    return layers


def keep_mask(scores_OI: Tensor, keep: float, *, is_two_of_four: bool, by_row: bool) -> Tensor:
    """Returns a mask [O, I] of the largest scores: two of every four inputs, or a fraction of each row or of all."""
    if is_two_of_four:
        grouped = scores_OI.unflatten(-1, (-1, GROUP))
        indices = grouped.topk(KEPT_OF_GROUP, dim=-1).indices
        return torch.zeros_like(grouped, dtype=torch.bool).scatter_(-1, indices, True).flatten(-2)
    flat = scores_OI if by_row else scores_OI.flatten()
    indices = flat.topk(round(keep * flat.shape[-1]), dim=-1).indices
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(-1, indices, True).view_as(scores_OI)


def num_zeros(model: Any) -> int:
    """Returns the number of zero weights of linear layers in blocks."""
    return sum(int((one.weight == 0).sum()) for block in blocks_of(model) for one in linears_of_block(model, block))


def _add_squares(squares: dict[nn.Linear, Tensor], mask_BT: Tensor, linear: nn.Linear, input_BTI: Tensor) -> None:
    squares[linear] += input_BTI[mask_BT].float().square().sum(0)


def _zero(linear: nn.Linear, scores_OI: Tensor, keep: float, *, is_two_of_four: bool, by_row: bool) -> None:
    if is_two_of_four and linear.in_features % GROUP:
        raise ValueError(f"a linear layer of {linear.in_features} inputs has no groups of {GROUP}; use another pattern")
    linear.weight.mul_(keep_mask(scores_OI, keep, is_two_of_four=is_two_of_four, by_row=by_row))


def _run(target: Target, batch: Batch, layer: int, input_BTD: Tensor) -> Tensor:
    """Returns a block's output for its input [B, T, D]."""
    tokens_BT = batch.tokens_BT.to(target.device)
    cache, whole = target.new_cache(len(tokens_BT)), chain(tokens_BT.shape[1], target.device)
    return target.forward(tokens_BT, whole, cache, span=(layer, layer + 1), resume_BND=input_BTD).hidden_BND
