"""Figures of training and of held-out rows: sums and counts added up, and what families conclude from their means."""

import math
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from data.batches import Batch
from data.teacher import complete
from draftsmith import Target
from trainers import Metrics, Needs

ACCEPTANCE = "acceptance"
ON_DRAFT_TEXT = "acceptance_on_draft_text"


class Sums:
    """Adds up (sum, count) pairs; divided once, by `means`."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, metrics: Metrics) -> None:
        for name, (total, count) in metrics.items():
            self._sums[name] = self._sums.get(name, 0) + total.detach().double()
            self._counts[name] = self._counts.get(name, 0) + count

    def means(self, reduce: Callable[[Tensor], Tensor] = lambda pairs: pairs) -> dict[str, float]:
        """Returns sum / count of each metric, NaN where the count is 0; `reduce` adds a tensor up over ranks."""
        names = list(self._sums)
        pairs = torch.stack([torch.stack([self._sums[name] for name in names]), self._count_tensor(names)])
        sums, counts = reduce(pairs).tolist()
        return {name: sums[at] / counts[at] if counts[at] else math.nan for at, name in enumerate(names)}

    def _count_tensor(self, names: list[str]) -> Tensor:
        device = self._sums[names[0]].device
        return torch.tensor([self._counts[name] for name in names], dtype=torch.float64, device=device)


def best_of(family: ModuleType) -> str:
    """Returns the held-out figure that names the family's best step."""
    return getattr(family, "BEST_METRIC", ACCEPTANCE)


def evaluate(drafter: Any, batch: Batch, family: ModuleType, settings: Any, target: Target, needs: Needs) -> Metrics:
    """Returns the family's judgement of held-out rows, and of what the drafter writes in their place if it writes."""
    metrics = family.evaluate(drafter, batch, settings, target)
    own = family.self_generated(drafter, batch, settings, target) if hasattr(family, "self_generated") else None
    if own is None:
        return metrics
    own = complete(own, target, needs.layers + needs.held_out_layers, needs.top_k)
    return metrics | {ON_DRAFT_TEXT: family.evaluate(drafter, own, settings, target)[ACCEPTANCE]}


def summarise(means: dict[str, float], costs: dict[str, float], family: ModuleType) -> dict[str, float]:
    """Returns the figures that are there, with what the family concludes from them."""
    there = {name: value for name, value in means.items() if not math.isnan(value)}
    return there | family.summarise(there, costs) if hasattr(family, "summarise") else means


def evaluate_all(
    drafter: Any,
    batches: Iterable[Batch],
    family: ModuleType,
    settings: Any,
    target: Target,
    needs: Needs,
    costs: dict[str, float],
) -> dict[str, float]:
    """Returns all figures of a drafter on these held-out rows."""
    sums = Sums()
    for batch in batches:
        sums.add(evaluate(drafter, batch, family, settings, target, needs))
    return summarise(sums.means(), costs, family)
