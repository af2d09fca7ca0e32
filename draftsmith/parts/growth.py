"""Drafts of a model that is asked again at every level: chains, trees of a fixed shape, or grown where it is confident.

The draft model is a function of the draft so far: its tokens [B, N], its shape, and the first node that the model has
not been given yet, all before that being as they were. It returns logits [B, M, V] at the M new nodes.

Shape suffixes: B rows, N nodes, M new nodes, F nodes that are given children, C children each,
V vocabulary.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from draftsmith.core.drafter import Session
from draftsmith.core.sampling import draw
from draftsmith.core.tree import Draft, SamplingScheme, Tree, chain

Paths = tuple[tuple[int, ...], ...]
Model = Callable[[Tensor, Tree, int], Tensor]
SIBLINGS = ("without_replacement", "independent", "top_and_drawn", "deterministic")


class Shape(Protocol):
    """What the configuration of a drafter says of its drafts: chains, or trees that grow."""

    @property
    def num_draft(self) -> int:
        """Most levels."""

    @property
    def width(self) -> int:
        """If not 0, so many nodes a level are given so many children."""

    @property
    def num_nodes(self) -> int:
        """Nodes kept of such a tree."""


def check_shape(shape: Shape) -> None:
    """Raises ValueError unless there can be such drafts."""
    if shape.num_draft < 1:
        raise ValueError(f"num_draft is {shape.num_draft}; it must be at least 1")
    if shape.width < 0 or shape.num_nodes < 1:
        raise ValueError(f"width {shape.width} must not be negative and num_nodes {shape.num_nodes} at least 1")


def draft(model: Model, session: Session, shape: Shape, budget: int) -> Draft:
    """Returns a draft of this shape, no deeper than `budget`."""
    depth = min(budget, shape.num_draft)
    if depth < 1:
        return session.only_pending()
    if shape.width:
        return grow(model, session, width=shape.width, num_nodes=shape.num_nodes, depth=depth)
    return line(model, session, depth)


def line(model: Model, session: Session, num_draft: int) -> Draft:
    """Returns a chain, each token drawn from the model's law after those before it (2211.17192; 2302.01318).

    It ends where the session's length policy says so, which is asked after each token.
    """
    device, sampling = session.target.device, session.sampling
    tokens_BN, laws = session.pending()[:, None], []
    num_nodes, is_drafting = [1] * len(session.rows), [True] * len(session.rows)
    while tokens_BN.shape[1] <= num_draft and any(is_drafting):
        length = tokens_BN.shape[1]
        logits_BV = model(tokens_BN, chain(length, device), length - 1)[:, -1]
        if sampling.is_greedy:
            token_B = logits_BV.argmax(-1)
        else:
            laws.append(sampling.probs(logits_BV))
            token_B = draw(laws[-1], session.uniforms())
        confidences = logits_BV.float().softmax(-1).gather(1, token_B[:, None])[:, 0].tolist()
        tokens_BN = torch.cat([tokens_BN, token_B[:, None]], dim=1)
        for row, is_row_drafting in enumerate(is_drafting):
            num_nodes[row] += is_row_drafting
            is_drafting[row] = is_row_drafting and session.should_continue(row, confidences[row])
    return Draft(
        tokens_BN=tokens_BN,
        tree=chain(tokens_BN.shape[1], device),
        num_nodes=num_nodes if min(num_nodes) < tokens_BN.shape[1] else None,
        draft_probs_BNV=torch.stack(laws, dim=1) if laws else None,
        sampling_scheme="independent" if laws else "deterministic",
    )


def check_paths(paths: Paths) -> None:
    """Raises ValueError unless every node's parent and, as draws come in turn, its earlier siblings are there too."""
    nodes = set(paths)
    for path in paths:
        if not path or min(path) < 0:
            raise ValueError(f"tree node {list(path)} must be a list of ranks from 0 up")
        before = path[:-1] if path[-1] == 0 else (*path[:-1], path[-1] - 1)
        if before and before not in nodes:
            raise ValueError(f"tree node {list(path)} needs node {list(before)}, which is not in the tree")
    if len(nodes) < len(paths):
        raise ValueError("the tree lists a node twice")


def check_siblings(sampling_scheme: str) -> None:
    """Raises ValueError unless siblings can be drawn so."""
    if sampling_scheme not in SIBLINGS:
        raise ValueError(f"siblings is {sampling_scheme!r}; there are {', '.join(SIBLINGS)}")


@lru_cache(maxsize=64)
def levels(paths: Paths, device: torch.device) -> list[tuple[Tree, dict[int, list[int]]]]:
    """Returns, for each level from node 0 on, the tree down to it and which of its nodes get how many children."""
    ordered = [(), *sorted(paths, key=lambda path: (len(path), path))]
    number = {path: node for node, path in enumerate(ordered)}
    found = []
    for level in range(max(map(len, ordered)) + 1):
        kept = [path for path in ordered if len(path) <= level]
        tree = Tree.from_parents([[-1] + [number[path[:-1]] for path in kept[1:]]], device)
        counts = {path: sum(child[:-1] == path for child in ordered[1:]) for path in kept if len(path) == level}
        by_count: dict[int, list[int]] = {}
        for path, count in counts.items():
            if count:
                by_count.setdefault(count, []).append(number[path])
        found.append((tree, by_count))
    return found


def fill(model: Model, session: Session, paths: Paths, sampling_scheme: SamplingScheme, depth: int) -> Draft:
    """Returns a tree of a fixed shape cut to `depth` levels, its siblings drawn as `drawn` says.

    Greedily, and where they are to be deterministic, they are their parent's likeliest. A node's children come in the
    order in which they were drawn.
    """
    device, sampling = session.target.device, session.sampling
    plan = levels(paths, device)
    is_drawn = sampling_scheme != "deterministic" and not sampling.is_greedy
    tokens_BN = session.pending()[:, None]
    laws: list[Tensor] = []
    for level in range(min(depth, len(plan) - 1)):
        tree, by_count = plan[level]
        first = int((tree.depths_RN[0] < level).sum())
        logits_BMV = model(tokens_BN, tree, first)
        if is_drawn:
            laws.append(sampling.probs(logits_BMV))
        children: dict[int, Tensor] = {}
        for count, nodes in by_count.items():
            places = [node - first for node in nodes]
            if is_drawn:
                drawn_BFC = draw_siblings(laws[-1][:, places], count, sampling_scheme, session.generator)
            else:
                drawn_BFC = logits_BMV[:, places].topk(count, dim=-1).indices
            children |= dict(zip(nodes, drawn_BFC.unbind(1), strict=True))
        tokens_BN = torch.cat([tokens_BN, *(children[node] for node in sorted(children))], dim=1)
    tree = plan[min(depth, len(plan) - 1)][0]
    return Draft(
        tokens_BN=tokens_BN,
        tree=tree,
        draft_probs_BNV=torch.cat(laws, dim=1) if laws else None,
        sampling_scheme=sampling_scheme if laws else "deterministic",
    )


def draw_siblings(probs_BFV: Tensor, count: int, sampling_scheme: SamplingScheme, generator: torch.Generator) -> Tensor:
    """Returns tokens [B, F, C] of siblings, in the order in which they are drawn from their parent's law.

    Without replacement they are the first to arrive in a race of exponential clocks whose rates are the law: the next
    one follows the law less those before it. A law with too few tokens is filled with some that it excludes.
    """
    shape, device = probs_BFV.shape[:-1], probs_BFV.device

    def uniforms(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator, dtype=torch.float64).to(device)

    if sampling_scheme == "without_replacement":
        # A token's arrival is -ln(u) / law.
        arrivals_BFV = -uniforms(*probs_BFV.shape).log_() / probs_BFV
        return arrivals_BFV.topk(count, dim=-1, largest=False).indices
    if sampling_scheme == "top_and_drawn":
        top_BFC = probs_BFV.topk(count - 1, dim=-1).indices
        rest_BFV = probs_BFV.scatter(-1, top_BFC, 0.0)
        return torch.cat([top_BFC, draw(rest_BFV, uniforms(*shape))[..., None]], dim=-1)
    assert sampling_scheme == "independent"
    return torch.stack([draw(probs_BFV, uniforms(*shape)) for _ in range(count)], dim=-1)


def grow(model: Model, session: Session, *, width: int, num_nodes: int, depth: int) -> Draft:
    """Returns, for each row, the `num_nodes` nodes that the draft model finds likeliest; EAGLE-2's trees, 2406.16858.

    Every level asks for the `width` best children of its `width` best nodes, by the product of probabilities along the
    path, and of all children met the best are kept. A row's tree depends on laws that no token was drawn from: it is
    deterministic. Its nodes are in another order than they were given to the model in, save node 0.
    """
    num_rows, device = len(session.rows), session.target.device
    tokens, parents = [[row[-1]] for row in session.rows], [[-1] for _ in session.rows]
    scores = [[0.0] for _ in session.rows]
    # What is fed: node 0 and each level's best, which come to lie in the same places in every row.
    fed = [[0] for _ in session.rows]
    for level in range(depth):
        places = [{node: place for place, node in enumerate(nodes)} for nodes in fed]
        shape = Tree.from_parents(
            [[places[row].get(parents[row][node], -1) for node in fed[row]] for row in range(num_rows)], device
        )
        fed_BN = torch.tensor([[tokens[row][node] for node in fed[row]] for row in range(num_rows)], device=device)
        num_asked = 1 if level == 0 else width
        chances_BFV = model(fed_BN, shape, len(fed[0]) - num_asked).float().log_softmax(-1)
        best = chances_BFV.topk(width, dim=-1)
        for row, (logs, ids) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            asked = fed[row][-num_asked:]
            new = []
            for node, node_logs, node_ids in zip(asked, logs, ids, strict=True):
                for log, token in zip(node_logs, node_ids, strict=True):
                    new.append(len(tokens[row]))
                    tokens[row].append(token)
                    parents[row].append(node)
                    scores[row].append(scores[row][node] + log)
            best_new = sorted(new, key=lambda node: -scores[row][node])[:width]
            fed[row] += sorted(best_new)
    kept = [sorted(sorted(range(len(one)), key=lambda node: (-one[node], node))[: num_nodes + 1]) for one in scores]
    number = [{node: place for place, node in enumerate(nodes)} for nodes in kept]
    return Draft(
        tokens_BN=torch.tensor([[tokens[row][node] for node in kept[row]] for row in range(num_rows)], device=device),
        tree=Tree.from_parents(
            [[number[row].get(parents[row][node], -1) for node in kept[row]] for row in range(num_rows)], device
        ),
    )
