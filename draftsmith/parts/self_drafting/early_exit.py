"""Drafting from inside the target: its first blocks over a draft's nodes, and layers of the drafter's own above them.

The keys and values of those first blocks are the target's own, so that verification goes on from where they ended.

Shape suffixes: B rows, T positions, N nodes, M new nodes, P length of the longest accepted path, D hidden width,
R is B or 1, S cache slots.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from draftsmith.core.cache import KVCache
from draftsmith.core.drafter import Session
from draftsmith.core.target import PREFILL_CHUNK
from draftsmith.core.tree import Draft, ResumePoint, Tree, chain
from draftsmith.parts.neural.layers import prepare_cache
from draftsmith.verify.paths import at

Layers = Callable[[Tensor, Tensor, Tensor, KVCache], Tensor]
"""(x_BMD, positions_BM, mask_R1MS, cache) -> [B, M, D], written to the cache as its layers' keys and values."""


class Shallow:
    """The target's first `layer` blocks, run over the nodes of one draft after another in the target's own cache."""

    def __init__(self, session: Session, layer: int) -> None:
        self._target, self._cache, self._layer = session.target, session.cache, layer
        self._parts: list[Tensor] = []

    def run(self, tokens_BN: Tensor, tree: Tree, first: int) -> Tensor:
        """Returns what the blocks make of the nodes from `first` on [B, M, D]; a new draft begins with node 0."""
        span = (0, self._layer)
        out = self._target.forward(tokens_BN[:, first:], tree, self._cache, span=span, first=first)
        self._parts = [*self._parts, out.hidden_BND] if first else [out.hidden_BND]
        return out.hidden_BND

    def entered(self, draft: Draft, num_in_place: int) -> Draft:
        """Returns the draft with its entry, having run what is new or was moved: the nodes from `num_in_place` on."""
        self._parts = [torch.cat(self._parts, dim=1)[:, :num_in_place]]
        self.run(draft.tokens_BN, draft.tree, num_in_place)
        return dataclasses.replace(draft, resume_point=ResumePoint(layer=self._layer, hidden_BND=torch.cat(self._parts, dim=1)))


class Trail:
    """Keys and values of a drafter's own layers over the committed text; what they have not read waits for them."""

    def __init__(self, layers: Layers, num_layers: int, num_rows: int) -> None:
        self._layers = layers
        self.cache = KVCache(num_layers=num_layers, batch_size=num_rows)
        self._unread: list[list[Tensor]] = [[] for _ in range(num_rows)]

    def read(self, x_BTD: Tensor, lengths: list[int]) -> None:
        """Reads prompts, right-padded rows of these lengths."""
        for part_BTD in x_BTD.split(PREFILL_CHUNK, dim=1):
            chunk = part_BTD.shape[1]
            self._run(part_BTD, chain(chunk, x_BTD.device), 0)
            # Shorter rows run along at the same slots and are cut back below.
            self.cache.commit([list(range(chunk)) for _ in lengths])
        self.cache.lengths = list(lengths)

    def run(self, x_BMD: Tensor, tree: Tree, first: int) -> Tensor:
        """Returns the layers' output [B, M, D] at the nodes from `first` on; before node 0 they read what they lack."""
        if first:
            return self._run(x_BMD, tree, first)
        rows = [torch.cat([*unread, x_1D]) for unread, x_1D in zip(self._unread, x_BMD, strict=True)]
        self._unread = [[] for _ in rows]
        out_BTD = self._run(
            torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), chain(max(map(len, rows)), x_BMD.device), 0
        )
        self.cache.commit([list(range(len(row) - 1)) for row in rows])
        last_B = torch.tensor([len(row) - 1 for row in rows], device=x_BMD.device)
        return at(out_BTD, last_B)[:, None]

    def keep(self, x_BPD: Tensor, paths: list[list[int]], num_in_place: int) -> None:
        """Commits the accepted nodes that were read in their places; of the others the inputs `x_BPD` are kept."""
        read = [[node for node in path if node < num_in_place] for path in paths]
        self.cache.commit(read)
        for row, (path, before) in enumerate(zip(paths, read, strict=True)):
            if len(path) > len(before):
                self._unread[row].append(x_BPD[row, len(before) : len(path)])

    def _run(self, x_BMD: Tensor, tree: Tree, first: int) -> Tensor:
        positions_BM, mask_R1MS = prepare_cache(tree, self.cache, first=first)
        return self._layers(x_BMD, positions_BM, mask_R1MS, self.cache)
