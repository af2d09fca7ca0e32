"""Cross-entropy of features through a matrix of logits: loss and gradient in one pass, block by block.

The gradient is computed with the loss, as in Liger's and Apple's kernels (2410.10989, 2411.09009): the logits of a few
hundred rows exist in the compute dtype, and in float32 those of one block of the vocabulary, which stays in the cache.

Shape suffixes: N rows, R rows of a chunk, G positions, S rows that share a position's target, so that N = G * S and
C = R / S, D hidden width, W tokens that have logits, V tokens of a block, B blocks.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from draftsmith.parts.neural.shortlist import SharedHead
from draftsmith.parts.neural.tied_heads import TiedHead
from trainers.compilation import compiled_losses
from trainers.compilation.compiled_losses import compilable
from trainers.parts.fused.block_operations import CompiledOperations, Distributions, Labels, PlainOperations

MAX_ROWS = 1024
"""Rows of a chunk, of which the gradient of a trained matrix is read and written once."""
BLOCK_LOGITS = {"cpu": 2**20}
"""Logits of a block: in float32 they stay in a CPU's cache; accelerators take larger ones."""
ACCELERATOR_BLOCK_LOGITS = 2**25


@dataclass(frozen=True, kw_only=True, eq=False)
class Matrix:
    """Logits are `features @ weight.T + bias`."""

    weight_WD: Tensor
    bias_W: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class SoftTargets:
    """The target's distribution over the W tokens at G positions, softmax(logits)."""

    logits_GW: Tensor
    log_normaliser_G: Tensor
    """Log-sum-exp of each row of `logits_GW` (float32)."""


def soft_targets(logits_GW: Tensor) -> SoftTargets:
    """Returns the distributions softmax(logits)."""
    exact = torch.promote_types(logits_GW.dtype, torch.float32)
    rows = max(1, BLOCK_LOGITS.get(logits_GW.device.type, ACCELERATOR_BLOCK_LOGITS) // logits_GW.shape[1])
    normalisers = [_log_normaliser(chunk_RW, exact) for chunk_RW in logits_GW.split(rows)]
    return SoftTargets(logits_GW=logits_GW, log_normaliser_G=torch.cat(normalisers))


@compilable
def _log_normaliser(logits_RW: Tensor, dtype: torch.dtype) -> Tensor:
    return logits_RW.to(dtype).logsumexp(-1)


def matrix_of(linear: nn.Module, device: torch.device) -> Matrix | None:
    """Returns the matrix of a linear layer; None if it is of another kind, or its weights are not whole on `device`.

    Adapters, quantised layers and weights that ZeRO-3 or tensor parallelism has sharded must be called as modules.
    """
    if type(linear) is not nn.Linear:
        return None
    weight, is_whole = linear.weight, linear.weight.ndim == 2 and linear.weight.device == device
    if not is_whole or type(weight) not in (Tensor, nn.Parameter):
        return None
    return Matrix(weight_WD=weight, bias_W=linear.bias)


def shared_matrix(head: SharedHead, device: torch.device) -> Matrix | None:
    """Returns the shortlist's rows of the target's LM head, as `matrix_of` does."""
    matrix = None if head.linear is None else matrix_of(head.linear, device)
    if matrix is None:
        return None
    rows = head.shortlist.rows
    bias_W = matrix.bias_W
    return Matrix(weight_WD=rows(matrix.weight_WD.detach()), bias_W=None if bias_W is None else rows(bias_W.detach()))


def tied_matrix(head: TiedHead, device: torch.device) -> Matrix | None:
    """Returns the matrix of a head's `widened` features, as `matrix_of` does."""
    matrix = matrix_of(head.target.model.get_output_embeddings(), device)
    if matrix is None or len(head.bias) != len(head.shortlist):
        return None
    return Matrix(weight_WD=head.shortlist.rows(matrix.weight_WD.detach()), bias_W=head.bias)


def linear_cross_entropy(
    features_ND: Tensor, matrix: Matrix, targets: Tensor | SoftTargets, weights_N: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the weighted sum of -sum_w t_w log q_w over the rows, and this loss of each row [N] without gradient.

    `targets` are labels [N], or distributions each shared by N / G successive rows. Under autocast the products are
    in its dtype, and everything else is in float32. The gradient may be taken once.
    """
    soft = targets if isinstance(targets, SoftTargets) else None
    return _LinearCrossEntropy.apply(
        features_ND,
        matrix.weight_WD,
        matrix.bias_W,
        None if soft else targets,
        soft.logits_GW if soft else None,
        soft.log_normaliser_G if soft else None,
        weights_N,
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features_ND: Tensor,
        weight_WD: Tensor,
        bias_W: Tensor | None,
        labels_N: Tensor | None,
        target_logits_GW: Tensor | None,
        target_normaliser_G: Tensor | None,
        weights_N: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        device = features_ND.device.type
        needs_features, needs_matrix, needs_bias = ctx.needs_input_grad[:3]
        is_mixed = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if is_mixed else features_ND.dtype
        exact = torch.promote_types(dtype, torch.float32)
        z_ND, weight_cWD = features_ND.to(dtype), weight_WD.to(dtype)
        num_rows, vocab_size = len(z_ND), len(weight_cWD)
        grad_features_ND = torch.zeros_like(z_ND, dtype=exact) if needs_features else None
        grad_weight_WD = torch.zeros_like(weight_WD, dtype=exact) if needs_matrix else None
        grad_bias_W = torch.zeros_like(bias_W, dtype=exact) if needs_bias and bias_W is not None else None
        losses_N = z_ND.new_zeros(num_rows, dtype=exact)
        share = num_rows // max(len(target_logits_GW), 1) if target_logits_GW is not None else 1
        rows_at_once = max(1, MAX_ROWS // share) * share
        block_size = max(1, BLOCK_LOGITS.get(device, ACCELERATOR_BLOCK_LOGITS) // rows_at_once)
        blocks = [slice(begin, min(begin + block_size, vocab_size)) for begin in range(0, vocab_size, block_size)]
        at_once_RD = z_ND[:rows_at_once]
        kept = [z_ND.new_empty(len(at_once_RD), block.stop - block.start) for block in blocks]
        operations = (
            CompiledOperations(exact)
            if compiled_losses.is_active()
            else PlainOperations(len(at_once_RD), blocks[0].stop, z_ND, exact)
        )
        with torch.autocast(device, enabled=False):
            for begin in range(0, num_rows, rows_at_once):
                rows = slice(begin, min(begin + rows_at_once, num_rows))
                chunk = _Chunk(z_ND[rows], weight_cWD, bias_W, blocks, kept, operations)
                if labels_N is not None:
                    targets: Labels | Distributions = Labels(labels_N[rows])
                else:
                    assert target_logits_GW is not None and target_normaliser_G is not None
                    positions = slice(begin // share, rows.stop // share)
                    targets = Distributions(target_logits_GW[positions], target_normaliser_G[positions], share)
                losses_N[rows] = chunk.losses(targets)
                if needs_features or needs_matrix or needs_bias:
                    weights_R = None if weights_N is None else weights_N[rows]
                    grad_features_RD = None if grad_features_ND is None else grad_features_ND[rows]
                    chunk.add_gradients(targets, weights_R, grad_features_RD, grad_weight_WD, grad_bias_W)
        ctx.gradients = (grad_features_ND, grad_weight_WD, grad_bias_W)
        ctx.dtypes = (features_ND.dtype, weight_WD.dtype, None if bias_W is None else bias_W.dtype)
        ctx.mark_non_differentiable(losses_N)
        return (losses_N if weights_N is None else losses_N * weights_N).sum(), losses_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # The gradient of a matrix is large, so that it is scaled in place, which can be done once.
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "the gradient of linear_cross_entropy can be taken once"
        scaled = [
            None if gradient is None else gradient.mul_(grads[0]).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None, None)


class _Chunk:
    """A few rows: their loss, for which every logit is computed, and then their gradient, from what was kept of it."""

    def __init__(
        self,
        z_RD: Tensor,
        weight_WD: Tensor,
        bias_W: Tensor | None,
        blocks: list[slice],
        kept: list[Tensor],
        operations: PlainOperations | CompiledOperations,
    ) -> None:
        self._z_RD, self._weight_WD, self._bias_W, self._blocks = z_RD, weight_WD, bias_W, blocks
        self._operations = operations
        self._kept = [kept_RV[: len(z_RD)] for kept_RV in kept]
        self._normaliser_RB = z_RD.new_empty(len(z_RD), len(blocks), dtype=operations.dtype)
        """Each block's log-sum-exp."""

    def losses(self, targets: Labels | Distributions) -> Tensor:
        """Returns each row's log-sum-exp of its logits minus their mean under its target [R]."""
        expected_R = torch.zeros_like(self._normaliser_RB[:, 0])
        for index, (block, kept_RV) in enumerate(zip(self._blocks, self._kept, strict=True)):
            torch.mm(self._z_RD, self._weight_WD[block].T, out=kept_RV)
            bias_V = None if self._bias_W is None else self._bias_W[block]
            self._normaliser_RB[:, index], part_R = self._operations.reduce(kept_RV, bias_V, targets, block)
            expected_R += part_R
        self._normaliser_R = self._normaliser_RB.logsumexp(1)
        return self._normaliser_R - expected_R

    def add_gradients(
        self,
        targets: Labels | Distributions,
        weights_R: Tensor | None,
        features_RD: Tensor | None,
        weight_WD: Tensor | None,
        bias_W: Tensor | None,
    ) -> None:
        """Adds the gradients of the weighted sum of the losses to those of features, matrix and bias."""
        for index, (block, kept_RV) in enumerate(zip(self._blocks, self._kept, strict=True)):
            bias_gradient_V = self._operations.differentiate(
                kept_RV,
                None if self._bias_W is None else self._bias_W[block],
                (self._normaliser_RB[:, index], self._normaliser_R),
                targets,
                block,
                weights_R,
                needs_bias=bias_W is not None,
            )
            if features_RD is not None:
                features_RD += kept_RV @ self._weight_WD[block]
            if weight_WD is not None:
                weight_WD[block] += kept_RV.T @ self._z_RD
            if bias_W is not None and bias_gradient_V is not None:
                bias_W[block] += bias_gradient_V
