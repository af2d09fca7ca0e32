"""Grouped-query attention without copies of keys and values, for views of a target.

With a mask, transformers' scaled-dot-product attention repeats the keys and values of a forward of several tokens for
every query head. Here the queries that share a key head are stacked as rows of it instead, which computes the same
numbers from the cache as it lies. Batch-invariant decoding lets it pad the stacked rows.

Shape suffixes: B rows, R is B or 1, N new tokens, S cache slots, D head width, H query heads, K key heads, G query
heads per key head, M = G * N stacked rows.
"""

import copy
import sys
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from draftsmith.core.views import ATTENTIONS, shallow_copy

NAME = "draftsmith_stacked"
SAVED_ELEMENTS = 2**16
"""Elements of keys whose reading takes as long as a call for one more row (20 microseconds; two threads of an EPYC)."""
HANDED_ON = ("softcap", "s_aux", "position_bias", "cache", "output_attentions")
"""Arguments that only transformers' own function knows how to apply, or to reject."""


def stacked_attention(
    module: Any,
    query_BHND: Tensor,
    key_BKSD: Tensor,
    value_BKSD: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Returns attention [B, N, H, D] under a mask [R, 1, N, S]; what it does not serve goes to transformers' function.

    A drop-in for transformers' `sdpa_attention_forward`, whose results differ by rounding at most.
    """
    batch_size, num_heads, num_new, width = query_BHND.shape
    num_groups = num_heads // key_BKSD.shape[1]
    if (
        attention_mask is None
        or attention_mask.ndim != 4
        or attention_mask.shape[1] != 1
        or any(others.get(name) is not None and others[name] is not False for name in HANDED_ON)
        or (num_groups == 1 and module.stacked_masks.row_multiple == 1 and not module.stacked_masks.ends)
    ):
        return sdpa_attention_forward(
            module, query_BHND, key_BKSD, value_BKSD, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    masks = module.stacked_masks
    query_BKMD = query_BHND.reshape(batch_size, -1, num_groups * num_new, width)
    if num_dummies := masks.num_dummies(num_groups * num_new):
        query_BKMD = nn.functional.pad(query_BKMD, (0, 0, 0, num_dummies))
    mask_R1MS = masks.get(attention_mask, num_groups, query_BHND.dtype)
    attend = partial(nn.functional.scaled_dot_product_attention, dropout_p=dropout, scale=scaling)
    if masks.are_apart(key_BKSD, mask_R1MS):
        # Each row attends to its own slots alone, not to those of the longest row.
        rows = [slice(row, row + 1) for row in range(batch_size)]
        parts = [
            attend(query_BKMD[row], key_BKSD[row, :, :end], value_BKSD[row, :, :end], mask_R1MS[row, ..., :end])
            for row, end in zip(rows, masks.ends, strict=True)
        ]
        out_BKMD = torch.cat(parts)
    else:
        out_BKMD = attend(query_BKMD, key_BKSD, value_BKSD, mask_R1MS)
    if num_dummies:
        out_BKMD = out_BKMD[:, :, : num_groups * num_new]
    out_BHND = out_BKMD.reshape(batch_size, num_heads, num_new, value_BKSD.shape[-1])
    return out_BHND.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, stacked_attention)


class StackedMasks(threading.local):
    """The additive masks of one forward, each repeated for the query heads of a group: made once for all layers.

    They also say of how many rows attention is to see a multiple.
    """

    def __init__(self) -> None:
        self.begin()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return StackedMasks, ()  # a copy begins empty, so that targets can be copied

    def begin(self, *, row_multiple: int = 1, ends: Sequence[int] = ()) -> None:
        """Begins a forward in which attention sees a multiple of so many stacked rows; drops the last one's masks.

        `ends` are the numbers of slots that rows of different lengths may attend to.
        """
        self._made: list[tuple[Tensor, int, Tensor]] = []
        self.row_multiple, self.ends = row_multiple, ends

    def are_apart(self, key_BKSD: Tensor, mask_R1MS: Tensor) -> bool:
        """Returns whether attention row by row takes less time than over the slots of the longest row for all."""
        num_rows, num_heads, num_slots, width = key_BKSD.shape
        if len(self.ends) != len(mask_R1MS) or num_slots != max(self.ends):
            return False
        return (num_slots - sum(self.ends) / num_rows) * num_heads * width > SAVED_ELEMENTS

    def num_dummies(self, num_rows: int) -> int:
        """Returns how many rows are to be added to this many."""
        return -num_rows % self.row_multiple

    def get(self, mask_R1NS: Tensor, num_groups: int, dtype: torch.dtype) -> Tensor:
        """Returns the mask [R, 1, M, S] in `dtype`; a mask of one new token serves every row as it is."""
        for mask, groups, made in self._made:
            if mask is mask_R1NS and groups == num_groups and made.dtype == dtype:
                return made
        made = mask_R1NS
        if made.dtype == torch.bool:
            made = torch.zeros_like(mask_R1NS, dtype=dtype).masked_fill_(~mask_R1NS, float("-inf"))
        if made.shape[2] > 1:
            made = made.repeat(1, 1, num_groups, 1)
            if num_dummies := self.num_dummies(made.shape[2]):
                made = nn.functional.pad(made, (0, 0, 0, num_dummies))
        self._made = [*self._made[-1:], (mask_R1NS, num_groups, made)]  # one for each of two kinds of layers at most
        return made


def with_stacked_attention(stack: Any, masks: StackedMasks, list_name: str) -> Any:
    """Returns a copy of a decoder stack that shares every parameter, whose blocks call `stacked_attention`.

    A block stays as it is if it has another implementation than "sdpa", or does not call transformers' own function
    for it.
    """
    configs: dict[int, Any] = {}
    blocks = [_stacked_block(block, masks, configs) for block in getattr(stack, list_name)]
    if not configs:
        return stack
    copied = shallow_copy(stack)
    copied._modules[list_name] = nn.ModuleList(blocks)
    return copied


def _stacked_block(block: nn.Module, masks: StackedMasks, configs: dict[int, Any]) -> nn.Module:
    name = next((name for name in ATTENTIONS if isinstance(block._modules.get(name), nn.Module)), None)
    attention: Any = block._modules[name] if name is not None else None
    interface = getattr(sys.modules.get(type(attention).__module__), "ALL_ATTENTION_FUNCTIONS", None)
    config: Any = getattr(attention, "config", None)
    # A module whose forward was replaced or compiled would run the original's children.
    own_forward = any(
        "forward" in module.__dict__ or module._compiled_call_impl for module in (block, attention or block)
    )
    if (
        getattr(config, "_attn_implementation", None) != "sdpa"
        or not isinstance(interface, AttentionInterface)
        or interface.get("sdpa") is not sdpa_attention_forward
        or hasattr(attention, "indexer")  # sparse attention asks for the name "sdpa" before it masks what is not chosen
        or own_forward
    ):
        return block
    if id(config) not in configs:
        configs[id(config)] = copy.deepcopy(config)
        configs[id(config)]._attn_implementation = NAME
    # The copied attention shares its dictionary of projections: one replaced later, by a quantised one say, is seen.
    stacked, copied = copy.copy(attention), shallow_copy(block)
    stacked.config, stacked.stacked_masks = configs[id(config)], masks
    copied._modules[name] = stacked
    return copied
