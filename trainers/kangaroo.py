"""Trains Kangaroo's adapter (2404.18911) on the target's distribution, and can choose its exit layer.

Shape suffixes: B rows, T positions, N supervised positions, D hidden width, C exit layers tried.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from data.batches import Batch, Example
from draftsmith import Target
from draftsmith.drafters.kangaroo import Config, Drafter
from draftsmith.length import policies
from draftsmith.loading.model_info import TargetInfo
from draftsmith.parts.checks import MAX_DEPTH, check_at_least
from draftsmith.parts.neural.shortlist import check_size
from trainers import Metrics, Needs
from trainers.corpora import corpus
from trainers.parts import exits
from trainers.parts.fused.linear_cross_entropy import shared_matrix
from trainers.parts.losses import DIVERGENCES, Teacher, divergence, sum_forward_kl, sum_in_chunks


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The adapter, its loss, and how drafts are made."""

    exit_layer: int = 2
    """Number of target blocks that drafts run; 0 trains an adapter after each of several and keeps the one with most
    predicted tokens per second, from held-out acceptance and costs measured on this machine."""
    num_heads: int = 0
    """Number of the adapter's attention heads, 0 for as many as the target's."""
    loss: str = field(default="forward_kl", metadata={"choices": list(DIVERGENCES)})
    """Divergence from the target's distribution; forward_kl has the gradient of the paper's soft cross-entropy."""
    config: Config = field(default_factory=Config, metadata={"omit": ("exit_layer", "num_heads")})

    def __post_init__(self) -> None:
        check_at_least(self, 0, "exit_layer", "num_heads", most=MAX_DEPTH)
        divergence(self.loss)


def check(settings: Settings, target: TargetInfo) -> None:
    """Raises ValueError for a shortlist larger than the vocabulary."""
    check_size(settings.config.shortlist, target.vocab_size)


def build(settings: Settings, target: Target) -> nn.ModuleList:
    """Returns drafters in float32, one for each exit layer that is tried."""
    num_heads = settings.num_heads or target.model.config.get_text_config(decoder=True).num_attention_heads
    layers = exits.exit_layers(settings, target)
    configs = [dataclasses.replace(settings.config, exit_layer=layer, num_heads=num_heads) for layer in layers]
    return nn.ModuleList(Drafter(config, target).float() for config in configs)


def prepare(drafters: Sequence[Drafter], settings: Settings, target: Target, rows: Sequence[Example]) -> None:
    """Fills the shortlist of each exit."""
    for drafter in drafters:
        corpus.fill_shortlist(drafter.head.shortlist, rows)


def needs(settings: Settings, target: Target) -> Needs:
    """Returns the exit layers and the last layer."""
    return Needs(layers=tuple(sorted({*exits.exit_layers(settings, target), target.num_layers})))


def loss(drafters: Sequence[Drafter], batch: Batch, settings: Settings, target: Target) -> tuple[Tensor, Metrics]:
    """Returns the divergence summed over exit layers and supervised tokens, each predicted at the position before it.

    With a shortlist it is between distributions over its tokens. The adapters share no weights: each is trained as it
    would be alone, but gradients are clipped together.
    """
    compare, head = divergence(settings.loss), drafters[0].head
    theirs_ND, *outputs = _supervised(drafters, batch)
    count = len(theirs_ND)

    def target_logits(hidden_ND: Tensor) -> Tensor:
        return head.listed(target.norm(hidden_ND))

    def losses(theirs_ND: Tensor, *z_ND: Tensor) -> Tensor:
        teacher = Teacher(logits=target_logits(theirs_ND))
        return torch.stack([compare(head.listed(z), teacher) for z in z_ND], dim=1)

    if settings.loss == "forward_kl" and (matrix := shared_matrix(head, theirs_ND.device)) is not None:
        sums_C = sum_forward_kl(matrix, outputs, target_logits, theirs_ND)
    else:
        num_logits = len(head.shortlist) * len(drafters)
        sums_C, _ = sum_in_chunks(losses, theirs_ND, *outputs, vocab_size=num_logits)
    metrics = {f"loss_{one.config.exit_layer}": (sums_C[at].detach(), count) for at, one in enumerate(drafters)}
    return sums_C.sum(), metrics if len(drafters) > 1 else {}


def evaluate(drafter: Sequence[Drafter] | Drafter, batch: Batch, settings: Settings, target: Target) -> Metrics:
    """Returns acceptance, the mean of sum_x min(p, q) at temperature 1, and the rate of agreement of both argmaxes.

    With several exit layers, these are means over layers, and the acceptance of each is returned as well.
    """
    drafters = [drafter] if isinstance(drafter, Drafter) else drafter
    theirs_ND, *outputs = _supervised(drafters, batch)
    return exits.acceptance_metrics({one.config.exit_layer: one.head for one in drafters}, outputs, theirs_ND, target)


@torch.no_grad()
def finish(drafters: Sequence[Drafter], settings: Settings, target: Target, held_out: list[Batch]) -> Drafter:
    """Returns the drafter whose chains have the most predicted tokens per second."""
    if len(drafters) == 1:
        return drafters[0]
    candidates = []
    for drafter in drafters:
        outcomes = exits.row_outcomes(drafter.head, [_adapted(drafter, batch) for batch in held_out], held_out, target)
        # Costs do not depend on the weights, so that a new drafter of chains is measured.
        candidates.append((Drafter(dataclasses.replace(drafter.config, width=0), target).eval(), outcomes))
    return drafters[exits.fastest(candidates, partial(policies.make, settings.config.length))]


def _supervised(drafters: Sequence[Drafter], batch: Batch) -> list[Tensor]:
    """Returns the target's last hidden state and each adapter's output [N, D] before supervised tokens."""
    mask_BT = batch.loss_mask_BT[:, 1:]
    outputs = [_adapted(drafter, batch)[:, :-1][mask_BT] for drafter in drafters]
    return [batch.hidden[drafters[0].target.num_layers][:, :-1][mask_BT], *outputs]


def _adapted(drafter: Drafter, batch: Batch) -> Tensor:
    # In mixed precision the adapter's weights are float32 and the batch's hidden states are not.
    hidden_BTD = batch.hidden[drafter.config.exit_layer].to(drafter.attention_norm.weight.dtype)
    return drafter(hidden_BTD, torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device)[None])
