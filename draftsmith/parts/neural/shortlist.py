"""A shortlist: the few tokens that a drafter computes logits for, where the whole vocabulary would dominate a step.

Drafting stays lossless: other tokens come from the target's residual distribution (FR-Spec, 2502.14856).

Shape suffixes: V vocabulary, W tokens of the shortlist, H width of the features; `...` any leading dimensions.
"""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from draftsmith.loading.placement.packed_weights import fixed_product

OUTSIDE = -1e4
"""The logit of all other tokens: their probability is 0, and it is finite because losses multiply it by zero."""

T = TypeVar("T")


def check_size(num_tokens: int, vocab_size: int) -> None:
    """Raises ValueError unless the number of tokens is between 0 and the size of the vocabulary."""
    if not 0 <= num_tokens <= vocab_size:
        raise ValueError(f"shortlist is {num_tokens}; it must lie between 0, for none, and {vocab_size}, all tokens")


class Shortlist(nn.Module):
    """The tokens that get logits, in ascending order: the vocabulary's first until `set_tokens`, or all if it is 0."""

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

    def set_tokens(self, ids_W: Tensor) -> None:
        """Sets the tokens."""
        assert ids_W.shape == self.ids_W.shape and (ids_W.diff() > 0).all()
        self.ids_W.copy_(ids_W)

    def rows(self, matrix_VH: Tensor) -> Tensor:
        """Returns the rows [W, ...] of the shortlist's tokens."""
        return matrix_VH if self.is_whole else matrix_VH[self.ids_W]

    def spread(self, logits_W: Tensor) -> Tensor:
        """Returns logits [..., V] from those of the shortlist [..., W]."""
        if self.is_whole:
            return logits_W
        return logits_W.new_full((*logits_W.shape[:-1], self.vocab_size), OUTSIDE).index_copy(-1, self.ids_W, logits_W)

    def tokens(self, indices: Tensor) -> Tensor:
        """Returns the tokens at these indices on the shortlist."""
        return indices if self.is_whole else self.ids_W[indices]

    def indices(self, tokens: Tensor) -> Tensor:
        """Returns the index on the shortlist of each token, all of which it contains."""
        return tokens if self.is_whole else torch.searchsorted(self.ids_W, tokens)

    def contains(self, tokens: Tensor) -> Tensor:
        """Returns, for each token, whether it is on the shortlist."""
        return torch.ones_like(tokens, dtype=torch.bool) if self.is_whole else torch.isin(tokens, self.ids_W)


class ShortlistHead(nn.Module):
    """Replaces a model's LM head and multiplies only the shortlist's rows."""

    def __init__(self, whole: nn.Linear, num_tokens: int) -> None:
        super().__init__()
        self.weight, self.bias = whole.weight, whole.bias
        self.shortlist = Shortlist(num_tokens, len(whole.weight))
        self.training_switches = TrainingSwitches()
        self._cached_product = WeightCache(self, self._product)

    def forward(self, features: Tensor) -> Tensor:
        """Returns logits [..., V] of features [..., H]."""
        return self.shortlist.spread(self.listed(features))

    def listed(self, features: Tensor) -> Tensor:
        """Returns the logits [..., W] of the shortlist's tokens, or of all tokens."""
        if torch.is_grad_enabled() or self.training:
            return functional.linear(features, *self._rows())
        return self._cached_product()(features)

    def _product(self) -> Callable[[Tensor], Tensor]:
        return fixed_product(*self._rows())

    def _rows(self) -> tuple[Tensor, Tensor | None]:
        return self.shortlist.rows(self.weight), None if self.bias is None else self.shortlist.rows(self.bias)


class SharedHead(nn.Module):
    """The target's LM head, or only its rows for a shortlist of `num_tokens`; it has no weights of its own.

    Raises ValueError for a shortlist where the target's head is not a matrix product.
    """

    _target: Any

    def __init__(self, target: Any, num_tokens: int) -> None:
        super().__init__()
        object.__setattr__(self, "_target", target)
        self.shortlist = Shortlist(num_tokens, target.vocab_size)
        if num_tokens and not target.head_is_linear:
            raise ValueError(f"{target.name} scales or caps its logits, so it supports no shortlist")
        self.training_switches = TrainingSwitches()
        self._cached_product = WeightCache(self, self._product)

    @property
    def linear(self) -> nn.Module | None:
        """The target's LM head, None if its logits are not a matrix product alone."""
        return self._target.model.get_output_embeddings() if self._target.head_is_linear else None

    def forward(self, features: Tensor) -> Tensor:
        """Returns logits [..., V] of features [..., D]."""
        return self._target.head(features) if self.shortlist.is_whole else self.shortlist.spread(self.listed(features))

    def listed(self, features: Tensor) -> Tensor:
        """Returns the logits [..., W] of the shortlist's tokens, or of all tokens."""
        if self.shortlist.is_whole:
            return self._target.head(features)
        if torch.is_grad_enabled() or self.training:
            return functional.linear(features, *self._rows())
        return self._cached_product()(features)

    def _product(self) -> Callable[[Tensor], Tensor]:
        return fixed_product(*self._rows(), request=self._target.pack_weights)

    def _rows(self) -> tuple[Tensor, Tensor | None]:
        head = self._target.model.get_output_embeddings()
        bias = getattr(head, "bias", None)
        return self.shortlist.rows(head.weight.detach()), None if bias is None else self.shortlist.rows(bias.detach())


class TrainingSwitches(nn.Module):
    """Counts the number of times that its parent module entered or left training mode.

    Fused optimisers do not count their writes to a tensor, so only this shows that the weights changed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def train(self, mode: bool = True) -> "TrainingSwitches":
        self.count += mode != self.training
        return super().train(mode)


def weights_version(module: nn.Module) -> list[Any]:
    """Returns a value that changes whenever a weight or buffer does, and at every call in training mode.

    The module, or one inside it, needs a `TrainingSwitches` child.
    """
    tensors = [*module.parameters(), *module.buffers()]
    # Tensors made in inference mode do not count their writes.
    writes = [(one.data_ptr(), -1 if one.is_inference() else one._version) for one in tensors]
    switches = [child.count for child in module.modules() if isinstance(child, TrainingSwitches)]
    assert switches
    return [writes, switches, object() if module.training else None]


class WeightCache(Generic[T]):
    """Caches what `compute` returns from a module's weights until one of them changes (`weights_version`)."""

    def __init__(self, module: nn.Module, compute: Callable[[], T]) -> None:
        self._module, self._compute = module, compute
        self._version: list[Any] | None = None

    def __call__(self) -> T:
        if self._version != (now := weights_version(self._module)):
            self._value, self._version = self._compute(), now
        return self._value
