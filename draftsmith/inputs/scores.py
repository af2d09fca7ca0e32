"""The logits that a call's tokens were drawn from, as `model.generate` returns them: `KeptScores`.

Shape suffixes: B rows, N nodes of a draft, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from draftsmith.core.sampling import Sampling
from draftsmith.inputs.processors import warpers_of

Steps = tuple[Tensor, ...]


class KeptScores:
    """Keeps, for each committed token, the target's logits at the node that it follows.

    `logits` are those of the model, and `scores` the same after the processors and cutoffs of the call, the temperature
    included, in float32.
    """

    def __init__(self, num_rows: int, sampling: Sampling, *, scores: bool, logits: bool, normalise: bool) -> None:
        self._warpers = [] if sampling.is_greedy else warpers_of(sampling)
        self._normalise = normalise
        self._wanted = {"scores": scores, "logits": logits}
        self._kept: dict[str, list[list[Tensor]]] = {name: [[] for _ in range(num_rows)] for name in self._wanted}

    def begin(self, logits_BNV: Tensor, processed_BNV: Tensor) -> None:
        """Takes the logits of a step's draft, before and after the logits processors."""
        self._step = {"scores": processed_BNV, "logits": logits_BNV}

    def keep(self, index: int, row: int, nodes: Sequence[int]) -> None:
        """Keeps the logits at the `nodes` that the new tokens of the text `index`, in row `row`, follow."""
        for name, is_wanted in self._wanted.items():
            if is_wanted:
                self._kept[name][index].extend(self._step[name][row, list(nodes)].float().clone().unbind())

    def steps(self) -> tuple[Steps | None, Steps | None]:
        """Returns (scores, logits), each with [B, V] for every new token, or None; NaN where a row has ended."""
        return self._joined("scores"), self._joined("logits")

    def _joined(self, name: str) -> Steps | None:
        if not self._wanted[name]:
            return None
        rows = self._kept[name]
        ended_V = torch.full_like(next(row[0] for row in rows if row), torch.nan)
        steps = []
        for step in range(max(map(len, rows))):
            kept_BV = torch.stack([row[step] if step < len(row) else ended_V for row in rows])
            if name == "scores":
                for warper in self._warpers:
                    kept_BV = warper(None, kept_BV)
                kept_BV = kept_BV.log_softmax(-1) if self._normalise else kept_BV
            steps.append(kept_BV)
        return tuple(steps)
