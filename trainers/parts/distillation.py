"""Distillation of draft models: losses against the target's text or distribution, and held-out metrics.

A draft model is given by its features after every token of a batch and the head that computes logits from them.

Shape suffixes: B rows, T positions, P = T - 1, N supervised positions, D width of the features, K most likely tokens,
V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from data.batches import Batch, Example
from draftsmith import Target
from draftsmith.length import predicted_speedup
from draftsmith.loading.model_info import TargetInfo
from draftsmith.parts.checks import check_at_least, check_positive
from draftsmith.parts.neural import cross_attention
from draftsmith.parts.neural.shortlist import Shortlist, check_size
from trainers import Metrics, Needs
from trainers.corpora import corpus
from trainers.parts import on_policy
from trainers.parts.fused.linear_cross_entropy import Matrix, tied_matrix
from trainers.parts.losses import (
    DIVERGENCES,
    Teacher,
    acceptance,
    divergence,
    map_in_chunks,
    on_shortlist,
    outcome_log_probs,
    sum_in_chunks,
    sum_label_losses,
)

Head = Callable[[Tensor], Tensor]
"""Features [N, D] -> logits [N, V]."""
BEST_METRIC = "predicted_speedup"
ACCEPTED_TO = "accepted_to_"
DRAFT_TOKENS = 64
"""Largest number of tokens that a draft model generates after a held-out prompt to be evaluated on them."""


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """The loss against the target's text or distribution."""

    loss: str = field(default="ce", metadata={"choices": ["ce", *DIVERGENCES]})
    """Cross-entropy on the text (ce), or a divergence from the target's distribution at each of its tokens."""
    beta: float = 0.5
    """Weight in the Jensen-Shannon divergence (jsd)."""
    loss_temperature: float = 1.0
    """Temperature of both distributions in a divergence."""
    teacher_top_k: int = 0
    """Number of the target's largest logits that a divergence uses, all other tokens being one outcome; 0 for all."""
    on_policy: float = 0.0
    """Fraction of the rows, chosen again at each step, whose text the draft model generates itself after the row's
    prompt; needs a divergence. The other rows keep the text of --data."""
    on_policy_temperature: float = 1.0
    """Sampling temperature of that text."""

    def __post_init__(self) -> None:
        check_at_least(self, 0, "teacher_top_k")
        if self.loss == "ce" and (self.teacher_top_k or self.loss_temperature != 1):
            raise ValueError("teacher_top_k and loss_temperature apply to divergences only; choose a --loss besides ce")
        if not 0 <= self.on_policy <= 1:
            raise ValueError(f"on_policy is {self.on_policy}; it is a fraction from 0 to 1")
        if self.on_policy and self.loss == "ce":
            raise ValueError("on_policy needs a divergence: cross-entropy would teach a draft model its own text")
        check_at_least(self, 0, "on_policy_temperature", most=1e6)
        check_at_least(self, 0, "beta", most=1)
        check_positive(self, "loss_temperature")
        if self.loss != "ce":
            divergence(self.loss, beta=self.beta, temperature=self.loss_temperature)
        if self.teacher_top_k and self.loss_temperature != 1:
            raise ValueError(f"with teacher_top_k, loss_temperature must be 1, not {self.loss_temperature}")


def check_network(settings: Any, target: TargetInfo) -> None:
    """Raises ValueError if the target lacks what a network's config needs: a source to copy from, trees, or tokens."""
    cross_attention.check(target, copies=settings.config.copy, width=settings.config.width)
    check_size(settings.config.shortlist, target.vocab_size)


def fill_shortlist(drafter: Any, settings: Any, target: Target, rows: Sequence[Example]) -> None:
    """Fills a network's shortlist with the most frequent tokens of the rows."""
    corpus.fill_shortlist(drafter.tied_head.shortlist, rows)


def needs(settings: LossSettings, target: Target) -> Needs:
    """Returns the target outputs that the loss and the held-out metrics read."""
    last = (target.num_layers,)
    if settings.loss == "ce" or settings.teacher_top_k:
        return Needs(top_k=settings.teacher_top_k, held_out_layers=last)
    return Needs(layers=last)


def loss(
    features_BTD: Tensor,
    head: Head,
    batch: Batch,
    settings: LossSettings,
    target: Target,
    shortlist: Shortlist | None = None,
    *,
    matrix: Matrix | None = None,
    widened: Callable[[Tensor], Tensor] = lambda features_ND: features_ND,
) -> tuple[Tensor, Metrics]:
    """Returns the loss summed over supervised tokens, each predicted at the position before it.

    If `head` is a product of `widened` features with `matrix`, its cross-entropy is computed block by block.

    With a shortlist, `head` returns the logits of its tokens, the cross-entropy skips tokens off the list, and
    divergences are from the target's distribution conditioned on the list; the metric `outside` is the fraction of
    tokens off the list.
    """
    shortlist = shortlist or Shortlist(0, target.vocab_size)
    labels_N = batch.tokens_BT[:, 1:][batch.loss_mask_BT[:, 1:]]
    is_listed_N = shortlist.contains(labels_N)
    metrics = {} if shortlist.is_whole else {"outside": ((~is_listed_N).sum(), len(labels_N))}
    features_ND = before_supervised(features_BTD, batch)
    if settings.loss == "ce":
        listed_ND = features_ND[is_listed_N]
        total, _ = sum_label_losses(
            head,
            matrix,
            listed_ND if matrix is None else widened(listed_ND),
            shortlist.indices(labels_N[is_listed_N]),
            vocab_size=len(shortlist),
        )
        return total, metrics
    compare = divergence(settings.loss, beta=settings.beta, temperature=settings.loss_temperature)
    total, _ = sum_in_chunks(
        lambda features, *theirs: compare(*on_shortlist(head(features), _teacher(target, *theirs), shortlist)),
        features_ND,
        *(before_supervised(part, batch) for part in _teacher_inputs(batch, settings, target)),
        vocab_size=len(shortlist) if settings.teacher_top_k else target.vocab_size,
    )
    return total, metrics


def transform_batch(drafter: Any, batch: Batch, settings: LossSettings, target: Target, salt: str) -> Batch:
    """Returns the batch with a fraction `on_policy` of its rows generated by the drafter, chosen by row and salt."""
    if settings.on_policy and on_policy.is_sharded(drafter):
        raise ValueError(
            "on_policy needs unsharded draft model weights, and zero3 shards them: use another --deepspeed"
        )
    rows = on_policy.select_rows(settings.on_policy, batch, salt)
    return on_policy.rewrite_rows(drafter, batch, target, rows, temperature=settings.on_policy_temperature, salt=salt)


def self_generated(drafter: Any, batch: Batch, settings: LossSettings, target: Target) -> Batch | None:
    """Returns held-out prompts continued by the drafter at temperature 1; None if ZeRO-3 shards its weights."""
    if on_policy.is_sharded(drafter):
        return None
    rows, options = range(len(batch.keys)), {"most_tokens": DRAFT_TOKENS}
    return on_policy.rewrite_rows(drafter, batch, target, rows, temperature=1.0, salt="held out", **options)


def listed_head(drafter: Any, source: Any) -> Head:
    """Returns the map from a network's features to the logits of its shortlist's tokens."""
    return drafter.cross_attention.copy_head(drafter.tied_head.listed, source)


def network_loss(
    features_BTH: Tensor, drafter: Any, batch: Batch, settings: LossSettings, target: Target
) -> tuple[Tensor, Metrics]:
    """Returns `loss` of the features of a network that has a tied head."""
    tied, head = drafter.tied_head, listed_head(drafter, batch.source)
    # What is copied from a source is mixed with the head's distribution.
    matrix = tied_matrix(tied, batch.tokens_BT.device) if head == tied.listed else None
    return loss(features_BTH, head, batch, settings, target, tied.shortlist, matrix=matrix, widened=tied.widened)


def evaluate_network(drafter: Any, batch: Batch, settings: Any, target: Target) -> Metrics:
    """Returns the metrics of a network that maps tokens and source to features."""
    features_BTD, head = drafter(batch.tokens_BT, batch.source), drafter.head(batch.source)
    return evaluate(features_BTD, head, batch, target, num_draft=settings.config.num_draft)


def evaluate(features_BTD: Tensor, head: Head, batch: Batch, target: Target, *, num_draft: int = 1) -> Metrics:
    """Returns acceptance, the mean of b = sum_x min(p, q) at temperature 1, and the rate of agreement of both argmaxes.

    With `num_draft` above 1 also `accepted_to_d`, the mean of b_1 b_2 ... b_d over consecutive supervised positions.
    """

    def compare(features: Tensor, theirs: Tensor) -> Tensor:
        student_NV, teacher_NV = outcome_log_probs(head(features), _teacher(target, theirs))
        agrees_N = student_NV.argmax(-1) == teacher_NV.argmax(-1)
        return torch.stack([acceptance(student_NV, teacher_NV), agrees_N.float()], dim=1)

    both = (before_supervised(part, batch) for part in (features_BTD, batch.hidden[target.num_layers]))
    found_N2 = map_in_chunks(compare, *both, vocab_size=target.vocab_size)
    accepted, agrees, count = *found_N2.sum(0), len(found_N2)
    metrics = {"acceptance": (accepted, count), "greedy_agreement": (agrees, count)}
    return metrics | run_acceptance(found_N2[:, 0], batch, num_draft)


def run_acceptance(accepted_N: Tensor, batch: Batch, num_draft: int) -> Metrics:
    """Returns the mean product of d consecutive acceptances for d from 2 to `num_draft`, as `accepted_to_d`."""
    known_BP = batch.loss_mask_BT[:, 1:]
    accepted_BP = torch.zeros(known_BP.shape, device=accepted_N.device, dtype=accepted_N.dtype)
    accepted_BP[known_BP] = accepted_N
    # Runs that contain an unsupervised position are not counted.
    product_BP, is_whole_BP, metrics = accepted_BP, known_BP, {}
    for depth in range(2, num_draft + 1):
        product_BP = product_BP[:, :-1] * accepted_BP[:, depth - 1 :]
        is_whole_BP = is_whole_BP[:, :-1] & known_BP[:, depth - 1 :]
        metrics[f"{ACCEPTED_TO}{depth}"] = (product_BP.sum(), int(is_whole_BP.sum()))
    return metrics


@torch.no_grad()
def measure_costs(drafter: Any, settings: LossSettings, target: Target) -> dict[str, float]:
    """Returns the cost of a drafted token relative to a plain decoding step, which does not depend on the weights."""
    return {"cost_ratio": on_policy.cost_ratio(drafter, target)}


def summarise(means: dict[str, float], costs: dict[str, float]) -> dict[str, float]:
    """Returns the predicted speed-up over plain decoding with chains of the best length, at least one token.

    For n tokens drafted at cost c each, (1 + mean b_1 + ... + mean b_1 ... b_n) / (n c + 1) (2211.17192, theorem 3.8,
    with the acceptances of consecutive positions); less than 1 is a slow-down.
    """
    accepted = [means["acceptance"]]
    while not math.isnan(further := means.get(f"{ACCEPTED_TO}{len(accepted) + 1}", math.nan)):
        accepted.append(further)
    speedups = (
        predicted_speedup.speedup(predicted_speedup.tokens_by_depth(accepted[:number]), number, costs["cost_ratio"])
        for number in range(1, len(accepted) + 1)
    )
    return {BEST_METRIC: max(speedups), **costs}


def before_supervised(values_BTD: Tensor, batch: Batch) -> Tensor:
    """Returns the values at the positions before supervised tokens [N, D]."""
    return values_BTD[:, :-1][batch.loss_mask_BT[:, 1:]]


def _teacher_inputs(batch: Batch, settings: LossSettings, target: Target) -> tuple[Tensor, ...]:
    """Returns the target's outputs in the batch [B, T, ...]: last hidden states, or the largest logits."""
    if not settings.teacher_top_k:
        return (batch.hidden[target.num_layers],)
    assert batch.top_logits_BTK is not None and batch.top_ids_BTK is not None and batch.log_normaliser_BT is not None
    return batch.top_logits_BTK, batch.top_ids_BTK, batch.log_normaliser_BT


def _teacher(target: Target, *inputs: Tensor) -> Teacher:
    if len(inputs) == 1:
        return Teacher(logits=target.logits(inputs[0][None])[0])
    return Teacher(logits=inputs[0], ids_NK=inputs[1], log_normaliser_N=inputs[2])
