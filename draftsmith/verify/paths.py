"""Parts of verifiers: following accepted paths in a tree, sets of siblings, sampling the next token.

Shape suffixes: B rows, N nodes, V vocabulary, P length of the longest accepted path, X a subset of the rows.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from draftsmith.core.sampling import draw
from draftsmith.core.tree import Draft, Verdict


def walk(choice_BN: Tensor, draft: Draft) -> Verdict:
    """Follows, from node 0, the child that equals the token chosen at each node; the choice at the last one is next.

    Each node's choice is made once and does not depend on its children, so the output has the choices' distribution.
    """
    tree, tokens_BN = draft.tree, draft.tokens_BN
    parents_BN = tree.parents_RN.clamp(min=0).expand_as(tokens_BN)
    is_chosen_BN = tokens_BN == choice_BN.gather(1, parents_BN)
    if (valid_BN := draft.valid_BN()) is not None:
        is_chosen_BN = is_chosen_BN & valid_BN
    is_chosen_BN[:, 0] = True
    if not tree.is_chain:
        # Siblings with the same token are one text, whose next token must not be chosen twice: only the first counts.
        is_same_BNN = (parents_BN[:, :, None] == parents_BN[:, None]) & (tokens_BN[:, :, None] == tokens_BN[:, None])
        is_chosen_BN[:, 1:] &= ~is_same_BNN[:, 1:, 1:].tril(-1).any(2)
    return follow(is_chosen_BN, draft, choice_BN)


def follow(is_accepted_BN: Tensor, draft: Draft, next_BN: Tensor) -> Verdict:
    """Returns the deepest path of accepted nodes, the first of equals in node order, and `next_BN` at its end."""
    tree = draft.tree
    if tree.is_chain:
        num_accepted_B = is_accepted_BN[:, 1:].to(torch.long).cumprod(1).sum(1)
        order_P = torch.arange(tree.num_nodes, device=next_BN.device)
        path_BP = torch.minimum(order_P, num_accepted_B[:, None])
        return Verdict(path_BP=path_BP, num_accepted_B=num_accepted_B, next_token_B=pick(next_BN, num_accepted_B))
    parents_BN = tree.parents_RN.clamp(min=0).expand_as(draft.tokens_BN)
    reached_BN = is_accepted_BN
    for _ in range(tree.depth - 1):
        reached_BN = is_accepted_BN & reached_BN.gather(1, parents_BN)
    end_B = torch.where(reached_BN, tree.depths_RN, -1).argmax(1)
    return verdict_at(end_B, pick(next_BN, end_B), draft)


def first_duplicates(draft: Draft) -> Tensor:
    """Returns, for each node [B, N], the first node with the same text, which is itself if none before it has it.

    Siblings may hold the same token unless they were drawn without replacement; they are then one text, whose children
    are the children of all of them.
    """
    tokens_BN, num_nodes = draft.tokens_BN, draft.tree.num_nodes
    parents_BN = draft.tree.parents_RN.clamp(min=0).expand_as(tokens_BN)
    first_BN = torch.arange(num_nodes, device=tokens_BN.device).expand_as(tokens_BN)
    if draft.sampling_scheme in ("without_replacement", "top_and_drawn") or draft.tree.is_chain:
        return first_BN
    same_token_BNN = tokens_BN[:, :, None] == tokens_BN[:, None]
    same_token_BNN[:, :, 0] = same_token_BNN[:, 0] = False
    same_token_BNN[:, 0, 0] = True
    if (valid_BN := draft.valid_BN()) is not None:
        same_token_BNN &= valid_BN[:, None]
        same_token_BNN |= torch.eye(num_nodes, dtype=torch.bool, device=tokens_BN.device)
    for _ in range(draft.tree.depth):
        above_BN = first_BN.gather(1, parents_BN)
        same_text_BNN = same_token_BNN & (above_BN[:, :, None] == above_BN[:, None])
        first_BN = same_text_BNN.to(torch.uint8).argmax(-1)
    return first_BN


class Siblings:
    """The children of each text in a tree, in node order; the first node with a text stands for it."""

    def __init__(self, draft: Draft) -> None:
        tokens_BN = draft.tokens_BN
        self._parents_BN = draft.tree.parents_RN.clamp(min=0).expand_as(tokens_BN)
        self._tokens_BN = tokens_BN
        self.first_BN = first_duplicates(draft)
        self.above_BN = self.first_BN.gather(1, self._parents_BN)
        """The text before each node's token."""
        self.is_child_BN = torch.ones_like(tokens_BN, dtype=torch.bool)
        """True for nodes that may be accepted."""
        if (valid_BN := draft.valid_BN()) is not None:
            self.is_child_BN &= valid_BN
        if draft.draft_probs_BNV is not None:
            # Where fewer tokens have a probability above 0 than there are children, the rest are fillers.
            self.is_child_BN &= self.token_probs(draft.draft_probs_BNV) > 0
        self.is_child_BN[:, 0] = False

    def token_probs(self, probs_BNV: Tensor) -> Tensor:
        """Returns each node's token's probability [B, N] after its parent."""
        rows_B1 = torch.arange(len(self._tokens_BN), device=self._tokens_BN.device)[:, None]
        return probs_BNV[rows_B1, self._parents_BN, self._tokens_BN]

    def of(self, text_B: Tensor) -> Tensor:
        """Returns a mask [B, N] of the children of each row's text."""
        return self.is_child_BN & (self.above_BN == text_B[:, None])


def values_at(values_BNV: Tensor, node_X: Tensor, row_X: Tensor | None = None) -> Tensor:
    """Returns probabilities, or other values [X, V], at one node of each row, or of each row in `row_X`.

    A node past the last one gets the last one's: draft probabilities end before the leaves, which have no children.
    """
    num_rows, num_nodes, size = values_BNV.shape
    row_X = torch.arange(num_rows, device=node_X.device) if row_X is None else row_X
    # index_select copies whole rows several times as fast as indexing by two dimensions.
    index_X = row_X * num_nodes + node_X.clamp(max=num_nodes - 1)
    return values_BNV.reshape(num_rows * num_nodes, size).index_select(0, index_X)


def pick(values_BX: Tensor, index_B: Tensor) -> Tensor:
    """Returns each row's value [B] at its own index."""
    return values_BX.gather(1, index_B[:, None])[:, 0]


def verdict_at(end_B: Tensor, next_token_B: Tensor, draft: Draft, next_probs_BV: Tensor | None = None) -> Verdict:
    """Returns the verdict that accepts the path from node 0 to each row's `end_B`."""
    tree = draft.tree
    parents_BN = tree.parents_RN.clamp(min=0).expand_as(draft.tokens_BN)
    num_accepted_B = pick(tree.depths_RN.expand_as(draft.tokens_BN), end_B)
    upwards = [end_B[:, None]]
    for _ in range(tree.depth):
        upwards.append(parents_BN.gather(1, upwards[-1]))
    # Upwards, short paths end in zeros; reversed, each row starts where its own zeros end.
    steps_BP = num_accepted_B[:, None] - torch.arange(tree.depth + 1, device=end_B.device)
    path_BP = torch.cat(upwards, dim=1).gather(1, steps_BP.clamp(min=0))
    return Verdict(
        path_BP=path_BP, num_accepted_B=num_accepted_B, next_token_B=next_token_B, next_probs_BV=next_probs_BV
    )


def follow_choices(choose: Callable[[Tensor], Tensor], draft: Draft) -> Verdict:
    """Follows, from node 0, the child that equals the token chosen at each node; the choice at the last one is next.

    `choose` returns the token [B] chosen at each row's node [B], the same each time, and is called on the path alone.
    """
    siblings = Siblings(draft)
    end_B = torch.zeros_like(draft.tokens_BN[:, 0])
    while True:
        chosen_B = choose(end_B)
        is_chosen_BN = siblings.of(end_B) & (draft.tokens_BN == chosen_B[:, None])
        if not is_chosen_BN.any():
            return verdict_at(end_B, chosen_B, draft)
        end_B = torch.where(is_chosen_BN.any(1), is_chosen_BN.to(torch.uint8).argmax(1), end_B)


def sample_next(
    end_B: Tensor, next_probs_BV: Tensor, target_probs_BNV: Tensor, uniform_B: Tensor, draft: Draft
) -> Verdict:
    """Returns the verdict of the path to `end_B`, with the next token drawn from `next_probs_BV`, not normalised.

    Where rounding leaves a sum of 0, as the residual of two equal distributions, the target's probabilities are used.
    """
    is_empty_B = next_probs_BV.sum(-1) <= 0
    if is_empty_B.any():
        next_probs_BV = torch.where(is_empty_B[:, None], values_at(target_probs_BNV, end_B), next_probs_BV)
    return verdict_at(end_B, draw(next_probs_BV, uniform_B), draft, next_probs_BV)
