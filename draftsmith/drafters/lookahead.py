"""Lookahead decoding (2402.02057): the target generates n-grams ahead of the text, which are drafted where they fit.

A window has W columns of N - 1 levels. Entry (l, i), level l of column i, is a guess of the token i + l positions after
the pending one, which is entry (0, 0); its context are entries (0, 0) to (0, i) and (1, i) to (l - 1, i). The target's
likeliest tokens after the last level, N - 2, become the new last level, and every other level moves down by one, as in
Jacobi iteration. A column with the token generated after it is an n-gram of N tokens; a pool keeps the latest G n-grams
by first token, and those that begin with the pending token are drafted.

In the draft tree level 0 is a branch, and each column another that leaves it at entry (0, i), so that one forward
processes window and guesses. They add at most (W + G)(N - 1) nodes to the pending one, fewer where branches agree.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from draftsmith.core import drafter
from draftsmith.core.drafter import Session, Step
from draftsmith.core.target import Target
from draftsmith.core.tree import Draft
from draftsmith.parts.checks import MAX_DEPTH, MAX_NODES, check_at_least
from draftsmith.parts.trie import build_trie, to_draft
from draftsmith.verify.paths import values_at


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the lookahead window and the n-gram pool; nothing is trained."""

    window: int = 3
    """Number of columns of the window (W)."""
    level: int = 3
    """Length of an n-gram, including the token that it is found by (N)."""
    num_guesses: int = 5
    """Number of n-grams kept per first token, which is also the number drafted at a time (G)."""
    pool_from_prompt: bool = True
    """Start the pool with the prompt's n-grams."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "window", "num_guesses", most=MAX_NODES)
        check_at_least(self, 2, "level", most=MAX_DEPTH)


class Drafter(drafter.Drafter):
    """Drafts guesses and the window of each row, which moves on in every step in which the target processed it."""

    row_state = ("_windows",)

    def __init__(self, config: Config, target: Target) -> None:
        target.check_trees("and lookahead needs trees")
        self.config = config
        self.target = target

    def start(self, session: Session) -> None:
        self._session = session
        self._windows = [_Window(self.config, row) for row in session.rows]

    def propose(self, budget: int) -> Draft:
        """Returns the guesses and, unless it is deeper than `budget`, the window."""
        drafts = []
        for window, row in zip(self._windows, self._session.rows, strict=True):
            columns = window.columns()
            texts: list[Sequence[int]] = [guess[:budget] for guess in window.guesses(row[-1])]
            texts += columns if len(columns[-1]) <= budget else []
            drafts.append(build_trie((text, 1.0) for text in texts))
        return to_draft(self._session, drafts)

    def observe(self, step: Step) -> None:
        """Moves the window of each row whose columns were all verified, even if another drafter drafted them."""
        draft = step.draft
        tokens, parents = draft.tokens_BN.tolist(), draft.tree.parents_RN.tolist()
        ends: dict[int, list[int]] = {}
        for row, path in enumerate(step.paths):
            if path:
                used = slice(1, draft.num_nodes[row] if draft.num_nodes else None)
                edges = zip(parents[row % len(parents)][used], tokens[row][used], strict=True)
                child = {edge: node for node, edge in enumerate(edges, start=1)}
                found = [_end(child, column) for column in self._windows[row].columns()]
                if min(found) >= 0:
                    ends[row] = found
        nodes_X2 = [(row, node) for row, nodes in ends.items() for node in nodes]
        row_X, node_X = torch.tensor(nodes_X2, device=self.target.device).reshape(-1, 2).long().unbind(1)
        likeliest = iter(values_at(step.logits_BNV, node_X, row_X).argmax(-1).tolist())
        for row, nodes in ends.items():
            self._windows[row].move(tokens[row][0], [next(likeliest) for _ in nodes])

    def rewind(self, lengths: list[int]) -> bool:
        """Keeps its n-grams: they need not be part of the text."""
        return True


class _Window:
    """One row's window, which grows by a level in each of its first steps, and its pool of n-grams."""

    def __init__(self, config: Config, prompt: list[int]) -> None:
        self._config = config
        # Each added level drops a column, because the window moves on by one.
        width = config.window + config.level - 2
        self._levels = [random.Random(0).choices(prompt, k=width)]
        self._pool: dict[int, dict[tuple[int, ...], None]] = {}
        if config.pool_from_prompt:
            for end in range(config.level, len(prompt) + 1):
                self._keep(prompt[end - config.level : end])

    def guesses(self, pending: int) -> list[tuple[int, ...]]:
        """Returns the continuations of the pending token in the pool, the latest first."""
        return [*reversed(self._pool.get(pending, {}))]

    def columns(self) -> list[list[int]]:
        """Returns, for each column, the tokens after the pending one up to the column's end."""
        return [
            self._levels[0][1 : column + 1] + [level[column] for level in self._levels[1:]]
            for column in range(len(self._levels[0]))
        ]

    def move(self, pending: int, following: list[int]) -> None:
        """Adds the target's token after each column, given the pending token that the columns followed."""
        if len(self._levels) < self._config.level - 1:
            self._levels = [level[1:] for level in (*self._levels, following)]
            return
        first = [pending, *self._levels[0][1:]]
        for ngram in zip(first, *self._levels[1:], following, strict=True):
            self._keep(ngram)
        self._levels = [*self._levels[1:], following]

    def _keep(self, ngram: Sequence[int]) -> None:
        """Adds an n-gram as the latest of its first token, and drops the oldest one if there are too many."""
        key, guess = ngram[0], tuple(ngram[1:])
        kept = self._pool.setdefault(key, {})
        kept.pop(guess, None)
        kept[guess] = None
        if len(kept) > self._config.num_guesses:
            del kept[next(iter(kept))]


def _end(child: dict[tuple[int, int], int], text: Sequence[int]) -> int:
    """Returns the node at which the text ends, -1 if it is not in the tree."""
    node = 0
    for token in text:
        node = child.get((node, token), -1)
    return node
