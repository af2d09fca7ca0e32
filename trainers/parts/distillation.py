"""What trainers of draft models with laws of their own share: losses against the target's text or laws, and judgement.

A draft model is given as its features after every token of a batch, and the head that makes logits of them.

Shape suffixes: B rows, T positions, P = T - 1, N supervised positions, D width of the features, K likeliest tokens,
V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from data.batches import Batch
from draftsmith import Target
from draftsmith.length import predicted_speedup
from draftsmith.parts.neural.shortlist import Shortlist
from trainers import Metrics, Needs
from trainers.parts import on_policy
from trainers.parts.losses import (
    DIVERGENCES,
    Teacher,
    acceptance,
    cross_entropy,
    divergence,
    map_in_chunks,
    outcome_log_probs,
    restrict_to_shortlist,
    sum_in_chunks,
)

Head = Callable[[Tensor], Tensor]
"""Features [N, D] -> logits [N, V]."""
BEST_METRIC = "predicted_speedup"
ACCEPTED_TO = "accepted_to_"
DRAFT_TOKENS = 64
"""Most tokens that a draft model writes of its own after a held-out prompt, to be judged."""


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """What is learnt from the target: its text, or its laws."""

    loss: str = field(default="ce", metadata={"choices": ["ce", *DIVERGENCES]})
    """Cross-entropy on the text, or a divergence from the target's law at each of its tokens."""
    beta: float = 0.5
    """Of the Jensen-Shannon divergence (`jsd`)."""
    loss_temperature: float = 1.0
    """Both laws are taken at this temperature in a divergence."""
    teacher_top_k: int = 0
    """A divergence sees so many of the target's largest logits and the rest as one, 0 for all of them."""
    on_policy: float = 0.0
    """Share of the rows, drawn anew at each step, whose text the draft model writes itself after the row's prompt, for
    a divergence to correct; the other rows keep the text that --data has."""
    on_policy_temperature: float = 1.0
    """At which it writes."""

    def __post_init__(self) -> None:
        if self.teacher_top_k < 0:
            raise ValueError(f"teacher_top_k is {self.teacher_top_k}; it must not be negative")
        if self.loss == "ce" and (self.teacher_top_k or self.loss_temperature != 1):
            raise ValueError("teacher_top_k and loss_temperature belong to a divergence, and loss is ce: name another")
        if not 0 <= self.on_policy <= 1:
            raise ValueError(f"on_policy is {self.on_policy}; it is a share, from 0 to 1")
        if self.on_policy and self.loss == "ce":
            raise ValueError(
                "on_policy needs a divergence: by cross-entropy a draft model learns nothing of its own text"
            )
        if not 0 <= self.on_policy_temperature < math.inf:
            raise ValueError(f"on_policy_temperature is {self.on_policy_temperature}; it must not be negative")
        if self.loss != "ce":
            divergence(self.loss, beta=self.beta, temperature=self.loss_temperature)
        if self.teacher_top_k and self.loss_temperature != 1:
            raise ValueError(f"with teacher_top_k, loss_temperature must be 1, not {self.loss_temperature}")


def needs(settings: LossSettings, target: Target) -> Needs:
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
) -> tuple[Tensor, Metrics]:
    """Returns the loss summed over supervised tokens, each predicted at the position before it.

    With a shortlist the cross-entropy leaves out tokens that are not on it, and divergences are from the target's law
    given that the token is; `outside` is the share that is not.
    """
    shortlist = shortlist or Shortlist(0, target.vocab_size)
    labels_N = batch.tokens_BT[:, 1:][batch.loss_mask_BT[:, 1:]]
    is_listed_N = shortlist.holds(labels_N)
    metrics = {} if shortlist.is_whole else {"outside": ((~is_listed_N).sum(), len(labels_N))}
    features_ND = before_supervised(features_BTD, batch)
    if settings.loss == "ce":
        total, _ = sum_in_chunks(
            lambda features, labels: cross_entropy(head(features), labels),
            features_ND[is_listed_N],
            labels_N[is_listed_N],
            vocab_size=target.vocab_size,
        )
        return total, metrics
    compare = divergence(settings.loss, beta=settings.beta, temperature=settings.loss_temperature)
    total, _ = sum_in_chunks(
        lambda features, *theirs: compare(head(features), restrict_to_shortlist(_teacher(target, *theirs), shortlist)),
        features_ND,
        *(before_supervised(part, batch) for part in _law(batch, settings, target)),
        vocab_size=target.vocab_size,
    )
    return total, metrics


def transform_batch(drafter: Any, batch: Batch, settings: LossSettings, target: Target, salt: str) -> Batch:
    """Returns the batch with a share `on_policy` of its rows written by the drafter; the coin goes by row and salt."""
    if settings.on_policy and on_policy.is_sharded(drafter):
        raise ValueError(
            "on_policy needs the draft model's weights whole, which zero3 shards: name another --deepspeed"
        )
    rows = on_policy.select_rows(settings.on_policy, batch, salt)
    return on_policy.rewrite_rows(drafter, batch, target, rows, temperature=settings.on_policy_temperature, salt=salt)


def self_generated(drafter: Any, batch: Batch, settings: LossSettings, target: Target) -> Batch | None:
    """Returns held-out rows' prompts with what the drafter writes after them at temperature 1, if it is whole."""
    if on_policy.is_sharded(drafter):
        return None
    every, most = range(len(batch.keys)), {"most_tokens": DRAFT_TOKENS}
    return on_policy.rewrite_rows(drafter, batch, target, every, temperature=1.0, salt="held out", **most)


def evaluate(features_BTD: Tensor, head: Head, batch: Batch, target: Target, *, num_draft: int = 1) -> Metrics:
    """Returns acceptance, the mean of b = sum_x min(p, q) at temperature 1, and how often both laws' likeliest agree.

    With more than one to draft also `accepted_to_d`, the mean of b_1 b_2 ... b_d over supervised positions in a row.
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
    """Returns the mean of the product of d acceptances in a row for d from 2 to `num_draft`, as `accepted_to_d`."""
    known_BP = batch.loss_mask_BT[:, 1:]
    accepted_BP = torch.zeros(known_BP.shape, device=accepted_N.device, dtype=accepted_N.dtype)
    accepted_BP[known_BP] = accepted_N
    # Zeros where nothing is supervised: a run that meets one counts for nothing.
    product_BP, is_whole_BP, metrics = accepted_BP, known_BP, {}
    for depth in range(2, num_draft + 1):
        product_BP = product_BP[:, :-1] * accepted_BP[:, depth - 1 :]
        is_whole_BP = is_whole_BP[:, :-1] & known_BP[:, depth - 1 :]
        metrics[f"{ACCEPTED_TO}{depth}"] = (product_BP.sum(), int(is_whole_BP.sum()))
    return metrics


@torch.no_grad()
def measure_costs(drafter: Any, settings: LossSettings, target: Target) -> dict[str, float]:
    """Returns what a drafted token costs of a plain step, which no training changes."""
    return {"cost_ratio": on_policy.cost_ratio(drafter, target)}


def summarise(means: dict[str, float], costs: dict[str, float]) -> dict[str, float]:
    """Returns the speed-up over plain decoding to expect of chains as long as pays best, one token at least.

    For n tokens drafted at cost c each, (1 + mean b_1 + ... + mean b_1 ... b_n) / (n c + 1) (2211.17192, theorem 3.8,
    with acceptances as they come one after the other); less than 1 is a slow-down.
    """
    reached = [means["acceptance"]]
    while not math.isnan(further := means.get(f"{ACCEPTED_TO}{len(reached) + 1}", math.nan)):
        reached.append(further)
    speedups = (
        predicted_speedup.speedup(predicted_speedup.tokens_by_depth(reached[:number]), number, costs["cost_ratio"])
        for number in range(1, len(reached) + 1)
    )
    return {BEST_METRIC: max(speedups), **costs}


def before_supervised(values_BTD: Tensor, batch: Batch) -> Tensor:
    """Returns what stands at the positions before supervised tokens [N, D]."""
    return values_BTD[:, :-1][batch.loss_mask_BT[:, 1:]]


def _law(batch: Batch, settings: LossSettings, target: Target) -> tuple[Tensor, ...]:
    """Returns what the batch holds of the target's law [B, T, ...]: last hidden states, or the top of its logits."""
    if not settings.teacher_top_k:
        return (batch.hidden[target.num_layers],)
    assert batch.top_logits_BTK is not None and batch.top_ids_BTK is not None and batch.log_normaliser_BT is not None
    return batch.top_logits_BTK, batch.top_ids_BTK, batch.log_normaliser_BT


def _teacher(target: Target, *law: Tensor) -> Teacher:
    if len(law) == 1:
        return Teacher(logits=target.logits(law[0][None])[0])
    return Teacher(logits=law[0], ids_NK=law[1], log_normaliser_N=law[2])
