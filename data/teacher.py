"""The live teacher: runs the target on a batch and adds the hidden states and logits it lacks.

Shape suffixes: B rows, T positions, S positions of a source, N = B * T, D hidden width, K largest logits kept,
V vocabulary.
"""

import dataclasses

import torch
from torch import Tensor

from data.batches import Batch, check_batch, check_layers
from draftsmith import Target

TOKENS_AT_ONCE = 2048


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


def top_logits(target: Target, hidden_BTD: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (logits [B, T, K], ids [B, T, K], log-normaliser [B, T]) from the last block's output, in float32.

    The head runs on a few positions at a time, so that no [B, T, V] tensor is allocated. Raises ValueError if `top_k`
    exceeds the vocabulary.
    """
    if top_k > target.vocab_size:
        raise ValueError(f"top_k is {top_k}; {target.name} has a vocabulary of {target.vocab_size}")
    parts = []
    for hidden_1ND in hidden_BTD.flatten(0, 1)[None].split(TOKENS_AT_ONCE, dim=1):
        logits_NV = target.head(target.norm(hidden_1ND))[0].float()
        top_NK = logits_NV.topk(top_k, dim=-1)
        parts.append((top_NK.values, top_NK.indices, logits_NV.logsumexp(-1)))
    values_NK, ids_NK, normaliser_N = (torch.cat(column) for column in zip(*parts, strict=True))
    shape = hidden_BTD.shape[:2]
    return values_NK.view(*shape, top_k), ids_NK.view(*shape, top_k), normaliser_N.view(shape)
