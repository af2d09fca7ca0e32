"""The preallocated key-value cache of one model, written in place at each row's own length.

Shape suffixes: L layers, B rows, H key heads, S slots, D head width, N nodes of a tree or new tokens, P length of the
accepted path; R is B, or 1 when all rows share the shape.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from draftsmith.core.fixed_shapes.forwards import Shapes
from draftsmith.core.tree import Tree
from draftsmith.loading.placement.zeros import lazy_zeros

FIRST_CAPACITY = 256


class KVCache(Cache):
    """A cache whose rows may hold different numbers of tokens: row b's committed slots are those below `lengths[b]`.

    A forward of N new tokens writes row b's slots `lengths[b] .. lengths[b] + N - 1` without committing them; `commit`
    then keeps the accepted ones. Capacity grows geometrically. Keys and values of one shape, usually all layers',
    lie in one tensor [L, B, H, S, D], so that a commit is one gather. Modules with recurrent state keep it here too.
    """

    def __init__(self, *, num_layers: int, batch_size: int, shapes: Shapes | None = None) -> None:
        self.layers: list[Any] = []  # transformers expects its own per-layer objects here; there are none
        self.num_layers = num_layers
        self.lengths = [0] * batch_size
        self.capacity = 0
        self._stores: list[Tensor] = []
        # Where the keys (0), values (1) and index keys (2) of a layer lie: the index of a store, and the index in it.
        self._places: dict[tuple[int, int], tuple[int, int]] = {}
        self._is_joined = True
        self._slots_BN: Tensor | None = None
        self._flat_slots: dict[tuple[int, torch.device], Tensor] = {}
        self._first_slot = self._num_fed = 0
        self.first = 0  # node of the tree that the current forward begins with
        # The states of modules that keep one instead of keys and values (draftsmith/core/architectures/recurrent.py).
        self.recurrent: dict[str, Any] = {}
        self._recurrent_lengths = list(self.lengths)  # of the text that recurrent state is of
        self.num_visible = 0  # slots that the current forward may attend to
        self.shapes = shapes  # of the forwards of a batch-invariant call; None leaves them as they are
        # An encoder-decoder's source, and its cross-attention cache, which the first forward fills.
        self.source: Any = None
        self.cross: Cache | None = None
        self.cross_is_filled: dict[int, bool] = {}

    def prepare(self, num_nodes: int, device: torch.device, *, first: int = 0) -> None:
        """Prepares a forward of a tree's nodes `first` to `num_nodes - 1`; the nodes before were fed already."""
        if self.recurrent and self.lengths != self._recurrent_lengths:
            raise ValueError(
                f"the target's recurrent state is of {self._recurrent_lengths} tokens; it cannot be set back to"
                f" {self.lengths}"
            )
        self.first, self._first_slot = first, self.lengths[0] + first
        longest = max(self.lengths) + num_nodes
        self.num_visible = longest if self.shapes is None else self.shapes.num_slots(longest)
        self._flat_slots = {}
        self._slots_BN = None
        if self.is_ragged:
            lengths_B1 = torch.tensor(self.lengths, device=device)[:, None]
            self._slots_BN = lengths_B1 + torch.arange(first, num_nodes, device=device)
        if self.num_visible > self.capacity:
            # By a quarter, as unused slots of many rows take much memory on a GPU.
            self._resize(0, max(self.num_visible, self.capacity + self.capacity // 4, FIRST_CAPACITY))
        self._num_fed = num_nodes

    @property
    def is_ragged(self) -> bool:
        return any(length != self.lengths[0] for length in self.lengths)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes [B, H, N, D] at the prepared slots and returns the visible keys and values [B, H, S, D]."""
        return self._write(layer_idx, 0, key_states), self._write(layer_idx, 1, value_states)

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        """Writes the index keys [B, N, D] of sparse attention and returns the visible ones [B, S, D]."""
        return self._write(layer_idx, 2, indexer_key_states[:, None])[:, 0]

    def _write(self, layer: int, kind: int, states_BHND: Tensor) -> Tensor:
        stored = self._stored(layer, kind, states_BHND)
        if self._slots_BN is None:
            stored[:, :, self._first_slot : self._first_slot + states_BHND.shape[2]] = states_BHND
        else:
            # A width may be 0: sparse attention without positions keeps no part for them.
            num_slots, width = stored.shape[:3].numel(), states_BHND.shape[3]
            stored.view(num_slots, width).index_copy_(0, self._flat_index(stored), states_BHND.flatten(0, 2))
        return stored[:, :, : self.num_visible]

    def stored(self, layer: int) -> tuple[Tensor, Tensor]:
        """Returns a layer's keys and values [B, H, S, D] of all slots, used or not; changes to them are kept."""
        keys, values = (self._places[layer, kind] for kind in (0, 1))
        return self._stores[keys[0]][keys[1]], self._stores[values[0]][values[1]]

    def _stored(self, layer: int, kind: int, states: Tensor) -> Tensor:
        """Returns the layer's keys, values or index keys [B, H, S, D], making room for them at the first call."""
        if (place := self._places.get((layer, kind))) is None:
            batch_size, num_heads, _, width = states.shape
            place, self._is_joined = (len(self._stores), 0), False
            self._places[layer, kind] = place
            self._stores.append(lazy_zeros((1, batch_size, num_heads, self.capacity, width), states))
        return self._stores[place[0]][place[1]][: len(self.lengths)]

    def _flat_index(self, stored: Tensor) -> Tensor:
        """Returns the indices [B * H * N] of the slots to write among all those of [B, H, S, D]."""
        num_heads, device = stored.shape[1], stored.device
        if (index := self._flat_slots.get((num_heads, device))) is None:
            assert self._slots_BN is not None
            heads_BH = torch.arange(len(self.lengths) * num_heads, device=device).view(-1, num_heads)
            index = (heads_BH[:, :, None] * self.capacity + self._slots_BN[:, None].to(device)).flatten()
            self._flat_slots[num_heads, device] = index
        return index

    def _join_stores(self) -> None:
        """Joins stores of one shape, dtype (autocast gives keys and values different ones) and device, when written."""
        by_shape: dict[tuple[torch.Size, torch.dtype, torch.device], list[tuple[int, int]]] = {}
        for key, (store, _) in sorted(self._places.items(), key=lambda item: item[1]):
            stored = self._stores[store]
            by_shape.setdefault((stored.shape[1:], stored.dtype, stored.device), []).append(key)
        # The stores of each shape, in order, each once.
        groups = [dict.fromkeys(self._places[key][0] for key in keys) for keys in by_shape.values()]
        self._stores, self._is_joined = [torch.cat([self._stores[at] for at in group]) for group in groups], True
        self._places = {
            key: (store, index) for store, keys in enumerate(by_shape.values()) for index, key in enumerate(keys)
        }

    def commit(self, paths: list[list[int]]) -> None:
        """Keeps, in row b, the tokens of the last forward at the indices `paths[b]`, in that order."""
        if not self._is_joined:
            self._join_stores()
        if any(path != list(range(len(path))) for path in paths):
            for store in self._stores:
                self._gather(store, paths)
        for row, path in enumerate(paths):
            self.lengths[row] += len(path)
        for state in self.recurrent.values():
            state.commit([len(path) for path in paths])
        self._recurrent_lengths = list(self.lengths)

    def change_rows(self, origins: list[int | None], added: "KVCache | None" = None) -> None:
        """Makes row i what row `origins[i]` was, or for None the next row of `added`; the other rows are dropped."""
        moves = [(row, origin) for row, origin in enumerate(origins) if origin is not None and origin != row]
        new = [row for row, origin in enumerate(origins) if origin is None]
        added_lengths = iter(added.lengths if added is not None else ())
        if added is not None and not self._stores:
            # Nothing was fed to this cache: its rows are empty, and take the place of keys and values from the other.
            self._stores = [lazy_zeros((len(one), len(self.lengths), *one.shape[2:]), one) for one in added._stores]
            self._places, self._is_joined, self.capacity = dict(added._places), added._is_joined, added.capacity
        self._resize(len(origins), added.capacity if added is not None else 0)
        longest = max((self.lengths[origin] for _, origin in moves), default=0)
        for index, store in enumerate(self._stores):
            if moves:
                filled = store[:, :, :, :longest]
                filled[:, [row for row, _ in moves]] = filled[:, [origin for _, origin in moves]]
            if new and added is not None and added._stores:
                assert added._places == self._places
                for row, states, length in zip(new, added._stores[index].unbind(1), added.lengths, strict=False):
                    store[:, row, :, :length] = states[:, :, :length]
        for name, state in self.recurrent.items():
            state.change_rows(origins, added.recurrent.get(name) if added is not None else None)
        self.lengths = [next(added_lengths) if origin is None else self.lengths[origin] for origin in origins]
        self._recurrent_lengths = list(self.lengths)

    def _gather(self, store: Tensor, paths: list[list[int]]) -> None:
        longest = max(map(len, paths))
        # After a row's own path, slots are copied onto themselves.
        sources = [
            [length + node for node in (path + list(range(len(path), longest)))]
            for length, path in zip(self.lengths, paths, strict=True)
        ]
        if len(paths) == 1:
            start = self.lengths[0]
            store[:, 0, :, start : start + longest] = store[:, 0, :, sources[0]]
            return
        rows_B1 = torch.arange(len(paths), device=store.device)[:, None]
        slots_BP = torch.tensor(self.lengths, device=store.device)[:, None] + torch.arange(longest, device=store.device)
        by_slot = store.permute(1, 3, 0, 2, 4)
        by_slot[rows_B1, slots_BP] = by_slot[rows_B1, torch.tensor(sources, device=store.device)]

    def _resize(self, num_rows: int, capacity: int) -> None:
        """Makes room for so many rows and slots, where there are fewer; only slots that were written are copied."""
        capacity = max(capacity, self.capacity)
        for index, store in enumerate(self._stores):
            if num_rows > store.shape[1] or capacity > self.capacity:
                rows = max(num_rows, store.shape[1])
                self._stores[index] = lazy_zeros((len(store), rows, store.shape[2], capacity, store.shape[4]), store)
                for row, length in enumerate(self.lengths):
                    written = min(length + self._num_fed, self.capacity)
                    self._stores[index][:, row, :, :written] = store[:, row, :, :written]
        self.capacity = capacity

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns the number of tokens before the current forward's, of the longest row.

        Models whose code takes positions from here instead of `position_ids` run rows of one length only.
        """
        return max(self.lengths) + self.first

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.num_visible, 0


def visible(tree: Tree, cache: KVCache, *, first: int = 0) -> Tensor:
    """Returns the mask [R, N, S] of slots that nodes from `first` on attend to: committed ones, ancestors, themselves.

    The cache must have been prepared for them.
    """
    ancestors_RNN = tree.ancestors_RNN[:, first:]
    num_new, device = ancestors_RNN.shape[1], ancestors_RNN.device
    if not cache.is_ragged:
        past = ancestors_RNN.new_ones(1, num_new, cache.lengths[0]).expand(len(ancestors_RNN), -1, -1)
        num_unused = cache.num_visible - cache.lengths[0] - tree.num_nodes
        return torch.nn.functional.pad(torch.cat([past, ancestors_RNN], dim=2), (0, num_unused))
    batch_size = len(cache.lengths)
    lengths_B1 = torch.tensor(cache.lengths, device=device)[:, None]
    committed_BS = torch.arange(cache.num_visible, device=device) < lengths_B1
    mask_BNS = committed_BS[:, None].repeat(1, num_new, 1)
    slots_BN = lengths_B1 + torch.arange(tree.num_nodes, device=device)
    index_BNN = slots_BN[:, None].expand(-1, num_new, -1)
    return mask_BNS.scatter_(2, index_BNN, ancestors_RNN.expand(batch_size, -1, -1))
