"""A datastore of text: copies what followed the text's last tokens there, as a tree (REST, 2311.08252).

Of what followed the longest match the likeliest beginnings are kept. The tree has no law: at any temperature each of
its nodes is judged once by a token drawn from the target's own law, where the paper's code draws anew for every branch.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from draftsmith.core import drafter
from draftsmith.core.drafter import Session, Step
from draftsmith.core.target import Target
from draftsmith.core.tree import Draft
from draftsmith.parts.suffix_array import SuffixArray, read_shards, write_shards
from draftsmith.parts.trie import TokenTree, to_draft, heaviest_nodes, heaviest_path, build_trie

UNSEEN = 2


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is looked for, and how much of what followed it is drafted."""

    max_match: int = 16
    """Most last tokens looked for."""
    min_match: int = 2
    """Fewest that may match."""
    max_matches: int = 64
    """Most places whose continuation is read, evenly spread over those found."""
    num_draft: int = 10
    """Most tokens of each continuation."""
    num_nodes: int = 16
    """Most tokens drafted: the likeliest beginnings of the continuations."""
    min_chance: float = 0.05
    """Least chance of being right that a token drafted may have, as far as its frequency tells."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_match <= self.max_match:
            raise ValueError(f"min_match {self.min_match} must be at least 1 and at most max_match {self.max_match}")
        for name in ("max_matches", "num_draft", "num_nodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.min_chance < 1:
            raise ValueError(f"min_chance is {self.min_chance}; it must be at least 0 and less than 1")


class Drafter(drafter.Drafter):
    """Looks up each row's last tokens in every shard of its store; nothing is kept between steps."""

    serving_engines = ("vllm", "sglang")

    def __init__(self, config: Config, target: Target, shards: tuple[SuffixArray, ...] = ()) -> None:
        self.config = config
        self.target = target
        self.shards = shards

    def start(self, session: Session) -> None:
        self._session = session
        self._is_running = [True] * len(session.rows)

    def propose(self, budget: int) -> Draft:
        rows = zip(self._session.rows, self._is_running, strict=True)
        return to_draft(self._session, [self.branches(row, budget) if runs else TokenTree() for row, runs in rows])

    def observe(self, step: Step) -> None:
        self._is_running = [len(path) > 0 for path in step.paths]

    def branches(self, text: list[int], budget: int) -> TokenTree:
        """Returns the tree of what followed the text's last tokens, at most `budget` deep, weighed by chance."""
        config = self.config
        matches = [shard.match(text, config.max_match, config.min_match) for shard in self.shards]
        longest = max((length for length, _ in matches), default=0)
        found = [(shard, matches[at][1]) for at, shard in enumerate(self.shards) if matches[at][0] == longest]
        step = -(-sum(len(places) for _, places in found) // config.max_matches) or 1
        times: Counter[tuple[int, ...]] = Counter()
        num_passed = 0
        for shard, places in found:
            # Every step-th place, counted on from shard to shard.
            read = places[-num_passed % step :: step]
            times.update(shard.continuations(read, min(budget, config.num_draft)))
            num_passed += len(places)
        branches = by_chance(build_trie(times.items()), times.total())
        num_likely = sum(chance >= config.min_chance for chance in branches.weights)
        kept = heaviest_nodes(branches, min(num_likely, config.num_nodes))
        return kept if self.target.takes_trees else heaviest_path(kept)

    def save_state(self, folder: Path) -> None:
        write_shards(folder, self.shards)

    @classmethod
    def load_state(cls, folder: Path, config: Config, target: Target) -> Self:
        """Returns the drafter whose shards lie in `folder`; raises ValueError if one is missing, truncated or odd."""
        return cls(config, target, read_shards(folder, target.vocab_size))


def by_chance(branches: TokenTree, times: int) -> TokenTree:
    """Returns the tree weighed by each node's chance: its parent's, times t / (s + 2).

    The token came t times and its parent s times, node 0 `times` times; the 2 stand for what was not met yet.
    """
    chances: list[float] = []
    for parent, weight in zip(branches.parents, branches.weights, strict=True):
        before, chance = (branches.weights[parent - 1], chances[parent - 1]) if parent else (times, 1.0)
        chances.append(chance * weight / (before + UNSEEN))
    return TokenTree(tokens=branches.tokens, parents=branches.parents, weights=chances)
