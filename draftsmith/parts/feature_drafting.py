"""Drafting from features: position t of the draft model reads token t + 1 and a feature of position t.

It predicts token t + 2. The features of committed positions are computed from the target's hidden states; those of
draft positions are the draft model's own output at the position before. Its cache keeps only the keys and values of
the former: those of draft nodes are dropped after each draft, because the target's features of the same tokens are more
accurate (EAGLE-2, 2406.16858).

Shape suffixes: B rows, T positions not yet read, N nodes, M new nodes, P length of the longest accepted path, D hidden
width, E widths of the hidden layers together.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from draftsmith.core.cache import KVCache
from draftsmith.core.drafter import Session, Step
from draftsmith.core.rows import followed
from draftsmith.core.target import PREFILL_CHUNK
from draftsmith.core.tree import Tree, chain
from draftsmith.parts.draft_progress import DraftProgress
from draftsmith.parts.neural.layers import gather_path


class FeatureModel(Protocol):
    """A draft model that reads features."""

    joined_width: int
    """E."""

    def join(self, hidden: dict[int, Tensor]) -> Tensor:
        """Returns the target's hidden layers, concatenated [B, T, E]."""
        ...

    def fuse(self, joined_BTE: Tensor) -> Tensor:
        """Returns the target's features [B, T, D]."""
        ...

    def run(
        self, tokens_BM: Tensor, features_BMD: Tensor, tree: Tree, cache: KVCache, first: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Runs the tree's nodes from `first` on; returns (their own features, inputs of the LM head) [B, M, D]."""
        ...


class FeatureState:
    """The state of one `generate` call: the cache, and the target's hidden layers at positions not yet read."""

    def __init__(self, session: Session, model: FeatureModel, cache: KVCache) -> None:
        self._session, self._model, self.cache = session, model, cache
        self._progress = DraftProgress(session)
        device, dtype = session.target.device, session.target.dtype
        no_hidden_BTE = torch.zeros(len(session.rows), 0, model.joined_width, device=device, dtype=dtype)
        joined_BTE = model.join(session.hidden) if session.hidden else no_hidden_BTE
        self.unread = [joined_TE[: len(ids) - 1] for joined_TE, ids in zip(joined_BTE, session.rows, strict=True)]
        """The joined hidden layers of each row's uncached positions [T, E], up to the one before the pending token."""
        if not self.is_empty:
            self._read()

    @property
    def is_empty(self) -> bool:
        """Returns whether no row has a feature yet, being of one token: then the step is a plain one."""
        return not any(map(len, self.unread))

    def change_rows(self, origins: list[int | None], added: "FeatureState | None") -> None:
        """Follows rows as `Drafter.change_rows` does."""
        self.cache.change_rows(origins, added.cache if added is not None else None)
        self.unread = followed(origins, self.unread, added.unread if added is not None else [])

    def advance(self, tokens_BN: Tensor, tree: Tree, first: int) -> Tensor:
        """Returns the inputs of the LM head [B, M, D] after the draft's nodes from `first` on."""
        if first == 0:
            self._features_BND, normed_BMD = self._read()
            return normed_BMD
        parents_BM1 = tree.parents_RN[:, first:, None].expand(len(tokens_BN), -1, -1)
        above_BMD = self._features_BND.gather(1, parents_BM1.expand(-1, -1, self._features_BND.shape[-1]))
        new_BMD, normed_BMD = self._model.run(tokens_BN[:, first:], above_BMD, tree, self.cache, first)
        self._features_BND = torch.cat([self._features_BND[:, :first], new_BMD], dim=1)
        return normed_BMD

    def observe(self, step: Step) -> None:
        """Commits node 0, and keeps the hidden layers of the accepted nodes to be read."""
        joined_BPE = gather_path(self._model.join(step.hidden), step.verdict)
        # Node 0 was read at the last position; rows of one token had none to read.
        read = [nodes[: len(unread)] for nodes, unread in zip(self._progress.accepted(step), self.unread, strict=True)]
        self.cache.commit(read)
        self.unread = [unread[len(nodes) :] for unread, nodes in zip(self.unread, read, strict=True)]
        for row, (ids, path) in enumerate(zip(self._session.rows, step.paths, strict=True)):
            unread_TE = torch.cat([self.unread[row], joined_BPE[row, : len(path)]])
            # A row that finished within its path has fewer tokens than were accepted.
            self.unread[row] = unread_TE[: len(ids) - 1 - self.cache.lengths[row]]

    def _read(self) -> tuple[Tensor, Tensor]:
        """Reads each row's unread positions; returns the output of `run` at the last one [B, 1, D], node 0.

        That position stays unread, and may be read again.
        """
        cache, device = self.cache, self._session.target.device
        counts = [max(len(unread), 1) for unread in self.unread]
        tokens = [torch.tensor(ids[-n:], device=device) for ids, n in zip(self._session.rows, counts, strict=True)]
        tokens_BT = pad_sequence(tokens, batch_first=True)
        features_BTD = self._model.fuse(pad_sequence(self.unread, batch_first=True))
        starts, found = list(cache.lengths), []
        for begin in range(0, max(counts), PREFILL_CHUNK):
            part = slice(begin, begin + PREFILL_CHUNK)
            num_new = tokens_BT[:, part].shape[1]
            found.append(self._model.run(tokens_BT[:, part], features_BTD[:, part], chain(num_new, device), cache))
            # Shorter rows are padded to the same slots, and cut back below.
            cache.commit([list(range(num_new)) for _ in counts])
        cache.lengths = [start + count - 1 for start, count in zip(starts, counts, strict=True)]
        self.unread = [unread[-1:] for unread in self.unread]
        self._progress.num_processed = 1
        last_B1 = torch.tensor(counts, device=device)[:, None] - 1
        rows_B1 = torch.arange(len(counts), device=device)[:, None]
        features, normed = (torch.cat(parts, dim=1)[rows_B1, last_B1] for parts in zip(*found, strict=True))
        return features, normed
