"""Self-drafting by early exit: the target's first blocks run over a draft's nodes, below layers of the drafter's own.

The keys and values of those first blocks are written to the target's cache, so that verification resumes after them.

Shape suffixes: B rows, T positions, N nodes, M new nodes, P length of the longest accepted path, D hidden width,
R is B or 1, S cache slots.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from draftsmith.core.cache import KVCache
from draftsmith.core.drafter import Session, Step
from draftsmith.core.rows import followed
from draftsmith.core.target import PREFILL_CHUNK, Target
from draftsmith.core.tree import Draft, ResumePoint, Tree, chain
from draftsmith.parts.draft_progress import DraftProgress
from draftsmith.parts.neural.layers import prepare_cache
from draftsmith.verify.paths import values_at

CachedLayers = Callable[[Tensor, Tensor, Tensor, KVCache], Tensor]
"""Maps (x_BMD, positions_BM, mask_R1MS, cache) to [B, M, D] and writes its layers' keys and values to the cache."""


def check_exit_layer(exit_layer: int, target: Target, *, width: int = 0) -> None:
    """Raises ValueError unless the target's blocks can be run up to this layer and resumed there, for trees too."""
    target.check_splits()
    if width:
        target.check_trees(f"and width is {width}, for trees")
    if exit_layer > target.num_layers:
        raise ValueError(f"exit_layer is {exit_layer}; {target.name} has {target.num_layers} blocks")


class EarlyExitRunner:
    """Runs the target's first `layer` blocks over the nodes of one draft after another, in the target's own cache."""

    def __init__(self, session: Session, layer: int) -> None:
        self._target, self._cache, self._layer = session.target, session.cache, layer
        self._hidden: list[Tensor] = []
        self._progress = DraftProgress(session)

    def run(self, tokens_BN: Tensor, tree: Tree, first: int) -> Tensor:
        """Returns the exit layer [B, M, D] at the nodes from `first` on; `first` = 0 begins a new draft."""
        span = (0, self._layer)
        out = self._target.forward(tokens_BN[:, first:], tree, self._cache, span=span, first=first)
        self._hidden = [*self._hidden, out.hidden_BND] if first else [out.hidden_BND]
        return out.hidden_BND

    def with_resume_point(self, draft: Draft, *, is_reordered: bool) -> Draft:
        """Returns the draft with the exit layer at its nodes as its resume point.

        It runs the nodes that have not been run in the draft's order: the last one of a chain, and all but node 0 of a
        dynamic tree, which is reordered.
        """
        self._progress.drafted(draft, draft.tree.num_nodes - 1, is_reordered=is_reordered)
        num_processed = self._progress.num_processed
        self._hidden = [torch.cat(self._hidden, dim=1)[:, :num_processed]]
        self.run(draft.tokens_BN, draft.tree, num_processed)
        resume_point = ResumePoint(layer=self._layer, hidden_BND=torch.cat(self._hidden, dim=1))
        return dataclasses.replace(draft, resume_point=resume_point)

    def accepted(self, step: Step) -> list[list[int]]:
        """Returns each row's accepted nodes that layers above the exit have processed in their order."""
        return self._progress.accepted(step)


class DrafterCache:
    """The KV cache of a drafter's own layers over the committed text, and their inputs that are still to be read."""

    def __init__(self, layers: CachedLayers, num_layers: int, num_rows: int) -> None:
        self._layers = layers
        self.cache = KVCache(num_layers=num_layers, batch_size=num_rows)
        self._unread: list[list[Tensor]] = [[] for _ in range(num_rows)]

    def read(self, x_BTD: Tensor, lengths: list[int]) -> None:
        """Reads prompts, right-padded rows of these lengths."""
        for part_BTD in x_BTD.split(PREFILL_CHUNK, dim=1):
            chunk = part_BTD.shape[1]
            self._run(part_BTD, chain(chunk, x_BTD.device), 0)
            # Shorter rows are padded to the same slots, and cut back below.
            self.cache.commit([list(range(chunk)) for _ in lengths])
        self.cache.lengths = list(lengths)

    def change_rows(self, origins: list[int | None], added: "DrafterCache | None") -> None:
        """Follows rows as `Drafter.change_rows` does."""
        self.cache.change_rows(origins, added.cache if added is not None else None)
        self._unread = followed(origins, self._unread, added._unread if added is not None else [])

    def run(self, x_BMD: Tensor, tree: Tree, first: int) -> Tensor:
        """Returns the layers' output [B, M, D] at the nodes from `first` on; unread inputs are read before node 0."""
        if first:
            return self._run(x_BMD, tree, first)
        rows = [torch.cat([*unread, x_1D]) for unread, x_1D in zip(self._unread, x_BMD, strict=True)]
        self._unread = [[] for _ in rows]
        out_BTD = self._run(
            torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), chain(max(map(len, rows)), x_BMD.device), 0
        )
        self.cache.commit([list(range(len(row) - 1)) for row in rows])
        last_B = torch.tensor([len(row) - 1 for row in rows], device=x_BMD.device)
        return values_at(out_BTD, last_B)[:, None]

    def keep(self, x_BPD: Tensor, paths: list[list[int]], processed: list[list[int]]) -> None:
        """Commits the `processed` nodes of the accepted paths; the inputs `x_BPD` of the others are read later."""
        self.cache.commit(processed)
        for row, (path, before) in enumerate(zip(paths, processed, strict=True)):
            if len(path) > len(before):
                self._unread[row].append(x_BPD[row, len(before) : len(path)])

    def _run(self, x_BMD: Tensor, tree: Tree, first: int) -> Tensor:
        positions_BM, mask_R1MS = prepare_cache(tree, self.cache, first=first)
        return self._layers(x_BMD, positions_BM, mask_R1MS, self.cache)
