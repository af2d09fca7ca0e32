"""The draft tree: what a drafter proposes and the target checks in one forward.

Shape suffixes: B rows of the batch, N nodes of the tree, D hidden width, V vocabulary; R is B, or 1 when all rows share
the shape.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

SamplingScheme = Literal["deterministic", "independent", "without_replacement", "top_and_drawn"]
"""How siblings came to be, in node order: given without a law; each from their parent's law; each from that law less
the siblings before it; the likeliest tokens, then a last one from the law without them."""

REFUSAL = "a tree's first parent is -1 and each other parent an earlier node, not "


@dataclass(frozen=True, kw_only=True, eq=False)
class Tree:
    """The shape of a draft; node 0 is the pending token and every parent comes before its children."""

    parents_RN: Tensor
    """Index of each node's parent, -1 for node 0."""
    depths_RN: Tensor
    """Number of edges from node 0."""
    ancestors_RNN: Tensor
    """True at [i, j] if j is i or an ancestor of i: what node i may attend to."""
    depth: int
    """The deepest node's depth."""
    is_chain: bool
    """Whether it is the same single branch in every row."""

    @property
    def num_nodes(self) -> int:
        return self.parents_RN.shape[1]

    @staticmethod
    def from_parents(parents: list[list[int]], device: torch.device | str = "cpu") -> "Tree":
        """Builds the tree from one list of parents (shared) or one a row; raises ValueError unless parent < child."""
        num_nodes = len(parents[0])
        depths, bits = [], []
        # A node's ancestors are the bits of a number: an operation of torch or numpy for each would take longer.
        for row in parents:
            if len(row) != num_nodes or row[0] != -1:
                raise ValueError(f"{REFUSAL}{row}")
            depth, ancestors = [0], [1]
            for node in range(1, num_nodes):
                parent = row[node]
                if not 0 <= parent < node:
                    raise ValueError(f"{REFUSAL}{row}")
                depth.append(depth[parent] + 1)
                ancestors.append(ancestors[parent] | 1 << node)
            depths.append(depth)
            bits += [number.to_bytes((num_nodes + 7) // 8, "little") for number in ancestors]
        bytes_RNK = np.frombuffer(b"".join(bits), dtype=np.uint8).reshape(len(parents), num_nodes, -1)
        ancestors_RNN = np.unpackbits(bytes_RNK, axis=2, count=num_nodes, bitorder="little").view(bool)
        return Tree(
            parents_RN=torch.tensor(parents, device=device),
            depths_RN=torch.tensor(depths, device=device),
            ancestors_RNN=torch.from_numpy(ancestors_RNN).to(device),
            depth=max(map(max, depths)),
            is_chain=all(row == list(range(-1, num_nodes - 1)) for row in parents),
        )


@lru_cache(maxsize=256)
def chain(num_nodes: int, device: torch.device | str = "cpu") -> Tree:
    """Returns the tree with a single branch of `num_nodes` nodes, the pending one included."""
    order_N = torch.arange(num_nodes, device=device)
    return Tree(
        parents_RN=order_N[None] - 1,
        depths_RN=order_N[None],
        ancestors_RNN=(order_N[:, None] >= order_N)[None],
        depth=num_nodes - 1,
        is_chain=True,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class ResumePoint:
    """What the target's first blocks made of a draft's nodes, their keys and values being in the target's cache."""

    layer: int
    """How many blocks have run."""
    hidden_BND: Tensor
    """The last one's output."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Draft:
    """A tree filled with tokens, and the laws that its children were drawn from."""

    tokens_BN: Tensor
    """Node 0 is the pending token: committed, not yet fed."""
    tree: Tree
    num_nodes: list[int] | None = None
    """Nodes in use in each row, the rest being padding; None means all."""
    draft_probs_BNV: Tensor | None = None
    """Row i is the law that the children of node i were drawn from; None if the draft is deterministic."""
    sampling_scheme: SamplingScheme = "deterministic"
    """How the children of a node were drawn."""
    resume_point: ResumePoint | None = None
    """From where verification goes on, if the drafter ran the target's first blocks over these very nodes."""

    def valid_BN(self) -> Tensor | None:
        """Returns which nodes are in use [B, N], or None if all are."""
        if self.num_nodes is None:
            return None
        device = self.tokens_BN.device
        return torch.arange(self.tree.num_nodes, device=device) < torch.tensor(self.num_nodes, device=device)[:, None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Verdict:
    """The accepted path of each row and the token that follows it."""

    path_BP: Tensor
    """Accepted nodes from node 0 on; entries beyond `num_accepted` repeat the last one."""
    num_accepted_B: Tensor
    """Drafted nodes accepted, node 0 not counted."""
    next_token_B: Tensor
    """The token after the path: correction or bonus."""
    next_probs_BV: Tensor | None = None
    """The law that it was drawn from, not normalised; None where each node's own choice is followed."""

    def to_host(self) -> tuple[list[list[int]], list[int]]:
        """Returns each row's accepted nodes and next token, in a single transfer."""
        columns = (self.num_accepted_B[:, None], self.next_token_B[:, None], self.path_BP)
        numbers = torch.cat(columns, dim=1).tolist()
        return [row[2 : row[0] + 3] for row in numbers], [row[1] for row in numbers]
