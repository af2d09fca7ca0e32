"""A KV cache for training, through which gradients reach the keys and values of earlier forwards.

Shape suffixes: B rows, H key heads, N new tokens, S slots, D head width.
"""

from typing import Any

import torch
from torch import Tensor

from draftsmith.core.cache import KVCache


class GrowingCache(KVCache):
    """A cache to which every forward appends new tensors; of one tree, whose nodes are fed in order and not committed.

    The cache that decodes is written in place, which autograd does not allow for keys that a forward has read.
    """

    def __init__(self, *, num_layers: int, batch_size: int) -> None:
        super().__init__(num_layers=num_layers, batch_size=batch_size)
        self._appended: dict[tuple[int, str], Tensor] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends [B, H, N, D] and returns all keys and values [B, H, S, D]."""
        return self._append(layer_idx, "keys", key_states, 2), self._append(layer_idx, "values", value_states, 2)

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        """Appends the index keys [B, N, D] of sparse attention and returns all of them [B, S, D]."""
        return self._append(layer_idx, "index keys", indexer_key_states, 1)

    def _append(self, layer: int, kind: str, states: Tensor, dim: int) -> Tensor:
        earlier = self._appended.get((layer, kind))
        joined = states if earlier is None else torch.cat([earlier, states], dim=dim)
        self._appended[layer, kind] = joined
        return joined
