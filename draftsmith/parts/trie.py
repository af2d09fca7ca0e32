"""Drafts of looked-up text: continuations joined where they begin alike, a tree of its own for every row.

Node 0 is the pending token; `Branches` lists the nodes after it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from draftsmith.core.drafter import Session
from draftsmith.core.tree import Draft, Tree, chain


@dataclass(kw_only=True, eq=False)
class TokenTree:
    """One row's tree; entry i is node i + 1, its parent an earlier node."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    """What all continuations through a node weigh: never more than its parent's."""


def build_trie(continuations: Iterable[tuple[Sequence[int], float]]) -> TokenTree:
    """Returns the trie of (tokens, weight) pairs; a node's children come in the order in which they were met."""
    branches = TokenTree()
    number: dict[tuple[int, int], int] = {}
    for tokens, weight in continuations:
        node = 0
        for token in tokens:
            child = number.get((node, token))
            if child is None:
                branches.tokens.append(token)
                branches.parents.append(node)
                branches.weights.append(0.0)
                child = number[node, token] = len(branches.tokens)
            branches.weights[child - 1] += weight
            node = child
    return branches


def heaviest_nodes(branches: TokenTree, num_nodes: int) -> TokenTree:
    """Returns the tree of its `num_nodes` heaviest nodes, of equal ones the earlier: a parent is always among them."""
    weights = branches.weights
    # Sorting in reverse leaves equal ones in their order.
    kept = sorted(sorted(range(len(weights)), key=weights.__getitem__, reverse=True)[:num_nodes])
    number = {0: 0} | {node + 1: place for place, node in enumerate(kept, start=1)}
    return TokenTree(
        tokens=[branches.tokens[node] for node in kept],
        parents=[number[branches.parents[node]] for node in kept],
        weights=[weights[node] for node in kept],
    )


def heaviest_path(branches: TokenTree) -> TokenTree:
    """Returns the one branch that takes the heaviest child at every node, of equal ones the first."""
    best: dict[int, int] = {}
    for node, parent in enumerate(branches.parents, start=1):
        if parent not in best or branches.weights[node - 1] > branches.weights[best[parent] - 1]:
            best[parent] = node
    path, node = [], 0
    while node in best:
        node = best[node]
        path.append(node - 1)
    return TokenTree(
        tokens=[branches.tokens[node] for node in path],
        parents=list(range(len(path))),
        weights=[branches.weights[node] for node in path],
    )


def sort_by_level(branches: TokenTree) -> TokenTree:
    """Returns the same tree level by level, as what is to be cut at a depth must come; siblings keep their order."""
    depths = [0]
    for parent in branches.parents:
        depths.append(depths[parent] + 1)
    order = sorted(range(len(depths)), key=depths.__getitem__)
    number = {node: place for place, node in enumerate(order)}
    return TokenTree(
        tokens=[branches.tokens[node - 1] for node in order[1:]],
        parents=[number[branches.parents[node - 1]] for node in order[1:]],
        weights=[branches.weights[node - 1] for node in order[1:]],
    )


def to_draft(session: Session, rows: Sequence[TokenTree]) -> Draft:
    """Returns the deterministic draft of each row's tree, level by level; a chain if none of them branches.

    Shorter rows are padded, with siblings of their last node.
    """
    device = session.target.device
    is_chain = all(branches.parents == list(range(len(branches.parents))) for branches in rows)
    rows = rows if is_chain else [sort_by_level(branches) for branches in rows]
    num_nodes = [len(branches.tokens) + 1 for branches in rows]
    most = max(num_nodes)
    tokens = [
        [row[-1], *branches.tokens, *[0] * (most - used)]
        for row, branches, used in zip(session.rows, rows, num_nodes, strict=True)
    ]
    if is_chain:
        tree = chain(most, device)
    else:
        parents = [[-1, *branches.parents] for branches in rows]
        tree = Tree.from_parents([one + [max(one[-1], 0)] * (most - len(one)) for one in parents], device)
    return Draft(
        tokens_BN=torch.tensor(tokens, device=device),
        tree=tree,
        num_nodes=num_nodes if min(num_nodes) < most else None,
    )
