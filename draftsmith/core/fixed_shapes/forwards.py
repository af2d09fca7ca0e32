"""Batch-invariant forwards: shapes in which a token's bits do not depend on the other tokens of its forward.

Kernels are chosen by shape, and each rounds in its own way: matrix products of one or a few rows add in another order
than those of more, and attention gives other bits for another number of queries or of key slots, masked ones included.
"Batch-invariant" is the term of inference engines. `draftsmith/inputs/invariance/self_test.py` finds which shapes give
the same bits.

Shape suffixes: B rows, N nodes of a tree, M nodes of a part of it, D hidden width, V vocabulary.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from draftsmith.core.tree import Tree, chain

MOST_LOGITS = 64
"""Most nodes of a row that the LM head is run on at a time."""


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Shapes of forwards in which a token always gets the same bits."""

    fewest_nodes: int = 1
    """A forward has at least this many nodes, those of all rows together and dummy ones included."""
    most_nodes: int = 512
    """A forward has at most this many nodes, those of all rows together; longer chains are fed in parts."""
    node_multiple: int = 1
    """A forward has a multiple of this many nodes in each row."""
    query_multiple: int = 1
    """Attention sees a multiple of this many queries of each key head, dummy ones included."""
    slot_multiple: int = 1
    """Attention sees a multiple of this many key slots; the unused ones are masked."""
    slots_of_last: tuple[int, ...] = ()
    """Fewer slots, ascending, that may take the place of the last `slot_multiple`."""
    packs_weights: bool = True
    """Linear layers multiply by packed weights, if the target has any."""

    def num_slots(self, num_used: int) -> int:
        """Returns how many key slots attention sees where this many are used."""
        whole, rest = divmod(num_used, self.slot_multiple)
        last = next((slots for slots in (0, *self.slots_of_last) if slots >= rest), self.slot_multiple)
        return whole * self.slot_multiple + last

    def num_dummies(self, num_nodes: int, num_rows: int = 1) -> int:
        """Returns how many dummy nodes each of `num_rows` rows with this many nodes needs."""
        needed = max(num_nodes, -(-self.fewest_nodes // num_rows))
        return -(-needed // self.node_multiple) * self.node_multiple - num_nodes

    def most_of_a_row(self, num_rows: int) -> int:
        """Returns the most nodes of a forward in each of `num_rows` rows."""
        return max(self.most_nodes // num_rows // self.node_multiple, 1) * self.node_multiple


def fixed_shape_forward(
    run: Callable[..., Any],
    shapes: Shapes,
    tokens_BN: Tensor,
    tree: Tree,
    *,
    first: int,
    resume_BND: Tensor | None,
) -> Any:
    """Returns the output of `run(tokens, tree, first, resume)` over these nodes, called in the given shapes only.

    The tokens are those of the tree's nodes from `first` on. `run`, which a compiled or captured forward may replace,
    sees the numbers of nodes that `shapes` allow. The keys of dummies get slots after the tree's, which are masked for
    its nodes and never committed.
    """
    num_rows, num_new = tokens_BN.shape
    most = shapes.most_of_a_row(num_rows)
    if num_new > most and tree.is_chain:
        parts = [
            fixed_shape_forward(
                run,
                shapes,
                tokens_BN[:, begin : begin + most],
                chain(first + min(begin + most, num_new), tokens_BN.device),
                first=first + begin,
                resume_BND=None if resume_BND is None else resume_BND[:, begin : begin + most],
            )
            for begin in range(0, num_new, most)
        ]
        layers = {layer: torch.cat([part.layers[layer] for part in parts], dim=1) for layer in parts[0].layers}
        return dataclasses.replace(
            parts[0], hidden_BND=torch.cat([part.hidden_BND for part in parts], dim=1), layers=layers
        )
    if (num_dummies := shapes.num_dummies(num_new, num_rows)) == 0:
        return run(tokens_BN, tree, first, resume_BND)
    if resume_BND is not None:
        resume_BND = pad(resume_BND, (0, 0, 0, num_dummies))
    out = run(pad(tokens_BN, (0, num_dummies)), tree.padded(num_dummies), first, resume_BND)
    layers = {layer: hidden_BND[:, :num_new] for layer, hidden_BND in out.layers.items()}
    return dataclasses.replace(out, hidden_BND=out.hidden_BND[:, :num_new], layers=layers)


def fixed_shape_logits(head: Callable[[Tensor], Tensor], shapes: Shapes, hidden_BND: Tensor) -> Tensor:
    """Returns `head` of the hidden states [B, N, V], called for as many of them at a time as `shapes` allow."""
    parts, num_rows = [], len(hidden_BND)
    for part_BMD in hidden_BND.split(min(shapes.most_of_a_row(num_rows), MOST_LOGITS), dim=1):
        num_nodes = part_BMD.shape[1]
        parts.append(head(pad(part_BMD, (0, 0, 0, shapes.num_dummies(num_nodes, num_rows))))[:, :num_nodes])
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
