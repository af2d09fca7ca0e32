"""What the fused cross-entropy computes on the logits of a block: operation by operation, or compiled.

Shape suffixes: R rows of a chunk, S rows that share a position's target, C = R / S positions, V tokens of a block, W
tokens that have logits.
"""

import torch
from torch import Tensor

from trainers.compilation import compiled_losses
from trainers.compilation.compiled_losses import compilable


class Labels:
    """Targets that are one token each."""

    def __init__(self, labels_R: Tensor) -> None:
        self._labels_R = labels_R

    def expected(self, logits_RV: Tensor, block: slice, *, scratch_RV: Tensor) -> Tensor:
        """Returns the label's logit [R], 0 if it is not in the block."""
        index_R1, is_inside_R1 = self._index(block)
        return (logits_RV.gather(1, index_R1) * is_inside_R1)[:, 0]

    def subtract(self, probs_RV: Tensor, block: slice) -> None:
        """Subtracts the target's probabilities in place."""
        index_R1, is_inside_R1 = self._index(block)
        probs_RV.scatter_add_(1, index_R1, -is_inside_R1.to(probs_RV.dtype))

    def in_block(self, block: slice) -> Tensor:
        """Returns the labels as columns of the block [R], some of which it does not have."""
        return self._labels_R - block.start

    def _index(self, block: slice) -> tuple[Tensor, Tensor]:
        offset_R1, size = self.in_block(block)[:, None], block.stop - block.start
        return offset_R1.clamp(0, size - 1), (offset_R1 >= 0) & (offset_R1 < size)


class Distributions:
    """Targets that are distributions, each shared by `share` successive rows."""

    def __init__(self, logits_CW: Tensor, log_normaliser_C: Tensor, share: int) -> None:
        self._logits_CW, self._log_normaliser_C, self._share = logits_CW, log_normaliser_C, share

    def expected(self, logits_RV: Tensor, block: slice, *, scratch_RV: Tensor) -> Tensor:
        """Returns the block's part of the mean logit [R]."""
        by_position_CSV, scratch_CSV = (each.unflatten(0, (-1, self._share)) for each in (logits_RV, scratch_RV))
        # A product of matrices would be five times slower than these two operations on a CPU.
        torch.mul(by_position_CSV, self.probs(block, logits_RV.dtype)[:, None], out=scratch_CSV)
        return scratch_RV.sum(1)

    def subtract(self, probs_RV: Tensor, block: slice) -> None:
        """Subtracts the target's probabilities in place."""
        probs_RV.unflatten(0, (-1, self._share)).sub_(self.probs(block, probs_RV.dtype)[:, None])

    def probs(self, block: slice, dtype: torch.dtype) -> Tensor:
        """Returns the block's probabilities [C, V]."""
        if compiled_losses.is_active():
            return _probs(self._logits_CW[:, block], self._log_normaliser_C, dtype)
        return self._logits_CW[:, block].to(dtype, copy=True).sub_(self._log_normaliser_C[:, None]).exp_()


class PlainOperations:
    """Operations on a block's logits, run one by one; `reduce` replaces the logits by probabilities within the block.

    All blocks use the same memory in float32: fresh memory would cost more than the arithmetic on it.
    """

    def __init__(self, num_rows: int, block_size: int, example: Tensor, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._logits_RV, self._probs_RV = example.new_empty(2, num_rows, block_size, dtype=dtype)

    def reduce(
        self, kept_RV: Tensor, bias_V: Tensor | None, targets: Labels | Distributions, block: slice
    ) -> tuple[Tensor, Tensor]:
        """Returns the log-sum-exp of the logits `kept_RV`, and the block's part of their mean under the target, [R]."""
        logits_RV = self._of_block(self._logits_RV, kept_RV).copy_(kept_RV)
        if bias_V is not None:
            logits_RV += bias_V
        probs_RV = self._of_block(self._probs_RV, kept_RV)
        expected_R = targets.expected(logits_RV, block, scratch_RV=probs_RV)
        torch.softmax(logits_RV, 1, out=probs_RV)
        normaliser_R = logits_RV.amax(1) - probs_RV.amax(1).log()
        kept_RV.copy_(probs_RV)
        return normaliser_R, expected_R

    def differentiate(
        self,
        kept_RV: Tensor,
        bias_V: Tensor | None,
        normalisers: tuple[Tensor, Tensor],
        targets: Labels | Distributions,
        block: slice,
        weights_R: Tensor | None,
        *,
        needs_bias: bool,
    ) -> Tensor | None:
        """Replaces what `reduce` left in `kept_RV` by the logits' gradient; returns the bias's [V] if it is needed.

        `normalisers` are the log-sum-exp of the block's logits and of all logits [R].
        """
        of_block_R, of_all_R = normalisers
        gradient_RV = self._of_block(self._probs_RV, kept_RV).copy_(kept_RV)
        gradient_RV.mul_((of_block_R - of_all_R).exp()[:, None])
        targets.subtract(gradient_RV, block)
        if weights_R is not None:
            gradient_RV.mul_(weights_R[:, None])
        kept_RV.copy_(gradient_RV)
        return gradient_RV.sum(0) if needs_bias else None

    @staticmethod
    def _of_block(buffer_RV: Tensor, kept_RV: Tensor) -> Tensor:
        return buffer_RV.flatten()[: kept_RV.numel()].view(kept_RV.shape)


class CompiledOperations:
    """The operations of `PlainOperations`, each a compiled function; `reduce` leaves the logits as they are."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def reduce(
        self, kept_RV: Tensor, bias_V: Tensor | None, targets: Labels | Distributions, block: slice
    ) -> tuple[Tensor, Tensor]:
        """Returns what `PlainOperations.reduce` does."""
        if isinstance(targets, Labels):
            return _reduce_labels(kept_RV, bias_V, targets.in_block(block), self.dtype)
        probs_CV = targets.probs(block, self.dtype)
        return _reduce_distributions(kept_RV.unflatten(0, (len(probs_CV), -1)), bias_V, probs_CV)

    def differentiate(
        self,
        kept_RV: Tensor,
        bias_V: Tensor | None,
        normalisers: tuple[Tensor, Tensor],
        targets: Labels | Distributions,
        block: slice,
        weights_R: Tensor | None,
        *,
        needs_bias: bool,
    ) -> Tensor | None:
        """Does what `PlainOperations.differentiate` does."""
        if isinstance(targets, Labels):
            return _differentiate_labels(
                kept_RV, bias_V, normalisers[1], targets.in_block(block), weights_R, needs_bias=needs_bias
            )
        probs_CV = targets.probs(block, self.dtype)
        by_position = (len(probs_CV), -1)
        return _differentiate_distributions(
            kept_RV.unflatten(0, by_position),
            bias_V,
            normalisers[1].unflatten(0, by_position),
            probs_CV,
            None if weights_R is None else weights_R.unflatten(0, by_position),
            needs_bias=needs_bias,
        )


@compilable
def _reduce_labels(
    kept_RV: Tensor, bias_V: Tensor | None, labels_R: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    logits_RV = _biased(kept_RV, bias_V, dtype)
    size = logits_RV.shape[1]
    own_R = logits_RV.gather(1, labels_R.clamp(0, size - 1)[:, None])[:, 0]
    return logits_RV.logsumexp(1), torch.where((labels_R >= 0) & (labels_R < size), own_R, 0)


@compilable
def _reduce_distributions(kept_CSV: Tensor, bias_V: Tensor | None, probs_CV: Tensor) -> tuple[Tensor, Tensor]:
    logits_CSV = _biased(kept_CSV, bias_V, probs_CV.dtype)
    expected_CS = (logits_CSV * probs_CV[:, None]).sum(-1)
    return logits_CSV.logsumexp(-1).flatten(), expected_CS.flatten()


@compilable
def _differentiate_labels(
    kept_RV: Tensor,
    bias_V: Tensor | None,
    normaliser_R: Tensor,
    labels_R: Tensor,
    weights_R: Tensor | None,
    *,
    needs_bias: bool,
) -> Tensor | None:
    probs_RV = (_biased(kept_RV, bias_V, normaliser_R.dtype) - normaliser_R[:, None]).exp()
    # Of 32 bits, as many fit into a register as logits do.
    columns_V = torch.arange(kept_RV.shape[1], device=kept_RV.device, dtype=torch.int32)
    gradient_RV = probs_RV - (columns_V == labels_R.int()[:, None]).to(probs_RV.dtype)
    if weights_R is not None:
        gradient_RV = gradient_RV * weights_R[:, None]
    kept_RV.copy_(gradient_RV)
    return gradient_RV.sum(0) if needs_bias else None


@compilable
def _differentiate_distributions(
    kept_CSV: Tensor,
    bias_V: Tensor | None,
    normaliser_CS: Tensor,
    probs_CV: Tensor,
    weights_CS: Tensor | None,
    *,
    needs_bias: bool,
) -> Tensor | None:
    gradient_CSV = (_biased(kept_CSV, bias_V, probs_CV.dtype) - normaliser_CS[..., None]).exp() - probs_CV[:, None]
    if weights_CS is not None:
        gradient_CSV = gradient_CSV * weights_CS[..., None]
    kept_CSV.copy_(gradient_CSV)
    return gradient_CSV.sum((0, 1)) if needs_bias else None


def _biased(kept: Tensor, bias_V: Tensor | None, dtype: torch.dtype) -> Tensor:
    return kept.to(dtype) if bias_V is None else kept.to(dtype) + bias_V


@compilable
def _probs(logits_CV: Tensor, log_normaliser_C: Tensor, dtype: torch.dtype) -> Tensor:
    return (logits_CV.to(dtype) - log_normaliser_C[:, None]).exp()
