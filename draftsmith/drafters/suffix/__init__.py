"""SuffixDecoding (2411.04975): drafts what most often followed the text's last tokens, in it or in other texts.

A row's own text, texts of earlier calls and a datastore are searched for matches of every length. Ranges of a suffix
array serve as a counted suffix tree: a node's count is the number of positions after its string, and the probability of
a path after it, the product of count(child) / count(node) along the path, is the share of these that the path follows.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np

from draftsmith.core import drafter
from draftsmith.core.drafter import Session, Step
from draftsmith.core.rows import followed
from draftsmith.core.target import Target
from draftsmith.core.tree import Draft
from draftsmith.drafters.suffix.growing_text import GrowingText
from draftsmith.parts.checks import MAX_NODES, check_at_least
from draftsmith.parts.retrieval import load_array, source_tokens
from draftsmith.parts.suffix_array import SuffixArray, empty, read_shards, token_type, write_shards
from draftsmith.parts.trie import TokenTree, build_trie, heaviest_nodes, heaviest_path, to_draft

RECENT = "recent.npy"
HALF_SURE = 4
"""Tokens of a match, drafted ones included, behind which a token that always followed is half as sure as can be."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the search, and of the draft's size by the length of the match."""

    max_match: int = 24
    """Maximum length of a match, which is the depth of the suffix trees."""
    factor: float = 1.0
    """Number of tokens drafted per token of the match."""
    offset: float = 0.0
    """Number of tokens drafted in addition to those."""
    num_draft: int = 16
    """Maximum number of tokens drafted."""
    branches: bool = True
    """Draft a tree of the likeliest nodes; otherwise the likeliest path."""
    min_chance: float = 0.1
    """Minimum probability of a drafted token's path: the share of the matches that it followed."""
    max_matches: int = 64
    """Maximum number of matches whose continuation is read, evenly spread over all."""
    recent_tokens: int = 65_536
    """Number of tokens of earlier calls that are kept, the oldest dropped first; 0 for none, which timing the same
    prompts repeatedly needs."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "max_match", "num_draft", most=MAX_NODES)
        check_at_least(self, 1, "max_matches")
        check_at_least(self, 0, "recent_tokens")
        check_at_least(self, 0, "factor", most=MAX_NODES)
        check_at_least(self, -MAX_NODES, "offset", most=MAX_NODES)
        if not 0 <= self.min_chance <= 1:
            raise ValueError(f"min_chance is {self.min_chance}; it must lie between 0 and 1")
        if self.draft_size(self.max_match) < 1:
            raise ValueError(f"factor {self.factor} and offset {self.offset} draft no token for a match of any length")

    def draft_size(self, length: int) -> int:
        """Returns the number of tokens drafted for a match of this length."""
        return min(int(self.factor * length + self.offset), self.num_draft)


@dataclass(kw_only=True, eq=False)
class _Candidate:
    """The continuations of one match, as a tree."""

    score: float = 0.0
    """Expected number of correct tokens: the sum of the probabilities of the nodes' paths."""
    length: int = 0
    """Length of the match."""
    tree: TokenTree = field(default_factory=TokenTree)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Row:
    """One text of the call."""

    ids: list[int]
    """Its tokens, which the loop appends to."""
    num_given: int
    """Number of those of its prompt."""
    num_before: int
    """Number of tokens in `own` before them: of the source and a separator."""
    own: GrowingText


class Drafter(drafter.Drafter):
    """Searches each row's text, the texts of earlier calls and the datastore."""

    serving_engines = ("vllm", "sglang", "llama.cpp")
    keeps_state_between_calls = True

    def __init__(
        self, config: Config, target: Target, shards: tuple[SuffixArray, ...] = (), recent: Sequence[int] = ()
    ) -> None:
        self.config, self.target = config, target
        self.shards = shards or (empty(target.vocab_size),)
        self._given = recent
        self.forget()

    def forget(self) -> None:
        """Drops the texts of earlier calls, except those that it was made with."""
        self.recent = GrowingText(self.config.max_match, self.target.vocab_size, self._given)
        self._session: Session | None = None

    def start(self, session: Session) -> None:
        self._keep_last_call()
        self._session, self._is_running = session, [True] * len(session.rows)
        self._rows = self._rows_of(session)

    def change_rows(self, origins: list[int | None], new: Session | None) -> bool:
        assert self._session is not None
        self._keep([row for number, row in enumerate(self._rows) if number not in origins])
        self._rows = followed(origins, self._rows, self._rows_of(new) if new is not None else [])
        self._is_running = [True] * len(origins)
        return True

    def propose(self, budget: int) -> Draft:
        assert self._session is not None
        drafted = [TokenTree() for _ in self._rows]
        for number, row in enumerate(self._rows):
            if self._is_running[number]:
                row.own.extend(row.ids[len(row.own.tokens) - row.num_before :])
                drafted[number] = self._best(row.ids, row.own, budget)
        return to_draft(self._session, drafted)

    def observe(self, step: Step) -> None:
        """Notes which rows are running; the next `propose` reads the new tokens."""
        self._is_running = [len(path) > 0 for path in step.paths]

    def rewind(self, lengths: list[int]) -> bool:
        self._is_running = [True] * len(lengths)
        for row, length in zip(self._rows, lengths, strict=True):
            row.own.truncate(row.num_before + length)
        return True

    def _best(self, row: list[int], own: GrowingText, budget: int) -> TokenTree:
        """Returns the tree of the highest score; of equal ones that of the longer match, then of the row's own text."""
        best = _Candidate()
        texts: list[GrowingText | SuffixArray] = [own, self.recent, *self.shards]
        for text in texts:
            longest, entries = text.match(row, self.config.max_match, 1)
            num_entries = 0
            for length in range(longest, 0, -1):
                # The score is at most the number of nodes, and shorter matches get no more nodes.
                num_nodes = min(self.config.draft_size(length), budget)
                if num_nodes < 1 or (num_nodes, length) <= (best.score, best.length):
                    break
                if length < longest:
                    _, entries = text.match(row, length, 1)
                if len(entries) == num_entries:
                    continue  # the same positions as of the longer match, which got no fewer nodes
                num_entries = len(entries)
                found = self._continue(text, entries, length, num_nodes)
                if (found.score, found.length) > (best.score, best.length):
                    best = found
        return best.tree

    def _continue(self, text: GrowingText | SuffixArray, entries: range, length: int, num_nodes: int) -> _Candidate:
        """Returns the tree of what followed the entries of a match."""
        config = self.config
        read = entries[:: -(-len(entries) // config.max_matches)]
        tree = build_trie(Counter(text.continuations(read, num_nodes)).items())
        num_likely = sum(weight >= config.min_chance * len(read) for weight in tree.weights)
        kept = heaviest_nodes(tree, num_likely)
        is_tree = config.branches and self.target.takes_trees
        kept = heaviest_nodes(kept, num_nodes) if is_tree else heaviest_path(kept)
        score = sum(kept.weights) / len(read)
        return _Candidate(score=score, length=length, tree=_with_confidences(kept, length, len(read)))

    def _keep_last_call(self) -> None:
        """Adds each row of the last call, with as much of its prompt as a match can cover, to the recent texts."""
        if self._session is not None:
            self._keep(self._rows)
        self._session = None

    def _keep(self, rows: list["_Row"]) -> None:
        if self.config.recent_tokens:
            for row in rows:
                self.recent.extend([*row.ids[max(row.num_given - self.config.max_match, 0) :], self.target.vocab_size])
            self.recent.keep_last(self.config.recent_tokens)

    def _rows_of(self, session: Session) -> list["_Row"]:
        size, rows = self.target.vocab_size, []
        for ids, source in zip(session.rows, source_tokens(session), strict=True):
            before = [*source, size] if source else []
            own = GrowingText(self.config.max_match, size, before + ids)
            rows.append(_Row(ids=ids, num_given=len(ids), num_before=len(before), own=own))
        return rows

    def save_state(self, folder: Path) -> None:
        """Writes the datastore and the recent texts, including those of the last call."""
        self._keep_last_call()
        write_shards(folder, self.shards)
        np.save(folder / RECENT, np.array(self.recent.tokens, token_type(self.target.vocab_size)))

    @classmethod
    def load_state(cls, folder: Path, config: Config, target: Target) -> Self:
        shards = read_shards(folder, target.vocab_size)
        recent_S = load_array(folder / RECENT)
        if (
            recent_S.dtype != token_type(target.vocab_size)
            or recent_S.ndim != 1
            or recent_S.max(initial=0) > target.vocab_size
        ):
            raise ValueError(
                f"{folder / RECENT} is no text of a vocabulary of {target.vocab_size}; the artifact must be made again"
            )
        return cls(config, target, shards, recent_S.tolist())


def _with_confidences(tree: TokenTree, length: int, count: int) -> TokenTree:
    """Returns a tree weighted by counts, of a match of `length` tokens at `count` places, weighted by confidence.

    That of a node is its parent's times c / p * m / (m + `HALF_SURE`), with c its count, p its parent's, and m the
    tokens that match before it.
    """
    depths, weights = [0], [1.0]
    for parent, weight in zip(tree.parents, tree.weights, strict=True):
        matched = length + depths[parent]
        share = weight / (tree.weights[parent - 1] if parent else count)
        depths.append(depths[parent] + 1)
        weights.append(weights[parent] * share * matched / (matched + HALF_SURE))
    return TokenTree(tokens=tree.tokens, parents=tree.parents, weights=weights[1:])
