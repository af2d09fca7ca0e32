"""Merges the draft trees of several drafters into one and keeps the nodes most likely to be correct.

The accuracy of a part's nodes is estimated while text is generated: the share of its nodes of one depth, rank and level
of confidence that were correct, given that their parents were. A node's probability of being correct is the product of
these along its path; parts that agree are treated as independent. For a given number of nodes, the likeliest ones give
the greatest expected number of accepted tokens, which is the sum of their probabilities (EAGLE-2, 2406.16858, section
4.2). EAGLE-2 takes the confidences themselves; measured, they are comparable between parts.

Shape suffixes: P parts, D depths, R ranks among siblings, C levels of confidence.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from torch import Tensor

from draftsmith.core import drafter
from draftsmith.core.drafter import Session, Step
from draftsmith.core.sampling import Sampling
from draftsmith.core.target import Target
from draftsmith.core.tree import Draft
from draftsmith.parts.checks import MAX_NODES, check_at_least, check_below_one
from draftsmith.parts.composites import (
    Part,
    PartConfigs,
    check_parts,
    forget_all,
    hidden_layers_of,
    load_part,
    make_part,
    parameters_of,
    save_parts,
)
from draftsmith.parts.retrieval import load_array
from draftsmith.parts.trie import TokenTree, heaviest_path, to_draft

COUNTS = "counts.npy"
PRIOR = 8
"""Weight, in nodes, of the prior accuracy of nodes."""
NUM_DEPTHS, NUM_RANKS, NUM_LEVELS = 8, 4, 8
"""Deeper nodes and higher ranks count as the last. Level 0 is of nodes without a confidence, and level k of those whose
square root lies between (k - 1) / 8 and k / 8."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the merged tree."""

    parts: PartConfigs
    """Each part's family and configuration; they draft as at temperature 0."""
    num_nodes: int = 16
    """Maximum number of nodes of the merged tree."""
    least_chance: float = 0.0
    """Minimum probability of a node being correct; less likely ones cost more to verify than they gain."""

    def __post_init__(self) -> None:
        check_parts(self.parts)
        check_at_least(self, 1, "num_nodes", most=MAX_NODES)
        check_below_one(self, "least_chance")


class Drafter(drafter.Drafter):
    """Merges all parts' trees into one per row, of which an encoder-decoder gets the likeliest path only.

    `counts_PDRC2` holds, by part, depth, rank and level of confidence, the number of correct nodes and of evaluated
    nodes. Each call starts counting from it; `keep` stores the call's counts in it.
    """

    keeps_state_between_calls = True

    def __init__(
        self,
        config: Config,
        target: Target,
        parts: Sequence[Part] | None = None,
        counts_PDRC2: np.ndarray | None = None,
    ) -> None:
        self.config = config
        self.target = target
        self.parts = list(parts or [make_part(part, target) for part in config.parts])
        self.hidden_layers = hidden_layers_of(self.parts)
        shape = (len(self.parts), NUM_DEPTHS, NUM_RANKS, 1 + NUM_LEVELS, 2)
        self.counts_PDRC2 = np.zeros(shape, dtype=np.int64) if counts_PDRC2 is None else counts_PDRC2

    def save_state(self, folder: Path) -> None:
        save_parts(self.parts, folder)
        np.save(folder / COUNTS, self.counts_PDRC2)

    @classmethod
    def load_state(cls, folder: Path, config: Config, target: Target) -> Self:
        parts = [load_part(folder, config.parts, at, target) for at in range(len(config.parts))]
        counts_PDRC2 = load_array(folder / COUNTS)
        drafter = cls(config, target, parts)
        if (counts_PDRC2.shape, counts_PDRC2.dtype) != (drafter.counts_PDRC2.shape, drafter.counts_PDRC2.dtype):
            raise ValueError(
                f"{folder / COUNTS} holds {counts_PDRC2.dtype} {list(counts_PDRC2.shape)}, expected"
                f" {drafter.counts_PDRC2.dtype} {list(drafter.counts_PDRC2.shape)}; the artifact must be made again"
            )
        if (
            not np.isfinite(counts_PDRC2).all()
            or (counts_PDRC2[..., 0] < 0).any()
            or (counts_PDRC2[..., 0] > counts_PDRC2[..., 1]).any()
        ):
            raise ValueError(
                f"{folder / COUNTS} counts more correct nodes than evaluated ones; the artifact must be made again"
            )
        drafter.counts_PDRC2 = counts_PDRC2
        return drafter

    def parameters(self) -> Iterator[Tensor]:
        return parameters_of(self.parts)

    def forget(self) -> None:
        forget_all(self.parts)

    def start(self, session: Session) -> None:
        self._session = session
        self._counts_PDRC2 = self.counts_PDRC2.copy()
        self._trees: list[list[PartTree]] = []
        for part in self.parts:
            part.start(_greedy(session))

    def change_rows(self, origins: list[int | None], new: Session | None) -> bool:
        own = None if new is None else _greedy(new)
        return all(part.change_rows(origins, own) for part in self.parts)

    def propose(self, budget: int) -> Draft:
        drafts = [part.propose(budget) for part in self.parts]
        for part, draft in zip(self.parts, drafts, strict=True):
            _check_mergeable(part, draft)
        self._lengths = [len(row) for row in self._session.rows]
        self._trees = [list(trees) for trees in zip(*map(part_trees, drafts), strict=True)]
        accuracies = estimate_accuracies(self._counts_PDRC2).tolist()
        rows = [self._merge(trees, accuracies) for trees in self._trees]
        if not self.target.takes_trees:
            rows = [heaviest_path(tree) for tree in rows]
        return to_draft(self._session, rows)

    def observe(self, step: Step) -> None:
        for row, trees in enumerate(self._trees):
            if step.paths[row]:
                text = self._session.rows[row][self._lengths[row] :]
                for tree, counts_DRC2 in zip(trees, self._counts_PDRC2, strict=True):
                    tree.count_correct(text, counts_DRC2)
        self._trees = []
        for part in self.parts:
            part.observe(step)

    def keep(self) -> None:
        """Stores the counts of the current call, so that later calls start from them."""
        self.counts_PDRC2 = self._counts_PDRC2.copy()

    def _merge(self, trees: Sequence["PartTree"], accuracies: list) -> TokenTree:
        """Returns one row's tree; a node's weight is its probability of being correct."""
        wrong: dict[tuple[int, ...], float] = {}
        for part, tree in enumerate(trees):
            for path, probability in tree.path_probabilities(accuracies[part]):
                wrong[path] = wrong.get(path, 1.0) * (1 - probability)
        # A parent is at least as likely as its child, and is sorted before it.
        likely = sorted(
            (path for path, probability in wrong.items() if 1 - probability >= self.config.least_chance),
            key=lambda path: (wrong[path], len(path)),
        )[: self.config.num_nodes]
        number = {(): 0} | {path: node for node, path in enumerate(likely, start=1)}
        return TokenTree(
            tokens=[path[-1] for path in likely],
            parents=[number[path[:-1]] for path in likely],
            weights=[1 - wrong[path] for path in likely],
        )


class PartTree:
    """One part's tree in one row: each node's path of tokens, parent, depth, rank and level of confidence."""

    def __init__(self, tokens: Sequence[int], parents: Sequence[int], confidences: Sequence[float] | None = None):
        """Takes the nodes after node 0."""
        self._parents, num_children = [-1, *parents], [0] * (len(tokens) + 1)
        self._paths: list[tuple[int, ...]] = [()]
        self._cells = [(0, 0, 0)]
        for node, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
            path = (*self._paths[parent], token)
            self._paths.append(path)
            level = 0 if confidences is None else _level_of(confidences[node])
            self._cells.append((min(len(path), NUM_DEPTHS) - 1, min(num_children[parent], NUM_RANKS - 1), level))
            num_children[parent] += 1

    def path_probabilities(self, accuracies_DRC: list[list[list[float]]]) -> Iterator[tuple[tuple[int, ...], float]]:
        """Yields each node's path and the probability that all of it is correct."""
        probabilities = [1.0]
        for path, parent, (depth, rank, level) in self._nodes():
            probabilities.append(probabilities[parent] * accuracies_DRC[depth][rank][level])
            yield path, probabilities[-1]

    def count_correct(self, text: Sequence[int], counts_DRC2: np.ndarray) -> None:
        """Adds to the counts the nodes whose parent was correct and that are no deeper than the text is long."""
        is_correct = [True]
        for path, parent, cell in self._nodes():
            is_evaluated = is_correct[parent] and len(path) <= len(text)
            is_correct.append(is_evaluated and path[-1] == text[len(path) - 1])
            if is_evaluated:
                counts_DRC2[cell] += (is_correct[-1], 1)

    def _nodes(self) -> list[tuple[tuple[int, ...], int, tuple[int, int, int]]]:
        return list(zip(self._paths, self._parents, self._cells, strict=True))[1:]


def _level_of(confidence: float) -> int:
    return 1 + min(int(NUM_LEVELS * math.sqrt(confidence)), NUM_LEVELS - 1)


def part_trees(draft: Draft) -> list[PartTree]:
    """Returns each row's tree without its padding."""
    tokens, parents = draft.tokens_BN.tolist(), draft.tree.parents_RN.tolist()
    used = draft.num_nodes or [draft.tree.num_nodes] * len(tokens)
    confidences = draft.confidences and draft.confidences()
    return [
        PartTree(ids[1:number], parents[row % len(parents)][1:number], confidences[row] if confidences else None)
        for row, (ids, number) in enumerate(zip(tokens, used, strict=True))
    ]


def estimate_accuracies(counts_PDRC2: np.ndarray) -> np.ndarray:
    """Returns the shares of correct nodes [P, D, R, C], with a prior that weighs as `PRIOR` nodes.

    The prior is 2^-(rank + 1) for nodes without a confidence; for others the share of all nodes of their level, whose
    own prior is the confidence.
    """
    num_ranks, num_levels = counts_PDRC2.shape[2], counts_PDRC2.shape[3] - 1
    prior_PDRC = np.zeros(counts_PDRC2.shape[:-1])
    prior_PDRC[..., 0] = 0.5 ** np.arange(1, num_ranks + 1)
    confidence_L = ((np.arange(num_levels) + 0.5) / num_levels) ** 2
    prior_PDRC[..., 1:] = _shares(counts_PDRC2[..., 1:, :].sum((1, 2)), confidence_L)[:, None, None]
    return _shares(counts_PDRC2, prior_PDRC)


def _shares(counts_X2: np.ndarray, prior_X: np.ndarray) -> np.ndarray:
    return (counts_X2[..., 0] + PRIOR * prior_X) / (counts_X2[..., 1] + PRIOR)


def _greedy(session: Session) -> Session:
    """Returns the session as parts see it: they draft their likeliest tokens at every temperature.

    Only deterministic trees can be merged: a sampled node would have to be verified by the distribution of its part.
    """
    return dataclasses.replace(session, sampling=Sampling(), noise=None)


def _check_mergeable(part: Part, draft: Draft) -> None:
    """Raises ValueError for a draft that cannot be merged with others."""
    if draft.resume_point is not None:
        raise ValueError(
            f"{part.name} runs the target's first blocks over its own draft, which cannot be merged with another; leave"
            " it out"
        )
    if draft.draft_probs_BNV is not None:
        raise ValueError(
            f"{part.name} samples its drafts even at temperature 0, and only deterministic trees can be merged; leave"
            " it out"
        )
