"""Batch-invariant forwards: shapes in which a token's bits do not depend on the other tokens of its forward.

Kernels are chosen by shape, and each rounds in its own way: alone a token gets other bits than among the tokens of a
draft, and attention gives other bits for another number of key slots, masked ones included. "Batch-invariant" is the
term of inference engines. `draftsmith/inputs/invariance.py` finds which shapes give the same bits.

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
"""Most nodes that the LM head is run on at a time."""


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Shapes of forwards in which a token always gets the same bits."""

    node_multiple: int = 1
    """A forward has a multiple of this many nodes in each row, dummy ones included."""
    most_nodes: int = 512
    """Most nodes of a forward in each row, a multiple as well; longer chains are fed in parts of this many."""
    slot_multiple: int = 1
    """Attention sees a multiple of this many key slots; the unused ones are masked."""

    def num_dummies(self, num_nodes: int) -> int:
        """Returns how many dummy nodes this many need."""
        return -num_nodes % self.node_multiple


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
    sees a multiple of `node_multiple` of them, at most `most_nodes` in a chain. The keys of dummies get slots after the
    tree's, which are masked for its nodes and never committed.
    """
    num_new, most = tokens_BN.shape[1], shapes.most_nodes
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
    if (num_dummies := shapes.num_dummies(num_new)) == 0:
        return run(tokens_BN, tree, first, resume_BND)
    if resume_BND is not None:
        resume_BND = pad(resume_BND, (0, 0, 0, num_dummies))
    out = run(pad(tokens_BN, (0, num_dummies)), tree.padded(num_dummies), first, resume_BND)
    layers = {layer: hidden_BND[:, :num_new] for layer, hidden_BND in out.layers.items()}
    return dataclasses.replace(out, hidden_BND=out.hidden_BND[:, :num_new], layers=layers)


def fixed_shape_logits(head: Callable[[Tensor], Tensor], shapes: Shapes, hidden_BND: Tensor) -> Tensor:
    """Returns `head` of the hidden states [B, N, V], called for as many of them at a time as `shapes` allow."""
    parts = []
    for part_BMD in hidden_BND.split(min(shapes.most_nodes, MOST_LOGITS), dim=1):
        num_nodes = part_BMD.shape[1]
        parts.append(head(pad(part_BMD, (0, 0, 0, shapes.num_dummies(num_nodes))))[:, :num_nodes])
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
