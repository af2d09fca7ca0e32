"""Input embedding and LM head of a small drafter, tied to the target's.

The target's matrices are neither trained nor saved. The layers between them and the drafter are linear, so that for
drafting both products are computed once: a token's input to the first layer becomes a table look-up, and the LM head is
as narrow as its rank and as short as its shortlist. `TiedHead`, `TiedEmbedding` and `TargetEncoder` can replace the
modules of a transformers model.

Shape suffixes: B rows, S positions of the source, V vocabulary, W tokens of the shortlist, E width of the target's
embedding, D width of its LM head, H the drafter's width, R rank of its LM head, G outputs of its first layer.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import BaseModelOutput

from draftsmith.core.target import Target
from draftsmith.loading.placement.packed_weights import fixed_product
from draftsmith.parts.neural.shortlist import Shortlist, TrainingSwitches, WeightCache

MAX_TABLE = 2**26
"""Numbers in the largest matrix that is precomputed for speed, 256 MiB in float32."""


class TiedHead(nn.Module):
    """The target's LM head and embedding, with a low-rank map from the drafter's features to the former.

    logits = O P A x + b for features x: O is the target's LM head, A of rank R, P D x R, or none if R is D. With a
    shortlist, O and b hold its tokens only. Embedded tokens are the rows of the target's embedding, each divided by its
    root mean square.
    """

    target: Target

    def __init__(self, target: Target, width: int, rank: int, *, shortlist: int = 0) -> None:
        super().__init__()
        object.__setattr__(self, "target", target)
        self.shortlist = Shortlist(shortlist, target.vocab_size)
        self.input_width = self._embedding().shape[1]
        output_width = self._lm_head().shape[1]
        self.narrow = nn.Linear(width, min(rank, output_width), bias=False)
        self.widen = nn.Linear(rank, output_width, bias=False) if rank < output_width else None
        self.bias = nn.Parameter(torch.zeros(len(self.shortlist)))
        self.training_switches = TrainingSwitches()
        self._cached_head = WeightCache(self, self.folded_head)

    @torch.no_grad()
    def init_principal_directions(self) -> None:
        """Initialises P for training with the orthonormal directions of most variance among the target's output rows.

        Where these rows are long, as in encoder-decoders that scale them down, A is scaled down, so that features of
        size 1 give logits of size 1 at most.
        """
        if self.widen is not None:
            _, directions_DD = torch.linalg.eigh(self._lm_head().float().T.cov())
            self.widen.weight.copy_(directions_DD[:, -self.widen.in_features :])
        size = self._folded_outputs().float().square().sum(-1).mean().sqrt() * 3**-0.5
        self.narrow.weight.div_(size.clamp(min=1.0))

    def forward(self, features: Tensor) -> Tensor:
        """Returns logits [..., V] of features [..., H], as a model's LM head does."""
        if torch.is_grad_enabled() or self.training:
            return self.head(features)
        return self.shortlist.spread(self.folded(features))

    def folded(self, features: Tensor) -> Tensor:
        """Returns what `listed` does, by matrices that are multiplied together once."""
        return self._cached_head()(features.flatten(0, -2)).unflatten(0, features.shape[:-1])

    def embed(self, tokens: Tensor) -> Tensor:
        """Returns the embedded tokens [..., E]."""
        return self._normed(functional.embedding(tokens, self._embedding()))

    def head(self, features: Tensor) -> Tensor:
        """Returns logits [..., V] of features [..., H]."""
        return self.shortlist.spread(self.listed(features))

    def listed(self, features: Tensor) -> Tensor:
        """Returns the logits [..., W] of the shortlist's tokens, or of all tokens."""
        return functional.linear(self.widened(features), self.shortlist.rows(self._lm_head()), self.bias)

    def widened(self, features: Tensor) -> Tensor:
        """Returns the input P A x of the target's LM head [..., D]."""
        z = self.narrow(features)
        return z if self.widen is None else self.widen(z)

    def folded_input(self, weight_GE: Tensor, bias_G: Tensor) -> Callable[[Tensor], Tensor]:
        """Returns the map tokens [B] -> weight embed(tokens) + bias [B, G], a table look-up unless it is too large."""
        if self.target.vocab_size * len(weight_GE) > MAX_TABLE:
            return lambda tokens_B: functional.linear(self.embed(tokens_B), weight_GE, bias_G)
        table_VG = functional.linear(self._normed(self._embedding()), weight_GE, bias_G)
        return lambda tokens_B: table_VG.index_select(0, tokens_B)

    def folded_head(self) -> Callable[[Tensor], Tensor]:
        """Returns the map `listed` from features [B, H], its matrices multiplied together unless too large."""
        if self.widen is None and len(self.shortlist) * self.narrow.out_features > MAX_TABLE:
            return self.listed
        outputs = fixed_product(self._folded_outputs(), self.bias, request=self.target.pack_weights)
        return lambda features_BH: outputs(self.narrow(features_BH))

    def _folded_outputs(self) -> Tensor:
        """Returns O P [W, R]."""
        outputs_WD = self.shortlist.rows(self._lm_head()).to(self.bias.dtype)
        return outputs_WD if self.widen is None else outputs_WD @ self.widen.weight

    def _embedding(self) -> Tensor:
        return self.target.model.get_input_embeddings().weight.detach()

    def _lm_head(self) -> Tensor:
        return self.target.model.get_output_embeddings().weight.detach()

    def _normed(self, rows: Tensor) -> Tensor:
        # Weights in training may have a wider dtype than the target's.
        return functional.rms_norm(rows.to(self.bias.dtype), rows.shape[-1:])


class TiedEmbedding(nn.Module):
    """The target's embedding, mapped to the drafter's width; replaces a model's input embedding."""

    head: TiedHead

    def __init__(self, head: TiedHead, width: int) -> None:
        super().__init__()
        object.__setattr__(self, "head", head)
        self.map = nn.Linear(head.input_width, width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns the embedded tokens [..., H]."""
        return self.map(self.head.embed(tokens))


class TargetEncoder(nn.Module):
    """The target's encoder, mapped to the drafter's width where that differs; replaces a model's encoder."""

    target: Target

    def __init__(self, target: Target, width: int) -> None:
        super().__init__()
        object.__setattr__(self, "target", target)
        is_as_wide = target.hidden_size == width
        self.map = nn.Identity() if is_as_wide else nn.Linear(target.hidden_size, width, bias=False)

    def read(self, encoded_BSD: Tensor) -> Tensor:
        """Returns the drafter's source states [B, S, H] from those of the target's encoder."""
        return self.map(encoded_BSD)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: object) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=self.read(self.target.encode(input_ids, attention_mask).encoded_BTD))
