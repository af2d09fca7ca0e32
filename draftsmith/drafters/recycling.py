"""Token Recycling (2408.08696): drafts the tokens that the target last found likeliest after each token.

A matrix holds the likeliest successors of every token, from the last forward in which the target processed the token,
at any node of any draft. It fills a static tree: node (0, 2) is the third successor of the first successor of the
pending token. Each row of a batch has its own matrix, because texts differ; the next call starts with
the successors learnt in all rows.

Shape suffixes: B rows, T tokens of a prompt, N nodes, M nodes of one level, X nodes or tokens of any rows, K successors
of a token, D hidden width, V vocabulary.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from draftsmith.core import drafter
from draftsmith.core.drafter import Session, Step
from draftsmith.core.target import Target
from draftsmith.core.tree import Draft
from draftsmith.parts import autoregressive
from draftsmith.parts.checks import MAX_NODES, check_at_least
from draftsmith.parts.trie import TokenTree, to_draft


def static_tree(counts: tuple[int, ...], num_successors: int) -> autoregressive.Paths:
    """Returns a tree with `counts[d]` nodes at depth d + 1, those of the smallest products (r + 1)(s + 1)...

    r, s, ... are the ranks along the path: a token of rank r is taken to be correct with a probability of 1 / (r + 1).
    """
    nodes: list[tuple[int, ...]] = []
    level: list[tuple[int, ...]] = [()]
    for count in counts:
        children = [(*path, rank) for path in level for rank in range(num_successors)]
        level = sorted(children, key=lambda path: (prod(rank + 1 for rank in path), path))[:count]
        nodes += level
    return tuple(nodes)


AT_ONCE = 512
"""Number of prompt tokens whose logits are computed at a time."""
TREE = static_tree((8, 21, 25, 15, 8, 3), 8)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the matrix and of the tree that it fills."""

    num_successors: int = 8
    """Number of successors kept per token."""
    tree: autoregressive.Paths = TREE
    """Each node as the ranks along its path; the default has as many nodes per level as the paper's, 80 in total."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "num_successors", most=MAX_NODES)
        autoregressive.check_paths(self.tree)
        if not self.tree:
            raise ValueError("the tree has no nodes; list at least one")
        highest = max(map(max, self.tree))
        if highest >= self.num_successors:
            raise ValueError(
                f"a tree node has rank {highest}; with num_successors {self.num_successors} ranks are smaller than that"
            )


class Drafter(nn.Module, drafter.Drafter):
    """Fills trees from the matrix level by level; for an encoder-decoder only the chain of first successors."""

    row_state = ("_own_BVK",)
    serving_engines = ("vllm",)
    keeps_state_between_calls = True
    successors: Tensor

    def __init__(self, config: Config, target: Target) -> None:
        super().__init__()
        if config.num_successors > target.vocab_size:
            raise ValueError(
                f"num_successors is {config.num_successors}; the target's vocabulary has {target.vocab_size} tokens"
            )
        self.config = config
        object.__setattr__(self, "target", target)
        self.hidden_layers: tuple[int, ...] = (target.num_layers,)
        # The last row is that of an unknown token, whose successors are unknown too.
        shape_VK = (target.vocab_size + 1, config.num_successors)
        unknown_VK = torch.full(shape_VK, target.vocab_size, dtype=torch.int32, device=target.device)
        self.register_buffer("successors", unknown_VK)
        self._initial_VK = unknown_VK.clone()
        paths = tuple(path for path in config.tree if target.takes_trees or not any(path))
        self._trees = [tree for tree, _ in autoregressive.levels(paths, target.device)]
        ranks = [path[-1] for path in sorted(paths, key=lambda path: (len(path), path))]
        self._levels: list[tuple[Tensor, Tensor]] = []
        for before, tree in zip(self._trees, self._trees[1:], strict=False):
            span = slice(before.num_nodes, tree.num_nodes)
            ranks_M = torch.tensor(ranks[span.start - 1 : span.stop - 1], device=target.device)
            self._levels.append((tree.parents_RN[0, span], ranks_M))

    def on_weights_loaded(self) -> None:
        """Raises ValueError if the loaded successors are no token ids."""
        vocab_size = self.target.vocab_size
        if self.successors.min() < 0 or self.successors.max() > vocab_size:
            raise ValueError(
                f"the stored successors are not all ids below {vocab_size}; the artifact must be made again"
            )
        self._initial_VK = self.successors.clone()

    def forget(self) -> None:
        """Restores the successors that it was loaded with."""
        self.successors.copy_(self._initial_VK)

    def with_tree(self, tree: autoregressive.Paths) -> "Drafter":
        """Returns a drafter with a copy of this one's matrix and another tree."""
        other = Drafter(Config(num_successors=self.config.num_successors, tree=tree), self.target)
        other.successors.copy_(self.successors)
        return other

    @torch.no_grad()
    def start(self, session: Session) -> None:
        """Starts with the successors of earlier calls, and adds those that the target predicts along each prompt."""
        self._session = session
        # A single row writes to the matrix of later calls directly.
        num_rows = len(session.rows)
        self._is_shared = num_rows == 1
        self._own_BVK = self.successors[None] if self._is_shared else self.successors.repeat(num_rows, 1, 1)
        for row, ids in enumerate(session.rows if session.hidden else ()):
            tokens_T = torch.tensor(ids[:-1], dtype=torch.long, device=self.target.device)
            hidden_TD = session.hidden[self.target.num_layers][row, : len(tokens_T)]
            for part_X, hidden_XD in zip(tokens_T.split(AT_ONCE), hidden_TD.split(AT_ONCE), strict=True):
                logits_XV = self.target.head(self.target.norm(hidden_XD[None]))[0]
                self._learn(torch.full_like(part_X, row), part_X, self._likeliest(logits_XV))

    def change_rows(self, origins: list[int | None], new: Session | None) -> bool:
        return not self._is_shared and super().change_rows(origins, new)

    def propose(self, budget: int) -> Draft:
        num_tokens, num_successors = self.successors.shape
        tokens_BN = self._session.pending()[:, None]
        first_B1 = num_tokens * torch.arange(len(tokens_BN), device=tokens_BN.device)[:, None]
        depth = min(budget, len(self._levels))
        for parents_M, ranks_M in self._levels[:depth]:
            # A flat index takes less than half the time of several indices.
            index_BM = (first_B1 + tokens_BN.index_select(1, parents_M)) * num_successors + ranks_M
            tokens_BN = torch.cat([tokens_BN, self._own_BVK.take(index_BM)], dim=1)
        if int(tokens_BN.max()) < self.target.vocab_size:
            return Draft(tokens_BN=tokens_BN, tree=self._trees[depth])
        parents = self._trees[depth].parents_RN[0].tolist()
        return to_draft(self._session, [self._known_nodes(tokens, parents) for tokens in tokens_BN.tolist()])

    def observe(self, step: Step) -> None:
        """Updates the successors of every token that the target processed.

        A token at several nodes gets those of its deepest accepted node, or else of its deepest node; of equally deep
        ones the last.
        """
        draft = step.draft
        is_accepted_BN = torch.zeros_like(draft.tokens_BN).scatter_(1, step.verdict.path_BP, 1)
        priority_BN = draft.tree.depths_RN + is_accepted_BN * draft.tree.num_nodes
        is_running_B = torch.tensor([len(path) > 0 for path in step.paths], device=priority_BN.device)
        is_fed_BN = is_running_B[:, None].expand_as(draft.tokens_BN)
        if (valid_BN := draft.valid_BN()) is not None:
            is_fed_BN = is_fed_BN & valid_BN
        fed_X = is_fed_BN.flatten().nonzero()[:, 0]
        fed_X = fed_X[priority_BN.flatten()[fed_X].argsort(stable=True)]
        tokens_X = draft.tokens_BN.flatten()[fed_X]
        top_XK = self._likeliest(step.logits_BNV).flatten(0, 1)[fed_X]
        self._learn(fed_X // draft.tree.num_nodes, tokens_X, top_XK)

    def rewind(self, lengths: list[int]) -> bool:
        """Keeps its successors: the target's predictions hold for text that was taken back, too."""
        return True

    def _likeliest(self, logits_V: Tensor) -> Tensor:
        return logits_V.topk(self.config.num_successors, dim=-1).indices.int()

    def _learn(self, rows_X: Tensor, tokens_X: Tensor, top_XK: Tensor) -> None:
        """Stores the successors of tokens for their rows and for later calls; of a repeated token the last ones."""
        _write(self._own_BVK.flatten(0, 1), rows_X * len(self.successors) + tokens_X, top_XK)
        if not self._is_shared:
            _write(self.successors, tokens_X, top_XK)

    def _known_nodes(self, tokens: list[int], parents: list[int]) -> TokenTree:
        """Returns the nodes after node 0 whose tokens are known; descendants of unknown tokens are unknown."""
        known = TokenTree()
        number = {0: 0}
        for node in range(1, len(tokens)):
            if tokens[node] < self.target.vocab_size:
                known.tokens.append(tokens[node])
                known.parents.append(number[parents[node]])
                known.weights.append(1.0)
                number[node] = len(known.tokens)
        return known


def _write(matrix_VK: Tensor, rows_X: Tensor, values_XK: Tensor) -> None:
    """Sets rows of a matrix, to the last values given for a row; torch leaves the result undefined otherwise."""
    order_X = rows_X.argsort(stable=True)
    sorted_X = rows_X[order_X]
    is_last_X = torch.ones_like(sorted_X, dtype=torch.bool)
    is_last_X[:-1] = sorted_X[1:] != sorted_X[:-1]
    kept_X = order_X[is_last_X]
    matrix_VK.index_copy_(0, rows_X[kept_X], values_XK[kept_X])
