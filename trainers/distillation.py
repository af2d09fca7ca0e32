"""What trainers of draft models with laws of their own share: losses against the target's text or laws, and judgement.

A draft model is given as its features after every token of a batch, and the head that makes logits of them.

Shape suffixes: B rows, T positions, N supervised positions, D width of the features, K likeliest tokens, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from data.batches import Batch
from draftsmith import Target
from trainers import Metrics, Needs
from trainers.losses import DIVERGENCES, Teacher, acceptance, chunked, cross_entropy, divergence, laws

Head = Callable[[Tensor], Tensor]
"""Features [N, D] -> logits [N, V]."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What is learnt from the target: its text, or its laws."""

    loss: str = field(default="ce", metadata={"choices": ["ce", *DIVERGENCES]})
    """Cross-entropy on the text, or a divergence from the target's law at each of its tokens."""
    beta: float = 0.5
    """Of the Jensen-Shannon divergence (`jsd`)."""
    loss_temperature: float = 1.0
    """Both laws are taken at this temperature in a divergence."""
    teacher_top_k: int = 0
    """A divergence sees so many of the target's largest logits and the rest as one, 0 for all of them."""

    def __post_init__(self) -> None:
        if self.teacher_top_k < 0:
            raise ValueError(f"teacher_top_k is {self.teacher_top_k}; it must not be negative")
        if self.loss == "ce" and (self.teacher_top_k or self.loss_temperature != 1):
            raise ValueError("teacher_top_k and loss_temperature belong to a divergence, and loss is ce: name another")
        if self.loss != "ce":
            divergence(self.loss, beta=self.beta, temperature=self.loss_temperature)
        if self.teacher_top_k and self.loss_temperature != 1:
            raise ValueError(f"with teacher_top_k, loss_temperature must be 1, not {self.loss_temperature}")


def needs(settings: Loss, target: Target) -> Needs:
    last = (target.num_layers,)
    if settings.loss == "ce" or settings.teacher_top_k:
        return Needs(top_k=settings.teacher_top_k, held_out_layers=last)
    return Needs(layers=last)


def loss(features_BTD: Tensor, head: Head, batch: Batch, settings: Loss, target: Target) -> tuple[Tensor, Metrics]:
    """Returns the loss summed over supervised tokens, each predicted at the position before it."""
    if settings.loss == "ce":
        labels_N = batch.tokens_BT[:, 1:][batch.loss_mask_BT[:, 1:]]
        total, _ = chunked(
            lambda features, labels: cross_entropy(head(features), labels),
            before_supervised(features_BTD, batch),
            labels_N,
            vocab_size=target.vocab_size,
        )
        return total, {}
    compare = divergence(settings.loss, beta=settings.beta, temperature=settings.loss_temperature)
    total, _ = chunked(
        lambda features, *theirs: compare(head(features), _teacher(target, *theirs)),
        before_supervised(features_BTD, batch),
        *(before_supervised(part, batch) for part in _law(batch, settings, target)),
        vocab_size=target.vocab_size,
    )
    return total, {}


def judge(features_BTD: Tensor, head: Head, batch: Batch, target: Target) -> Metrics:
    """Returns acceptance, the mean of sum_x min(p, q) at temperature 1, and how often both laws' likeliest agree."""

    def compare(features: Tensor, theirs: Tensor) -> Tensor:
        student_NV, teacher_NV = laws(head(features), _teacher(target, theirs))
        agrees_N = student_NV.argmax(-1) == teacher_NV.argmax(-1)
        return torch.stack([acceptance(student_NV, teacher_NV), agrees_N.float()], dim=1)

    both = (before_supervised(part, batch) for part in (features_BTD, batch.hidden[target.num_layers]))
    sums_2, count = chunked(compare, *both, vocab_size=target.vocab_size)
    return {"acceptance": (sums_2[0], count), "greedy_agreement": (sums_2[1], count)}


def before_supervised(values_BTD: Tensor, batch: Batch) -> Tensor:
    """Returns what stands at the positions before supervised tokens [N, D]."""
    return values_BTD[:, :-1][batch.loss_mask_BT[:, 1:]]


def _law(batch: Batch, settings: Loss, target: Target) -> tuple[Tensor, ...]:
    """Returns what the batch holds of the target's law [B, T, ...]: last hidden states, or the top of its logits."""
    if not settings.teacher_top_k:
        return (batch.hidden[target.num_layers],)
    assert batch.top_logits_BTK is not None and batch.top_ids_BTK is not None and batch.log_normaliser_BT is not None
    return batch.top_logits_BTK, batch.top_ids_BTK, batch.log_normaliser_BT


def _teacher(target: Target, *law: Tensor) -> Teacher:
    if len(law) == 1:
        return Teacher(logits=target.logits(law[0][None])[0])
    return Teacher(logits=law[0], ids_NK=law[1], log_normaliser_N=law[2])
