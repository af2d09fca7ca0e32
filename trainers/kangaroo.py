"""Kangaroo's adapter (2404.18911): learns the target's law at every token, and where to leave the target if asked to.

Shape suffixes: B rows, T positions, N supervised positions, D hidden width, C exit layers tried.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from data.batches import Batch
from draftsmith import Target
from draftsmith.drafters.kangaroo import Config, Drafter
from draftsmith.length import policies
from trainers import Metrics, Needs
from trainers.parts import exits
from trainers.parts.losses import DIVERGENCES, Teacher, divergence, sum_in_chunks
from trainers.training.settings import part_of


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The adapter, its loss, and how long its drafts are."""

    exit_layer: int = 2
    """Blocks of the target that drafts pass; 0 trains an adapter at each of several and keeps the one that promises
    most tokens a second, from held-out text and the costs measured on this machine."""
    num_heads: int = 0
    """Of the adapter's attention, 0 for as many as the target's."""
    loss: str = field(default="forward_kl", metadata={"choices": list(DIVERGENCES)})
    """Divergence from the target's law; forward_kl has the gradient of the paper's cross-entropy with soft targets."""
    num_draft: int = 6
    """Most tokens drafted at a time."""
    length: str = "confidence=0.6"
    """How long chains are, unless told otherwise: a policy of draftsmith/length/policies.py, and its number."""
    width: int = 0
    """If not 0, trees grow where the adapter is confident: so many nodes a level are given so many children."""
    num_nodes: int = 16
    """Nodes kept of such a tree."""

    def __post_init__(self) -> None:
        for name in ("exit_layer", "num_heads"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        divergence(self.loss)
        _config(self, 1, 1)


def build(settings: Settings, target: Target) -> nn.ModuleList:
    """Returns drafters in float32, one for each exit layer that is tried."""
    num_heads = settings.num_heads or target.model.config.get_text_config(decoder=True).num_attention_heads
    return nn.ModuleList(
        Drafter(_config(settings, layer, num_heads), target).float() for layer in _layers(settings, target)
    )


def needs(settings: Settings, target: Target) -> Needs:
    return Needs(layers=tuple(sorted({*_layers(settings, target), target.num_layers})))


def loss(drafters: Sequence[Drafter], batch: Batch, settings: Settings, target: Target) -> tuple[Tensor, Metrics]:
    """Returns the divergence summed over exit layers and over supervised tokens, each learnt at the position before it.

    The adapters share nothing: each learns as it would alone, save that gradients are clipped together.
    """
    compare = divergence(settings.loss)

    def losses(theirs_ND: Tensor, *z_ND: Tensor) -> Tensor:
        teacher = Teacher(logits=target.logits(theirs_ND[None])[0])
        return torch.stack([compare(target.head(z[None])[0], teacher) for z in z_ND], dim=1)

    sums_C, count = sum_in_chunks(losses, *_supervised(drafters, batch), vocab_size=target.vocab_size * len(drafters))
    metrics = {f"loss_{one.config.exit_layer}": (sums_C[at].detach(), count) for at, one in enumerate(drafters)}
    return sums_C.sum(), metrics if len(drafters) > 1 else {}


def evaluate(drafter: Sequence[Drafter] | Drafter, batch: Batch, settings: Settings, target: Target) -> Metrics:
    """Returns acceptance, the mean of sum_x min(p, q) at temperature 1, and how often both laws' likeliest agree.

    Of several exit layers the mean, and the acceptance of each.
    """
    drafters = [drafter] if isinstance(drafter, Drafter) else drafter
    theirs_ND, *outputs = _supervised(drafters, batch)
    return exits.acceptance_metrics(
        {one.config.exit_layer: target.head for one in drafters}, outputs, theirs_ND, target
    )


@torch.no_grad()
def finish(drafters: Sequence[Drafter], settings: Settings, target: Target, held_out: list[Batch]) -> Drafter:
    """Returns the drafter whose chains promise most tokens a second."""
    if len(drafters) == 1:
        return drafters[0]
    found = []
    for drafter in drafters:
        told = exits.row_outcomes(target.head, [_adapted(drafter, batch) for batch in held_out], held_out, target)
        # Costs are the same whatever the weights are.
        found.append((Drafter(dataclasses.replace(drafter.config, width=0), target).eval(), told))
    return drafters[exits.fastest(found, partial(policies.make, settings.length))]


def _layers(settings: Settings, target: Target) -> tuple[int, ...]:
    return (settings.exit_layer,) if settings.exit_layer else exits.candidate_layers(target.num_layers)


def _config(settings: Settings, exit_layer: int, num_heads: int) -> Config:
    return part_of(Config, settings, exit_layer=exit_layer, num_heads=num_heads)


def _supervised(drafters: Sequence[Drafter], batch: Batch) -> list[Tensor]:
    """Returns the target's last hidden state [N, D] and each adapter's output [N, D] where the next token is learnt."""
    mask_BT = batch.loss_mask_BT[:, 1:]
    outputs = [_adapted(drafter, batch)[:, :-1][mask_BT] for drafter in drafters]
    return [batch.hidden[drafters[0].target.num_layers][:, :-1][mask_BT], *outputs]


def _adapted(drafter: Drafter, batch: Batch) -> Tensor:
    # In mixed precision the adapter's weights are in float32 and what the batch holds is not.
    hidden_BTD = batch.hidden[drafter.config.exit_layer].to(drafter.attention_norm.weight.dtype)
    return drafter(hidden_BTD, torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device)[None])
