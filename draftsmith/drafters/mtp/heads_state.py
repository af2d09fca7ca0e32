"""The state of a call that drafts with MTP heads: their caches, and which positions they have still to read.

Position t of head i, from 0, reads token t + 1 + i, and the output of head i - 1 at position t (DeepSeek-V3,
2412.19437, equations 21 to 23) or, unchained, the target's hidden state of position t. In a text whose last token is
pending, the last i positions of head i read drafted tokens. After each draft, every cache keeps the positions that are
final for all heads, and all heads read the others again, as in transformers' `MtpModel`.

Shape suffixes: B rows, T positions not yet read, N nodes, M new nodes, D hidden width, E widths of the hidden layers.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from draftsmith.core.cache import KVCache
from draftsmith.core.drafter import Session, Step
from draftsmith.core.rows import followed
from draftsmith.core.target import PREFILL_CHUNK
from draftsmith.core.tree import Tree, chain
from draftsmith.parts.neural.layers import gather_path

MOST_UNREAD = 32
"""With more positions unread than this, all heads read them before a draft: short drafts do not use the later heads."""


class RunsHead(Protocol):
    """One head."""

    def run(
        self, tokens_BM: Tensor, hidden_BMD: Tensor, tree: Tree, cache: KVCache, first: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Runs the tree's nodes from `first` on; returns (their own states, inputs of the LM head) [B, M, D]."""
        ...


class Heads(Protocol):
    """A drafter of several heads."""

    joined_width: int
    """E."""

    @property
    def heads(self) -> Sequence[RunsHead]: ...

    @property
    def is_chained(self) -> bool:
        """Whether a head reads the output of the head before it."""

    def join(self, hidden: dict[int, Tensor]) -> Tensor:
        """Returns the target's hidden layers, concatenated [B, T, E]."""
        ...

    def fuse(self, joined_BTE: Tensor) -> Tensor:
        """Returns the hidden states [B, T, D] that the first head reads."""
        ...


class HeadsState:
    """The caches, one per head, and the target's hidden layers at the positions that they do not hold."""

    def __init__(self, session: Session, model: Heads, caches: Sequence[KVCache]) -> None:
        self._session, self._model, self.caches = session, model, list(caches)
        device, dtype = session.target.device, session.target.dtype
        no_hidden_BTE = torch.zeros(len(session.rows), 0, model.joined_width, device=device, dtype=dtype)
        joined_BTE = model.join(session.hidden) if session.hidden else no_hidden_BTE
        self.unread = [joined_TE[: len(ids) - 1] for joined_TE, ids in zip(joined_BTE, session.rows, strict=True)]
        """The joined hidden layers of each row's uncached positions [T, E], up to the one before the pending token."""
        self._last_B1D = no_hidden_BTE
        self._num_run = 0
        self._read_final()

    @property
    def is_empty(self) -> bool:
        """Returns whether no row has a hidden state yet, being of one token: then the step is a plain one."""
        return not any(map(len, self.unread))

    def change_rows(self, origins: list[int | None], added: "HeadsState | None") -> None:
        """Follows rows as `Drafter.change_rows` does."""
        for index, cache in enumerate(self.caches):
            cache.change_rows(origins, added.caches[index] if added is not None else None)
        self.unread = followed(origins, self.unread, added.unread if added is not None else [])

    def advance(self, tokens_BN: Tensor, first: int) -> Tensor:
        """Returns the input of the LM head [B, 1, D] after the last of a chain's tokens, of index `first`.

        Head `first` reads all positions that the caches lack. Past the last head, that head is applied to its own
        output at one position more (FastMTP, 2509.18362).
        """
        num_heads = len(self._model.heads)
        if first >= num_heads:
            node = first - num_heads + 1
            tree = chain(node + 1, tokens_BN.device)
            last, cache, before_B1D = self._model.heads[-1], self.caches[-1], self._last_B1D
            self._last_B1D, normed_B1D = last.run(tokens_BN[:, first:], before_B1D, tree, cache, node)
            return normed_B1D
        if first == 0:
            if max(map(len, self.unread)) > MOST_UNREAD:
                self._read_final()
            self._starts = list(self.caches[0].lengths)
            self._hidden_BTD = self._model.fuse(pad_sequence(self.unread, batch_first=True))
        counts = [max(len(unread), 1) for unread in self.unread]
        tokens_BT = self._tokens(first, counts, tokens_BN[:, 1 : first + 1].tolist())
        states_BTD, normed_BTD = self._run(first, tokens_BT, self._hidden_BTD)
        self.caches[first].lengths = [start + count - 1 for start, count in zip(self._starts, counts, strict=True)]
        if self._model.is_chained:
            self._hidden_BTD = states_BTD
        self._num_run = first + 1
        last_B1 = torch.tensor(counts, device=tokens_BN.device)[:, None] - 1
        rows_B1 = torch.arange(len(counts), device=tokens_BN.device)[:, None]
        self._last_B1D = states_BTD[rows_B1, last_B1]
        return normed_BTD[rows_B1, last_B1]

    def observe(self, step: Step) -> None:
        """Keeps the final positions of a draft that ran all heads, and the accepted nodes' hidden layers to be read."""
        if self._num_run:
            ran_all = self._num_run == len(self.caches)
            final = [max(len(unread) - len(self.caches) + 1, 0) if ran_all else 0 for unread in self.unread]
            self._keep([start + count for start, count in zip(self._starts, final, strict=True)], final)
        self._num_run = 0
        joined_BPE = gather_path(self._model.join(step.hidden), step.verdict)
        for row, (ids, path) in enumerate(zip(self._session.rows, step.paths, strict=True)):
            unread_TE = torch.cat([self.unread[row], joined_BPE[row, : len(path)]])
            # A row that finished within its path has fewer tokens than were accepted.
            self.unread[row] = unread_TE[: len(ids) - 1 - self.caches[0].lengths[row]]

    def _read_final(self) -> None:
        """Lets all heads read the positions whose tokens are committed for all of them, one at least being left."""
        final = [max(len(unread) - max(len(self.caches) - 1, 1), 0) for unread in self.unread]
        starts = list(self.caches[0].lengths)
        for begin in range(0, max(final), PREFILL_CHUNK):
            end = min(begin + PREFILL_CHUNK, max(final))
            hidden_BTD = self._model.fuse(pad_sequence([one[begin:end] for one in self.unread], batch_first=True))
            for head in range(len(self.caches)):
                # Shorter rows are padded, and cut back below.
                ids = [
                    row[len(row) - len(unread) :][begin + head : end + head] or [0]
                    for row, unread in zip(self._session.rows, self.unread, strict=True)
                ]
                tokens = [torch.tensor(one, device=hidden_BTD.device) for one in ids]
                states_BTD, _ = self._run(head, pad_sequence(tokens, batch_first=True), hidden_BTD)
                if self._model.is_chained:
                    hidden_BTD = states_BTD
        self._keep([start + count for start, count in zip(starts, final, strict=True)], final)

    def _keep(self, lengths: list[int], num_read: list[int]) -> None:
        """Sets the length of every cache, and drops hidden layers that were read."""
        for cache in self.caches:
            cache.lengths = list(lengths)
        self.unread = [unread[count:] for unread, count in zip(self.unread, num_read, strict=True)]

    def _tokens(self, head: int, counts: list[int], drafted: list[list[int]]) -> Tensor:
        """Returns the tokens [B, T] of a head at the last `counts` positions, the last `head` of which are drafted."""
        ids = [
            torch.tensor([*row[-count:], *new][head:], device=self._session.target.device)
            for row, count, new in zip(self._session.rows, counts, drafted, strict=True)
        ]
        return pad_sequence(ids, batch_first=True)

    def _run(self, head: int, tokens_BT: Tensor, hidden_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Runs a head over positions behind its cache, which then holds them for all rows alike."""
        cache, found = self.caches[head], []
        for begin in range(0, tokens_BT.shape[1], PREFILL_CHUNK):
            part = slice(begin, begin + PREFILL_CHUNK)
            num_new = tokens_BT[:, part].shape[1]
            tree = chain(num_new, tokens_BT.device)
            found.append(self._model.heads[head].run(tokens_BT[:, part], hidden_BTD[:, part], tree, cache))
            cache.commit([list(range(num_new)) for _ in cache.lengths])
        states, normed = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
        return states, normed
