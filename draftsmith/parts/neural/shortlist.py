"""A shortlist: the few tokens that a drafter gives logits to, where the whole vocabulary would cost most of a step.

Verification needs no more: what the drafter never draws comes from the target's residual law (FR-Spec, 2502.14856).

Shape suffixes: V vocabulary, W tokens of the shortlist, H width of the features; `...` any leading dimensions.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

OUTSIDE = -1e4
"""The logit of any other token, of which no softmax has anything left; finite, as losses multiply it by zero."""


def check_size(num_tokens: int, vocab_size: int) -> None:
    """Raises ValueError for a shortlist of a number of tokens that is negative or more than the vocabulary."""
    if not 0 <= num_tokens <= vocab_size:
        raise ValueError(f"shortlist is {num_tokens}; it must lie between 0, for none, and {vocab_size}, all tokens")


class Shortlist(nn.Module):
    """The tokens that get logits, in ascending order; until `take` the first of the vocabulary. All of them if 0."""

    ids_W: Tensor

    def __init__(self, num_tokens: int, vocab_size: int) -> None:
        super().__init__()
        check_size(num_tokens, vocab_size)
        self.vocab_size = vocab_size
        if num_tokens:
            self.register_buffer("ids_W", torch.arange(num_tokens))

    @property
    def is_whole(self) -> bool:
        return not self._buffers

    def __len__(self) -> int:
        return self.vocab_size if self.is_whole else len(self.ids_W)

    def take(self, ids_W: Tensor) -> None:
        """Makes these the tokens."""
        assert ids_W.shape == self.ids_W.shape and (ids_W.diff() > 0).all()
        self.ids_W.copy_(ids_W)

    def rows(self, matrix_VH: Tensor) -> Tensor:
        """Returns the tokens' rows [W, ...] of something that has one for each of the vocabulary."""
        return matrix_VH if self.is_whole else matrix_VH[self.ids_W]

    def spread(self, logits_W: Tensor) -> Tensor:
        """Returns logits [..., V] from those of the shortlist [..., W]."""
        if self.is_whole:
            return logits_W
        return logits_W.new_full((*logits_W.shape[:-1], self.vocab_size), OUTSIDE).index_copy(-1, self.ids_W, logits_W)

    def holds(self, tokens: Tensor) -> Tensor:
        """Returns which of the tokens are on it, a boolean of their shape."""
        return torch.ones_like(tokens, dtype=torch.bool) if self.is_whole else torch.isin(tokens, self.ids_W)


class ShortHead(nn.Module):
    """A model's own output layer, in its own place, of which only the shortlist's rows are multiplied out."""

    def __init__(self, whole: nn.Linear, num_tokens: int) -> None:
        super().__init__()
        self.weight, self.bias = whole.weight, whole.bias
        self.shortlist = Shortlist(num_tokens, len(whole.weight))
        self.trainings = Trainings()
        self._stamp: list[Any] | None = None

    def forward(self, features: Tensor) -> Tensor:
        """Returns logits [..., V] of features [..., H]."""
        if torch.is_grad_enabled() or self.training:
            return self.shortlist.spread(functional.linear(features, *self._rows()))
        if self._stamp != (now := stamp(self)):
            self._kept, self._stamp = self._rows(), now
        return self.shortlist.spread(functional.linear(features, *self._kept))

    def _rows(self) -> tuple[Tensor, Tensor | None]:
        return self.shortlist.rows(self.weight), None if self.bias is None else self.shortlist.rows(self.bias)


class Trainings(nn.Module):
    """A child of a module that keeps products of its weights: counts how often that began and ended training.

    Fused optimisers count no writes, so that only this tells that weights are others afterwards.
    """

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def train(self, mode: bool = True) -> "Trainings":
        self.number += mode != self.training
        return super().train(mode)


def stamp(module: nn.Module) -> list[Any]:
    """Returns what changes whenever a weight or buffer does, by which it is known whether products of them are good.

    In training it is never the same. The module needs `Trainings` among its children, or theirs.
    """
    tensors = [*module.parameters(), *module.buffers()]
    # Tensors made in inference mode count no writes.
    writes = [(one.data_ptr(), -1 if one.is_inference() else one._version) for one in tensors]
    trainings = [child.number for child in module.modules() if isinstance(child, Trainings)]
    assert trainings
    return [writes, trainings, object() if module.training else None]
