"""The draft tree: what a drafter proposes and the target verifies in one forward.

Shape suffixes: B rows of the batch, N nodes of the tree, D hidden width, V vocabulary, P length of the longest accepted
path; R is B, or 1 when all rows share the shape.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

SamplingScheme = Literal["deterministic", "independent", "without_replacement", "top_and_drawn"]
"""The siblings of a tree are, in node order: not sampled; each sampled from the draft distribution after their parent;
each from that distribution without the siblings before it; its most likely tokens, then one sampled from the rest."""

INVALID_PARENTS = "parents are {}; the first must be -1, each other an earlier node, and all rows equally long"


@dataclass(frozen=True, kw_only=True, eq=False)
class Tree:
    """The shape of a draft; node 0 is the pending token and every parent comes before its children."""

    parents_RN: Tensor
    """Index of each node's parent, -1 for node 0."""
    depths_RN: Tensor
    """Number of edges from node 0."""
    ancestors_RNN: Tensor
    """True at [i, j] if j is i or an ancestor of i: node i may attend to j."""
    depth: int
    """Depth of the deepest node."""
    is_chain: bool
    """True if it is the same single branch in every row."""

    @property
    def num_nodes(self) -> int:
        return self.parents_RN.shape[1]

    def padded(self, num_more: int) -> "Tree":
        """Returns the tree with this many more nodes, to which no node of the tree attends; a chain stays one."""
        if self.is_chain:
            return chain(self.num_nodes + num_more, self.parents_RN.device)
        device = self.parents_RN.device
        more_RNN = torch.eye(num_more, dtype=torch.bool, device=device).expand(len(self.parents_RN), -1, -1)
        more_RNN = torch.nn.functional.pad(more_RNN, (self.num_nodes, 0))
        more_RNN[:, :, 0] = True
        ancestors_RNN = torch.nn.functional.pad(self.ancestors_RNN, (0, num_more))
        return Tree(
            parents_RN=torch.nn.functional.pad(self.parents_RN, (0, num_more)),
            depths_RN=torch.nn.functional.pad(self.depths_RN, (0, num_more), value=1),
            ancestors_RNN=torch.cat([ancestors_RNN, more_RNN], dim=1),
            depth=max(self.depth, 1),
            is_chain=False,
        )

    @staticmethod
    def from_parents(parents: list[list[int]], device: torch.device | str = "cpu") -> "Tree":
        """Returns the tree of one list of parents (shared) or one per row; raises ValueError unless parent < child."""
        num_nodes = len(parents[0])
        depths, bits = [], []
        # A node's ancestors are bits of a Python integer: a tensor or array operation for each would take longer.
        for row in parents:
            if len(row) != num_nodes or row[0] != -1:
                raise ValueError(INVALID_PARENTS.format(row))
            depth, ancestors = [0], [1]
            for node in range(1, num_nodes):
                parent = row[node]
                if not 0 <= parent < node:
                    raise ValueError(INVALID_PARENTS.format(row))
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
    return Tree.from_parents([list(range(-1, num_nodes - 1))], device)


@dataclass(frozen=True, kw_only=True, eq=False)
class ResumePoint:
    """A partial forward of a draft's nodes: the target's first blocks, whose keys and values are in its cache."""

    layer: int
    """Number of blocks that have run."""
    hidden_BND: Tensor
    """Output of the last of them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Draft:
    """A tree with its tokens, and the distributions that its children were sampled from."""

    tokens_BN: Tensor
    """Node 0 is the pending token: committed, not yet fed."""
    tree: Tree
    num_nodes: list[int] | None = None
    """Number of nodes used in each row, the rest being padding; None means all."""
    draft_probs_BNV: Tensor | None = None
    """Row i is the distribution of the children of node i; None if the draft is deterministic."""
    sampling_scheme: SamplingScheme = "deterministic"
    resume_point: ResumePoint | None = None
    """The partial forward to resume from, if the drafter ran the target's first blocks over these nodes."""

    confidences: Callable[[], list[list[float]]] | None = None
    """Returns how sure the drafter is, from 0 to 1, of each row's nodes after node 0, given their parents; None if
    unknown. A GPU is waited for only when it is asked, which most sessions never do."""
    kept_of_BN: Tensor | None = None
    """The tokens of the draft that its nodes are some of; None if it was proposed so."""

    def valid_BN(self) -> Tensor | None:
        """Returns the mask [B, N] of the nodes used, or None if all are."""
        if self.num_nodes is None:
            return None
        device = self.tokens_BN.device
        return torch.arange(self.tree.num_nodes, device=device) < torch.tensor(self.num_nodes, device=device)[:, None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Verdict:
    """The accepted path of each row and the token that follows it."""

    path_BP: Tensor
    """Accepted nodes from node 0 on; entries after `num_accepted` repeat the last one."""
    num_accepted_B: Tensor
    """Number of drafted nodes accepted, node 0 not counted."""
    next_token_B: Tensor
    """The token after the path: correction or bonus."""
    next_probs_BV: Tensor | None = None
    """Its probabilities, not normalised; None for verifiers that sample a token at each node."""

    def to_host(self) -> tuple[list[list[int]], list[int]]:
        """Returns each row's accepted nodes and next token, in a single transfer."""
        columns = (self.num_accepted_B[:, None], self.next_token_B[:, None], self.path_BP)
        numbers = torch.cat(columns, dim=1).tolist()
        return [row[2 : row[0] + 3] for row in numbers], [row[1] for row in numbers]
