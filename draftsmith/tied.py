"""The ends of a small drafter, tied to the target's: tokens by its embedding, logits by its output matrix.

The target's matrices are neither trained nor saved. What stands between them and the drafter is linear, so that for
drafting both are multiplied out once: then a token's part of the first layer is looked up, and the head is as narrow as
its rank.

Shape suffixes: B rows, V vocabulary, E width of the target's embedding, D width of its output matrix, H the drafter's
width, R rank of its head, G outputs of its first layer.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from draftsmith.target import Target

MAX_TABLE = 2**26
"""Numbers in the largest matrix that is laid out anew for the sake of speed alone, 256 MiB in float32."""


class Ends(nn.Module):
    """logits = O P A x + b for features x: O is the target's output matrix, A of rank R, P D x R, or none if R is D.

    Tokens are the rows of the target's embedding, each divided by its root mean square.
    """

    target: Target

    def __init__(self, target: Target, width: int, rank: int) -> None:
        super().__init__()
        object.__setattr__(self, "target", target)
        self.input_width = self._embedding().shape[1]
        output_width = self._outputs().shape[1]
        self.narrow = nn.Linear(width, min(rank, output_width), bias=False)
        self.widen = nn.Linear(rank, output_width, bias=False) if rank < output_width else None
        self.bias = nn.Parameter(torch.zeros(target.vocab_size))

    @torch.no_grad()
    def take_directions(self) -> None:
        """Starts P as the orthonormal directions in which the target's output rows differ most, for training."""
        if self.widen is not None:
            _, directions_DD = torch.linalg.eigh(self._outputs().float().T.cov())
            self.widen.weight.copy_(directions_DD[:, -self.widen.in_features :])

    def embed(self, tokens: Tensor) -> Tensor:
        """Returns [..., E]."""
        return self._normed(functional.embedding(tokens, self._embedding()))

    def head(self, features: Tensor) -> Tensor:
        """Returns logits [..., V] of features [..., H]."""
        z = self.narrow(features)
        return functional.linear(z if self.widen is None else self.widen(z), self._outputs(), self.bias)

    def folded_input(self, weight_GE: Tensor, bias_G: Tensor) -> Callable[[Tensor], Tensor]:
        """Returns tokens [B] -> weight embed(tokens) + bias [B, G], by a table if it is not too large."""
        if self.target.vocab_size * len(weight_GE) > MAX_TABLE:
            return lambda tokens_B: functional.linear(self.embed(tokens_B), weight_GE, bias_G)
        table_VG = functional.linear(self._normed(self._embedding()), weight_GE, bias_G)
        return lambda tokens_B: table_VG.index_select(0, tokens_B)

    def folded_head(self) -> Callable[[Tensor], Tensor]:
        """Returns features [B, H] -> logits [B, V]."""
        outputs_VR = self._outputs().to(self.bias.dtype)
        if self.widen is not None:
            outputs_VR = outputs_VR @ self.widen.weight
        elif outputs_VR.numel() > MAX_TABLE:
            return self.head
        # Products with one row are quicker by columns.
        narrow_HR, outputs_RV = self.narrow.weight.T.contiguous(), outputs_VR.T.contiguous()
        return lambda features_BH: torch.addmm(self.bias, features_BH @ narrow_HR, outputs_RV)

    def _embedding(self) -> Tensor:
        return self.target.model.get_input_embeddings().weight.detach()

    def _outputs(self) -> Tensor:
        return self.target.model.get_output_embeddings().weight.detach()

    def _normed(self, rows: Tensor) -> Tensor:
        # Weights in training are wider than the target's may be.
        return functional.rms_norm(rows.to(self.bias.dtype), rows.shape[-1:])


def stamp(module: nn.Module) -> list[tuple[int, int]]:
    """Returns what changes whenever a weight does, by which it is known whether products of them are still good."""
    # Tensors made in inference mode count no writes.
    return [(one.data_ptr(), -1 if one.is_inference() else one._version) for one in module.parameters()]
