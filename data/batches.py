"""The inputs of trainers: `Example`, a text with the target's outputs on it, and `Batch`, examples padded right.

Both may lack the target's outputs; `data.teacher.complete` adds them to a batch. For an encoder-decoder the tokens are
the decoder's, beginning with its start token, and the encoder's input is the source.

Shape suffixes: B rows, T positions, S positions of a source, D hidden width, K largest logits kept.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from draftsmith import Target
from draftsmith.core.target import Source
from draftsmith.loading.model_info import TargetInfo

STEPS_SORTED = 16
"""Optimiser steps among which rows grouped by length are exchanged."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """One training text."""

    tokens_T: Tensor
    """Token ids (int64)."""
    loss_mask_T: Tensor
    """True at supervised tokens, on which drafters are trained and evaluated: those that the target or the assistant
    wrote."""
    key: str
    """Identifier of the prompt that it continues; determines whether it is held out."""
    where: str = ""
    """Origin of the text, as `file:line`; empty if it is not known."""
    source_S: Tensor | None = None
    """Token ids (int64) of the encoder's input; None for causal text."""
    hidden: dict[int, Tensor] = field(default_factory=dict)
    """Hidden layers [T, D], un-normed; 0 is the embedding output, i the output of the i-th block."""
    top_logits_TK: Tensor | None = None
    """The target's largest next-token logits at each position (float32), in descending order."""
    top_ids_TK: Tensor | None = None
    """Token ids (int64) of `top_logits_TK`."""
    log_normaliser_T: Tensor | None = None
    """Log-sum-exp of all logits (float32); log-probabilities are `top_logits_TK` minus it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Examples padded right to the longest, with the fields of `Example`."""

    tokens_BT: Tensor
    """Token ids; 0 in the padding."""
    loss_mask_BT: Tensor
    """True at supervised tokens; False in the padding."""
    lengths_B: Tensor
    """Number of tokens of each row without padding."""
    keys: tuple[str, ...] = ()
    """Each row's key."""
    names: tuple[str, ...] = ()
    """Each row's origin, or its key if that is not known, for error messages."""
    source_BS: Tensor | None = None
    """Token ids of the encoder's inputs; 0 in the padding."""
    source_lengths_B: Tensor | None = None
    """Number of tokens of each source without padding."""
    source: Source | None = None
    """The encoded sources."""
    hidden: dict[int, Tensor] = field(default_factory=dict)
    """Hidden layers [B, T, D]."""
    top_logits_BTK: Tensor | None = None
    """Largest logits, descending."""
    top_ids_BTK: Tensor | None = None
    """Token ids of `top_logits_BTK`."""
    log_normaliser_BT: Tensor | None = None
    """Log-sum-exp of all logits."""

    def to(self, device: torch.device | str) -> "Batch":
        """Returns the batch with every tensor on `device`."""
        moved: dict[str, Any] = {
            f.name: value.to(device, non_blocking=True)
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        moved["hidden"] = {layer: states.to(device, non_blocking=True) for layer, states in self.hidden.items()}
        if self.source is not None:
            parts = {name: tensor.to(device, non_blocking=True) for name, tensor in vars(self.source).items()}
            moved["source"] = Source(**parts)
        return dataclasses.replace(self, **moved)


def example(
    ids: Sequence[int],
    loss_mask: Sequence[bool] | None,
    key: str,
    source: Sequence[int] | None = None,
    *,
    where: str = "",
) -> Example:
    """Returns an example without the target's outputs; a mask of None means that every token is supervised."""
    tokens_T = torch.tensor(ids, dtype=torch.long)
    mask_T = torch.ones(len(ids), dtype=torch.bool) if loss_mask is None else torch.tensor(loss_mask, dtype=torch.bool)
    assert len(mask_T) == len(tokens_T)
    source_S = None if source is None else torch.tensor(source, dtype=torch.long)
    return Example(tokens_T=tokens_T, loss_mask_T=mask_T, key=key, where=where, source_S=source_S)


def truncate(row: Example, length: int) -> Example:
    """Returns the first `length` tokens of an example, with its complete source."""
    tensors = {f.name: value for f in dataclasses.fields(row) if isinstance(value := getattr(row, f.name), Tensor)}
    parts: dict[str, Any] = {name: value[:length] for name, value in tensors.items() if name != "source_S"}
    return dataclasses.replace(row, hidden={layer: states[:length] for layer, states in row.hidden.items()}, **parts)


def collate(examples: Sequence[Example]) -> Batch:
    """Pads examples right into one batch; raises ValueError for a row without a supervised token.

    The batch has those of the target's outputs that all examples have.
    """
    for one in examples:
        # The first token has no context to be predicted from.
        if not one.loss_mask_T[1:].any():
            raise ValueError(f"the loss mask of row {one.where or one.key} is all zero: it has no supervised token")
    first = examples[0]
    layers = [layer for layer in first.hidden if all(layer in one.hidden for one in examples)]
    with_top = all(one.top_ids_TK is not None for one in examples)
    sources = [one.source_S for one in examples if one.source_S is not None]
    assert len(sources) in (0, len(examples)), "a batch cannot mix rows with and without a source"
    return Batch(
        tokens_BT=_padded([one.tokens_T for one in examples]),
        loss_mask_BT=_padded([one.loss_mask_T for one in examples]),
        lengths_B=torch.tensor([len(one.tokens_T) for one in examples]),
        keys=tuple(one.key for one in examples),
        names=tuple(one.where or one.key for one in examples),
        source_BS=_padded(sources) if sources else None,
        source_lengths_B=torch.tensor([len(source_S) for source_S in sources]) if sources else None,
        hidden={layer: _padded([one.hidden[layer] for one in examples]) for layer in layers},
        top_logits_BTK=_padded([one.top_logits_TK for one in examples]) if with_top else None,
        top_ids_BTK=_padded([one.top_ids_TK for one in examples]) if with_top else None,
        log_normaliser_BT=_padded([one.log_normaliser_T for one in examples]) if with_top else None,
    )


def check_batch(batch: Batch, target: Target | TargetInfo, *, layers: tuple[int, ...] = (), top_k: int = 0) -> None:
    """Raises ValueError unless the batch fits the target and has the hidden `layers` and `top_k` logits."""
    if not batch.loss_mask_BT[:, 1:].any():
        raise ValueError(f"the loss mask is all zero in the batch of rows {', '.join(batch.names)}")
    if target.is_encoder_decoder != (batch.source_BS is not None):
        kind, has = ("an encoder-decoder", "no") if target.is_encoder_decoder else ("a causal model", "a")
        raise ValueError(f"target {target.name} is {kind}, and row {batch.names[0]} has {has} source for an encoder")
    for tokens, lengths_B in ((batch.tokens_BT, batch.lengths_B), (batch.source_BS, batch.source_lengths_B)):
        if tokens is None or lengths_B is None:
            continue
        lowest, highest, longest = int(tokens.min()), int(tokens.max()), int(lengths_B.max())
        if highest >= target.vocab_size or lowest < 0:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(f"token id {wrong} is outside {target.name}'s vocabulary of {target.vocab_size}")
        if longest > (limit := target.context_length):
            raise ValueError(f"a row of {longest} tokens is longer than the target's context of {limit}")
        if int(lengths_B.min()) < 1:
            raise ValueError(f"one of the rows {', '.join(batch.names)} has no token")
    check_layers(layers, target)
    missing = [layer for layer in layers if layer not in batch.hidden]
    if missing:
        raise ValueError(f"the batch lacks hidden layers {missing}; it has {sorted(batch.hidden)}")
    for layer, states in batch.hidden.items():
        if states.shape != (*batch.tokens_BT.shape, target.hidden_size):
            found = tuple(states.shape)
            raise ValueError(f"hidden layer {layer} has shape {found}; the target's width is {target.hidden_size}")
    num_logits = 0 if batch.top_ids_BTK is None else batch.top_ids_BTK.shape[-1]
    if (
        batch.top_ids_BTK is not None
        and not 0 <= int(batch.top_ids_BTK.min()) <= int(batch.top_ids_BTK.max()) < target.vocab_size
    ):
        raise ValueError(f"top_ids are outside {target.name}'s vocabulary of {target.vocab_size}; make the store again")
    if num_logits < top_k:
        raise ValueError(f"the batch has the top {num_logits} logits; {top_k} are needed")


def check_layers(layers: Sequence[int], target: Target | TargetInfo) -> None:
    """Raises ValueError for hidden layers that the target does not have."""
    outside = [layer for layer in layers if not 0 <= layer <= target.num_layers]
    if outside:
        raise ValueError(f"hidden layer {outside[0]} does not exist; {target.name} has layers 0 to {target.num_layers}")


def split(keys: Sequence[str], *, held_out_share: float, seed: int = 0) -> tuple[list[int], list[int]]:
    """Returns the indices (train, held_out), split by a hash of each key, so that rows of one prompt stay together.

    The pieces of a document also stay together, unless there are so few documents that one would exceed the held-out
    share. The split of a row depends on its key and the seed alone, except that at least one key is held out. Raises
    ValueError if no row would be left for training.
    """
    documents = [key.partition(".")[0] for key in keys]
    grouped = documents if len(set(documents)) * held_out_share >= 1 else keys
    hashes = [hashlib.sha256(f"{seed}:{key}".encode()).digest() for key in grouped]
    shares = [int.from_bytes(digest[:8], "big") / 2**64 for digest in hashes]
    limit = max(held_out_share, min(shares, default=0.0) + 2**-53) if held_out_share > 0 else 0.0
    train = [index for index, share in enumerate(shares) if share >= limit]
    if not train:
        raise ValueError(f"a held-out share of {held_out_share} leaves none of the {len(keys)} rows for training")
    return train, [index for index, share in enumerate(shares) if share < limit]


def order(num_examples: int, *, seed: int, epoch: int) -> list[int]:
    """Returns the order of the examples in one epoch, which depends on the seed and the epoch alone."""
    return np.random.default_rng([seed, epoch]).permutation(num_examples).tolist()


def grouped_order(
    examples: Sequence[Example], rows_per_step: int, max_length: int, *, seed: int, epoch: int
) -> Iterator[int]:
    """Yields the order of one epoch in which the rows of an optimiser step are about equally long, to save padding.

    Of every `STEPS_SORTED` steps of the random order the rows are sorted by length, cut to `max_length`, and the steps
    are shuffled. Rows too few for a last step come last.
    """
    indices = order(len(examples), seed=seed, epoch=epoch)
    num_whole = len(indices) // rows_per_step * rows_per_step
    for begin in range(0, num_whole, size := STEPS_SORTED * rows_per_step):
        found = indices[begin : min(begin + size, num_whole)]
        found.sort(key=lambda index: min(len(examples[index].tokens_T), max_length))
        for step in order(len(found) // rows_per_step, seed=seed, epoch=begin):
            yield from found[step * rows_per_step : (step + 1) * rows_per_step]
    yield from indices[num_whole:]


def batches(
    examples: Sequence[Example], batch_size: int, *, seed: int | None = None, epoch: int = 0
) -> Iterator[Batch]:
    """Yields collated batches, shuffled by (seed, epoch), or in order if `seed` is None; the last may be short."""
    indices = list(range(len(examples))) if seed is None else order(len(examples), seed=seed, epoch=epoch)
    for begin in range(0, len(indices), batch_size):
        yield collate([examples[index] for index in indices[begin : begin + batch_size]])


def _padded(rows: Sequence[Tensor | None]) -> Tensor:
    tensors = [row for row in rows if row is not None]
    assert len(tensors) == len(rows)
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
