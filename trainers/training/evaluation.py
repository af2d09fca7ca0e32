"""Metrics of training and of held-out rows: sums and counts added up, means, and the families' summaries of them."""

import math
from collections.abc import Callable, Iterable, Mapping
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


class MetricSums:
    """Adds up (sum, count) pairs, which `means` divides once."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, metrics: Metrics) -> None:
        for name, (total, count) in metrics.items():
            self._sums[name] = self._sums.get(name, 0) + total.detach().double()
            self._counts[name] = self._counts.get(name, 0) + count

    def means(self, reduce: Callable[[Tensor], Tensor] = lambda pairs: pairs) -> dict[str, float]:
        """Returns sum / count of each metric, NaN where the count is 0; `reduce` sums a tensor over ranks.

        Raises ValueError if a sum is not finite, as that of a drafter with broken weights.
        """
        names = list(self._sums)
        pairs = torch.stack([torch.stack([self._sums[name] for name in names]), self._count_tensor(names)])
        sums, counts = reduce(pairs).tolist()
        for name, total, count in zip(names, sums, counts, strict=True):
            if count and not math.isfinite(total):
                raise ValueError(
                    f"{name} is {total}: the drafter's weights or outputs are not finite; the last checkpoint is"
                    " unchanged: lower --learning-rate"
                )
        return {name: sums[i] / counts[i] if counts[i] else math.nan for i, name in enumerate(names)}

    def _count_tensor(self, names: list[str]) -> Tensor:
        device = self._sums[names[0]].device
        return torch.tensor([self._counts[name] for name in names], dtype=torch.float64, device=device)


def shown(metrics: Mapping[str, float | None]) -> str:
    """Returns the acceptance as text, or that no held-out row is long enough to measure it."""
    value = metrics.get(ACCEPTANCE)
    if value is None or math.isnan(value):
        return "unknown: no held-out row has as many tokens to learn as a draft"
    return f"{value:.3f}"


def best_metric(family: ModuleType) -> str:
    """Returns the name of the held-out metric that selects the best checkpoint."""
    return getattr(family, "BEST_METRIC", ACCEPTANCE)


def evaluate(drafter: Any, batch: Batch, family: ModuleType, settings: Any, target: Target, needs: Needs) -> Metrics:
    """Returns the family's metrics on held-out rows, and its acceptance on text that the drafter generates itself."""
    metrics = family.evaluate(drafter, batch, settings, target)
    generated = family.self_generated(drafter, batch, settings, target) if hasattr(family, "self_generated") else None
    if generated is None:
        return metrics
    generated = complete(generated, target, needs.layers + needs.held_out_layers, needs.top_k)
    return metrics | {ON_DRAFT_TEXT: family.evaluate(drafter, generated, settings, target)[ACCEPTANCE]}


def summarise(means: dict[str, float], costs: dict[str, float], family: ModuleType) -> dict[str, float]:
    """Returns the means with the metrics that the family computes from those that are not NaN."""
    known = {name: value for name, value in means.items() if not math.isnan(value)}
    return known | family.summarise(known, costs) if hasattr(family, "summarise") else means


def evaluate_all(
    drafter: Any,
    batches: Iterable[Batch],
    family: ModuleType,
    settings: Any,
    target: Target,
    needs: Needs,
    costs: dict[str, float],
) -> dict[str, float]:
    """Returns all metrics of a drafter on batches of held-out rows."""
    sums = MetricSums()
    for batch in batches:
        sums.add(evaluate(drafter, batch, family, settings, target, needs))
    return summarise(sums.means(), costs, family)
