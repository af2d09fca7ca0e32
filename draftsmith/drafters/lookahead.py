"""Lookahead decoding (2402.02057): n-grams that the target writes ahead of the text are tried where they fit.

A window of W columns lies ahead of the pending token. Entry (l, i) of it, column i on level l, stands for the token
i + l places on, after entries (0, 0) to (0, i) and (1, i) to (l - 1, i); entry (0, 0) is the pending token. Of the
entries on the last level, N - 2, the target's likeliest next tokens are kept: they become the last level, every other
level the one below it, as in Jacobi iteration. A column with the token that came of it is an n-gram of the target's, of
N tokens; a pool keeps the latest G that begin with a token, and those beginning with the pending one are guessed.

Level 0 is a branch of the tree and each column another that leaves it at entry (0, i), so that one forward takes window
and guesses as an ordinary draft. It adds up to (W + G)(N - 1) nodes to the pending one, fewer where branches agree.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from draftsmith.core import drafter
from draftsmith.core.drafter import Session, Step
from draftsmith.core.target import Target
from draftsmith.core.tree import Draft
from draftsmith.parts import trie
from draftsmith.verify.paths import values_at


@dataclass(frozen=True, kw_only=True)
class Config:
    """Nothing is learnt beforehand; these settle how far the target looks ahead."""

    window: int = 3
    """Columns of the window (W)."""
    level: int = 3
    """Tokens of an n-gram, the one it is found by included (N)."""
    num_guesses: int = 5
    """N-grams kept of those that begin with the same token, and most that are tried at a time (G)."""
    pool_from_prompt: bool = True
    """Whether n-grams of the prompt are known from the start."""

    def __post_init__(self) -> None:
        for name, least in (("window", 1), ("level", 2), ("num_guesses", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")


class Drafter(drafter.Drafter):
    """Each row's window, which moves on with every step in which the target has read it."""

    def __init__(self, config: Config, target: Target) -> None:
        if target.is_encoder_decoder:
            raise ValueError(f"{target.name} is an encoder-decoder: it verifies chains, and lookahead needs trees")
        self.config = config
        self.target = target

    def start(self, session: Session) -> None:
        self._session = session
        self._windows = [_Window(self.config, row) for row in session.rows]

    def propose(self, budget: int) -> Draft:
        """Returns the guesses and, while the tokens still to come are as many as it is deep, the window."""
        drafts = []
        for window, row in zip(self._windows, self._session.rows, strict=True):
            columns = window.columns()
            texts: list[Sequence[int]] = [guess[:budget] for guess in window.guesses(row[-1])]
            texts += columns if len(columns[-1]) <= budget else []
            drafts.append(trie.build_trie((text, 1.0) for text in texts))
        return trie.to_draft(self._session, drafts)

    def observe(self, step: Step) -> None:
        """Moves the window of each row whose columns were all among the nodes fed, whoever drafted them."""
        draft = step.draft
        tokens, parents = draft.tokens_BN.tolist(), draft.tree.parents_RN.tolist()
        ends: dict[int, list[int]] = {}
        for row, path in enumerate(step.paths):
            if path:
                used = slice(1, draft.num_nodes[row] if draft.num_nodes else None)
                places = zip(parents[row % len(parents)][used], tokens[row][used], strict=True)
                child = {place: node for node, place in enumerate(places, start=1)}
                found = [_end(child, column) for column in self._windows[row].columns()]
                if min(found) >= 0:
                    ends[row] = found
        places_X2 = [(row, node) for row, nodes in ends.items() for node in nodes]
        row_X, node_X = torch.tensor(places_X2, device=self.target.device).reshape(-1, 2).long().unbind(1)
        likeliest = iter(values_at(step.logits_BNV, node_X, row_X).argmax(-1).tolist())
        for row, nodes in ends.items():
            self._windows[row].move(tokens[row][0], [next(likeliest) for _ in nodes])

    def rewind(self, lengths: list[int]) -> bool:
        """Keeps its n-grams: they need not be part of the text."""
        return True


class _Window:
    """One row's window, which gains a level in each of its first steps, and its pool of n-grams."""

    def __init__(self, config: Config, prompt: list[int]) -> None:
        self._config = config
        # A level gained costs a column, as the window has moved on by then.
        width = config.window + config.level - 2
        self._levels = [random.Random(0).choices(prompt, k=width)]
        self._pool: dict[int, dict[tuple[int, ...], None]] = {}
        if config.pool_from_prompt:
            for end in range(config.level, len(prompt) + 1):
                self._keep(prompt[end - config.level : end])

    def guesses(self, pending: int) -> list[tuple[int, ...]]:
        """Returns what may follow the pending token, the latest first."""
        return [*reversed(self._pool.get(pending, {}))]

    def columns(self) -> list[list[int]]:
        """Returns the text from the pending token, not included, to the end of each column."""
        return [
            self._levels[0][1 : place + 1] + [level[place] for level in self._levels[1:]]
            for place in range(len(self._levels[0]))
        ]

    def move(self, pending: int, following: list[int]) -> None:
        """Takes up the token that follows each column of the window behind the pending token."""
        if len(self._levels) < self._config.level - 1:
            self._levels = [level[1:] for level in (*self._levels, following)]
            return
        first = [pending, *self._levels[0][1:]]
        for ngram in zip(first, *self._levels[1:], following, strict=True):
            self._keep(ngram)
        self._levels = [*self._levels[1:], following]

    def _keep(self, ngram: Sequence[int]) -> None:
        """Makes an n-gram the latest of those that begin as it does, and forgets the oldest of too many."""
        key, guess = ngram[0], tuple(ngram[1:])
        kept = self._pool.setdefault(key, {})
        kept.pop(guess, None)
        kept[guess] = None
        if len(kept) > self._config.num_guesses:
            del kept[next(iter(kept))]


def _end(child: dict[tuple[int, int], int], text: Sequence[int]) -> int:
    """Returns the node at which a text ends, -1 if it is not in the tree."""
    node = 0
    for token in text:
        node = child.get((node, token), -1)
    return node
