"""Losses by hand, against slow references in value and gradient, at their limits, and their memory."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from trainers.parts import losses
from trainers.parts.fused.linear_cross_entropy import Matrix
from trainers.parts.losses import (
    DIVERGENCES,
    Teacher,
    acceptance,
    cross_entropy,
    divergence,
    forward_kl,
    jensen_shannon,
    likelihood,
    likelihood_hybrid,
    outcome_log_probs,
    reverse_kl,
    sum_in_chunks,
    total_variation,
)

NUM_POSITIONS, VOCAB_SIZE, WIDTH = 7, 11, 5


def random_logits(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def top_k(logits_NV: Tensor, k: int) -> Teacher:
    top = logits_NV.topk(k)
    return Teacher(logits=top.values, ids_NK=top.indices, log_normaliser_N=logits_NV.logsumexp(-1))


def test_all_losses_by_hand() -> None:
    """p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4)."""
    p = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
    q = torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64).log()
    kl = 0.25 * math.log(2)  # 1/2 log 2 - 1/4 log 2
    mixed = 0.5 * (0.5 * math.log(0.5 / 0.375) + 0.25 * math.log(0.25 / 0.375)) * 2
    weight = math.exp(-3 * 0.75)
    expected = {
        "forward_kl": kl,
        "reverse_kl": kl,
        "jsd": mixed,
        "tvd": 0.25,
        "lk": -math.log(0.75),
        "lk_hybrid": weight * kl + (1 - weight) * 0.25,
    }
    assert expected.keys() == DIVERGENCES.keys()
    for name, value in expected.items():
        assert divergence(name)(q, Teacher(logits=p)).item() == pytest.approx(value, abs=1e-12), name
    assert cross_entropy(q, torch.tensor([1])).item() == pytest.approx(math.log(2))
    assert acceptance(q, p).item() == pytest.approx(0.75)


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_losses_and_gradients_equal_a_slow_reference(name: str) -> None:
    """The reference sums over tokens in Python, in float64; values agree to 1e-10."""
    teacher_NV = random_logits(0, NUM_POSITIONS, VOCAB_SIZE)
    fast = random_logits(1, NUM_POSITIONS, VOCAB_SIZE).requires_grad_()
    slow = fast.detach().clone().requires_grad_()
    beta, temperature = 0.3, 1.5
    fast_N = divergence(name, beta=beta, temperature=temperature)(fast, Teacher(logits=teacher_NV))
    rows = []
    for n in range(NUM_POSITIONS):
        p, q = (teacher_NV[n] / temperature).softmax(0), (slow[n] / temperature).softmax(0)
        terms: dict[str, list[Tensor]] = {"fkl": [], "rkl": [], "jsd": [], "tv": [], "min": []}
        for x in range(VOCAB_SIZE):
            m = beta * p[x] + (1 - beta) * q[x]
            terms["fkl"].append(p[x] * (p[x] / q[x]).log())
            terms["rkl"].append(q[x] * (q[x] / p[x]).log())
            terms["jsd"].append(beta * p[x] * (p[x] / m).log() + (1 - beta) * q[x] * (q[x] / m).log())
            terms["tv"].append((p[x] - q[x]).abs() / 2)
            terms["min"].append(torch.minimum(p[x], q[x]))
        total = {key: torch.stack(values).sum() for key, values in terms.items()}
        weight = torch.exp(-3 * total["min"]).detach()
        rows.append(
            {
                "forward_kl": total["fkl"],
                "reverse_kl": total["rkl"],
                "jsd": total["jsd"],
                "tvd": total["tv"],
                "lk": -total["min"].log(),
                "lk_hybrid": weight * total["fkl"] + (1 - weight) * total["tv"],
            }[name]
        )
    slow_N = torch.stack(rows) * temperature**2
    torch.testing.assert_close(fast_N, slow_N, rtol=1e-10, atol=1e-12)
    fast_N.sum().backward()
    slow_N.sum().backward()
    torch.testing.assert_close(fast.grad, slow.grad, rtol=1e-8, atol=1e-10)


def test_jensen_shannon_tends_to_the_kl_divergences() -> None:
    """Divided by beta (1 - beta) it tends to the forward (reverse) KL, with an error of first order."""
    student, teacher = outcome_log_probs(random_logits(1, 3, 6), Teacher(logits=random_logits(2, 3, 6)))
    small = 1e-6
    near_forward = jensen_shannon(student, teacher, beta=small) / small
    near_reverse = jensen_shannon(student, teacher, beta=1 - small) / small
    torch.testing.assert_close(near_forward, forward_kl(student, teacher), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(near_reverse, reverse_kl(student, teacher), rtol=1e-3, atol=1e-4)


def test_acceptance_equals_one_minus_total_variation_and_lk_its_negative_log() -> None:
    student, teacher = outcome_log_probs(random_logits(1, 9, 6), Teacher(logits=random_logits(2, 9, 6)))
    accepted_N = acceptance(student, teacher)
    torch.testing.assert_close(total_variation(student, teacher), 1 - accepted_N)
    torch.testing.assert_close(likelihood(student, teacher), -accepted_N.log())
    same = likelihood_hybrid(teacher, teacher)
    torch.testing.assert_close(same, torch.zeros_like(same))


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_losses_with_top_logits(name: str) -> None:
    """K = V equals all logits; fewer equal, and are at most, the loss with all other tokens as one outcome."""
    loss = divergence(name)
    student_NV, teacher_NV = random_logits(3, NUM_POSITIONS, VOCAB_SIZE), random_logits(4, NUM_POSITIONS, VOCAB_SIZE)
    full_N = loss(student_NV, Teacher(logits=teacher_NV))
    torch.testing.assert_close(loss(student_NV, top_k(teacher_NV, VOCAB_SIZE)), full_N, rtol=1e-9, atol=1e-12)

    teacher = top_k(teacher_NV, 4)
    assert teacher.ids_NK is not None

    def lumped(logits_NV: Tensor) -> Tensor:
        probs_NV = logits_NV.softmax(-1)
        kept_NK = probs_NV.gather(-1, teacher.ids_NK)
        return torch.cat([kept_NK, 1 - kept_NK.sum(-1, keepdim=True)], dim=-1).log()

    few_N = loss(student_NV, teacher)
    torch.testing.assert_close(few_N, loss(lumped(student_NV), Teacher(logits=lumped(teacher_NV))))
    if name != "lk_hybrid":  # its weight on the larger of two divergences falls when the acceptance rises
        assert (few_N <= full_N + 1e-12).all()


def test_losses_are_finite_if_the_top_logits_have_all_the_mass() -> None:
    """A target whose other tokens' mass rounds to zero gives finite losses and gradients in float32."""
    teacher = top_k(torch.tensor([[60.0, 0.0, 0.0, 0.0]]), 2)
    for name in DIVERGENCES:
        student = torch.zeros(1, 4, requires_grad=True)
        divergence(name)(student, teacher).sum().backward()
        assert student.grad is not None and student.grad.isfinite().all(), name


def test_invalid_beta_and_temperature_raise() -> None:
    with pytest.raises(ValueError, match="beta"):
        divergence("jsd", beta=1.0)
    with pytest.raises(ValueError, match="temperature"):
        divergence("tvd", temperature=0.0)
    with pytest.raises(ValueError, match="temperature is 2"):
        outcome_log_probs(torch.zeros(1, 4), top_k(torch.zeros(1, 4), 2), temperature=2.0)


class SavedForBackward:
    """Records the size of the largest tensor that autograd saves for the backward pass."""

    def __init__(self) -> None:
        self.largest = 0

    def __enter__(self) -> "SavedForBackward":
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> Tensor:
        self.largest = max(self.largest, tensor.numel())
        return tensor


@pytest.mark.parametrize("size", [1, 3, NUM_POSITIONS, 100])
def test_sum_in_chunks_equals_the_whole_sum(size: int) -> None:
    """Sum, and gradients of the hidden states and the head's weights, equal those without chunks to 1e-12."""
    hidden_ND = random_logits(0, NUM_POSITIONS, WIDTH).requires_grad_()
    weight_VD = random_logits(1, VOCAB_SIZE, WIDTH).requires_grad_()
    labels_N = torch.arange(NUM_POSITIONS)

    whole = functional.cross_entropy(hidden_ND @ weight_VD.T, labels_N, reduction="sum")
    expected = torch.autograd.grad(whole, [hidden_ND, weight_VD])
    total, count = sum_in_chunks(
        lambda hidden, labels: cross_entropy(hidden @ weight_VD.T, labels),
        hidden_ND,
        labels_N,
        vocab_size=VOCAB_SIZE,
        max_logits=size * VOCAB_SIZE,
    )
    assert count == NUM_POSITIONS
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(total, [hidden_ND, weight_VD]), expected, rtol=1e-12, atol=1e-12)
    fused = functional.linear_cross_entropy(hidden_ND, weight_VD, labels_N, reduction="sum")
    torch.testing.assert_close(total, fused, rtol=1e-10, atol=1e-10)


def test_sum_in_chunks_saves_no_logits() -> None:
    """With 256 positions of 512 tokens in chunks of 16, nothing larger than the head or the hidden states is saved."""
    hidden_ND = torch.randn(256, 8, requires_grad=True)
    head = torch.nn.Linear(8, 512)
    labels_N = torch.zeros(256, dtype=torch.long)

    def loss(hidden: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(head(hidden), labels)

    with SavedForBackward() as whole:
        sum_in_chunks(loss, hidden_ND, labels_N, vocab_size=512, max_logits=256 * 512)
    with SavedForBackward() as in_chunks:
        sum_in_chunks(loss, hidden_ND, labels_N, vocab_size=512, max_logits=16 * 512)
    assert whole.largest == 256 * 512
    assert in_chunks.largest <= 512 * 8


def test_sum_in_chunks_of_no_positions_is_a_zero_with_gradient() -> None:
    """A rank without supervised tokens in its batch takes part in the reduction of gradients."""
    head = torch.nn.Linear(4, 6)
    total, count = sum_in_chunks(lambda hidden: head(hidden).logsumexp(-1), torch.zeros(0, 4), vocab_size=6)
    assert count == 0 and total.item() == 0.0
    total.backward()
    assert head.weight.grad is not None and not head.weight.grad.any()


@pytest.mark.parametrize("is_trained", [False, True])
def test_forward_kl_in_chunks_equals_the_whole(monkeypatch: pytest.MonkeyPatch, is_trained: bool) -> None:
    torch.manual_seed(0)
    theirs_ND, *given = (torch.randn(7, 5, dtype=torch.float64) for _ in range(3))
    weight_WD = torch.randn(11, 5, dtype=torch.float64, requires_grad=is_trained)
    head = torch.randn(11, 5, dtype=torch.float64)
    features = [one.requires_grad_() for one in given]
    monkeypatch.setattr(losses, "MAX_LOGITS", 33)
    sums = losses.sum_forward_kl(Matrix(weight_WD=weight_WD), features, lambda hidden: hidden @ head.T, theirs_ND)
    teacher_NW = (theirs_ND @ head.T).log_softmax(-1)
    slow = torch.stack([forward_kl((one @ weight_WD.T).log_softmax(-1), teacher_NW).sum() for one in features])
    torch.testing.assert_close(sums, slow)
    learnt = [*features, weight_WD] if is_trained else features
    expected = torch.autograd.grad(slow.sum(), learnt)
    torch.testing.assert_close(torch.autograd.grad(sums.sum(), learnt), expected)
