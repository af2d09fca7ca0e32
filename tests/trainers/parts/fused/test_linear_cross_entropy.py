"""The cross-entropy by blocks against torch's own, in value and gradient; what is no matrix; the sums without one."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from draftsmith.parts.neural.shortlist import SharedHead
from tests.support.models import tiny_target
from trainers.compilation.compiled_losses import compiled_losses
from trainers.parts.fused import linear_cross_entropy as module
from trainers.parts.fused.linear_cross_entropy import (
    Matrix,
    SoftTargets,
    linear_cross_entropy,
    matrix_of,
    shared_matrix,
)
from trainers.parts.losses import sum_label_losses, sum_soft_losses

NUM_POSITIONS, SHARE, WIDTH, VOCAB_SIZE = 6, 3, 5, 23
CPU = torch.device("cpu")


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in chunks of 6 and the vocabulary in blocks of 4, the last one shorter."""
    monkeypatch.setattr(module, "MAX_ROWS", 7)
    monkeypatch.setattr(module, "BLOCK_LOGITS", {"cpu": 24})


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(2).to(dtype)


def inputs(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Returns features, matrix and bias that are trained, labels, and weights of which one is 0."""
    weights_N = torch.linspace(0, 1, NUM_POSITIONS * SHARE, dtype=dtype)
    return {
        "z": random(0, NUM_POSITIONS * SHARE, WIDTH, dtype=dtype).requires_grad_(),
        "weight": random(1, VOCAB_SIZE, WIDTH, dtype=dtype).requires_grad_(),
        "bias": random(2, VOCAB_SIZE, dtype=dtype).requires_grad_(),
        "labels": torch.arange(NUM_POSITIONS * SHARE) * 4 % VOCAB_SIZE,
        "weights": weights_N,
    }


def soft_targets(dtype: torch.dtype = torch.float64) -> SoftTargets:
    logits_GW = random(3, NUM_POSITIONS, VOCAB_SIZE, dtype=dtype)
    return SoftTargets(logits_GW=logits_GW, log_normaliser_G=logits_GW.logsumexp(-1))


def check(found: tuple[Tensor, Tensor], expected_N: Tensor, given: dict[str, Tensor], weights_N: Tensor) -> None:
    """Compares losses and gradients; the gradient of the sum is scaled, as it is by the number of tokens."""
    trained = [given[name] for name in ("z", "weight", "bias")]
    expected = torch.autograd.grad((expected_N * weights_N).sum() / 7, trained)
    total, losses_N = found
    torch.testing.assert_close(losses_N, expected_N.detach())
    torch.testing.assert_close(total, (expected_N * weights_N).sum())
    torch.testing.assert_close(torch.autograd.grad(total / 7, trained), expected)
    assert not losses_N.requires_grad


@pytest.fixture(params=["plain", pytest.param("compiled", marks=pytest.mark.slow)])
def either_way(request: pytest.FixtureRequest) -> Iterator[None]:
    """Computes the loss operation by operation, and compiled."""
    torch._dynamo.reset()  # functions are compiled for few dtypes in one process
    with compiled_losses() if request.param == "compiled" else nullcontext():
        yield


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.usefixtures("small_chunks", "either_way")
def test_labels_equal_torch(is_weighted: bool) -> None:
    given = inputs()
    matrix, weights_N = Matrix(weight_WD=given["weight"], bias_W=given["bias"]), given["weights"] * is_weighted
    found = linear_cross_entropy(given["z"], matrix, given["labels"], given["weights"] if is_weighted else None)
    logits_NW = functional.linear(given["z"], given["weight"], given["bias"])
    expected_N = functional.cross_entropy(logits_NW, given["labels"], reduction="none")
    check(found, expected_N, given, weights_N if is_weighted else torch.ones_like(weights_N))


@pytest.mark.usefixtures("small_chunks", "either_way")
def test_soft_targets_equal_torch() -> None:
    given, targets = inputs(), soft_targets()
    matrix = Matrix(weight_WD=given["weight"], bias_W=given["bias"])
    found = linear_cross_entropy(given["z"], matrix, targets, given["weights"])
    logits_NW = functional.linear(given["z"], given["weight"], given["bias"])
    probs_NW = targets.logits_GW.softmax(-1).repeat_interleave(SHARE, 0)
    expected_N = functional.cross_entropy(logits_NW, probs_NW, reduction="none")
    check(found, expected_N, given, given["weights"])


@pytest.mark.usefixtures("either_way")
def test_frozen_matrix_gets_no_gradient() -> None:
    given = inputs()
    total, _ = linear_cross_entropy(given["z"], Matrix(weight_WD=given["weight"].detach()), given["labels"])
    total.backward()
    expected_N = functional.cross_entropy(given["z"] @ given["weight"].detach().T, given["labels"], reduction="sum")
    torch.testing.assert_close(given["z"].grad, torch.autograd.grad(expected_N, given["z"])[0])
    assert given["weight"].grad is None


@pytest.mark.usefixtures("small_chunks", "either_way")
def test_autocast_rounds_as_a_linear_layer_does() -> None:
    """The errors of the gradients, against float32, are at most those of torch's own operations under autocast."""
    given, targets = inputs(torch.float32), soft_targets(torch.float32)
    trained = [given["z"], given["weight"]]
    probs_NW = targets.logits_GW.softmax(-1).repeat_interleave(SHARE, 0)

    def plain() -> Tensor:
        return functional.cross_entropy(functional.linear(*trained).float(), probs_NW, reduction="sum")

    exact = torch.autograd.grad(plain(), trained)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = torch.autograd.grad(plain(), trained)
        total, _ = linear_cross_entropy(given["z"], Matrix(weight_WD=given["weight"]), targets)
    found = torch.autograd.grad(total, trained)
    for one, other, reference in zip(found, rounded, exact, strict=True):
        assert one.dtype == torch.float32
        assert (one - reference).norm() <= 1.5 * (other - reference).norm() < 0.05 * reference.norm()


def test_gradient_is_taken_once() -> None:
    given = inputs()
    total, _ = linear_cross_entropy(given["z"], Matrix(weight_WD=given["weight"]), given["labels"])
    total.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="once"):
        total.backward()


def test_sums_without_a_matrix_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that must be called, such as one with adapters, gives the same losses and gradients."""
    monkeypatch.setattr("trainers.parts.losses.MAX_LOGITS", 2 * SHARE * VOCAB_SIZE)
    given, targets = inputs(), soft_targets()
    matrix = Matrix(weight_WD=given["weight"], bias_W=given["bias"])

    def logits(z_ND: Tensor) -> Tensor:
        return functional.linear(z_ND, given["weight"], given["bias"])

    def run(known: Matrix | None) -> tuple[Any, ...]:
        labelled, count = sum_label_losses(logits, known, given["z"], given["labels"], vocab_size=VOCAB_SIZE)
        soft, losses_N = sum_soft_losses(logits, known, given["z"], targets, given["weights"])
        trained = [given[name] for name in ("z", "weight", "bias")]
        return labelled, count, soft, losses_N, torch.autograd.grad(labelled + soft, trained)

    torch.testing.assert_close(run(None), run(matrix))


def test_matrix_of_other_layers_is_none() -> None:
    class Scaled(nn.Linear):
        pass

    linear = nn.Linear(3, 4)
    found = matrix_of(linear, CPU)
    assert found is not None and found.weight_WD is linear.weight and found.bias_W is linear.bias
    assert matrix_of(Scaled(3, 4), CPU) is None
    assert matrix_of(nn.Linear(3, 4, device="meta"), CPU) is None
    linear.weight = nn.Parameter(torch.empty(0))  # as ZeRO-3 leaves it
    assert matrix_of(linear, CPU) is None


def test_shared_matrix_holds_the_rows_of_the_shortlist() -> None:
    target = tiny_target("llama")
    head, z_ND = SharedHead(target, 9), random(0, 4, target.hidden_size, dtype=torch.float32)
    head.shortlist.set_tokens(torch.arange(9) * 3)
    matrix = shared_matrix(head, CPU)
    assert matrix is not None and not matrix.weight_WD.requires_grad
    torch.testing.assert_close(functional.linear(z_ND, matrix.weight_WD, matrix.bias_W), head.listed(z_ND))
    capped = tiny_target("gemma2")
    assert not capped.head_is_linear and shared_matrix(SharedHead(capped, 0), CPU) is None
