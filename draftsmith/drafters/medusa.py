"""Medusa heads on the target's last hidden state (2401.10774, section 2.1), drafting a static tree.

Shape suffixes: B rows, T positions, N nodes, D hidden width, V vocabulary, K heads.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from draftsmith.drafters import Session, Step
from draftsmith.target import Target
from draftsmith.tree import Draft, Tree


@dataclass(frozen=True, kw_only=True)
class Config:
    """The heads' shape and the tree they fill."""

    num_heads: int = 4
    """Head k (from 0), at the position of token t, predicts token t + 2 + k."""
    num_blocks: int = 1
    """Residual blocks a head, each with weights of its own."""
    own_head: bool = False
    """Whether each head has its own output matrix, started as a copy of the target's, or uses the target's head."""
    tree: tuple[tuple[int, ...], ...] = ((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 0, 0))
    """Each node as the ranks along its path: (0, 2) is the third guess of head 1 after the first guess of head 0."""

    def __post_init__(self) -> None:
        nodes = {tuple(path) for path in self.tree}
        if not nodes or len(nodes) != len(self.tree):
            raise ValueError("tree must list at least one node, and none twice")
        for path in self.tree:
            if not 1 <= len(path) <= self.num_heads or min(path) < 0:
                raise ValueError(f"tree node {list(path)} needs 1 to num_heads={self.num_heads} ranks from 0 up")
            if len(path) > 1 and tuple(path[:-1]) not in nodes:
                raise ValueError(f"tree node {list(path)} has no parent {list(path[:-1])} in the tree")


class Drafter(nn.Module):
    """K heads: z = h + SiLU(W h + b) for each block, then the output head; h is the last hidden state, normed."""

    target: Target

    def __init__(self, config: Config, target: Target) -> None:
        super().__init__()
        self.config = config
        object.__setattr__(self, "target", target)
        self.hidden_layers = (target.num_layers,)
        width = target.hidden_size
        self.blocks = nn.ModuleList(
            nn.ModuleList(nn.Linear(width, width) for _ in range(config.num_blocks)) for _ in range(config.num_heads)
        )
        for parameter in self.blocks.parameters():
            nn.init.zeros_(parameter)
        if config.own_head:
            weight = target.model.get_output_embeddings().weight
            self.outputs = nn.ModuleList(nn.Linear(width, weight.shape[0], bias=False) for _ in range(config.num_heads))
            for output in self.outputs:
                output.weight = nn.Parameter(weight.detach().clone())
        self.to(device=target.device, dtype=target.dtype)
        self._plan_tree()

    def heads(self, normed_BTD: Tensor, number: int | None = None) -> list[Tensor]:
        """Returns, for each of the first `number` heads or all, its features [B, T, D] before the output matrix."""
        features = []
        for blocks in self.blocks[:number]:
            z_BTD = normed_BTD
            for linear in blocks:  # type: ignore[attr-defined]
                z_BTD = z_BTD + nn.functional.silu(linear(z_BTD))
            features.append(z_BTD)
        return features

    def head(self, k: int, z_BTD: Tensor) -> Tensor:
        """Returns head k's logits [B, T, V]."""
        return self.outputs[k](z_BTD) if self.config.own_head else self.target.head(z_BTD)

    def start(self, session: Session) -> None:
        self._session = session
        hidden_BTD = session.hidden.get(self.hidden_layers[0])
        self._last_BD: Tensor | None = None
        # A row of one token has no hidden state yet; its first draft is then whatever position 0 suggests.
        if hidden_BTD is not None:
            last_B = torch.tensor([max(len(row) - 2, 0) for row in session.rows], device=hidden_BTD.device)
            self._last_BD = hidden_BTD[torch.arange(len(last_B), device=hidden_BTD.device), last_B]

    def propose(self, budget: int) -> Draft:
        pending_B1 = self._session.pending()[:, None]
        if self._last_BD is None:
            return Draft(tokens_BN=pending_B1, tree=self._trees[0])
        depth = min(budget, self._tree_depth)
        normed_B1D = self.target.norm(self._last_BD[:, None])
        features_BKD = torch.cat(self.heads(normed_B1D, depth), dim=1)
        if self.config.own_head:
            parts = [self.head(k, features_BKD[:, k : k + 1]) for k in range(depth)]
            logits_BKV = torch.cat(parts, dim=1)
        else:
            logits_BKV = self.target.head(features_BKD)
        guesses_BKR = logits_BKV.topk(self._num_ranks, dim=-1).indices
        drafted_BN = guesses_BKR.flatten(1)[:, self._flat_index[depth]]
        return Draft(tokens_BN=torch.cat([pending_B1, drafted_BN], dim=1), tree=self._trees[depth])

    def observe(self, step: Step) -> None:
        hidden_BND = step.hidden[self.hidden_layers[0]]
        ends_B = step.verdict.path_BP.gather(1, step.verdict.num_accepted_B[:, None])[:, 0]
        self._last_BD = hidden_BND[torch.arange(len(ends_B), device=ends_B.device), ends_B]

    def _plan_tree(self) -> None:
        """Prepares, for each depth a budget may allow, the tree cut to it and where its tokens lie in the guesses."""
        device = self.target.device
        paths = sorted((tuple(path) for path in self.config.tree), key=lambda path: (len(path), path))
        self._tree_depth = max(map(len, paths))
        self._num_ranks = 1 + max(map(max, paths))
        if self._num_ranks > self.target.vocab_size:
            size = self.target.vocab_size
            raise ValueError(
                f"a tree node has rank {self._num_ranks - 1}; the vocabulary of {size} has ranks below {size}"
            )
        self._trees: dict[int, Tree] = {}
        self._flat_index: dict[int, Tensor] = {}
        for depth in range(self._tree_depth + 1):
            kept = [path for path in paths if len(path) <= depth]
            number = {(): 0} | {path: 1 + at for at, path in enumerate(kept)}
            parents = [-1] + [number[path[:-1]] for path in kept]
            self._trees[depth] = Tree.from_parents([parents], device)
            flat = [(len(path) - 1) * self._num_ranks + path[-1] for path in kept]
            self._flat_index[depth] = torch.tensor(flat, dtype=torch.long, device=device)
