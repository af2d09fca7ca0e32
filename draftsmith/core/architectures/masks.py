"""The attention masks of one forward of a tree, for each kind of layer that a model has.

Shape suffixes: B rows, N nodes of a tree, S cache slots; R is B or 1.
"""

from typing import Any

import torch
from torch import Tensor

from draftsmith.core.architectures.supported import RECURRENT, STATELESS, has_recurrent_layers, layer_kinds
from draftsmith.core.cache import KVCache, visible
from draftsmith.core.tree import Tree

RECURRENT_MASKS: dict[str, str | None] = {
    "full_attention": "full_attention",
    "sliding_attention": "sliding_attention",
    "hybrid": "full_attention",
    "hybrid_sliding": "sliding_attention",
    "linear_attention": None,
    "conv": None,
}
"""The kind of mask by every name under which a model with recurrent layers asks for one; None where padding would be
masked, of which there is none."""


class AttentionMasks:
    """Makes the masks of a model, by the text configuration that it has."""

    def __init__(self, model: Any, config: Any, *, applies_windows: bool, dtype: torch.dtype) -> None:
        self._is_boolean = config._attn_implementation == "sdpa"
        # Attention that transformers has not brought into its common form checks the number of rows, and T5Gemma 2
        # joins the mask with the source's.
        self._shares_rows = bool(model._supports_sdpa) and not model.config.is_encoder_decoder
        self._dtype = dtype
        self._window = getattr(config, "sliding_window", None) if applies_windows else None
        self._chunk = getattr(config, "attention_chunk_size", None)
        self._is_recurrent, kinds = has_recurrent_layers(config), layer_kinds(config)
        self._has_attention = not kinds or bool(kinds - STATELESS - {"linear_attention", "conv"})
        self._kinds = kinds - STATELESS - RECURRENT
        if self._is_recurrent:
            self._kinds = {"full_attention", "sliding_attention"} if self._window else {"full_attention"}
        elif not kinds:
            self._kinds = {"sliding_attention"} if self._window else {"full_attention"}

    def make(self, tree: Tree, cache: KVCache, positions_BN: Tensor, *, first: int) -> Any:
        """Returns the mask [R, 1, N, S] of the nodes from `first` on, or one by kind of layer; None without attention.

        The cache must have been prepared for them.
        """
        if not self._has_attention:
            return None
        full_RNS = visible(tree, cache, first=first)
        masks: dict[str, Tensor | None] = {}
        for kind in self._kinds:
            mask_RNS = full_RNS
            if kind == "sliding_attention" and self._window and cache.num_visible > self._window:
                distance_BNS = positions_BN[:, :, None] - key_positions(tree, cache)[:, None]
                mask_RNS = full_RNS & (distance_BNS < self._window)
            elif kind == "chunked_attention" and self._chunk and cache.num_visible > self._chunk:
                chunk_B1S = key_positions(tree, cache)[:, None] // self._chunk
                mask_RNS = full_RNS & (positions_BN[:, :, None] // self._chunk == chunk_B1S)
            num_rows = len(mask_RNS) if self._shares_rows else len(cache.lengths)
            masks[kind] = self._as_mask(mask_RNS.expand(num_rows, -1, -1))
        if self._is_recurrent:
            return {name: None if kind is None else masks.get(kind) for name, kind in RECURRENT_MASKS.items()}
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _as_mask(self, visible_RNS: Tensor) -> Tensor:
        if self._is_boolean:
            return visible_RNS[:, None]
        # Eager attention adds its mask: a boolean one would have no effect.
        lowest = torch.finfo(self._dtype).min
        return torch.zeros_like(visible_RNS, dtype=self._dtype).masked_fill(~visible_RNS, lowest)[:, None]


def key_positions(tree: Tree, cache: KVCache) -> Tensor:
    """Returns the position [B, S] of the token in each slot: committed ones in order, then the tree's by depth."""
    device = tree.depths_RN.device
    slots_S = torch.arange(cache.num_visible, device=device)
    lengths_B1 = torch.tensor(cache.lengths, device=device)[:, None]
    node_BS = (slots_S - lengths_B1).clamp(0, tree.num_nodes - 1)
    depths_BN = tree.depths_RN.expand(len(cache.lengths), -1)
    return torch.where(slots_S < lengths_B1, slots_S, lengths_B1 + depths_BN.gather(1, node_BS))
