"""What a stream of texts yields, and the target's outputs at every token, kept while they are written.

Shape suffixes: B rows, T positions of a text, N nodes of a draft or tokens, D hidden width, K largest logits kept,
V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from draftsmith.core.target import Target
from draftsmith.core.tree import Draft
from draftsmith.inputs.arguments import whole_number

TOKENS_AT_ONCE = 2048


@dataclass(frozen=True, kw_only=True, eq=False)
class TextOutputs:
    """The target's outputs at every token of a text, on the CPU."""

    hidden: dict[int, Tensor] = field(default_factory=dict)
    """Hidden layers [T, D] in the target's dtype, un-normed; 0 is the embedding output, i that of the i-th block."""
    top_logits_TK: Tensor | None = None
    """The largest next-token logits (float32), in descending order."""
    top_ids_TK: Tensor | None = None
    """Token ids of `top_logits_TK`."""
    log_normaliser_T: Tensor | None = None
    """Log-sum-exp of all logits (float32)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StreamedText:
    """One text of `generate_stream`, complete."""

    index: int
    """Number of its prompt, from 0."""
    prompt_ids: list[int]
    """The prompt (causal) or the decoder start (encoder-decoder)."""
    new_ids: list[int]
    """The new tokens, the end-of-sequence included."""
    ended: bool
    """True if it ended by an end-of-sequence, False if by `max_new_tokens` or a stopping criterion."""
    outputs: TextOutputs | None = None
    """With `output_layers` or `output_top_logits`: the target's outputs at every token, the last one included; None if
    `max_time` ended the text."""


class OutputRecorder:
    """Keeps hidden layers and the `top_k` largest logits at every token that the rows of a batch feed.

    They are taken from the forwards that write the texts. Raises ValueError for layers or a number of logits that the
    target does not have.
    """

    def __init__(self, target: Target, layers: Sequence[int], top_k: int) -> None:
        for layer in layers:
            if not 0 <= whole_number("a hidden layer", layer) <= target.num_layers:
                raise ValueError(
                    f"hidden layer {layer} does not exist; {target.name} has layers 0 to {target.num_layers}"
                )
        if not 0 <= whole_number("output_top_logits", top_k) <= target.vocab_size:
            raise ValueError(
                f"output_top_logits is {top_k}; {target.name} has a vocabulary of {target.vocab_size}: pass 0 to"
                f" {target.vocab_size}"
            )
        self._target, self._kept, self._top_k = target, tuple(layers), top_k
        self.layers = tuple(sorted({*layers, target.num_layers} if top_k else {*layers}))
        """Hidden layers that the forwards must return: those to keep, and the last, from which logits of prompts are
        computed, as a prefill has none."""
        self._rows: list[list[dict[str, Tensor]]] = []

    def start(self, rows: list[list[int]], hidden: dict[int, Tensor]) -> None:
        """Begins with the prefilled `rows` and their hidden states [B, T, D], all but the pending token's."""
        self._rows = self._of_prompts(rows, hidden)

    def change_rows(self, origins: list[int | None], new_rows: list[list[int]], hidden: dict[int, Tensor]) -> None:
        """Follows a batch as `KVCache.change_rows` does; `hidden` are those of the new rows' prompts."""
        new = iter(self._of_prompts(new_rows, hidden))
        self._rows = [next(new) if origin is None else self._rows[origin] for origin in origins]

    def runs_whole(self, draft: Draft) -> bool:
        """Returns whether a draft must be run from the first block, as layers below its resume point are kept."""
        return draft.resume_point is not None and min(self.layers, default=0) <= draft.resume_point.layer

    def extend(self, hidden: dict[int, Tensor], logits_BNV: Tensor, paths: list[list[int]]) -> None:
        """Appends the outputs at each row's committed nodes: hidden states [B, N, D] and logits."""
        counts = [len(path) for path in paths]
        rows_N = torch.tensor([row for row, path in enumerate(paths) for _ in path], device=logits_BNV.device)
        nodes_N = torch.tensor([node for path in paths for node in path], device=logits_BNV.device)
        if not len(rows_N):
            return
        fed_ND = {layer: hidden[layer][rows_N, nodes_N] for layer in self._kept}
        tops = largest(logits_BNV[rows_N, nodes_N], self._top_k) if self._top_k else None
        for parts, found in zip(self._rows, self._by_row(fed_ND, tops, counts), strict=True):
            if found:
                parts.append(found)

    def outputs_of(self, row: int) -> TextOutputs:
        """Returns the outputs at the tokens that a row has fed, in order."""
        parts = self._rows[row]
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return TextOutputs(
            hidden={layer: joined[f"hidden.{layer}"] for layer in self._kept},
            top_logits_TK=joined.get("top_logits"),
            top_ids_TK=joined.get("top_ids"),
            log_normaliser_T=joined.get("log_normaliser"),
        )

    def _of_prompts(self, rows: list[list[int]], hidden: dict[int, Tensor]) -> list[list[dict[str, Tensor]]]:
        counts = [len(ids) - 1 for ids in rows]
        if not any(counts):
            return [[] for _ in rows]
        fed_ND = {
            layer: torch.cat([states_BTD[row, :count] for row, count in enumerate(counts)])
            for layer, states_BTD in hidden.items()
        }
        tops = None
        if self._top_k:
            tops = tuple(
                part[0] for part in top_logits(self._target, fed_ND[self._target.num_layers][None], self._top_k)
            )
        kept_ND = {layer: fed_ND[layer] for layer in self._kept}
        return [[found] if found else [] for found in self._by_row(kept_ND, tops, counts)]

    def _by_row(
        self, hidden_ND: dict[int, Tensor], tops: tuple[Tensor, ...] | None, counts: list[int]
    ) -> list[dict[str, Tensor]]:
        """Returns each row's tensors of outputs that are concatenated over rows; nothing for rows without tokens."""
        named: dict[str, Any] = {f"hidden.{layer}": states_ND for layer, states_ND in hidden_ND.items()}
        if tops is not None:
            named |= dict(zip(("top_logits", "top_ids", "log_normaliser"), tops, strict=True))
        split = {name: tensor.cpu().split(counts) for name, tensor in named.items()}
        return [
            {name: parts[row] for name, parts in split.items()} if count else {} for row, count in enumerate(counts)
        ]


class HiddenHistory:
    """Hidden states of every token that a row has fed, for drafters that must start again as the batch changes."""

    def __init__(self, rows: list[list[int]], hidden: dict[int, Tensor], layers: tuple[int, ...]) -> None:
        self._layers = layers
        self._rows = self._of_prompts(rows, hidden)

    def extend(self, layers: dict[int, Tensor], paths: list[list[int]]) -> None:
        """Appends the states [B, N, D] of each row's committed nodes."""
        for row, (parts, path) in enumerate(zip(self._rows, paths, strict=True)):
            if path:
                parts.append({layer: layers[layer][row, path] for layer in self._layers})

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

    def _of_prompts(self, rows: list[list[int]], hidden: dict[int, Tensor]) -> list[list[dict[int, Tensor]]]:
        return [
            [{layer: hidden[layer][row, : len(ids) - 1].clone() for layer in self._layers}]
            if hidden and len(ids) > 1
            else []
            for row, ids in enumerate(rows)
        ]


def top_logits(target: Target, hidden_BTD: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (logits [B, T, K], ids [B, T, K], log-normaliser [B, T]) from the last block's output, in float32.

    The head runs on a few positions at a time, so that no [B, T, V] tensor is allocated. Raises ValueError if `top_k`
    exceeds the vocabulary.
    """
    if top_k > target.vocab_size:
        raise ValueError(f"top_k is {top_k}; {target.name} has a vocabulary of {target.vocab_size}")
    parts = []
    for hidden_1ND in hidden_BTD.flatten(0, 1)[None].split(TOKENS_AT_ONCE, dim=1):
        parts.append(largest(target.head(target.norm(hidden_1ND))[0], top_k))
    values_NK, ids_NK, normaliser_N = (torch.cat(column) for column in zip(*parts, strict=True))
    shape = hidden_BTD.shape[:2]
    return values_NK.view(*shape, top_k), ids_NK.view(*shape, top_k), normaliser_N.view(shape)


def largest(logits_NV: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (logits [N, K], descending, ids [N, K], log-normaliser [N]) in float32."""
    logits_NV = logits_NV.float()
    top_NK = logits_NV.topk(top_k, dim=-1)
    return top_NK.values, top_NK.indices, logits_NV.logsumexp(-1)
