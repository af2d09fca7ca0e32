"""Importance of a target's layers, heads and neurons on calibration text.

Shape suffixes: B rows, T positions, N positions of real tokens, D hidden width, L layers, H query heads, W head width,
F neurons of a feed-forward layer.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from data.batches import Batch
from draftsmith import Target
from draftsmith.core.views import ATTENTIONS, MLPS, blocks_of, find_child
from trainers.compression.pruning import OUT_OF_ATTENTION, OUT_OF_MLP, check_projections, head_counts


def progress_bar(batches: Iterable[Batch], what: str) -> Iterable[Batch]:
    """Returns the batches with a progress bar."""
    return tqdm(batches, desc=what, unit="batch", mininterval=0.5)


def token_mask(batch: Batch) -> Tensor:
    """Returns True at tokens and False at padding [B, T]."""
    return torch.arange(batch.tokens_BT.shape[1]) < batch.lengths_B[:, None]


@torch.inference_mode()
def block_influence(target: Target, batches: Iterable[Batch]) -> list[float]:
    """Returns 1 - the mean cosine of each layer's input and output (ShortGPT, 2403.03853, equation 1)."""
    totals_L, count = torch.zeros(target.num_layers, dtype=torch.float64), 0
    for batch in progress_bar(batches, "block influence"):
        hidden = _hidden(target, batch)
        cosines = [torch.cosine_similarity(hidden[layer], hidden[layer + 1], dim=-1) for layer in range(len(totals_L))]
        totals_L += torch.stack([(1 - cosine_N.double()).sum().cpu() for cosine_N in cosines])
        count += int(batch.lengths_B.sum())
    return (totals_L / count).tolist()


@torch.inference_mode()
def angular_distance(target: Target, batches: Iterable[Batch], num_layers: int) -> list[float]:
    """Returns for every span of `num_layers` layers, by its first, the mean of arccos(cos(input, output)) / pi.

    Source: 2403.17887, equation 6, here over all tokens.
    """
    num_starts = target.num_layers - num_layers + 1
    totals, count = torch.zeros(num_starts, dtype=torch.float64), 0
    for batch in progress_bar(batches, "angular distance"):
        hidden = _hidden(target, batch)
        for start in range(num_starts):
            cosine_N = torch.cosine_similarity(hidden[start], hidden[start + num_layers], dim=-1)
            totals[start] += (cosine_N.double().clamp(-1, 1).arccos() / math.pi).sum().cpu()
        count += int(batch.lengths_B.sum())
    return (totals / count).tolist()


@torch.inference_mode()
def activations(target: Target, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """Returns the importance of query heads [L, H] and neurons [L, F] by their activations (Minitron, 2407.14679).

    It is the square root of the sum over rows of (mean over tokens of |a|)^2, where a is a neuron's value at the input
    of the down projection, or the norm over W of a head's values at the input of the output projection. Raises
    ValueError for architectures whose projections are not found.
    """
    check_projections(target.model)
    num_heads, _, width = head_counts(target.model)
    sums: dict[str, list[Tensor]] = {"heads": [], "neurons": []}
    mask_BT = torch.zeros(0, 0)

    def add(kind: str, layer: int, values_BTF: Tensor) -> None:
        values_BTF = values_BTF.float()
        if kind == "heads":
            values_BTF = values_BTF.unflatten(-1, (num_heads, width)).norm(dim=-1)
        mean_BF = (values_BTF.abs() * mask_BT[..., None]).sum(1) / mask_BT.sum(1, keepdim=True)
        squares_F = mean_BF.double().square().sum(0).cpu()
        if layer == len(sums[kind]):
            sums[kind].append(torch.zeros_like(squares_F))
        sums[kind][layer] += squares_F

    inputs: dict[Any, Any] = {}
    for layer, block in enumerate(blocks_of(target.model)):
        attention = getattr(block, find_child(block, ATTENTIONS, "attention"))
        mlp = getattr(block, find_child(block, MLPS, "MLP"))
        inputs[getattr(attention, OUT_OF_ATTENTION)] = partial(add, "heads", layer)
        inputs[getattr(mlp, OUT_OF_MLP)] = partial(add, "neurons", layer)
    with capture_inputs(inputs):
        for batch in progress_bar(batches, "activations"):
            mask_BT = token_mask(batch).to(target.device)
            target.read(batch.tokens_BT.to(target.device), (target.num_layers,))
    return torch.stack(sums["heads"]).sqrt(), torch.stack(sums["neurons"]).sqrt()


@contextmanager
def capture_inputs(watchers: dict[nn.Module, Any]) -> Iterator[None]:
    """Calls each watcher with its module's first input whenever the module runs, within the context."""
    handles = [
        module.register_forward_pre_hook(lambda _, inputs, watcher=watcher: watcher(inputs[0]))
        for module, watcher in watchers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hidden(target: Target, batch: Batch) -> list[Tensor]:
    """Returns the hidden layers 0 to L at the real tokens [N, D] in float32."""
    layers = tuple(range(target.num_layers + 1))
    hidden = target.read(batch.tokens_BT.to(target.device), layers)
    mask_BT = token_mask(batch).to(target.device)
    return [hidden[layer][mask_BT].float() for layer in layers]
