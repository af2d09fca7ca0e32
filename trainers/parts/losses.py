"""Training losses as pure functions of logits at N positions, and their sum over chunks without keeping the logits.

Shape suffixes: N positions, V vocabulary, K most likely tokens kept, C outcomes: the vocabulary, or the K most likely
tokens and one more outcome, "any other token". `student_logp_NC` and `teacher_logp_NC` are outcomes' log-probabilities.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from draftsmith.parts.neural.shortlist import OUTSIDE, Shortlist
from trainers.compilation.compiled_losses import compilable
from trainers.parts.fused.linear_cross_entropy import Matrix, SoftTargets, linear_cross_entropy, soft_targets

MAX_LOGITS = 2**24
"""Number of logits computed at once, 64 MiB in float32."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Teacher:
    """The target's distribution at N positions: all its logits, or the K largest with the exact log-normaliser."""

    logits: Tensor
    """[N, V], or [N, K] when `ids` are given."""
    ids_NK: Tensor | None = None
    """Token ids of the K largest logits."""
    log_normaliser_N: Tensor | None = None
    """Log-sum-exp of all V logits."""


def on_shortlist(student_logits_NW: Tensor, teacher: Teacher, shortlist: Shortlist) -> tuple[Tensor, Teacher]:
    """Returns the student's logits and the teacher conditioned on the next token being on the shortlist.

    That is p(x) / sum of p over the shortlist. With a top K, only tokens among the K that are off the shortlist leave
    the sum; the rest stay in "any other". `student_logits_NW` are those of the shortlist's tokens.
    """
    if shortlist.is_whole:
        return student_logits_NW, teacher
    if teacher.ids_NK is None:
        return student_logits_NW, Teacher(logits=teacher.logits[..., shortlist.ids_W])
    if teacher.ids_NK.shape[-1] == shortlist.vocab_size:
        logits_NV = torch.empty_like(teacher.logits).scatter(-1, teacher.ids_NK, teacher.logits)
        return student_logits_NW, Teacher(logits=logits_NV[..., shortlist.ids_W])
    assert teacher.log_normaliser_N is not None
    is_listed_NK = shortlist.contains(teacher.ids_NK)
    probs_NK = (_upcast(teacher.logits) - teacher.log_normaliser_N[:, None]).exp()
    # Where almost all the mass is off the shortlist, rounding must not make the rest negative.
    listed_N = (1 - (probs_NK * ~is_listed_NK).sum(-1)).clamp(min=torch.finfo(probs_NK.dtype).eps)
    # Two more columns stand for tokens off the shortlist: those among the K, and one that always stays in "any other".
    num_listed = len(shortlist)
    index_NK = torch.searchsorted(shortlist.ids_W, teacher.ids_NK).masked_fill(~is_listed_NK, num_listed)
    return functional.pad(student_logits_NW, (0, 2), value=OUTSIDE), Teacher(
        logits=teacher.logits.masked_fill(~is_listed_NK, OUTSIDE),
        ids_NK=index_NK,
        log_normaliser_N=teacher.log_normaliser_N + listed_N.log(),
    )


def outcome_log_probs(student_logits_NV: Tensor, teacher: Teacher, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Returns the log-probabilities (student_logp_NC, teacher_logp_NC) of the outcomes that are compared.

    With the teacher's top K the outcomes are those K tokens and "any other": teacher 1 - sum_K p, student
    sum_{x not in K} q(x). No mass is dropped; every divergence below is then that of the coarser distributions, which
    is at most the full one and equals it for K = V. Raises ValueError for a temperature other than 1 with a top K,
    because the stored normaliser holds for 1 only.
    """
    student_logp_NV = (_upcast(student_logits_NV) / temperature).log_softmax(-1)
    if teacher.ids_NK is None:
        return student_logp_NV, (_upcast(teacher.logits) / temperature).log_softmax(-1)
    assert teacher.log_normaliser_N is not None
    if temperature != 1.0:
        raise ValueError(f"temperature is {temperature}; with the teacher's top logits only it must be 1")
    top_teacher_NK = _upcast(teacher.logits) - teacher.log_normaliser_N[:, None]
    top_student_NK = student_logp_NV.gather(-1, teacher.ids_NK)
    if teacher.ids_NK.shape[-1] == student_logp_NV.shape[-1]:
        return top_student_NK, top_teacher_NK
    # A smaller rest is below the normaliser's rounding; a zero would make the reverse divergences infinite.
    smallest = torch.finfo(top_teacher_NK.dtype).eps
    rest_teacher_N = (1 - top_teacher_NK.exp().sum(-1)).clamp(min=smallest).log()
    rest_student_N = student_logp_NV.scatter(-1, teacher.ids_NK, -math.inf).logsumexp(-1)
    return (
        torch.cat([top_student_NK, rest_student_N[:, None]], dim=-1),
        torch.cat([top_teacher_NK, rest_teacher_N[:, None]], dim=-1),
    )


@compilable
def cross_entropy(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Returns -log q(label) [N]."""
    return functional.cross_entropy(_upcast(logits_NV), labels_N, reduction="none")


def forward_kl(student_logp_NC: Tensor, teacher_logp_NC: Tensor) -> Tensor:
    """Returns sum_x p log(p / q) [N], p the teacher."""
    return (teacher_logp_NC.exp() * (teacher_logp_NC - student_logp_NC)).sum(-1)


def reverse_kl(student_logp_NC: Tensor, teacher_logp_NC: Tensor) -> Tensor:
    """Returns sum_x q log(q / p) [N], q the student."""
    return forward_kl(teacher_logp_NC, student_logp_NC)


def jensen_shannon(student_logp_NC: Tensor, teacher_logp_NC: Tensor, *, beta: float) -> Tensor:
    """Returns beta KL(p | m) + (1 - beta) KL(q | m) [N] with m = beta p + (1 - beta) q (DistillSpec, 2310.08461).

    Divided by beta it tends to the forward KL for beta to 0; divided by 1 - beta, to the reverse KL for beta to 1.
    """
    mixed_NC = torch.logaddexp(teacher_logp_NC + math.log(beta), student_logp_NC + math.log1p(-beta))
    return beta * forward_kl(mixed_NC, teacher_logp_NC) + (1 - beta) * forward_kl(mixed_NC, student_logp_NC)


def total_variation(student_logp_NC: Tensor, teacher_logp_NC: Tensor) -> Tensor:
    """Returns half of sum_x |p - q| [N], which is 1 - acceptance."""
    return 0.5 * (teacher_logp_NC.exp() - student_logp_NC.exp()).abs().sum(-1)


def acceptance(student_logp_NC: Tensor, teacher_logp_NC: Tensor) -> Tensor:
    """Returns sum_x min(p, q) [N], the probability that the target accepts a token sampled from the student."""
    return torch.minimum(student_logp_NC, teacher_logp_NC).exp().sum(-1)


def likelihood(student_logp_NC: Tensor, teacher_logp_NC: Tensor) -> Tensor:
    """Returns -log sum_x min(p, q) [N] (LK losses, 2602.23881)."""
    return -torch.minimum(student_logp_NC, teacher_logp_NC).logsumexp(-1)


def likelihood_hybrid(student_logp_NC: Tensor, teacher_logp_NC: Tensor) -> Tensor:
    """Returns w KL(p | q) + (1 - w) TV(p, q) [N] with w = exp(-3 acceptance), held constant (2602.23881).

    The weight is computed at each position, so that the loss of a batch is the sum over its rows.
    """
    weight_N = torch.exp(-3 * acceptance(student_logp_NC, teacher_logp_NC)).detach()
    kl_N, tv_N = forward_kl(student_logp_NC, teacher_logp_NC), total_variation(student_logp_NC, teacher_logp_NC)
    return weight_N * kl_N + (1 - weight_N) * tv_N


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jensen_shannon,
    "tvd": total_variation,
    "lk": likelihood,
    "lk_hybrid": likelihood_hybrid,
}


@cache  # one function for each set of arguments, so that --compile compiles it once
def divergence(name: str, *, beta: float = 0.5, temperature: float = 1.0) -> Callable[[Tensor, Teacher], Tensor]:
    """Returns the function (student_logits_NV, teacher) -> loss [N] of a name in `DIVERGENCES`, times temperature^2.

    The square keeps the size of the gradient (Hinton et al. 2015). Only `jsd` uses `beta`.
    Raises ValueError for a beta outside (0, 1) and a temperature that is not positive.
    """
    if not 0 < beta < 1:
        raise ValueError(f"beta is {beta}; it must lie between 0 and 1, both excluded")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be positive")
    compare = partial(jensen_shannon, beta=beta) if name == "jsd" else DIVERGENCES[name]

    @compilable
    def loss(student_logits_NV: Tensor, teacher: Teacher) -> Tensor:
        return compare(*outcome_log_probs(student_logits_NV, teacher, temperature)) * temperature**2

    return loss


def sum_label_losses(
    logits: Callable[[Tensor], Tensor],
    matrix: Matrix | None,
    features_ND: Tensor,
    labels_N: Tensor,
    *,
    vocab_size: int,
) -> tuple[Tensor, int]:
    """Returns (sum of -log q(label), number of positions N) of the features.

    `logits` computes logits of features; if it is a product with `matrix`, its loss is computed block by block.
    """
    if matrix is not None:
        return linear_cross_entropy(features_ND, matrix, labels_N)[0], len(labels_N)
    return sum_in_chunks(
        lambda features, labels: cross_entropy(logits(features), labels), features_ND, labels_N, vocab_size=vocab_size
    )


def sum_soft_losses(
    logits: Callable[[Tensor], Tensor],
    matrix: Matrix | None,
    features_ND: Tensor,
    targets: SoftTargets,
    weights_N: Tensor,
) -> tuple[Tensor, Tensor]:
    """Returns the weighted sum of the cross-entropies with `targets`, and each position's without gradient [N].

    `logits` and `matrix` are those of `sum_label_losses`.
    """
    if matrix is not None:
        return linear_cross_entropy(features_ND, matrix, targets, weights_N)
    num_positions, vocab_size = targets.logits_GW.shape
    share = len(features_ND) // num_positions

    def losses(features_RD: Tensor, logits_CW: Tensor, log_normaliser_C: Tensor) -> Tensor:
        own_CSW = _upcast(logits(features_RD)).unflatten(0, (-1, share))
        probs_CW = (logits_CW - log_normaliser_C[:, None]).exp()
        return -(own_CSW.log_softmax(-1) * probs_CW[:, None]).sum(-1).flatten()

    size = max(1, MAX_LOGITS // (vocab_size * share))
    inputs = (features_ND.split(size * share), targets.logits_GW.split(size), targets.log_normaliser_G.split(size))
    losses_N = torch.cat(
        [
            checkpoint(losses, *chunk, use_reentrant=False, preserve_rng_state=False)
            for chunk in zip(*inputs, strict=True)
        ]
    )
    return (losses_N * weights_N).sum(), losses_N.detach()


def sum_forward_kl(
    matrix: Matrix, features: Sequence[Tensor], target_logits: Callable[[Tensor], Tensor], hidden_ND: Tensor
) -> Tensor:
    """Returns sum_n KL(target | softmax of the logits) of each of `features` [N, D], computed block by block.

    Logits of features are their product with `matrix`; `target_logits` computes the target's, of the same tokens, from
    its hidden states, and they take no gradient. KL is the cross-entropy less the target's entropy.
    """
    vocab_size = len(matrix.weight_WD)
    size = max(1, MAX_LOGITS // vocab_size)
    if matrix.weight_WD.requires_grad:
        size = max(1, len(hidden_ND))  # the gradient of a trained matrix is made once, not in each chunk

    def sums(theirs_RD: Tensor, *chunks: Tensor) -> Tensor:
        targets = soft_targets(map_in_chunks(target_logits, theirs_RD, vocab_size=vocab_size))
        entropies_R = map_in_chunks(_entropy, targets.logits_GW, targets.log_normaliser_G, vocab_size=vocab_size)
        cross_entropies = [linear_cross_entropy(chunk_RD, matrix, targets)[0] for chunk_RD in chunks]
        return torch.stack(cross_entropies) - entropies_R.sum()

    split = zip(*(each.split(size) for each in (hidden_ND, *features)), strict=True)
    return torch.stack([sums(*chunk) for chunk in split]).sum(0)


@compilable
def _entropy(logits_CW: Tensor, log_normaliser_C: Tensor) -> Tensor:
    logp_CW = _upcast(logits_CW) - log_normaliser_C[:, None]
    return -(logp_CW.exp() * logp_CW).sum(-1)


def sum_in_chunks(
    loss: Callable[..., Tensor], *inputs: Tensor, vocab_size: int, max_logits: int = MAX_LOGITS
) -> tuple[Tensor, int]:
    """Returns (sum of `loss(*inputs)` over its first dimension, number of positions N).

    `inputs` are [N, ...], of supervised positions only. `loss` applies the head itself; it is called on
    `max_logits / vocab_size` positions at a time and again in the backward pass, so that no chunk's logits are kept.
    """
    num_positions = len(inputs[0])
    size = max(1, max_logits // vocab_size)
    if num_positions <= size:
        return loss(*inputs).sum(0), num_positions
    sums = [
        checkpoint(_sum_loss, loss, *chunk, use_reentrant=False, preserve_rng_state=False)
        for chunk in zip(*(one.split(size) for one in inputs), strict=True)
    ]
    return torch.stack(sums).sum(0), num_positions


@torch.no_grad()
def map_in_chunks(
    compare: Callable[..., Tensor], *inputs: Tensor, vocab_size: int, max_logits: int = MAX_LOGITS
) -> Tensor:
    """Returns `compare(*inputs)` [N, ...] without gradient, computed in chunks as `sum_in_chunks` does."""
    size = max(1, max_logits // vocab_size)
    return torch.cat([compare(*chunk) for chunk in zip(*(one.split(size) for one in inputs), strict=True)])


def _sum_loss(loss: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    return loss(*inputs).sum(0)


def _upcast(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
