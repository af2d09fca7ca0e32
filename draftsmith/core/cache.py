"""Keys and values of one model, preallocated, written in place at each row's own length.

Shape suffixes: L layers, B rows, H key heads, S slots, D head width, N nodes of a tree or
new tokens, P length of the accepted path, R is B or 1.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from draftsmith.core.tree import Tree

FIRST_CAPACITY = 256


class KVCache(Cache):
    """A cache whose rows may hold different numbers of tokens: row b owns the slots below `lengths[b]`.

    A forward of N new tokens writes row b at `lengths[b] .. lengths[b] + N - 1` without owning them; `commit` then
    keeps the accepted ones. Slots grow geometrically. Keys and values of all layers lie in one tensor
    [L, 2, B, H, S, D], so that a commit is one gather.
    """

    def __init__(self, *, num_layers: int, batch_size: int) -> None:
        self.layers: list[Any] = []  # transformers looks here for its own per-layer objects; there are none
        self.num_layers = num_layers
        self.lengths = [0] * batch_size
        self.capacity = 0
        self._store: Tensor | None = None
        self._slots_BN: Tensor | None = None
        self._first_slot = 0
        self._num_visible = 0
        # An encoder-decoder's source, and its cross-attention, filled by the first forward.
        self.source: Any = None
        self.cross: Cache | None = None
        self.cross_is_filled: dict[int, bool] = {}

    def prepare(self, num_nodes: int, device: torch.device, *, first: int = 0) -> None:
        """Says that the next forward brings nodes `first` to `num_nodes - 1` of a tree, those before being there."""
        self._first_slot = self.lengths[0] + first
        self._num_visible = max(self.lengths) + num_nodes
        if self.is_ragged:
            order_N = torch.arange(first, num_nodes, device=device)
            self._slots_BN = torch.tensor(self.lengths, device=device)[:, None] + order_N
        else:
            self._slots_BN = None
        if self._num_visible > self.capacity:
            self._grow(max(self._num_visible, 2 * self.capacity, FIRST_CAPACITY))

    @property
    def is_ragged(self) -> bool:
        return any(length != self.lengths[0] for length in self.lengths)

    @property
    def num_visible(self) -> int:
        return self._num_visible

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes [B, H, N, D] at the prepared slots and returns the visible keys and values [B, H, S, D]."""
        if self._store is None:
            batch_size, num_heads, _, width = key_states.shape
            self._store = key_states.new_zeros(self.num_layers, 2, batch_size, num_heads, self.capacity, width)
        keys, values = self._store[layer_idx, 0], self._store[layer_idx, 1]
        if self._slots_BN is None:
            end = self._first_slot + key_states.shape[2]
            keys[:, :, self._first_slot : end] = key_states
            values[:, :, self._first_slot : end] = value_states
        else:
            rows_B1 = torch.arange(len(self.lengths), device=keys.device)[:, None]
            keys[rows_B1, :, self._slots_BN] = key_states.transpose(1, 2)
            values[rows_B1, :, self._slots_BN] = value_states.transpose(1, 2)
        return keys[:, :, : self._num_visible], values[:, :, : self._num_visible]

    def commit(self, paths: list[list[int]]) -> None:
        """Keeps, in row b, the new tokens at the indices `paths[b]` of the last forward, in that order."""
        if any(path != list(range(len(path))) for path in paths):
            self._gather(paths)
        for row, path in enumerate(paths):
            self.lengths[row] += len(path)

    def _gather(self, paths: list[list[int]]) -> None:
        assert self._store is not None
        longest = max(map(len, paths))
        # Beyond a row's own path the slot is copied onto itself.
        sources = [
            [length + node for node in (path + list(range(len(path), longest)))]
            for length, path in zip(self.lengths, paths, strict=True)
        ]
        if len(paths) == 1:
            start = self.lengths[0]
            self._store[:, :, 0, :, start : start + longest] = self._store[:, :, 0, :, sources[0]]
            return
        device = self._store.device
        rows_B1 = torch.arange(len(paths), device=device)[:, None]
        slots_BP = torch.tensor(self.lengths, device=device)[:, None] + torch.arange(longest, device=device)
        by_slot = self._store.permute(2, 4, 0, 1, 3, 5)
        by_slot[rows_B1, slots_BP] = by_slot[rows_B1, torch.tensor(sources, device=device)]

    def _grow(self, capacity: int) -> None:
        if self._store is not None:
            larger = self._store.new_zeros(*self._store.shape[:4], capacity, self._store.shape[5])
            larger[..., : self.capacity, :] = self._store
            self._store = larger
        self.capacity = capacity

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns the slots in use in the longest row; models read positions from `position_ids` instead."""
        return max(self.lengths)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._num_visible, 0


def visible(tree: Tree, cache: KVCache, *, first: int = 0) -> Tensor:
    """Returns which slots the nodes from `first` on may see [R, N, S]: what is committed, their ancestors, themselves.

    The cache must have been prepared for them.
    """
    ancestors_RNN = tree.ancestors_RNN[:, first:]
    num_new, device = ancestors_RNN.shape[1], ancestors_RNN.device
    if not cache.is_ragged:
        past = ancestors_RNN.new_ones(1, num_new, cache.lengths[0])
        return torch.cat([past.expand(len(ancestors_RNN), -1, -1), ancestors_RNN], dim=2)
    batch_size = len(cache.lengths)
    lengths_B1 = torch.tensor(cache.lengths, device=device)[:, None]
    committed_BS = torch.arange(cache.num_visible, device=device) < lengths_B1
    mask_BNS = committed_BS[:, None].repeat(1, num_new, 1)
    slots_BN = lengths_B1 + torch.arange(tree.num_nodes, device=device)
    index_BNN = slots_BN[:, None].expand(-1, num_new, -1)
    return mask_BNS.scatter_(2, index_BNN, ancestors_RNN.expand(batch_size, -1, -1))
