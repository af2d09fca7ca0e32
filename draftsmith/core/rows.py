"""Rows of a batch that come and go: the texts being written, and the hidden states that a drafter starts again from.

Shape suffixes: B rows, T positions, N nodes of a draft, D hidden width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(kw_only=True, eq=False)
class Text:
    """One row of a batch."""

    index: int
    """Number of its prompt in the call."""
    ids: list[int]
    """Its prompt and the new tokens so far; the last one is pending."""
    limit: int
    """Most tokens that it may have."""
    identity: tuple[int, int] = (0, 0)
    """Its seed, and its index among the rows with this seed."""
    processors: Sequence[Any] = ()
    """Logits processors of a text that comes to a batch, of the same kinds as those of the others."""
    is_running: bool = True


def replace_ended(texts: list[Text], new: list[Text]) -> list[int | None]:
    """Puts `new` in place of texts that ended, then running ones from the end of the list; drops the ended ones.

    Returns for each entry the index of its text in the former list, None for a new one.
    """
    origins: list[int | None] = list(range(len(texts)))
    ended = [row for row, text in enumerate(texts) if not text.is_running]
    for row, text in zip(ended, new, strict=False):
        texts[row], origins[row] = text, None
    for row in reversed(ended[len(new) :]):
        last, origin = texts.pop(), origins.pop()
        if row < len(texts):
            texts[row], origins[row] = last, origin
    return origins


class HiddenHistory:
    """Hidden states of every token that a row has fed, for drafters that must start again as the batch changes."""

    def __init__(self, rows: list[list[int]], hidden: dict[int, Tensor]) -> None:
        self._rows = self._of_prompts(rows, hidden)

    def extend(self, layers: dict[int, Tensor], paths: list[list[int]]) -> None:
        """Appends the states [B, N, D] of each row's committed nodes."""
        for row, (parts, path) in enumerate(zip(self._rows, paths, strict=True)):
            if path:
                parts.append({layer: states_BND[row, path] for layer, states_BND in layers.items()})

    def change_rows(self, origins: list[int | None], new_rows: list[list[int]], hidden: dict[int, Tensor]) -> None:
        """Follows a batch as `KVCache.change_rows` does; `hidden` [B, T, D] are those of the new rows' prompts."""
        new = iter(self._of_prompts(new_rows, hidden))
        self._rows = [next(new) if origin is None else self._rows[origin] for origin in origins]

    def padded(self) -> dict[int, Tensor]:
        """Returns, by layer, the states [B, T, D] of all rows, right-padded, as a prefill of their texts returns."""
        first = next((parts[0] for parts in self._rows if parts), {})
        return {
            layer: pad_sequence(
                [torch.cat([part[layer] for part in parts]) if parts else states_TD[:0] for parts in self._rows],
                batch_first=True,
            )
            for layer, states_TD in first.items()
        }

    @staticmethod
    def _of_prompts(rows: list[list[int]], hidden: dict[int, Tensor]) -> list[list[dict[int, Tensor]]]:
        return [
            [{layer: states_BTD[row, : len(ids) - 1].clone() for layer, states_BTD in hidden.items()}]
            if hidden and len(ids) > 1
            else []
            for row, ids in enumerate(rows)
        ]
