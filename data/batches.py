"""What trainers see: `Example`, one text with what the target says of it, and `Batch`, several of them padded right.

Both come with or without the target's features; `data.teacher.complete` fills in what a batch lacks. For an
encoder-decoder the tokens are the decoder's, its start token first, and what the encoder reads stands beside them.

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
from draftsmith.core.model_info import TargetInfo
from draftsmith.core.target import Source


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """One text to learn from."""

    tokens_T: Tensor
    """Token ids (int64)."""
    loss_mask_T: Tensor
    """True where the token itself is to be learnt or judged: what the target or the assistant wrote."""
    key: str
    """Names the prompt it grew from; decides whether it is held out."""
    source_S: Tensor | None = None
    """Token ids (int64) that an encoder-decoder's encoder reads; None for causal text."""
    hidden: dict[int, Tensor] = field(default_factory=dict)
    """Stored hidden layers [T, D], un-normed; 0 is the embedding output, i the output of the i-th block."""
    top_logits_TK: Tensor | None = None
    """The target's largest next-token logits at each position (float32), in descending order."""
    top_ids_TK: Tensor | None = None
    """Their token ids (int64)."""
    log_normaliser_T: Tensor | None = None
    """Log of the sum of exponentials of all logits (float32): log-probabilities are top_logits less it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Examples padded right to the longest; fields mean what `Example`'s do."""

    tokens_BT: Tensor
    """Token ids; 0 in the padding."""
    loss_mask_BT: Tensor
    """As Example.loss_mask_T; False in the padding."""
    lengths_B: Tensor
    """Tokens of each row, padding not counted."""
    keys: tuple[str, ...] = ()
    """Each row's key, to name it in errors."""
    source_BS: Tensor | None = None
    """As Example.source_S; 0 in the padding."""
    source_lengths_B: Tensor | None = None
    """Tokens of each source, padding not counted."""
    source: Source | None = None
    """The sources once the target's encoder has read them."""
    hidden: dict[int, Tensor] = field(default_factory=dict)
    """Hidden layers [B, T, D]."""
    top_logits_BTK: Tensor | None = None
    """Largest logits, descending."""
    top_ids_BTK: Tensor | None = None
    """Their token ids."""
    log_normaliser_BT: Tensor | None = None
    """Log-normaliser of the whole vocabulary."""

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
    ids: Sequence[int], loss_mask: Sequence[bool] | None, key: str, source: Sequence[int] | None = None
) -> Example:
    """Returns an example without features; a mask of None means every token is to be learnt."""
    tokens_T = torch.tensor(ids, dtype=torch.long)
    mask_T = torch.ones(len(ids), dtype=torch.bool) if loss_mask is None else torch.tensor(loss_mask, dtype=torch.bool)
    assert len(mask_T) == len(tokens_T)
    source_S = None if source is None else torch.tensor(source, dtype=torch.long)
    return Example(tokens_T=tokens_T, loss_mask_T=mask_T, key=key, source_S=source_S)


def cut(row: Example, length: int) -> Example:
    """Returns the row's first `length` tokens; its source stays whole, as the target read it."""
    tensors = {f.name: value for f in dataclasses.fields(row) if isinstance(value := getattr(row, f.name), Tensor)}
    parts: dict[str, Any] = {name: value[:length] for name, value in tensors.items() if name != "source_S"}
    return dataclasses.replace(row, hidden={layer: states[:length] for layer, states in row.hidden.items()}, **parts)


def collate(examples: Sequence[Example]) -> Batch:
    """Pads examples right into one batch; raises ValueError, naming the row, when a loss mask holds nothing."""
    for one in examples:
        # The first token has no context to be predicted from.
        if not one.loss_mask_T[1:].any():
            raise ValueError(f"the loss mask of row {one.key} is all zero: there is nothing to learn in it")
    first = examples[0]
    layers = [layer for layer in first.hidden if all(layer in one.hidden for one in examples)]
    with_top = all(one.top_ids_TK is not None for one in examples)
    sources = [one.source_S for one in examples if one.source_S is not None]
    assert len(sources) in (0, len(examples)), "rows with a source and rows without make no batch"
    return Batch(
        tokens_BT=_padded([one.tokens_T for one in examples]),
        loss_mask_BT=_padded([one.loss_mask_T for one in examples]),
        lengths_B=torch.tensor([len(one.tokens_T) for one in examples]),
        keys=tuple(one.key for one in examples),
        source_BS=_padded(sources) if sources else None,
        source_lengths_B=torch.tensor([len(source_S) for source_S in sources]) if sources else None,
        hidden={layer: _padded([one.hidden[layer] for one in examples]) for layer in layers},
        top_logits_BTK=_padded([one.top_logits_TK for one in examples]) if with_top else None,
        top_ids_BTK=_padded([one.top_ids_TK for one in examples]) if with_top else None,
        log_normaliser_BT=_padded([one.log_normaliser_T for one in examples]) if with_top else None,
    )


def check_batch(batch: Batch, target: Target | TargetInfo, *, layers: tuple[int, ...] = (), top_k: int = 0) -> None:
    """Raises ValueError unless batch, target and what a drafter reads (`layers`, `top_k`) agree with one another."""
    if not batch.loss_mask_BT[:, 1:].any():
        raise ValueError(f"the loss mask is all zero in the batch of rows {', '.join(batch.keys)}")
    if target.is_encoder_decoder != (batch.source_BS is not None):
        kind, has = ("an encoder-decoder", "no") if target.is_encoder_decoder else ("a causal model", "a")
        raise ValueError(f"target {target.name} is {kind}, and row {batch.keys[0]} has {has} source to be encoded")
    for tokens, lengths_B in ((batch.tokens_BT, batch.lengths_B), (batch.source_BS, batch.source_lengths_B)):
        if tokens is None or lengths_B is None:
            continue
        highest, longest = int(tokens.max()), int(lengths_B.max())
        if highest >= target.vocab_size:
            raise ValueError(f"token id {highest} is outside {target.name}'s vocabulary of {target.vocab_size}")
        if longest > (limit := target.context_length):
            raise ValueError(f"a row of {longest} tokens is longer than the target's context of {limit}")
        if int(lengths_B.min()) < 1:
            raise ValueError(f"the batch of rows {', '.join(batch.keys)} holds one without a token")
    check_layers(layers, target)
    missing = [layer for layer in layers if layer not in batch.hidden]
    if missing:
        raise ValueError(f"the batch lacks hidden layers {missing}; it holds {sorted(batch.hidden)}")
    for layer, states in batch.hidden.items():
        if states.shape != (*batch.tokens_BT.shape, target.hidden_size):
            found = tuple(states.shape)
            raise ValueError(f"hidden layer {layer} has shape {found}; the target's width is {target.hidden_size}")
    num_kept = 0 if batch.top_ids_BTK is None else batch.top_ids_BTK.shape[-1]
    if num_kept < top_k:
        raise ValueError(f"the batch holds the top {num_kept} logits; {top_k} were asked for")


def check_layers(layers: Sequence[int], target: Target | TargetInfo) -> None:
    """Raises ValueError for hidden layers that the target does not have."""
    outside = [layer for layer in layers if not 0 <= layer <= target.num_layers]
    if outside:
        raise ValueError(f"hidden layer {outside[0]} was asked for; {target.name} has layers 0 to {target.num_layers}")


def split(keys: Sequence[str], *, held_out_share: float, seed: int = 0) -> tuple[list[int], list[int]]:
    """Returns the indices (train, held_out) by a hash of each key: rows of one prompt stay on one side.

    So do the pieces of one document, unless these are so few that a whole one would be more than the share.
    A row's side depends on nothing but its key and the seed, save that one key at least is held out of a small set.
    Raises ValueError when no row would be left to train on.
    """
    documents = [key.partition(".")[0] for key in keys]
    grouped = documents if len(set(documents)) * held_out_share >= 1 else keys
    hashes = [hashlib.sha256(f"{seed}:{key}".encode()).digest() for key in grouped]
    shares = [int.from_bytes(digest[:8], "big") / 2**64 for digest in hashes]
    limit = max(held_out_share, min(shares, default=0.0) + 2**-53) if held_out_share > 0 else 0.0
    train = [index for index, share in enumerate(shares) if share >= limit]
    if not train:
        raise ValueError(f"of {len(keys)} rows none is left to train on at a held-out share of {held_out_share}")
    return train, [index for index, share in enumerate(shares) if share < limit]


def order(num_examples: int, *, seed: int, epoch: int) -> list[int]:
    """Returns the order of the examples in one epoch, the same wherever it is asked for."""
    return np.random.default_rng([seed, epoch]).permutation(num_examples).tolist()


def batches(
    examples: Sequence[Example], batch_size: int, *, seed: int | None = None, epoch: int = 0
) -> Iterator[Batch]:
    """Yields collated batches, shuffled by (seed, epoch), or as given without a seed; the last may be short."""
    indices = list(range(len(examples))) if seed is None else order(len(examples), seed=seed, epoch=epoch)
    for begin in range(0, len(indices), batch_size):
        yield collate([examples[index] for index in indices[begin : begin + batch_size]])


def _padded(rows: Sequence[Tensor | None]) -> Tensor:
    whole = [row for row in rows if row is not None]
    assert len(whole) == len(rows)
    return torch.nn.utils.rnn.pad_sequence(whole, batch_first=True)
