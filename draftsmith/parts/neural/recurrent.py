"""Drafts of a network that reads a text token by token and keeps a state: what it has read, and how it goes back.

A state is a tuple of tensors [B, ...] which nothing writes to, so that to take tokens back is to take an earlier one.

Shape suffixes: B rows, T tokens not yet read, N nodes, M nodes of one level, D width of the features, V vocabulary.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from draftsmith.core.drafter import Session, Step
from draftsmith.core.tree import Draft, Tree
from draftsmith.parts import growth

State = tuple[Tensor, ...]
MAX_MARKS = 16


class Network(Protocol):
    """What reads."""

    def read(self, tokens_BT: Tensor, lengths: list[int]) -> State:
        """Returns the state after the first `lengths` tokens of each row, of which there may be none."""
        ...

    def step(self, tokens_B: Tensor, state: State) -> tuple[Tensor, State]:
        """Returns the features [B, D] of one more token a row, and the state after it."""
        ...

    def logits(self, features_BD: Tensor) -> Tensor:
        """Returns the logits [B, V] of what comes next."""
        ...


class Reading:
    """One call's drafts: chains or trees that grow, as the shape says, whose rows advance at rates of their own."""

    def __init__(self, network: Network, session: Session, shape: growth.Shape) -> None:
        self._network, self._session, self._shape = network, session, shape
        self._draft: Draft | None = None
        # The states after the draft's nodes, level by level, each [B * M, ...]; none before there is a draft.
        self._levels: list[State] = []
        prompts = [torch.tensor(row[:-1] or [0], device=session.target.device) for row in session.rows]
        self._num_read = [len(row) - 1 for row in session.rows]
        self._state = network.read(pad_sequence(prompts, batch_first=True), self._num_read)
        self._marks = [(list(self._num_read), self._state)]

    def propose(self, budget: int) -> Draft:
        self._draft = growth.draft(self._logits, self._session, self._shape, budget)
        return self._draft

    def observe(self, step: Step) -> None:
        # Of another drafter's draft, or of a tree whose nodes were put in another order, only node 0 is the same.
        is_own = step.is_of(self._draft) and not self._shape.width
        states = [self._state, *self._levels[: None if is_own else 1]]
        # A row that ended within its path holds less than was accepted.
        most = [len(ids) - 1 - read for ids, read in zip(self._session.rows, self._num_read, strict=True)]
        kept = [min(len(path), len(states) - 1, left) for path, left in zip(step.paths, most, strict=True)]
        self._go_on_from(states, kept, [read + count for read, count in zip(self._num_read, kept, strict=True)])
        self._marks.append((list(self._num_read), self._state))
        del self._marks[1 : 1 - MAX_MARKS]

    def rewind(self, lengths: list[int]) -> None:
        """Forgets what it read of each row past so many tokens, which were taken back."""
        # A row's latest mark within its length; the first one is the prompt, which stays.
        places = [
            max(place for place, (read, _) in enumerate(self._marks) if read[row] <= length or place == 0)
            for row, length in enumerate(lengths)
        ]
        num_read = [self._marks[place][0][row] for row, place in enumerate(places)]
        self._go_on_from([state for _, state in self._marks], places, num_read)
        self._marks[1:] = [(list(num_read), self._state)]

    def _go_on_from(self, states: list[State], places: list[int], num_read: list[int]) -> None:
        self._state, self._num_read, self._levels = _chosen(states, places), num_read, []

    def _logits(self, tokens_BN: Tensor, tree: Tree, first: int) -> Tensor:
        """Returns the logits [B, M, V] after the nodes from `first` on, whose parents are those given last."""
        if first == 0:
            return self._network.logits(self._catch_up())[:, None]
        state = self._levels[-1]
        if not tree.is_chain:
            parents_RM = tree.parents_RN[:, first:]
            num_above = len(state[0]) // len(tokens_BN)
            above_BM = (parents_RM - (first - num_above)).expand(len(tokens_BN), -1)
            rows_B1 = torch.arange(len(tokens_BN), device=tokens_BN.device)[:, None]
            flat = (rows_B1 * num_above + above_BM).flatten()
            state = tuple(part[flat] for part in state)
        features, state = self._network.step(tokens_BN[:, first:].flatten(), state)
        self._levels.append(state)
        return self._network.logits(features).unflatten(0, (len(tokens_BN), -1))

    def _catch_up(self) -> Tensor:
        """Reads what was committed and not yet read; returns the features [B, D] of the pending tokens, node 0."""
        rows = self._session.rows
        missing = [ids[read:] for ids, read in zip(rows, self._num_read, strict=True)]
        counts = [len(ids) for ids in missing]
        padded = [ids + [0] * (max(counts) - len(ids)) for ids in missing]
        states: list[State] = [self._state]
        features: list[State] = []
        for tokens_B in torch.tensor(padded, device=self._session.target.device).unbind(1):
            features_BD, state = self._network.step(tokens_B, states[-1])
            states.append(state)
            features.append((features_BD,))
        before, after = ([count - back for count in counts] for back in (1, 0))
        node_0 = _chosen(states, after)
        self._go_on_from(states, before, [len(ids) - 1 for ids in rows])
        self._levels = [node_0]
        return _chosen(features, before)[0]


def _chosen(states: list[State], places: list[int]) -> State:
    """Returns the state in which each row is that at its own place of the list."""
    if min(places) == max(places):
        return states[places[0]]
    device = states[0][0].device
    places_B, rows_B = torch.tensor(places, device=device), torch.arange(len(places), device=device)
    return tuple(torch.stack(parts)[places_B, rows_B] for parts in zip(*states, strict=True))
