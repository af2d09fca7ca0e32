"""Medusa-style token heads: residual heads on one hidden state, their LM heads, and the static tree that they fill.

Shape suffixes: B rows, N tokens or nodes, D hidden width, V vocabulary, K token heads, R ranks.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from draftsmith.core.drafter import Session, Step
from draftsmith.core.rows import followed
from draftsmith.core.target import Target
from draftsmith.core.tree import Draft
from draftsmith.parts import autoregressive
from draftsmith.parts.neural.shortlist import SharedHead
from draftsmith.verify.paths import pick, values_at

Paths = tuple[tuple[int, ...], ...]


class ResidualHead(nn.ModuleList):
    """A token head before its LM head: z = z + SiLU(W z + b) for each block, with W and b initialised to zero."""

    def __init__(self, width: int, num_blocks: int) -> None:
        super().__init__(nn.Linear(width, width) for _ in range(num_blocks))
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, z_BND: Tensor) -> Tensor:
        for linear in self:
            z_BND = z_BND + nn.functional.silu(linear(z_BND))
        return z_BND


class FusedHeads:
    """Residual heads evaluated in one batched product over one position per row, from copies of their weights.

    For products this small the cost of the calls exceeds that of the arithmetic.
    """

    def __init__(self, heads: Iterable[nn.Module]) -> None:
        linears = [list(head.children()) for head in heads]
        self._weights = [torch.stack([linear.weight.T for linear in level]) for level in zip(*linears, strict=True)]
        self._biases = [torch.stack([linear.bias for linear in level])[:, None] for level in zip(*linears, strict=True)]

    def __call__(self, z_BD: Tensor, num_heads: int) -> Tensor:
        """Returns the features [B, K, D] of the first `num_heads` heads."""
        z_KBD = z_BD.expand(num_heads, -1, -1)
        for weight_KDD, bias_K1D in zip(self._weights, self._biases, strict=True):
            z_KBD = z_KBD + nn.functional.silu(torch.baddbmm(bias_K1D[:num_heads], z_KBD, weight_KDD[:num_heads]))
        return z_KBD.transpose(0, 1)


def untied_lm_heads(target: Target, num_heads: int) -> nn.ModuleList:
    """Returns one LM head per token head, initialised as copies of the target's."""
    weight = target.model.get_output_embeddings().weight.detach()
    lm_heads = nn.ModuleList(nn.Linear(weight.shape[1], weight.shape[0], bias=False) for _ in range(num_heads))
    for lm_head in lm_heads:
        lm_head.weight = nn.Parameter(weight.clone())
    return lm_heads


def last_prompt_hidden(session: Session, layer: int) -> Tensor | None:
    """Returns a hidden layer at each row's last token before the pending one [B, D], None if no row has such a token.

    In a batch where only some rows have one, the others get the state at position 0.
    """
    if layer not in session.hidden:
        return None
    hidden_BND = session.hidden[layer]
    return values_at(hidden_BND, torch.tensor([max(len(row) - 2, 0) for row in session.rows], device=hidden_BND.device))


def last_accepted_hidden(step: Step, layer: int) -> Tensor:
    """Returns a hidden layer at each row's last accepted node [B, D]."""
    return values_at(step.hidden[layer], pick(step.verdict.path_BP, step.verdict.num_accepted_B))


def check_tree(paths: Paths, num_heads: int) -> None:
    """Raises ValueError unless the paths form a tree that is at most `num_heads` levels deep."""
    nodes = {tuple(path) for path in paths}
    if not nodes or len(nodes) != len(paths):
        raise ValueError("tree must list at least one node, and none twice")
    for path in paths:
        if not 1 <= len(path) <= num_heads or min(path) < 0:
            raise ValueError(f"tree node {list(path)} needs 1 to num_heads={num_heads} ranks from 0 up")
        if len(path) > 1 and tuple(path[:-1]) not in nodes:
            raise ValueError(f"tree node {list(path)} has no parent {list(path[:-1])} in the tree")


class StaticTree:
    """A tree of fixed shape: node (0, 2) is head 1's third most likely token, after head 0's most likely one.

    Of a target that verifies chains it is the path of likeliest tokens.
    """

    def __init__(self, paths: Paths, target: Target) -> None:
        # Where chains are verified, the likeliest path of the tree is drafted.
        taken = [tuple(path) for path in paths if target.takes_trees or not any(path)]
        ordered = sorted(taken, key=lambda path: (len(path), path))
        self.depth = max(map(len, ordered))
        self.num_ranks = 1 + max(map(max, ordered))
        if self.num_ranks > target.vocab_size:
            raise ValueError(
                f"a tree node has rank {self.num_ranks - 1}; the vocabulary of {target.vocab_size} has ranks below"
                f" {target.vocab_size}"
            )
        if target.is_run_whole:
            target.check_splits()
        self._trees = [tree for tree, _ in autoregressive.levels(tuple(ordered), target.device)]
        flat = [(len(path) - 1) * self.num_ranks + path[-1] for path in ordered]
        self._flat_index = torch.tensor(flat, dtype=torch.long, device=target.device)

    def draft(
        self, pending_B: Tensor, logits_BKW: Tensor, vocabulary: autoregressive.DraftVocabulary | None = None
    ) -> Draft:
        """Returns the tree cut to K levels, its nodes filled with each head's most likely tokens."""
        tree = self._trees[logits_BKW.shape[1]]
        best_BKR, top_BKR = autoregressive.top(logits_BKW, self.num_ranks, vocabulary)
        probs_BKR = autoregressive.probabilities(best_BKR, logits_BKW)
        index_N = self._flat_index[: tree.num_nodes - 1]
        tokens_BN = torch.cat([pending_B[:, None], top_BKR.flatten(1)[:, index_N]], dim=1)
        return Draft(tokens_BN=tokens_BN, tree=tree, confidences=lambda: probs_BKR.flatten(1)[:, index_N].tolist())


class TokenHeadsState:
    """The draft state of token heads during one `generate` call: the target's last hidden state of each row."""

    def __init__(
        self,
        session: Session,
        tree: StaticTree,
        heads: Iterable[nn.Module],
        lm_heads: nn.ModuleList | None,
        shared: SharedHead | None = None,
    ) -> None:
        self._session, self._tree, self._lm_heads = session, tree, lm_heads
        self._shared = shared or SharedHead(session.target, 0)
        self._layer = session.target.num_layers
        self._fused_heads = FusedHeads(heads)
        # Rows of one token have no hidden state yet; if all rows are such, the first step is a plain one.
        self._last_BD = last_prompt_hidden(session, self._layer)

    def change_rows(self, origins: list[int | None], added: "TokenHeadsState | None") -> None:
        """Follows rows as `Drafter.change_rows` does."""
        assert self._last_BD is not None, "rows have a hidden state after their first step"
        self._last_BD = followed(origins, self._last_BD, added._last_BD if added is not None else None)

    def propose(self, budget: int) -> Draft:
        """Returns the static tree, at most `budget` levels deep, from the heads' own LM heads or the shared one."""
        if self._last_BD is None:
            return self._session.empty_draft()
        target = self._session.target
        features_BKD = self._fused_heads(target.norm(self._last_BD), min(budget, self._tree.depth))
        pending_B = self._session.pending()
        if self._lm_heads is None:
            return self._tree.draft(pending_B, self._shared.listed(features_BKD), self._shared.shortlist)
        pairs = zip(self._lm_heads, features_BKD.unbind(1), strict=False)
        return self._tree.draft(pending_B, torch.stack([lm_head(z_BD) for lm_head, z_BD in pairs], dim=1))

    def observe(self, step: Step) -> None:
        """Stores the hidden state at the end of each row's accepted path."""
        self._last_BD = last_accepted_hidden(step, self._layer)
