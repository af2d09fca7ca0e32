"""What verifiers share: walks down a tree, sets of siblings, what a rejection leaves.

Shape suffixes: B rows, N nodes, V vocabulary, P length of the longest accepted path, X some of the rows.
"""

import torch
from torch import Tensor

from draftsmith.core.sampling import draw
from draftsmith.core.tree import Draft, Verdict


def walk(choice_BN: Tensor, draft: Draft) -> Verdict:
    """Follows, from node 0, the child that equals the token chosen at each node; the choice at the end comes next.

    Each node's choice is made once, whatever its children are, so that the output follows the law of the choices.
    """
    tree, tokens_BN = draft.tree, draft.tokens_BN
    parents_BN = tree.parents_RN.clamp(min=0).expand_as(tokens_BN)
    is_chosen_BN = tokens_BN == choice_BN.gather(1, parents_BN)
    if (valid_BN := draft.valid_BN()) is not None:
        is_chosen_BN = is_chosen_BN & valid_BN
    is_chosen_BN[:, 0] = True
    if not tree.is_chain:
        # Siblings that agree stand for one text, whose next token must not be chosen twice: the first one counts.
        is_twin_BNN = (parents_BN[:, :, None] == parents_BN[:, None]) & (tokens_BN[:, :, None] == tokens_BN[:, None])
        is_chosen_BN[:, 1:] &= ~is_twin_BNN[:, 1:, 1:].tril(-1).any(2)
    return follow(is_chosen_BN, draft, choice_BN)


def follow(is_accepted_BN: Tensor, draft: Draft, next_BN: Tensor) -> Verdict:
    """Returns the deepest path of accepted nodes, the first such in node order, and `next_BN` at its end."""
    tree = draft.tree
    if tree.is_chain:
        num_accepted_B = is_accepted_BN[:, 1:].to(torch.long).cumprod(1).sum(1)
        order_P = torch.arange(tree.num_nodes, device=next_BN.device)
        path_BP = torch.minimum(order_P, num_accepted_B[:, None])
        return Verdict(
            path_BP=path_BP,
            num_accepted_B=num_accepted_B,
            next_token_B=next_BN.gather(1, num_accepted_B[:, None])[:, 0],
        )
    parents_BN = tree.parents_RN.clamp(min=0).expand_as(draft.tokens_BN)
    reached_BN = is_accepted_BN
    for _ in range(tree.depth - 1):
        reached_BN = is_accepted_BN & reached_BN.gather(1, parents_BN)
    score_BN = torch.where(reached_BN, tree.depths_RN, -1)
    end_B = score_BN.argmax(1)
    path_BP, num_accepted_B = path_to(end_B, draft)
    return Verdict(path_BP=path_BP, num_accepted_B=num_accepted_B, next_token_B=next_BN.gather(1, end_B[:, None])[:, 0])


def same_text(draft: Draft) -> Tensor:
    """Returns, for each node [B, N], the first node that stands for the same text, itself if there is none before it.

    Siblings may agree unless they were drawn without replacement; they then share one text, whose children are those of
    all of them.
    """
    tokens_BN, num_nodes = draft.tokens_BN, draft.tree.num_nodes
    parents_BN = draft.tree.parents_RN.clamp(min=0).expand_as(tokens_BN)
    first_BN = torch.arange(num_nodes, device=tokens_BN.device).expand_as(tokens_BN)
    if draft.sampling_scheme in ("without_replacement", "top_and_drawn") or draft.tree.is_chain:
        return first_BN
    agree_BNN = tokens_BN[:, :, None] == tokens_BN[:, None]
    agree_BNN[:, :, 0] = agree_BNN[:, 0] = False
    agree_BNN[:, 0, 0] = True
    if (valid_BN := draft.valid_BN()) is not None:
        agree_BNN &= valid_BN[:, None]
        agree_BNN |= torch.eye(num_nodes, dtype=torch.bool, device=tokens_BN.device)
    for _ in range(draft.tree.depth):
        above_BN = first_BN.gather(1, parents_BN)
        is_twin_BNN = agree_BNN & (above_BN[:, :, None] == above_BN[:, None])
        first_BN = is_twin_BNN.to(torch.uint8).argmax(-1)
    return first_BN


class Siblings:
    """The children of each text in a tree, in node order."""

    def __init__(self, draft: Draft) -> None:
        tokens_BN = draft.tokens_BN
        self._parents_BN = draft.tree.parents_RN.clamp(min=0).expand_as(tokens_BN)
        self._tokens_BN = tokens_BN
        self.first_BN = same_text(draft)
        self.above_BN = self.first_BN.gather(1, self._parents_BN)
        """The text that each node goes on."""
        self.is_child_BN = torch.ones_like(tokens_BN, dtype=torch.bool)
        """Whether it may be accepted."""
        if (valid_BN := draft.valid_BN()) is not None:
            self.is_child_BN &= valid_BN
        if draft.draft_probs_BNV is not None:
            # A law with fewer tokens than children wanted of it has filled the rest with what it excludes.
            self.is_child_BN &= self.chances(draft.draft_probs_BNV) > 0
        self.is_child_BN[:, 0] = False

    def chances(self, probs_BNV: Tensor) -> Tensor:
        """Returns what the law after each node's parent gives its token [B, N]."""
        rows_B1 = torch.arange(len(self._tokens_BN), device=self._tokens_BN.device)[:, None]
        return probs_BNV[rows_B1, self._parents_BN, self._tokens_BN]

    def of(self, text_B: Tensor) -> Tensor:
        """Returns which nodes [B, N] are children of each row's text."""
        return self.is_child_BN & (self.above_BN == text_B[:, None])


def at(values_BNV: Tensor, node_X: Tensor, row_X: Tensor | None = None) -> Tensor:
    """Returns the law, or whatever else stands at nodes, [X, V] at a node of each row, or of those `row_X` names.

    Nodes past the last law have no children, and any law will do.
    """
    num_rows, num_laws, size = values_BNV.shape
    row_X = torch.arange(num_rows, device=node_X.device) if row_X is None else row_X
    # Whole rows are copied several times as fast as by indices of two dimensions.
    place_X = row_X * num_laws + node_X.clamp(max=num_laws - 1)
    return values_BNV.reshape(num_rows * num_laws, size).index_select(0, place_X)


def pick(values_BX: Tensor, index_B: Tensor) -> Tensor:
    """Returns each row's value [B] at its own index, as the probability of its token."""
    return values_BX.gather(1, index_B[:, None])[:, 0]


def path_to(end_B: Tensor, draft: Draft) -> tuple[Tensor, Tensor]:
    """Returns the nodes from node 0 to each row's `end_B`, padded with it [B, P], and how many follow node 0 [B]."""
    tree = draft.tree
    parents_BN = tree.parents_RN.clamp(min=0).expand_as(draft.tokens_BN)
    num_accepted_B = tree.depths_RN.expand_as(draft.tokens_BN).gather(1, end_B[:, None])[:, 0]
    climb = [end_B[:, None]]
    for _ in range(tree.depth):
        climb.append(parents_BN.gather(1, climb[-1]))
    # The climb ends in zeros for short paths; turned round, each row starts where its own zeros end.
    steps_BP = num_accepted_B[:, None] - torch.arange(tree.depth + 1, device=end_B.device)
    return torch.cat(climb, dim=1).gather(1, steps_BP.clamp(min=0)), num_accepted_B


def drawn_at(
    end_B: Tensor, next_probs_BV: Tensor, target_probs_BNV: Tensor, uniform_B: Tensor, draft: Draft
) -> Verdict:
    """Returns the verdict of a path that ends at `end_B`, the next token drawn from `law_BV`, not normalised.

    Where rounding has left nothing of that law the target's own takes its place: two equal laws leave no residual.
    """
    is_empty_B = next_probs_BV.sum(-1) <= 0
    if is_empty_B.any():
        next_probs_BV = torch.where(is_empty_B[:, None], at(target_probs_BNV, end_B), next_probs_BV)
    path_BP, num_accepted_B = path_to(end_B, draft)
    return Verdict(
        path_BP=path_BP,
        num_accepted_B=num_accepted_B,
        next_token_B=draw(next_probs_BV, uniform_B),
        next_probs_BV=next_probs_BV,
    )
