"""Trains the layers between an early exit of a frozen target and its logits, on the target's distribution or text.

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
from draftsmith.drafters.early_exit import Config, Drafter
from draftsmith.length import policies
from draftsmith.loading.model_info import TargetInfo
from draftsmith.parts.checks import MAX_DEPTH, check_at_least
from draftsmith.parts.neural.shortlist import check_size
from trainers import Metrics, Needs
from trainers.corpora import corpus
from trainers.parts import exits
from trainers.parts.fused.linear_cross_entropy import shared_matrix
from trainers.parts.losses import DIVERGENCES, Teacher, cross_entropy, divergence, sum_forward_kl, sum_in_chunks

RUNS_BLOCKS = True


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The exit, its loss, and how drafts are made."""

    exit_layer: int = 0
    """Number of target blocks that drafts run; 0 tries several and keeps the one with most predicted tokens per second,
    from held-out acceptance and costs measured on this machine."""
    num_heads: int = 0
    """Number of attention heads of an extra block, 0 for as many as the target's."""
    config: Config = field(
        default_factory=Config, metadata={"omit": ("exit_layer", "num_heads", "tunes", "rank", "alpha", "modules")}
    )
    loss: str = field(default="forward_kl", metadata={"choices": ["ce", *DIVERGENCES]})
    """Cross-entropy on the text (ce), or a divergence from the target's distribution at each of its tokens."""

    def __post_init__(self) -> None:
        check_at_least(self, 0, "exit_layer", "num_heads", most=MAX_DEPTH)


def check(settings: Settings, target: TargetInfo) -> None:
    """Raises ValueError for a shortlist larger than the vocabulary."""
    check_size(settings.config.shortlist, target.vocab_size)


def build(settings: Settings, target: Target) -> nn.ModuleList:
    """Returns drafters in float32, one for each exit layer that is tried."""
    num_heads = settings.num_heads or target.model.config.get_text_config(decoder=True).num_attention_heads
    layers = exits.exit_layers(settings, target)
    configs = [dataclasses.replace(settings.config, exit_layer=layer, num_heads=num_heads) for layer in layers]
    return nn.ModuleList(Drafter(config, target).float() for config in configs)


def prepare(drafters: nn.ModuleList, settings: Settings, target: Target, rows: Sequence[Example]) -> None:
    """Fills the shortlist of each exit."""
    for drafter in _exits(drafters):
        corpus.fill_shortlist(drafter.shared_head.shortlist, rows)


def needs(settings: Settings, target: Target) -> Needs:
    """Returns the exit layers and, if the loss or recycling reads it, the last layer."""
    last, layers = (target.num_layers,), exits.exit_layers(settings, target)
    reads_last = settings.loss != "ce" or settings.config.recycling
    return Needs(layers=tuple(sorted({*layers, *last})) if reads_last else layers, held_out_layers=last)


def loss(drafters: nn.ModuleList, batch: Batch, settings: Settings, target: Target) -> tuple[Tensor, Metrics]:
    """Returns the loss summed over exit layers and supervised tokens, each predicted at the position before it.

    With a shortlist a divergence is between distributions over its tokens, and other labels of cross-entropy do not
    count. The exits share no weights: each is trained as it would be alone, but gradients are clipped together.
    """
    each, mask_BT = _exits(drafters), batch.loss_mask_BT[:, 1:]
    shared, own_head = each[0].shared_head, settings.config.own_head
    if settings.loss == "ce":
        mask_BT = mask_BT & shared.shortlist.contains(batch.tokens_BT[:, 1:])
    recycled_BTD = _recycled(batch, settings, target, None)
    given_BT = batch.tokens_BT[:, 1:] if settings.loss == "ce" else batch.hidden[target.num_layers][:, :-1]

    def target_logits(hidden_ND: Tensor) -> Tensor:
        return shared.listed(target.norm(hidden_ND))

    def losses(given_N: Tensor, *z_ND: Tensor) -> Tensor:
        logits = [one.output(z) if own_head else shared.listed(z) for one, z in zip(each, z_ND, strict=True)]
        if settings.loss == "ce":
            labels_N = shared.shortlist.indices(given_N)
            return torch.stack([cross_entropy(logits_NV, labels_N) for logits_NV in logits], dim=1)
        teacher, compare = Teacher(logits=target_logits(given_N)), divergence(settings.loss)
        return torch.stack([compare(logits_NV, teacher) for logits_NV in logits], dim=1)

    outputs = [_read(one, batch, recycled_BTD)[:, :-1][mask_BT] for one in each]
    given_N, matrix = given_BT[mask_BT], None if own_head else shared_matrix(shared, given_BT.device)
    if settings.loss == "forward_kl" and matrix is not None:
        sums_C, count = sum_forward_kl(matrix, outputs, target_logits, given_N), len(given_N)
    else:
        sums_C, count = sum_in_chunks(losses, given_N, *outputs, vocab_size=len(shared.shortlist) * len(each))
    metrics = {f"loss_{one.config.exit_layer}": (sums_C[at].detach(), count) for at, one in enumerate(each)}
    return sums_C.sum(), metrics if len(each) > 1 else {}


def evaluate(drafter: nn.ModuleList | Drafter, batch: Batch, settings: Settings, target: Target) -> Metrics:
    """Returns acceptance, the mean of sum_x min(p, q) at temperature 1, and the rate of agreement of both argmaxes.

    With several exit layers, these are means over layers, and the acceptance of each is returned as well.
    """
    each, mask_BT = _exits(drafter), batch.loss_mask_BT[:, 1:]
    recycled_BTD = _recycled(batch, settings, target, torch.Generator().manual_seed(0))
    outputs = [_read(one, batch, recycled_BTD)[:, :-1][mask_BT] for one in each]
    heads = {one.config.exit_layer: one.head for one in each}
    return exits.acceptance_metrics(heads, outputs, batch.hidden[target.num_layers][:, :-1][mask_BT], target)


@torch.no_grad()
def finish(drafters: nn.ModuleList, settings: Settings, target: Target, held_out: list[Batch]) -> Drafter:
    """Returns the drafter whose chains have the most predicted tokens per second."""
    each, candidates = _exits(drafters), []
    if len(each) == 1:
        return each[0]
    for drafter in each:
        generator = torch.Generator().manual_seed(0)
        outputs = [_read(drafter, batch, _recycled(batch, settings, target, generator)) for batch in held_out]
        # Costs do not depend on the weights, so that a new drafter of chains is measured.
        chains = Drafter(dataclasses.replace(drafter.config, width=0), target).eval()
        candidates.append((chains, exits.row_outcomes(drafter.head, outputs, held_out, target)))
    return each[exits.fastest(candidates, partial(policies.make, settings.config.length))]


def _exits(drafter: nn.Module) -> list[Drafter]:
    drafters = [module for module in drafter.modules() if isinstance(module, Drafter)]
    assert drafters
    return drafters


def _read(drafter: Drafter, batch: Batch, recycled_BTD: Tensor | None) -> Tensor:
    """Returns the inputs of the exit's head [B, T, D]."""
    return drafter(drafter.block_input(batch.hidden[drafter.config.exit_layer], recycled_BTD))


def _recycled(batch: Batch, settings: Settings, target: Target, generator: torch.Generator | None) -> Tensor | None:
    """Returns the last hidden state that each position would read [B, T, D], with rows cut into rounds at random."""
    if not settings.config.recycling:
        return None
    return crop(batch.hidden[target.num_layers], settings.config.num_draft + 1, generator)


def crop(hidden_BTD: Tensor, longest: int, generator: torch.Generator | None = None) -> Tensor:
    """Returns at each position the hidden state right before its round [B, T, D], zeros if there is none.

    Each row is cut into rounds of one length, uniform in 1 to `longest`, from a random offset, so that training sees
    states as old as in drafting; AlphaFold 2 samples its number of recyclings likewise (Jumper et al. 2021, algorithm
    31).
    """
    num_rows, num_positions, width = hidden_BTD.shape
    length_B1 = torch.randint(1, longest + 1, (num_rows, 1), generator=generator)
    offset_B1 = torch.randint(0, longest, (num_rows, 1), generator=generator)
    position_T = torch.arange(num_positions)
    before_BT = (position_T - (position_T + offset_B1) % length_B1 - 1).to(hidden_BTD.device)
    states_BTD = hidden_BTD.gather(1, before_BT.clamp(min=0)[..., None].expand(-1, -1, width))
    return states_BTD.masked_fill(before_BT[..., None] < 0, 0.0)
