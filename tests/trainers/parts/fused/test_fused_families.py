"""Families whose cross-entropy is computed block by block, against the same loss by whole logits."""

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from data.batches import Batch, collate, example
from data.teacher import complete
from draftsmith import Target
from tests.support.models import VOCAB_SIZE, scramble, tiny_target
from tests.support.runs import trainer_settings
from trainers import cnn, distill, lstm, mtp, prophet
from trainers.parts import distillation, losses


def batch(target: Target) -> Batch:
    generator = torch.Generator().manual_seed(0)
    rows = [
        example(
            torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist(),
            [position > row + 2 for position in range(length)],
            str(row),
        )
        for row, length in enumerate((9, 17, 23))
    ]
    return complete(collate(rows), target, (target.num_layers,))


@pytest.mark.parametrize(
    ("family", "given"),
    [
        (distill, {}),
        (lstm, {}),
        (lstm, {"shortlist": 20, "rank": 8}),
        (cnn, {}),
        (mtp, {}),
        (mtp, {"shortlist": 20}),
        (prophet, {}),
        (prophet, {"own_head": True}),
        (prophet, {"shortlist": 20}),
    ],
    ids=lambda value: value.__name__.rpartition(".")[2] if isinstance(value, ModuleType) else str(value),
)
def test_loss_and_gradients_equal_those_of_whole_logits(
    family: Any, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tiny_target("llama")
    settings, read = trainer_settings(family, **given), batch(target)
    torch.manual_seed(0)
    drafter = family.build(settings, target)
    scramble(drafter, seed=1)
    weights = [weight for weight in drafter.parameters() if weight.requires_grad]
    fused = losses.linear_cross_entropy
    calls = []

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return fused(*arguments)

    def computed() -> tuple[Tensor, tuple[Tensor | None, ...]]:
        torch.manual_seed(1)
        total, _ = family.loss(drafter, read, settings, target)
        return total, torch.autograd.grad(total, weights, allow_unused=True)

    monkeypatch.setattr(losses, "linear_cross_entropy", counted)
    found, num_calls = computed(), len(calls)
    for module in (family, distillation):
        for name in ("matrix_of", "shared_matrix", "tied_matrix"):
            monkeypatch.setattr(module, name, lambda *_: None, raising=False)
    torch.testing.assert_close(found, computed(), rtol=1e-5, atol=1e-5)
    assert num_calls and len(calls) == num_calls
