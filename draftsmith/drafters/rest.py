"""REST (2311.08252): drafts a tree of what followed the text's last tokens in a datastore.

The likeliest prefixes of the longest match's continuations are kept. The tree is deterministic: at any temperature
one token drawn from the target's distribution verifies all children of a node; the paper's code draws one per branch.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from draftsmith.core import drafter
from draftsmith.core.drafter import Session, Step
from draftsmith.core.target import Target
from draftsmith.core.tree import Draft
from draftsmith.parts.checks import MAX_NODES, check_at_least, check_below_one
from draftsmith.parts.suffix_array import SuffixArray, read_shards, write_shards
from draftsmith.parts.trie import TokenTree, build_trie, heaviest_nodes, heaviest_path, to_draft

UNSEEN = 2
"""Occurrences added to a node's count for continuations not in the datastore."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the look-up and of the tree."""

    max_match: int = 16
    """Maximum length of a match."""
    min_match: int = 2
    """Minimum length of a match."""
    max_matches: int = 64
    """Maximum number of matches whose continuation is read, evenly spread over all."""
    num_draft: int = 10
    """Maximum length of a continuation."""
    num_nodes: int = 16
    """Maximum number of tokens drafted: the likeliest prefixes of the continuations."""
    min_chance: float = 0.05
    """Minimum probability, estimated by frequency, of a drafted token being correct."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_match <= self.max_match:
            raise ValueError(f"min_match {self.min_match} must be at least 1 and at most max_match {self.max_match}")
        check_at_least(self, 1, "max_match", "num_draft", "num_nodes", most=MAX_NODES)
        check_at_least(self, 1, "max_matches")
        check_below_one(self, "min_chance")


class Drafter(drafter.Drafter):
    """Looks up each row's last tokens in every shard of the datastore; no state is kept between steps."""

    row_state = ("_is_running",)
    serving_engines = ("vllm", "sglang", "llama.cpp")

    def __init__(self, config: Config, target: Target, shards: tuple[SuffixArray, ...] = ()) -> None:
        self.config = config
        self.target = target
        self.shards = shards

    def start(self, session: Session) -> None:
        self._session = session
        self._is_running = [True] * len(session.rows)

    def propose(self, budget: int) -> Draft:
        rows = zip(self._session.rows, self._is_running, strict=True)
        return to_draft(self._session, [self.tree(row, budget) if runs else TokenTree() for row, runs in rows])

    def observe(self, step: Step) -> None:
        self._is_running = [len(path) > 0 for path in step.paths]

    def tree(self, text: list[int], budget: int) -> TokenTree:
        """Returns the tree of what followed the text's last tokens, at most `budget` deep, weighted by probability."""
        config = self.config
        matches = [shard.match(text, config.max_match, config.min_match) for shard in self.shards]
        longest = max((length for length, _ in matches), default=0)
        found = [(shard, matches[at][1]) for at, shard in enumerate(self.shards) if matches[at][0] == longest]
        step = -(-sum(len(entries) for _, entries in found) // config.max_matches) or 1
        counts: Counter[tuple[int, ...]] = Counter()
        num_passed = 0
        for shard, entries in found:
            # Every step-th match, counted across shards.
            read = entries[-num_passed % step :: step]
            counts.update(shard.continuations(read, min(budget, config.num_draft)))
            num_passed += len(entries)
        tree = to_probabilities(build_trie(counts.items()), counts.total())
        num_likely = sum(probability >= config.min_chance for probability in tree.weights)
        kept = heaviest_nodes(tree, min(num_likely, config.num_nodes))
        return kept if self.target.takes_trees else heaviest_path(kept)

    def save_state(self, folder: Path) -> None:
        write_shards(folder, self.shards)

    @classmethod
    def load_state(cls, folder: Path, config: Config, target: Target) -> Self:
        return cls(config, target, read_shards(folder, target.vocab_size))


def to_probabilities(tree: TokenTree, count: int) -> TokenTree:
    """Returns a tree weighted by counts as one weighted by probabilities: the parent's times c / (p + `UNSEEN`).

    c is the node's count and p its parent's, `count` for node 0.
    """
    weights: list[float] = []
    for parent, weight in zip(tree.parents, tree.weights, strict=True):
        of_parent, probability = (tree.weights[parent - 1], weights[parent - 1]) if parent else (count, 1.0)
        weights.append(probability * weight / (of_parent + UNSEEN))
    return TokenTree(tokens=tree.tokens, parents=tree.parents, weights=weights)
