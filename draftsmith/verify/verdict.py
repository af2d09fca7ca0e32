"""What every verifier returns, and the walk down a tree that several share.

Shape suffixes: B rows, N nodes, V vocabulary, P length of the longest accepted path.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from draftsmith.tree import Draft


@dataclass(frozen=True, kw_only=True, eq=False)
class Verdict:
    """The accepted path of each row and the token that follows it."""

    path_BP: Tensor
    """Accepted nodes from node 0 on; entries beyond `num_accepted` repeat the last one."""
    num_accepted_B: Tensor
    """Drafted nodes accepted, node 0 not counted."""
    next_token_B: Tensor
    """The token after the path: correction or bonus."""


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
    end_B1 = score_BN.argmax(1, keepdim=True)
    num_accepted_B = tree.depths_RN.expand_as(draft.tokens_BN).gather(1, end_B1)[:, 0]
    path = [end_B1]
    for _ in range(tree.depth):
        path.append(parents_BN.gather(1, path[-1]))
    # The climb ends in zeros for short paths; turned round, each row starts where its own zeros end.
    climb_BP = torch.cat(path, dim=1)
    steps_BP = num_accepted_B[:, None] - torch.arange(tree.depth + 1, device=end_B1.device)
    path_BP = climb_BP.gather(1, steps_BP.clamp(min=0))
    return Verdict(path_BP=path_BP, num_accepted_B=num_accepted_B, next_token_B=next_BN.gather(1, end_B1)[:, 0])
