"""Autoregressive drafting with one forward of the draft model per level: chains, static trees and dynamic trees.

The draft model is a function of the draft so far: its tokens [B, N], its tree, and the first node that the model has
not processed yet; earlier nodes are unchanged. It returns logits [B, M, W] at the M new nodes, of the tokens of its
`DraftVocabulary`, or of all tokens.

Shape suffixes: B rows, N nodes, M new nodes, F nodes that get children, C children of each, V vocabulary, W tokens of
the draft vocabulary.
"""

import math
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from draftsmith.core.drafter import Session
from draftsmith.core.sampling import draw, uniforms
from draftsmith.core.tree import Draft, SamplingScheme, Tree, chain
from draftsmith.parts.checks import MAX_NODES, check_at_least

Paths = tuple[tuple[int, ...], ...]
"""A tree's nodes, each as the ranks among siblings along its path; node 0 is left out."""
Model = Callable[[Tensor, Tree, int], Tensor]
SIBLINGS = ("without_replacement", "independent", "top_and_drawn", "deterministic")


class DraftVocabulary(Protocol):
    """The tokens that a draft model computes logits for, such as a `Shortlist`.

    The likeliest tokens are found among its logits; only where tokens are sampled are these spread over the vocabulary.
    """

    def __len__(self) -> int: ...

    def tokens(self, indices: Tensor) -> Tensor:
        """Returns the tokens at these indices."""

    def spread(self, logits_W: Tensor) -> Tensor:
        """Returns logits [..., V], so low for all other tokens that their probability is 0."""


class Shape(Protocol):
    """The settings of a drafter's configuration that select chains or dynamic trees."""

    @property
    def num_draft(self) -> int:
        """Maximum depth."""

    @property
    def width(self) -> int:
        """Nodes expanded per level and children of each, of a dynamic tree; 0 for chains."""

    @property
    def num_nodes(self) -> int:
        """Nodes kept of a dynamic tree."""


def check_shape(shape: Shape) -> None:
    """Raises ValueError if a setting is out of range."""
    check_at_least(shape, 1, "num_draft", "num_nodes", most=MAX_NODES)
    check_at_least(shape, 0, "width", most=MAX_NODES)


def top(logits_W: Tensor, count: int, vocabulary: DraftVocabulary | None = None) -> tuple[Tensor, Tensor]:
    """Returns the `count` largest logits [..., count] and their tokens, of a model that drafts this vocabulary."""
    if vocabulary is not None and count > len(vocabulary):
        logits_W, vocabulary = vocabulary.spread(logits_W), None
    # For one token `max` is several times as fast as `topk`, and as `argmax` in bfloat16 on a CPU.
    values, indices = logits_W.max(-1, keepdim=True) if count == 1 else logits_W.topk(count, dim=-1)
    return values, indices if vocabulary is None else vocabulary.tokens(indices)


def probabilities(logits_C: Tensor, logits_W: Tensor) -> Tensor:
    """Returns the probabilities [..., C] of tokens from their logits and those of all tokens [..., W]."""
    return (logits_C.float() - logits_W.float().logsumexp(-1, keepdim=True)).exp()


def _spread(logits_W: Tensor, vocabulary: DraftVocabulary | None) -> Tensor:
    return logits_W if vocabulary is None else vocabulary.spread(logits_W)


def draft(
    model: Model, session: Session, shape: Shape, budget: int, vocabulary: DraftVocabulary | None = None
) -> Draft:
    """Drafts a chain or, if `shape.width` is not 0, a dynamic tree, no deeper than `budget`."""
    depth = min(budget, shape.num_draft)
    if depth < 1:
        return session.empty_draft()
    if shape.width:
        return draft_dynamic_tree(
            model, session, width=shape.width, num_nodes=shape.num_nodes, depth=depth, vocabulary=vocabulary
        )
    return draft_chain(model, session, depth, vocabulary)


def draft_chain(model: Model, session: Session, num_draft: int, vocabulary: DraftVocabulary | None = None) -> Draft:
    """Drafts a chain, each token sampled from the model's distribution after those before it (2211.17192; 2302.01318).

    A row stops early when `session.should_continue` returns False after a token.
    """
    device, sampling = session.target.device, session.sampling
    tokens_BN, probs = session.pending()[:, None], []
    num_nodes, is_drafting = [1] * len(session.rows), [True] * len(session.rows)
    found: list[list[float]] = [[] for _ in session.rows]
    while tokens_BN.shape[1] <= num_draft and any(is_drafting):
        length = tokens_BN.shape[1]
        logits_BW = model(tokens_BN, chain(length, device), length - 1)[:, -1]
        if sampling.is_greedy:
            logit_B1, token_B1 = top(logits_BW, 1, vocabulary)
            token_B = token_B1[:, 0]
        else:
            logits_BW = _spread(logits_BW, vocabulary)
            probs.append(sampling.probs(logits_BW))
            token_B = session.draw(probs[-1], length - 1)
            logit_B1 = logits_BW.gather(1, token_B[:, None])
        confidences = probabilities(logit_B1, logits_BW)[:, 0].tolist()
        tokens_BN = torch.cat([tokens_BN, token_B[:, None]], dim=1)
        for row, is_row_drafting in enumerate(is_drafting):
            num_nodes[row] += is_row_drafting
            found[row].append(confidences[row])
            is_drafting[row] = is_row_drafting and session.should_continue(row, confidences[row])
    return Draft(
        tokens_BN=tokens_BN,
        tree=chain(tokens_BN.shape[1], device),
        num_nodes=num_nodes if min(num_nodes) < tokens_BN.shape[1] else None,
        draft_probs_BNV=torch.stack(probs, dim=1) if probs else None,
        sampling_scheme="independent" if probs else "deterministic",
        confidences=lambda: found,
    )


def check_paths(paths: Paths) -> None:
    """Raises ValueError for a repeated node, or one whose parent or earlier siblings are not in the tree.

    Earlier siblings are needed because siblings are drawn in order.
    """
    nodes = set(paths)
    for path in paths:
        if not path or min(path) < 0:
            raise ValueError(f"tree node {list(path)} must be a non-empty list of ranks from 0 up")
        before = path[:-1] if path[-1] == 0 else (*path[:-1], path[-1] - 1)
        if before and before not in nodes:
            raise ValueError(f"tree node {list(path)} needs node {list(before)}, which is not in the tree")
    if len(nodes) < len(paths):
        raise ValueError("the tree lists a node twice")


def check_siblings(sampling_scheme: str) -> None:
    """Raises ValueError for an unknown sampling scheme of siblings."""
    if sampling_scheme not in SIBLINGS:
        raise ValueError(f"siblings is {sampling_scheme!r}; it must be one of {', '.join(SIBLINGS)}")


@lru_cache(maxsize=64)
def levels(paths: Paths, device: torch.device) -> list[tuple[Tree, dict[int, list[int]]]]:
    """Returns, for each level from node 0 on, the tree down to it and its nodes by their number of children."""
    ordered = [(), *sorted(paths, key=lambda path: (len(path), path))]
    number = {path: node for node, path in enumerate(ordered)}
    num_children = Counter(path[:-1] for path in ordered[1:])
    found = []
    for level in range(max(map(len, ordered)) + 1):
        kept = [path for path in ordered if len(path) <= level]
        tree = Tree.from_parents([[-1] + [number[path[:-1]] for path in kept[1:]]], device)
        by_count: dict[int, list[int]] = {}
        for path in kept:
            if len(path) == level and num_children[path]:
                by_count.setdefault(num_children[path], []).append(number[path])
        found.append((tree, by_count))
    return found


def draft_static_tree(
    model: Model,
    session: Session,
    paths: Paths,
    sampling_scheme: SamplingScheme,
    depth: int,
    vocabulary: DraftVocabulary | None = None,
) -> Draft:
    """Drafts a tree of a fixed shape, cut to `depth` levels.

    Siblings are drawn by `sampling_scheme`; at temperature 0, and with the scheme "deterministic", they are the
    likeliest tokens after their parent. A node's children are in the order in which they were drawn.
    """
    device, sampling = session.target.device, session.sampling
    plan = levels(paths, device)
    is_drawn = sampling_scheme != "deterministic" and not sampling.is_greedy
    tokens_BN = session.pending()[:, None]
    probs: list[Tensor] = []
    probabilities_BN: list[Tensor] = []
    for level in range(min(depth, len(plan) - 1)):
        tree, by_count = plan[level]
        first = int((tree.depths_RN[0] < level).sum())
        logits_BMW = model(tokens_BN, tree, first)
        if is_drawn:
            probs.append(sampling.probs(_spread(logits_BMW, vocabulary)))
        children: dict[int, Tensor] = {}
        of_children: dict[int, Tensor] = {}
        for count, nodes in by_count.items():
            new = [node - first for node in nodes]
            if is_drawn:
                probs_BFV = probs[-1][:, new]
                if session.noise is not None:
                    rows = range(len(probs_BFV))
                    drawn_BFC = session.noise.scores(probs_BFV, [level] * len(rows), rows).topk(count, dim=-1).indices
                else:
                    drawn_BFC = draw_siblings(probs_BFV, count, sampling_scheme, session.generator)
            else:
                logits_BFW = logits_BMW[:, new]
                best_BFC, drawn_BFC = top(logits_BFW, count, vocabulary)
                of_children |= dict(zip(nodes, probabilities(best_BFC, logits_BFW).unbind(1), strict=True))
            children |= dict(zip(nodes, drawn_BFC.unbind(1), strict=True))
        probabilities_BN += [of_children[node] for node in sorted(of_children)]
        tokens_BN = torch.cat([tokens_BN, *(children[node] for node in sorted(children))], dim=1)
    tree = plan[min(depth, len(plan) - 1)][0]
    return Draft(
        tokens_BN=tokens_BN,
        tree=tree,
        draft_probs_BNV=torch.cat(probs, dim=1) if probs else None,
        sampling_scheme=sampling_scheme if probs else "deterministic",
        confidences=(lambda: torch.cat(probabilities_BN, dim=1).tolist()) if probabilities_BN else None,
    )


def draw_siblings(probs_BFV: Tensor, count: int, sampling_scheme: SamplingScheme, generator: torch.Generator) -> Tensor:
    """Returns tokens [B, F, C] of siblings, in the order in which they are drawn from their parent's distribution.

    Without replacement they are the first arrivals of exponential clocks whose rates are the probabilities: each token
    follows the distribution without those before it, renormalised. A distribution of too few tokens is filled up with
    tokens of probability 0.
    """
    shape, device = probs_BFV.shape[:-1], probs_BFV.device
    if sampling_scheme == "without_replacement":
        # A token arrives at -ln(u) / probability.
        arrivals_BFV = -uniforms(generator, *probs_BFV.shape).to(device).log_() / probs_BFV
        return arrivals_BFV.topk(count, dim=-1, largest=False).indices
    if sampling_scheme == "top_and_drawn":
        top_BFC = probs_BFV.topk(count - 1, dim=-1).indices
        rest_BFV = probs_BFV.scatter(-1, top_BFC, 0.0)
        return torch.cat([top_BFC, draw(rest_BFV, uniforms(generator, *shape).to(device))[..., None]], dim=-1)
    assert sampling_scheme == "independent"
    return torch.stack([draw(probs_BFV, uniforms(generator, *shape).to(device)) for _ in range(count)], dim=-1)


def draft_dynamic_tree(
    model: Model,
    session: Session,
    *,
    width: int,
    num_nodes: int,
    depth: int,
    vocabulary: DraftVocabulary | None = None,
) -> Draft:
    """Drafts, for each row, the tree of the `num_nodes` nodes likeliest under the draft model (EAGLE-2, 2406.16858).

    Each level expands its `width` best nodes by their `width` best children, scored by the product of probabilities
    along the path; the best of all children are kept. No token is sampled, so the draft is deterministic. Its nodes,
    except node 0, are in another order than the model processed them in.
    """
    num_rows, device = len(session.rows), session.target.device
    tokens, parents = [[row[-1]] for row in session.rows], [[-1] for _ in session.rows]
    scores = [[0.0] for _ in session.rows]
    # Node 0 and each level's best are fed to the model; they have the same indices in every row.
    fed = [[0] for _ in session.rows]
    for level in range(depth):
        index = [{node: at for at, node in enumerate(nodes)} for nodes in fed]
        shape = Tree.from_parents(
            [[index[row].get(parents[row][node], -1) for node in fed[row]] for row in range(num_rows)], device
        )
        fed_BN = torch.tensor([[tokens[row][node] for node in fed[row]] for row in range(num_rows)], device=device)
        num_expanded = 1 if level == 0 else width
        log_probs_BFW = model(fed_BN, shape, len(fed[0]) - num_expanded).float().log_softmax(-1)
        best_BFC, token_BFC = top(log_probs_BFW, width, vocabulary)
        for row, (logs, ids) in enumerate(zip(best_BFC.tolist(), token_BFC.tolist(), strict=True)):
            expanded = fed[row][-num_expanded:]
            new = []
            for node, node_logs, node_ids in zip(expanded, logs, ids, strict=True):
                for log, token in zip(node_logs, node_ids, strict=True):
                    new.append(len(tokens[row]))
                    tokens[row].append(token)
                    parents[row].append(node)
                    scores[row].append(scores[row][node] + log)
            best_new = sorted(new, key=lambda node: -scores[row][node])[:width]
            fed[row] += sorted(best_new)
    kept = [sorted(sorted(range(len(one)), key=lambda node: (-one[node], node))[: num_nodes + 1]) for one in scores]
    number = [{node: at for at, node in enumerate(nodes)} for nodes in kept]

    def confidences() -> list[list[float]]:
        rows = zip(scores, parents, kept, strict=True)
        return [[math.exp(one[node] - one[above[node]]) for node in nodes[1:]] for one, above, nodes in rows]

    return Draft(
        confidences=confidences,
        tokens_BN=torch.tensor([[tokens[row][node] for node in kept[row]] for row in range(num_rows)], device=device),
        tree=Tree.from_parents(
            [[number[row].get(parents[row][node], -1) for node in kept[row]] for row in range(num_rows)], device
        ),
    )
