"""The trees of several drafters joined into one, of which the target verifies the nodes most likely to be right.

What a part's guess is worth is learnt as text is written: the share of its nodes of one depth and rank that were right
where the node above was. A node's chance is the product of those on its path; of parts that agree as if they were
independent. The likeliest nodes give most accepted tokens for their number, as each counts with its chance (EAGLE-2,
2406.16858, section 4.2).

Shape suffixes: P parts, D depths, R ranks among siblings.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from torch import Tensor

from draftsmith.core import drafter
from draftsmith.core.drafter import Session, Step
from draftsmith.core.target import Target
from draftsmith.core.tree import Draft
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
from draftsmith.parts.trie import TokenTree, heaviest_path, to_draft

STORE, PRIOR = "counts.npy", 8


@dataclass(frozen=True, kw_only=True)
class Config:
    """The parts, and how much of their trees is kept."""

    parts: PartConfigs
    """Each part's family and configuration; their drafts must be deterministic."""
    num_nodes: int = 16
    """Most nodes of the joined tree."""
    least_chance: float = 0.0
    """A node less likely than this is left out: what it takes to verify it is more than it brings."""

    def __post_init__(self) -> None:
        check_parts(self.parts)
        if self.num_nodes < 1:
            raise ValueError(f"num_nodes is {self.num_nodes}; it must be at least 1")
        if not 0 <= self.least_chance < 1:
            raise ValueError(f"least_chance is {self.least_chance}; it must be at least 0 and below 1")


class Drafter(drafter.Drafter):
    """All parts propose; their trees become one for each row, and the best branch alone for an encoder-decoder.

    `counts_PDR2` says of each part's nodes how many were right and how many were judged. A call begins with what it
    holds and goes on counting; `keep` puts that into it.
    """

    NUM_DEPTHS, NUM_RANKS = 16, 16
    """Deeper and later nodes count as the last."""

    keeps_state_between_calls = True

    def __init__(
        self,
        config: Config,
        target: Target,
        parts: Sequence[Part] | None = None,
        counts_PDR2: np.ndarray | None = None,
    ) -> None:
        self.config = config
        self.target = target
        self.parts = list(parts or [make_part(part, target) for part in config.parts])
        self.hidden_layers = hidden_layers_of(self.parts)
        shape = (len(self.parts), self.NUM_DEPTHS, self.NUM_RANKS, 2)
        self.counts_PDR2 = np.zeros(shape, dtype=np.int64) if counts_PDR2 is None else counts_PDR2

    def save_state(self, folder: Path) -> None:
        save_parts(self.parts, folder)
        np.save(folder / STORE, self.counts_PDR2)

    @classmethod
    def load_state(cls, folder: Path, config: Config, target: Target) -> Self:
        parts = [load_part(folder, config.parts, at, target) for at in range(len(config.parts))]
        try:
            counts_PDR2 = np.load(folder / STORE, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(
                f"{folder / STORE} is missing or broken ({error}); the artifact must be made again"
            ) from error
        drafter = cls(config, target, parts)
        if (counts_PDR2.shape, counts_PDR2.dtype) != (drafter.counts_PDR2.shape, drafter.counts_PDR2.dtype):
            raise ValueError(
                f"{folder / STORE} holds {counts_PDR2.dtype} {list(counts_PDR2.shape)}, expected"
                f" {drafter.counts_PDR2.dtype} {list(drafter.counts_PDR2.shape)}; the artifact must be made again"
            )
        if (counts_PDR2[..., 0] < 0).any() or (counts_PDR2[..., 0] > counts_PDR2[..., 1]).any():
            raise ValueError(f"{folder / STORE} counts more right than judged; the artifact must be made again")
        drafter.counts_PDR2 = counts_PDR2
        return drafter

    def parameters(self) -> Iterator[Tensor]:
        return parameters_of(self.parts)

    def forget(self) -> None:
        forget_all(self.parts)

    def start(self, session: Session) -> None:
        self._session = session
        self._counts_PDR2 = self.counts_PDR2.copy()
        self._guessed: list[list[Guesses]] = []
        for part in self.parts:
            part.start(session)

    def propose(self, budget: int) -> Draft:
        drafts = [part.propose(budget) for part in self.parts]
        for part, draft in zip(self.parts, drafts, strict=True):
            _refuse_unfit(part, draft)
        self._lengths = [len(row) for row in self._session.rows]
        self._guessed = [list(of_parts) for of_parts in zip(*map(guesses, drafts), strict=True)]
        chances = chances_of(self._counts_PDR2).tolist()
        rows = [self._joined(of_parts, chances) for of_parts in self._guessed]
        if self.target.is_encoder_decoder:
            rows = [heaviest_path(branches) for branches in rows]
        return to_draft(self._session, rows)

    def observe(self, step: Step) -> None:
        for row, of_parts in enumerate(self._guessed):
            if step.paths[row]:
                text = self._session.rows[row][self._lengths[row] :]
                for guessed, counts_DR2 in zip(of_parts, self._counts_PDR2, strict=True):
                    guessed.judge(text, counts_DR2)
        self._guessed = []
        for part in self.parts:
            part.observe(step)

    def keep(self) -> None:
        """Lets later calls begin with what this one has learnt."""
        self.counts_PDR2 = self._counts_PDR2.copy()

    def _joined(self, of_parts: Sequence["Guesses"], chances: list) -> TokenTree:
        """Returns one row's tree; a node's weight is its chance of being right."""
        missed: dict[tuple[int, ...], float] = {}
        for part, guessed in enumerate(of_parts):
            for path, chance in guessed.weighed(chances[part]):
                missed[path] = missed.get(path, 1.0) * (1 - chance)
        # A parent is as likely as its child at least, and comes before it.
        likely = sorted(
            (path for path, miss in missed.items() if 1 - miss >= self.config.least_chance),
            key=lambda path: (missed[path], len(path)),
        )[: self.config.num_nodes]
        number = {(): 0} | {path: node for node, path in enumerate(likely, start=1)}
        return TokenTree(
            tokens=[path[-1] for path in likely],
            parents=[number[path[:-1]] for path in likely],
            weights=[1 - missed[path] for path in likely],
        )


class Guesses:
    """One part's tree in one row: each node's path of tokens, parent, depth and rank among its siblings."""

    def __init__(self, tokens: Sequence[int], parents: Sequence[int]) -> None:
        """Takes what follows node 0."""
        self._parents, num_children = [-1, *parents], [0] * (len(tokens) + 1)
        self._paths: list[tuple[int, ...]] = [()]
        self._cells = [(0, 0)]
        for token, parent in zip(tokens, parents, strict=True):
            path = (*self._paths[parent], token)
            self._paths.append(path)
            self._cells.append(
                (min(len(path), Drafter.NUM_DEPTHS) - 1, min(num_children[parent], Drafter.NUM_RANKS - 1))
            )
            num_children[parent] += 1

    def weighed(self, chances_DR: list[list[float]]) -> Iterator[tuple[tuple[int, ...], float]]:
        """Yields each node's path and the chance that all of it is right."""
        chance = [1.0]
        for path, parent, (depth, rank) in list(zip(self._paths, self._parents, self._cells, strict=True))[1:]:
            chance.append(chance[parent] * chances_DR[depth][rank])
            yield path, chance[-1]

    def judge(self, text: Sequence[int], counts_DR2: np.ndarray) -> None:
        """Counts the nodes whose parent was right and which the text says of whether they were."""
        is_right = [True]
        for path, parent, (depth, rank) in list(zip(self._paths, self._parents, self._cells, strict=True))[1:]:
            is_judged = is_right[parent] and len(path) <= len(text)
            is_right.append(is_judged and path[-1] == text[len(path) - 1])
            if is_judged:
                counts_DR2[depth, rank] += (is_right[-1], 1)


def guesses(draft: Draft) -> list[Guesses]:
    """Returns each row's tree."""
    tokens, parents = draft.tokens_BN.tolist(), draft.tree.parents_RN.tolist()
    used = draft.num_nodes or [draft.tree.num_nodes] * len(tokens)
    return [
        Guesses(ids[1:number], parents[row % len(parents)][1:number])
        for row, (ids, number) in enumerate(zip(tokens, used, strict=True))
    ]


def chances_of(counts_PDR2: np.ndarray) -> np.ndarray:
    """Returns the shares of right nodes [P, D, R], drawn to 2^-(rank + 1) as if by `PRIOR` nodes more."""
    expected_R = 0.5 ** np.arange(1, counts_PDR2.shape[2] + 1)
    return (counts_PDR2[..., 0] + PRIOR * expected_R) / (counts_PDR2[..., 1] + PRIOR)


def _refuse_unfit(part: Part, draft: Draft) -> None:
    if draft.resume_point is not None:
        raise ValueError(
            f"{part.name} runs the target's first blocks over its own draft, which cannot be joined with another; leave"
            " it out"
        )
    if draft.draft_probs_BNV is not None:
        ways = {"siblings": "siblings: deterministic with a fixed tree", "width": "a width, for trees that grow"}
        helpful = [way for setting, way in ways.items() if hasattr(part.config, setting)]
        raise ValueError(
            f"{part.name} drafts tokens drawn from a law, and trees are joined of deterministic ones only: "
            + (f"give it {' or '.join(helpful)}" if helpful else "leave it out, or decode at temperature 0")
        )
