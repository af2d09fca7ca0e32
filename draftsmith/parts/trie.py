"""Drafts of looked-up text: continuations are merged where they share a prefix, into one tree per row.

Node 0 is the pending token; `TokenTree` lists the nodes after it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from draftsmith.core.drafter import Session
from draftsmith.core.tree import Draft, Tree, chain


@dataclass(kw_only=True, eq=False)
class TokenTree:
    """One row's tree: entry i of each list describes node i + 1."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    """Each node's parent, an earlier node or 0."""
    weights: list[float] = field(default_factory=list)
    """Each node's weight, no greater than its parent's."""


def build_trie(continuations: Iterable[tuple[Sequence[int], float]]) -> TokenTree:
    """Returns the trie of (tokens, weight) pairs; a node's weight is the sum of those of all continuations through it.

    A node's children are in the order in which they first occur.
    """
    tree = TokenTree()
    nodes: dict[tuple[int, int], int] = {}
    for tokens, weight in continuations:
        node = 0
        for token in tokens:
            child = nodes.get((node, token))
            if child is None:
                tree.tokens.append(token)
                tree.parents.append(node)
                tree.weights.append(0.0)
                child = nodes[node, token] = len(tree.tokens)
            tree.weights[child - 1] += weight
            node = child
    return tree


def heaviest_nodes(tree: TokenTree, num_nodes: int) -> TokenTree:
    """Returns the tree of the `num_nodes` heaviest nodes, the earlier of equal ones; this keeps every node's parent."""
    weights = tree.weights
    # A sort in reverse keeps equal elements in their order.
    kept = sorted(sorted(range(len(weights)), key=weights.__getitem__, reverse=True)[:num_nodes])
    number = {0: 0} | {node + 1: new for new, node in enumerate(kept, start=1)}
    return TokenTree(
        tokens=[tree.tokens[node] for node in kept],
        parents=[number[tree.parents[node]] for node in kept],
        weights=[weights[node] for node in kept],
    )


def heaviest_path(tree: TokenTree) -> TokenTree:
    """Returns the path that takes the heaviest child at every node, the first of equal ones."""
    best: dict[int, int] = {}
    for node, parent in enumerate(tree.parents, start=1):
        if parent not in best or tree.weights[node - 1] > tree.weights[best[parent] - 1]:
            best[parent] = node
    path, node = [], 0
    while node in best:
        node = best[node]
        path.append(node - 1)
    return TokenTree(
        tokens=[tree.tokens[node] for node in path],
        parents=list(range(len(path))),
        weights=[tree.weights[node] for node in path],
    )


def sort_by_level(tree: TokenTree) -> TokenTree:
    """Returns the tree with its nodes level by level, the order that `controller.cut` needs; siblings keep theirs."""
    depths = [0]
    for parent in tree.parents:
        depths.append(depths[parent] + 1)
    order = sorted(range(len(depths)), key=depths.__getitem__)
    number = {node: new for new, node in enumerate(order)}
    return TokenTree(
        tokens=[tree.tokens[node - 1] for node in order[1:]],
        parents=[number[tree.parents[node - 1]] for node in order[1:]],
        weights=[tree.weights[node - 1] for node in order[1:]],
    )


def to_draft(session: Session, rows: Sequence[TokenTree]) -> Draft:
    """Returns the deterministic draft of each row's tree, level by level, or a chain if no tree branches.

    Shorter rows are padded with siblings of their last node. A node's confidence is its share of its parent's weight.
    """
    device = session.target.device
    is_chain = all(tree.parents == list(range(len(tree.parents))) for tree in rows)
    rows = rows if is_chain else [sort_by_level(tree) for tree in rows]
    num_nodes = [len(tree.tokens) + 1 for tree in rows]
    most = max(num_nodes)
    tokens = [
        [row[-1], *tree.tokens, *[0] * (most - used)]
        for row, tree, used in zip(session.rows, rows, num_nodes, strict=True)
    ]
    if is_chain:
        draft_tree = chain(most, device)
    else:
        parents = [[-1, *tree.parents] for tree in rows]
        draft_tree = Tree.from_parents([one + [max(one[-1], 0)] * (most - len(one)) for one in parents], device)
    return Draft(
        tokens_BN=torch.tensor(tokens, device=device),
        tree=draft_tree,
        num_nodes=num_nodes if min(num_nodes) < most else None,
        confidences=lambda: [_confidences(tree) for tree in rows],
    )


def _confidences(tree: TokenTree) -> list[float]:
    """Returns each node's share of its parent's weight; that of node 0 counts as 1."""
    weights = [1.0, *tree.weights]
    return [
        min(weight / weights[parent], 1.0) if weights[parent] else 0.0
        for parent, weight in zip(tree.parents, tree.weights, strict=True)
    ]
