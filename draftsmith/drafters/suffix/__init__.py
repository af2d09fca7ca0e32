"""SuffixDecoding (2411.04975): what followed a text's last tokens, in it or in others, drafted by how often it did.

A row's own text, earlier calls' and a stored corpus are searched for every length of match. A counted suffix tree is
read off a suffix array by ranges: a node's count is how many places its string ends at, and the chance of a path after
it, the product of count(child) / count(node) along it, the share of these places that the path follows.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np

from draftsmith.core import drafter
from draftsmith.core.drafter import Session, Step
from draftsmith.core.target import Target
from draftsmith.core.tree import Draft
from draftsmith.drafters.suffix.growing_text import GrowingText
from draftsmith.parts.suffix_array import SuffixArray, empty, read_shards, token_type, write_shards
from draftsmith.parts.trie import TokenTree, build_trie, heaviest_nodes, heaviest_path, to_draft

RECENT = "recent.npy"


@dataclass(frozen=True, kw_only=True)
class Config:
    """How far back is looked, and how much a match is trusted."""

    max_match: int = 24
    """Most last tokens looked for: the depth of the trees."""
    factor: float = 1.0
    """Tokens drafted for each token of the match; longer matches are trusted with longer drafts."""
    offset: float = 0.0
    """Tokens drafted beside those."""
    num_draft: int = 16
    """Most tokens drafted."""
    branches: bool = True
    """Whether the likeliest tokens are drafted as a tree, wherever they are, or those of the likeliest path."""
    min_chance: float = 0.1
    """Tokens whose path followed a smaller share of the matches are not drafted."""
    max_matches: int = 64
    """Most places whose continuation is read, evenly spread over those that match."""
    recent_tokens: int = 65_536
    """Tokens of finished calls that are kept for later ones, the oldest dropped first; 0 for none, as where the same
    prompts are decoded again to be timed."""

    def __post_init__(self) -> None:
        for name in ("max_match", "num_draft", "max_matches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("factor", "recent_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        if not 0 <= self.min_chance <= 1:
            raise ValueError(f"min_chance is {self.min_chance}; it must lie between 0 and 1")
        if self.room(self.max_match) < 1:
            raise ValueError(f"factor {self.factor} and offset {self.offset} leave no token to draft for any match")

    def room(self, length: int) -> int:
        """Returns how many tokens are drafted for a match of so many."""
        return min(int(self.factor * length + self.offset), self.num_draft)


@dataclass(kw_only=True, eq=False)
class _Found:
    """The most promising continuation so far."""

    score: float = 0.0
    """How many of its tokens are expected to be right: the sum of the chances of their paths."""
    length: int = 0
    """Of the match that it follows."""
    branches: TokenTree = field(default_factory=TokenTree)


class Drafter(drafter.Drafter):
    """Each row's text, those of earlier calls and the stored ones."""

    serving_engines = ("vllm", "sglang")
    keeps_state_between_calls = True

    def __init__(
        self, config: Config, target: Target, shards: tuple[SuffixArray, ...] = (), recent: Sequence[int] = ()
    ) -> None:
        self.config, self.target = config, target
        self.shards = shards or (empty(target.vocab_size),)
        self._given = recent
        self.forget()

    def forget(self) -> None:
        """Knows of recent texts only those that it was given."""
        self.recent = GrowingText(self.config.max_match, self.target.vocab_size, self._given)
        self._session: Session | None = None

    def start(self, session: Session) -> None:
        self._remember()
        sources: list[list[int]] = [[] for _ in session.rows]
        if session.source is not None:
            mask = session.source.mask_BT.bool()
            pairs = zip(session.source.tokens_BT, mask, strict=True)
            sources = [[*ids[kept].tolist(), self.target.vocab_size] for ids, kept in pairs]
        self._session, self._num_given = session, [len(row) for row in session.rows]
        self._is_running, self._num_before = [True] * len(session.rows), [len(source) for source in sources]
        self._own = [
            GrowingText(self.config.max_match, self.target.vocab_size, source + row)
            for source, row in zip(sources, session.rows, strict=True)
        ]

    def propose(self, budget: int) -> Draft:
        assert self._session is not None
        drafted = [TokenTree() for _ in self._own]
        for at, (row, own) in enumerate(zip(self._session.rows, self._own, strict=True)):
            if self._is_running[at]:
                own.extend(row[len(own.tokens) - self._num_before[at] :])
                drafted[at] = self._best(row, own, budget)
        return to_draft(self._session, drafted)

    def observe(self, step: Step) -> None:
        """Notes which rows go on: the next `propose` reads the new tokens."""
        self._is_running = [len(path) > 0 for path in step.paths]

    def rewind(self, lengths: list[int]) -> bool:
        """Takes back what came after so many tokens of each row, all of which go on."""
        self._is_running = [True] * len(lengths)
        for own, num_before, length in zip(self._own, self._num_before, lengths, strict=True):
            own.truncate(num_before + length)
        return True

    def _best(self, row: list[int], own: GrowingText, budget: int) -> TokenTree:
        """Returns the best continuation; of equal ones that of the longer match, then of the row's own text."""
        best = _Found()
        texts: list[GrowingText | SuffixArray] = [own, self.recent, *self.shards]
        for text in texts:
            longest, places = text.match(row, self.config.max_match, 1)
            num_places = 0
            for length in range(longest, 0, -1):
                # No chance is above 1, and shorter matches have less room.
                num_nodes = min(self.config.room(length), budget)
                if num_nodes < 1 or (num_nodes, length) <= (best.score, best.length):
                    break
                if length < longest:
                    _, places = text.match(row, length, 1)
                if len(places) == num_places:
                    continue  # those of the longer match, which had no less room
                num_places = len(places)
                found = self._continue(text, places, length, num_nodes)
                if (found.score, found.length) > (best.score, best.length):
                    best = found
        return best.branches

    def _continue(self, text: GrowingText | SuffixArray, places: range, length: int, num_nodes: int) -> _Found:
        config = self.config
        read = places[:: -(-len(places) // config.max_matches)]
        branches = build_trie(Counter(text.continuations(read, num_nodes)).items())
        num_likely = sum(weight >= config.min_chance * len(read) for weight in branches.weights)
        kept = heaviest_nodes(branches, num_likely)
        is_tree = config.branches and self.target.takes_trees
        kept = heaviest_nodes(kept, num_nodes) if is_tree else heaviest_path(kept)
        return _Found(score=sum(kept.weights) / len(read), length=length, branches=kept)

    def _remember(self) -> None:
        """Takes each row of the last call, with as much of its prompt as may match, for one of the recent texts."""
        if self._session is None or not self.config.recent_tokens:
            return
        for row, given in zip(self._session.rows, self._num_given, strict=True):
            self.recent.extend([*row[max(given - self.config.max_match, 0) :], self.target.vocab_size])
        self.recent.keep_last(self.config.recent_tokens)
        self._session = None

    def save_state(self, folder: Path) -> None:
        """Writes the stored texts and the recent ones, the last call's among them."""
        self._remember()
        write_shards(folder, self.shards)
        np.save(folder / RECENT, np.array(self.recent.tokens, token_type(self.target.vocab_size)))

    @classmethod
    def load_state(cls, folder: Path, config: Config, target: Target) -> Self:
        """Returns the drafter with what `folder` holds; raises ValueError if a file is missing, truncated or odd."""
        shards = read_shards(folder, target.vocab_size)
        try:
            recent_S = np.load(folder / RECENT, allow_pickle=False)
        except (OSError, EOFError, ValueError) as error:
            raise ValueError(
                f"{folder / RECENT} is missing or truncated ({error}); the artifact must be made again"
            ) from None
        if (
            recent_S.dtype != token_type(target.vocab_size)
            or recent_S.ndim != 1
            or recent_S.max(initial=0) > target.vocab_size
        ):
            raise ValueError(
                f"{folder / RECENT} holds no text of a vocabulary of {target.vocab_size}; it must be made again"
            )
        return cls(config, target, shards, recent_S.tolist())
