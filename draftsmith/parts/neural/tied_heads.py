"""The ends of a small drafter, tied to the target's: tokens by its embedding, logits by its output matrix.

The target's matrices are neither trained nor saved. What stands between them and the drafter is linear, so that for
drafting both are multiplied out once: then a token's part of the first layer is looked up, and the head is as narrow as
its rank, and as short as its shortlist. `Ends`, `Words` and `Encoder` can take the places of a transformers model's own
parts.

Shape suffixes: B rows, S positions of the source, V vocabulary, W tokens of the shortlist, E width of the target's
embedding, D width of its output matrix, H the drafter's width, R rank of its head, G outputs of its first layer.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import BaseModelOutput

from draftsmith.core.target import Target
from draftsmith.parts.neural.shortlist import Shortlist, Trainings, stamp

MAX_TABLE = 2**26
"""Numbers in the largest matrix that is laid out anew for the sake of speed alone, 256 MiB in float32."""


class Ends(nn.Module):
    """logits = O P A x + b for features x: O is the target's output matrix, A of rank R, P D x R, or none if R is D.

    With a shortlist O and b are of its tokens. Tokens are the rows of the target's embedding, each divided by its root
    mean square.
    """

    target: Target

    def __init__(self, target: Target, width: int, rank: int, *, shortlist: int = 0) -> None:
        super().__init__()
        object.__setattr__(self, "target", target)
        self.shortlist = Shortlist(shortlist, target.vocab_size)
        self.input_width = self._embedding().shape[1]
        output_width = self._outputs().shape[1]
        self.narrow = nn.Linear(width, min(rank, output_width), bias=False)
        self.widen = nn.Linear(rank, output_width, bias=False) if rank < output_width else None
        self.bias = nn.Parameter(torch.zeros(len(self.shortlist)))
        self.trainings = Trainings()
        self._stamp: list[Any] | None = None

    @torch.no_grad()
    def take_directions(self) -> None:
        """Starts P as the orthonormal directions in which the target's output rows differ most, for training.

        Where these are long, as of encoder-decoders that scale them down, A begins smaller: features of size 1 shall
        give logits of size 1 at most.
        """
        if self.widen is not None:
            _, directions_DD = torch.linalg.eigh(self._outputs().float().T.cov())
            self.widen.weight.copy_(directions_DD[:, -self.widen.in_features :])
        size = self._folded_outputs().float().square().sum(-1).mean().sqrt() * 3**-0.5
        self.narrow.weight.div_(size.clamp(min=1.0))

    def forward(self, features: Tensor) -> Tensor:
        """Returns logits [..., V] of features [..., H], as the output layer of a model that this takes the place of."""
        if torch.is_grad_enabled() or self.training:
            return self.head(features)
        if self._stamp != (now := stamp(self)):
            self._kept, self._stamp = self.folded_head(), now
        return self._kept(features.flatten(0, -2)).unflatten(0, features.shape[:-1])

    def embed(self, tokens: Tensor) -> Tensor:
        """Returns [..., E]."""
        return self._normed(functional.embedding(tokens, self._embedding()))

    def head(self, features: Tensor) -> Tensor:
        """Returns logits [..., V] of features [..., H]."""
        z = self.narrow(features)
        outputs_WD = self.shortlist.rows(self._outputs())
        return self.shortlist.spread(
            functional.linear(z if self.widen is None else self.widen(z), outputs_WD, self.bias)
        )

    def folded_input(self, weight_GE: Tensor, bias_G: Tensor) -> Callable[[Tensor], Tensor]:
        """Returns tokens [B] -> weight embed(tokens) + bias [B, G], by a table if it is not too large."""
        if self.target.vocab_size * len(weight_GE) > MAX_TABLE:
            return lambda tokens_B: functional.linear(self.embed(tokens_B), weight_GE, bias_G)
        table_VG = functional.linear(self._normed(self._embedding()), weight_GE, bias_G)
        return lambda tokens_B: table_VG.index_select(0, tokens_B)

    def folded_head(self) -> Callable[[Tensor], Tensor]:
        """Returns features [B, H] -> logits [B, V]."""
        if self.widen is None and len(self.shortlist) * self.narrow.out_features > MAX_TABLE:
            return self.head
        # Products with one row are quicker by columns.
        narrow_HR, outputs_RW = self.narrow.weight.T.contiguous(), self._folded_outputs().T.contiguous()
        return lambda features_BH: self.shortlist.spread(torch.addmm(self.bias, features_BH @ narrow_HR, outputs_RW))

    def _folded_outputs(self) -> Tensor:
        """Returns O P [W, R]."""
        outputs_WD = self.shortlist.rows(self._outputs()).to(self.bias.dtype)
        return outputs_WD if self.widen is None else outputs_WD @ self.widen.weight

    def _embedding(self) -> Tensor:
        return self.target.model.get_input_embeddings().weight.detach()

    def _outputs(self) -> Tensor:
        return self.target.model.get_output_embeddings().weight.detach()

    def _normed(self, rows: Tensor) -> Tensor:
        # Weights in training are wider than the target's may be.
        return functional.rms_norm(rows.to(self.bias.dtype), rows.shape[-1:])


class Words(nn.Module):
    """The target's embedding, mapped to a width, in the place of a model's own."""

    ends: Ends

    def __init__(self, ends: Ends, width: int) -> None:
        super().__init__()
        object.__setattr__(self, "ends", ends)
        self.map = nn.Linear(ends.input_width, width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns [..., H]."""
        return self.map(self.ends.embed(tokens))


class Encoder(nn.Module):
    """The target's own encoder, mapped to a width if that is another, in the place of a model's own."""

    target: Target

    def __init__(self, target: Target, width: int) -> None:
        super().__init__()
        object.__setattr__(self, "target", target)
        is_as_wide = target.hidden_size == width
        self.map = nn.Identity() if is_as_wide else nn.Linear(target.hidden_size, width, bias=False)

    def read(self, encoded_BSD: Tensor) -> Tensor:
        """Returns [B, S, H] of what the target's encoder made of a source."""
        return self.map(encoded_BSD)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: object) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=self.read(self.target.encode(input_ids, attention_mask).encoded_BTD))
