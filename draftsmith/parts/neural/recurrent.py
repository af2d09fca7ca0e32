"""Drafting by a network that reads text token by token and keeps a state: its draft state, with rewinding.

A state is a tuple of tensors [B, ...] that are never written to, so that rewinding means returning to an earlier state.

Shape suffixes: B rows, T tokens not yet read, N nodes, M nodes of one level, D width of the features, V vocabulary,
W tokens of the draft vocabulary.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from draftsmith.core.drafter import Session, Step
from draftsmith.core.rows import followed
from draftsmith.core.tree import Draft, Tree
from draftsmith.parts import autoregressive
from draftsmith.parts.draft_progress import DraftProgress
from draftsmith.parts.neural.shortlist import Shortlist

State = tuple[Tensor, ...]
MAX_SNAPSHOTS = 16


class RecurrentNetwork(Protocol):
    """The interface of the network."""

    @property
    def vocabulary(self) -> Shortlist:
        """The tokens that `logits` are of."""
        ...

    def read(self, tokens_BT: Tensor, lengths: list[int]) -> State:
        """Returns the state after the first `lengths` tokens of each row, of which there may be none."""
        ...

    def step(self, tokens_B: Tensor, state: State) -> tuple[Tensor, State]:
        """Returns the features [B, D] after one more token per row, and the new state."""
        ...

    def logits(self, features_BD: Tensor) -> Tensor:
        """Returns the next-token logits [B, W]."""
        ...


class RecurrentDraftState:
    """The draft state of one `generate` call: rows advance at different rates, over chains or dynamic trees."""

    def __init__(self, network: RecurrentNetwork, session: Session, shape: autoregressive.Shape) -> None:
        self._network, self._session, self._shape = network, session, shape
        self._progress = DraftProgress(session)
        # The states after the draft's nodes, level by level, each [B * M, ...]; empty before there is a draft.
        self._levels: list[State] = []
        prompts = [torch.tensor(row[:-1] or [0], device=session.target.device) for row in session.rows]
        self._num_read = [len(row) - 1 for row in session.rows]
        self._state = network.read(pad_sequence(prompts, batch_first=True), self._num_read)
        self._snapshots = [(list(self._num_read), self._state)]

    def propose(self, budget: int) -> Draft:
        draft = autoregressive.draft(self._logits, self._session, self._shape, budget, self._network.vocabulary)
        self._progress.drafted(draft, len(self._levels), is_reordered=bool(self._shape.width))
        return draft

    def observe(self, step: Step) -> None:
        kept = [len(nodes) for nodes in self._progress.accepted(step, self._num_read)]
        states = [self._state, *self._levels[: max(kept)]]
        self._continue_from(states, kept, [read + count for read, count in zip(self._num_read, kept, strict=True)])
        self._snapshots.append((list(self._num_read), self._state))
        del self._snapshots[1 : 1 - MAX_SNAPSHOTS]

    def change_rows(self, origins: list[int | None], added: "RecurrentDraftState | None") -> None:
        """Follows rows as `Drafter.change_rows` does; a new row's snapshots are all of its prompt."""
        read, new = (added._num_read, added._state) if added is not None else (None, [None] * len(self._state))

        def changed(num_read: list[int], state: State) -> tuple[list[int], State]:
            parts = zip(state, new, strict=True)
            return followed(origins, num_read, read), tuple(followed(origins, kept, other) for kept, other in parts)

        self._snapshots = [changed(num_read, state) for num_read, state in self._snapshots]
        self._num_read, self._state = changed(self._num_read, self._state)
        self._levels = []
        self._progress.reset()

    def rewind(self, lengths: list[int]) -> None:
        """Drops each row's state past its first `lengths` tokens."""
        # A row's latest snapshot within its length; the first one is the prompt, which stays.
        latest = [
            max(i for i, (num_read, _) in enumerate(self._snapshots) if num_read[row] <= length or i == 0)
            for row, length in enumerate(lengths)
        ]
        num_read = [self._snapshots[i][0][row] for row, i in enumerate(latest)]
        self._continue_from([state for _, state in self._snapshots], latest, num_read)
        self._snapshots[1:] = [(list(num_read), self._state)]
        self._progress.reset()

    def _continue_from(self, states: list[State], indices: list[int], num_read: list[int]) -> None:
        self._state, self._num_read, self._levels = _select(states, indices), num_read, []

    def _logits(self, tokens_BN: Tensor, tree: Tree, first: int) -> Tensor:
        """Returns the logits [B, M, W] after the nodes from `first` on, whose parents are on the level before."""
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
        """Reads the committed tokens not yet read; returns the features [B, D] after the pending tokens, node 0."""
        rows = self._session.rows
        unread = [ids[read:] for ids, read in zip(rows, self._num_read, strict=True)]
        counts = [len(ids) for ids in unread]
        padded = [ids + [0] * (max(counts) - len(ids)) for ids in unread]
        states: list[State] = [self._state]
        features: list[State] = []
        for tokens_B in torch.tensor(padded, device=self._session.target.device).unbind(1):
            features_BD, state = self._network.step(tokens_B, states[-1])
            states.append(state)
            features.append((features_BD,))
        before = [count - 1 for count in counts]
        node_0 = _select(states, counts)
        self._continue_from(states, before, [len(ids) - 1 for ids in rows])
        self._levels = [node_0]
        return _select(features, before)[0]


def _select(states: list[State], indices: list[int]) -> State:
    """Returns the state whose row b is row b of `states[indices[b]]`."""
    if min(indices) == max(indices):
        return states[indices[0]]
    device = states[0][0].device
    indices_B, rows_B = torch.tensor(indices, device=device), torch.arange(len(indices), device=device)
    return tuple(torch.stack(parts)[indices_B, rows_B] for parts in zip(*states, strict=True))
