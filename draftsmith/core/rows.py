"""The rows of a batch: their state as they come and go, `followed`, and groups of similar lengths."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Origins = Sequence[int | None]
"""For each row of a changed batch, the row that it was before; None for a new text."""


def followed(origins: Origins, kept: Any, new: Any = None) -> Any:
    """Returns the state of a changed batch's rows: of those that stay from `kept`, of new ones, in order, from `new`.

    It is a list, or a tensor, with an entry for each row, or an object with a method `change_rows` of these arguments.
    A tensor's new rows are zero if `new` is None.
    """
    if not isinstance(kept, list | Tensor):
        kept.change_rows(origins, new)
        return kept
    following = iter(range(len(kept), len(kept) + len(origins)))
    index = [next(following) if origin is None else origin for origin in origins]
    if isinstance(kept, list):
        return [(kept + (new or []))[at] for at in index]
    new = kept.new_zeros(origins.count(None), *kept.shape[1:]) if new is None else new
    return torch.cat([kept, new])[torch.tensor(index, device=kept.device)]


def groups_by_length(lengths: Sequence[int], most_padding: int) -> list[list[int]]:
    """Returns the indices of rows in groups, the longest rows first; padding adds `most_padding` to a group at most."""
    groups: list[list[int]] = []
    padding = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        padding += lengths[groups[-1][0]] - lengths[row] if groups else 0
        if not groups or padding > most_padding:
            groups.append([])
            padding = 0
        groups[-1].append(row)
    return [sorted(group) for group in groups]
