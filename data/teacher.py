"""The live teacher: runs the target on a batch and adds the hidden states and logits it lacks.

Shape suffixes: B rows, T positions, S positions of a source, N = B * T, D hidden width, K largest logits kept,
V vocabulary.
"""

import dataclasses

import torch
import torch.distributed
from torch import Tensor

from data.batches import Batch, check_batch, check_layers
from draftsmith import Target
from draftsmith.inputs.outputs import top_logits


def complete(batch: Batch, target: Target, layers: tuple[int, ...] = (), top_k: int = 0) -> Batch:
    """Returns `batch` on the target's device with hidden `layers` in its dtype and exactly the `top_k` largest logits.

    Outputs that the batch already has (from a teacher store) are kept; the target runs, without gradient, only if some
    are missing. For an encoder-decoder the sources are always encoded. Raises ValueError if the batch does not fit the
    target.
    """
    check_layers(layers, target)
    batch = _narrow(batch, layers, top_k).to(target.device)
    missing = tuple(layer for layer in layers if layer not in batch.hidden)
    lacks_top = top_k > 0 and batch.top_ids_BTK is None
    if batch.source is None and target.is_encoder_decoder:
        check_batch(batch, target)
        batch = _encode(batch, target)
    if missing or lacks_top:
        check_batch(batch, target)
        batch = _run(batch, target, missing, top_k if lacks_top else 0)
    hidden = {layer: batch.hidden[layer].to(target.dtype) for layer in layers}
    batch = dataclasses.replace(batch, hidden=hidden)
    check_batch(batch, target, layers=layers, top_k=top_k)
    return batch


def _narrow(batch: Batch, layers: tuple[int, ...], top_k: int) -> Batch:
    """Returns the batch with only the hidden layers and logits that are needed, so that no others are moved."""
    hidden = {layer: states for layer, states in batch.hidden.items() if layer in layers}
    ids_BTK, logits_BTK = batch.top_ids_BTK, batch.top_logits_BTK
    is_enough = top_k > 0 and ids_BTK is not None and logits_BTK is not None and ids_BTK.shape[-1] >= top_k
    return dataclasses.replace(
        batch,
        hidden=hidden,
        top_logits_BTK=logits_BTK[..., :top_k] if is_enough and logits_BTK is not None else None,
        top_ids_BTK=ids_BTK[..., :top_k] if is_enough and ids_BTK is not None else None,
        log_normaliser_BT=batch.log_normaliser_BT if is_enough else None,
    )


@torch.no_grad()
def _encode(batch: Batch, target: Target) -> Batch:
    assert batch.source_BS is not None and batch.source_lengths_B is not None
    positions_S = torch.arange(batch.source_BS.shape[1], device=batch.source_BS.device)
    mask_BS = (positions_S < batch.source_lengths_B[:, None]).long()
    return dataclasses.replace(batch, source=target.encode(batch.source_BS, mask_BS))


@torch.no_grad()
def _run(batch: Batch, target: Target, layers: tuple[int, ...], top_k: int) -> Batch:
    last = target.num_layers
    wanted = (*layers, last) if top_k and last not in layers else layers
    if target.ranks_differ:
        found = _read_in_turn(target, batch.tokens_BT, wanted)
    else:
        found = target.read(batch.tokens_BT, wanted, batch.source)
    hidden = batch.hidden | {layer: found[layer] for layer in layers}
    if not top_k:
        return dataclasses.replace(batch, hidden=hidden)
    top_logits_BTK, top_ids_BTK, log_normaliser_BT = top_logits(target, found[last], top_k)
    return dataclasses.replace(
        batch,
        hidden=hidden,
        top_logits_BTK=top_logits_BTK,
        top_ids_BTK=top_ids_BTK,
        log_normaliser_BT=log_normaliser_BT,
    )


def _read_in_turn(target: Target, tokens_BT: Tensor, layers: tuple[int, ...]) -> dict[int, Tensor]:
    """Returns hidden layers of this rank's rows; all ranks run the target on the rows of one rank after the other."""
    own, shapes = torch.distributed.get_rank(), [tokens_BT.shape] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(shapes, tokens_BT.shape)
    kept: dict[int, Tensor] = {}
    target.ranks_differ = False
    try:
        for rank, shape in enumerate(shapes):
            read_BT = tokens_BT.contiguous() if rank == own else tokens_BT.new_empty(shape)
            torch.distributed.broadcast(read_BT, src=rank)
            found = target.read(read_BT, layers)
            kept = found if rank == own else kept
    finally:
        target.ranks_differ = True
    return kept
