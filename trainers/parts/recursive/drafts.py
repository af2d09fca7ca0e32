"""Drafts of several steps that begin at every position of a batch, and their metrics.

Step s, from 0, of the draft that begins at position t reads token t + 1 + s and predicts token t + 2 + s.

Shape suffixes: B rows, T positions, M drafts of a row, X drafts of all rows, N supervised positions of a
step, D hidden width.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from data.batches import Batch
from trainers import Metrics
from trainers.parts import heads
from trainers.parts.heads import Head, HeadOutputs, shift_left


@dataclass(frozen=True, kw_only=True, eq=False)
class Drafts:
    """The outputs of the drafts of a batch, which begin at the positions `starts_BM` of each row."""

    starts_BM: Tensor
    """Positions in ascending order; rows with fewer drafts repeat position 0 at the end."""
    index_BT: Tensor
    """The place in `starts_BM` of each position that has a draft, 0 elsewhere."""
    outputs: list[Tensor]
    """The inputs of the LM head [B, M, D] of each step."""

    def index(self, rows: Tensor, starts: Tensor) -> Tensor:
        """Returns the places of the drafts that begin at `starts`; those of negative starts mean nothing."""
        return self.index_BT[rows, starts.clamp(min=0)]

    def steps(self, batch: Batch) -> Iterator[HeadOutputs]:
        """Yields each step's outputs and labels at its supervised positions."""
        for step, output_BMD in enumerate(self.outputs):
            mask_BT, rows_N, starts_N = _supervised(batch, step)
            z_ND = output_BMD[rows_N, self.index(rows_N, starts_N)]
            yield HeadOutputs(z_ND=z_ND, labels_N=_labels(batch, step, mask_BT), mask_BT=mask_BT)


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedDrafts:
    """The drafts of a batch of which at least one step is supervised, those of all rows one after the other."""

    rows_X: Tensor
    """Each draft's row, in ascending order."""
    starts_X: Tensor
    """The position where it begins."""
    order_X: Tensor
    """Its number within its row."""
    index_BT: Tensor
    """The index of the draft that begins at a position, 0 if none does."""
    outputs: list[Tensor] = field(default_factory=list)
    """The inputs of the LM head [X, D] of each step."""

    def index(self, rows: Tensor, starts: Tensor) -> Tensor:
        """Returns the indices of the drafts that begin at `starts`; those of negative starts mean nothing."""
        return self.index_BT[rows, starts.clamp(min=0)]

    def steps(self, batch: Batch) -> Iterator[HeadOutputs]:
        """Yields each step's outputs and labels at its supervised positions."""
        for step, output_XD in enumerate(self.outputs):
            mask_BT, rows_N, starts_N = _supervised(batch, step)
            z_ND = output_XD[self.index(rows_N, starts_N)]
            yield HeadOutputs(z_ND=z_ND, labels_N=_labels(batch, step, mask_BT), mask_BT=mask_BT)


def list_drafts(batch: Batch, num_steps: int) -> PackedDrafts:
    """Returns the drafts without outputs; a batch that has none gets one, at its first token."""
    is_needed_BT = torch.stack([shift_left(batch.loss_mask_BT, 2 + step) for step in range(num_steps)]).any(0)
    is_needed_BT[0, 0] |= ~is_needed_BT.any()
    rows_X, starts_X = is_needed_BT.nonzero(as_tuple=True)
    index_BT = (is_needed_BT.flatten().cumsum(0) - 1).view_as(batch.tokens_BT) * is_needed_BT
    order_X = (is_needed_BT.cumsum(1) - 1)[rows_X, starts_X]
    return PackedDrafts(rows_X=rows_X, starts_X=starts_X, order_X=order_X, index_BT=index_BT)


def draft_starts(batch: Batch, num_steps: int) -> tuple[Tensor, Tensor]:
    """Returns (starts_BM, index_BT) of the drafts of which at least one step is supervised."""
    is_needed_BT = torch.stack([shift_left(batch.loss_mask_BT, 2 + step) for step in range(num_steps)]).any(0)
    index_BT = (is_needed_BT.cumsum(1) - 1).clamp(min=0) * is_needed_BT
    rows_N, positions_N = is_needed_BT.nonzero(as_tuple=True)
    most = max(int(is_needed_BT.sum(1).max()), 1)
    starts_BM = torch.zeros(len(is_needed_BT), most, dtype=torch.long, device=is_needed_BT.device)
    starts_BM[rows_N, index_BT[rows_N, positions_N]] = positions_N
    return starts_BM, index_BT


def step_metrics(drafts: Drafts | PackedDrafts, batch: Batch, head: Head) -> Metrics:
    """Returns each step's top-1 accuracy and, as acceptance, the number of correct steps before the first wrong one.

    Each step reads the text's tokens, which equal the draft's up to the first wrong one; with greedy text this is the
    number of accepted tokens in greedy decoding.
    """
    return heads.accuracy_metrics(heads.label_ranks(drafts.steps(batch), head, batch))


def _supervised(batch: Batch, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns where the drafts begin whose step is supervised, as a mask [B, T], and as rows and positions [N]."""
    mask_BT = shift_left(batch.loss_mask_BT, 2 + step)
    rows_N, starts_N = mask_BT.nonzero(as_tuple=True)
    return mask_BT, rows_N, starts_N


def _labels(batch: Batch, step: int, mask_BT: Tensor) -> Tensor:
    return shift_left(batch.tokens_BT, 2 + step)[mask_BT]
