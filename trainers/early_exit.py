"""Early exits of a frozen target: what lies between an exit and its logits learns the target's law, or its text.

Shape suffixes: B rows, T positions, N supervised positions, D hidden width, C exit layers tried.
"""

import dataclasses
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from data.batches import Batch
from draftsmith import Target
from draftsmith.drafters.early_exit import Config, Drafter
from draftsmith.length import policies
from trainers import Metrics, Needs
from trainers.parts import exits
from trainers.parts.losses import DIVERGENCES, Teacher, cross_entropy, divergence, sum_in_chunks
from trainers.training.settings import part_of


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The exit, its loss, and how long its drafts are."""

    exit_layer: int = 0
    """Blocks of the target that drafts pass; 0 tries several and keeps the one that promises most tokens a second,
    from held-out text and the costs measured on this machine."""
    num_blocks: int = 0
    """Extra transformer blocks after them."""
    num_heads: int = 0
    """Attention heads of an extra block, 0 for as many as the target's."""
    inner_width: int = 0
    """Width of its feed-forward layer, 0 for 8/3 of the target's width."""
    own_norm: bool = True
    """Train a norm of the exit's own, started as the target's, instead of using the target's."""
    own_head: bool = False
    """Train an output matrix of the exit's own, started as the target's, instead of using the target's."""
    recycling: bool = False
    """Add the last verified token's last hidden state, through a matrix, to what leaves the exit."""
    loss: str = field(default="forward_kl", metadata={"choices": ["ce", *DIVERGENCES]})
    """Cross-entropy on the text, or a divergence from the target's law at each of its tokens."""
    num_draft: int = 6
    """Most tokens drafted at a time."""
    length: str = "confidence=0.6"
    """How long its chains are, unless told otherwise: a policy of draftsmith/length/policies.py, and its number."""
    width: int = 0
    """If not 0, trees grow where the exit is confident: so many nodes a level are given so many children."""
    num_nodes: int = 16
    """Nodes kept of such a tree."""

    def __post_init__(self) -> None:
        for name in ("exit_layer", "num_heads"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        _config(self, 1, 1)


def build(settings: Settings, target: Target) -> nn.ModuleList:
    """Returns drafters in float32, one for each exit layer that is tried."""
    num_heads = settings.num_heads or target.model.config.get_text_config(decoder=True).num_attention_heads
    return nn.ModuleList(
        Drafter(_config(settings, layer, num_heads), target).float() for layer in _layers(settings, target)
    )


def needs(settings: Settings, target: Target) -> Needs:
    last, layers = (target.num_layers,), _layers(settings, target)
    reads_last = settings.loss != "ce" or settings.recycling
    return Needs(layers=tuple(sorted({*layers, *last})) if reads_last else layers, held_out_layers=last)


def loss(drafters: nn.ModuleList, batch: Batch, settings: Settings, target: Target) -> tuple[Tensor, Metrics]:
    """Returns the loss summed over exit layers and over supervised tokens, each learnt at the position before it.

    The exits share nothing: each learns as it would alone, save that gradients are clipped together.
    """
    each, mask_BT = _exits(drafters), batch.loss_mask_BT[:, 1:]
    recycled_BTD = _recycled(batch, settings, target, None)
    given_BT = batch.tokens_BT[:, 1:] if settings.loss == "ce" else batch.hidden[target.num_layers][:, :-1]

    def losses(given_N: Tensor, *z_ND: Tensor) -> Tensor:
        logits = [one.head(z[None])[0] for one, z in zip(each, z_ND, strict=True)]
        if settings.loss == "ce":
            return torch.stack([cross_entropy(logits_NV, given_N) for logits_NV in logits], dim=1)
        teacher, compare = Teacher(logits=target.logits(given_N[None])[0]), divergence(settings.loss)
        return torch.stack([compare(logits_NV, teacher) for logits_NV in logits], dim=1)

    outputs = [_read(one, batch, recycled_BTD)[:, :-1][mask_BT] for one in each]
    sums_C, count = sum_in_chunks(losses, given_BT[mask_BT], *outputs, vocab_size=target.vocab_size * len(each))
    metrics = {f"loss_{one.config.exit_layer}": (sums_C[at].detach(), count) for at, one in enumerate(each)}
    return sums_C.sum(), metrics if len(each) > 1 else {}


def evaluate(drafter: nn.ModuleList | Drafter, batch: Batch, settings: Settings, target: Target) -> Metrics:
    """Returns acceptance, the mean of sum_x min(p, q) at temperature 1, and how often both laws' likeliest agree.

    Of several exit layers the mean, and the acceptance of each.
    """
    each, mask_BT = _exits(drafter), batch.loss_mask_BT[:, 1:]
    recycled_BTD = _recycled(batch, settings, target, torch.Generator().manual_seed(0))
    outputs = [_read(one, batch, recycled_BTD)[:, :-1][mask_BT] for one in each]
    heads = {one.config.exit_layer: one.head for one in each}
    return exits.acceptance_metrics(heads, outputs, batch.hidden[target.num_layers][:, :-1][mask_BT], target)


@torch.no_grad()
def finish(drafters: nn.ModuleList, settings: Settings, target: Target, held_out: list[Batch]) -> Drafter:
    """Returns the drafter whose chains promise most tokens a second."""
    each, found = _exits(drafters), []
    if len(each) == 1:
        return each[0]
    for drafter in each:
        generator = torch.Generator().manual_seed(0)
        outputs = [_read(drafter, batch, _recycled(batch, settings, target, generator)) for batch in held_out]
        # Costs are the same whatever the weights are.
        chains = Drafter(dataclasses.replace(drafter.config, width=0), target).eval()
        found.append((chains, exits.row_outcomes(drafter.head, outputs, held_out, target)))
    return each[exits.fastest(found, partial(policies.make, settings.length))]


def _exits(drafter: nn.Module) -> list[Drafter]:
    found = [module for module in drafter.modules() if isinstance(module, Drafter)]
    assert found
    return found


def _layers(settings: Settings, target: Target) -> tuple[int, ...]:
    return (settings.exit_layer,) if settings.exit_layer else exits.candidate_layers(target.num_layers)


def _config(settings: Settings, exit_layer: int, num_heads: int) -> Config:
    return part_of(Config, settings, exit_layer=exit_layer, num_heads=num_heads)


def _read(drafter: Drafter, batch: Batch, recycled_BTD: Tensor | None) -> Tensor:
    """Returns what the exit's head takes [B, T, D]."""
    return drafter(drafter.block_input(batch.hidden[drafter.config.exit_layer], recycled_BTD))


def _recycled(batch: Batch, settings: Settings, target: Target, generator: torch.Generator | None) -> Tensor | None:
    """Returns the last hidden state that each position would be given [B, T, D], rounds cut at random."""
    if not settings.recycling:
        return None
    return crop(batch.hidden[target.num_layers], settings.num_draft + 1, generator)


def crop(hidden_BTD: Tensor, longest: int, generator: torch.Generator | None = None) -> Tensor:
    """Returns at each position the hidden state right before its round [B, T, D], zeros where that has none.

    Each row is cut into rounds of one length, 1 to `longest` alike, from an offset at random: the model sees states as
    old as drafting makes them, as AlphaFold 2 draws how often it recycles (Jumper et al. 2021, algorithm 31).
    """
    num_rows, num_positions, width = hidden_BTD.shape
    length_B1 = torch.randint(1, longest + 1, (num_rows, 1), generator=generator)
    offset_B1 = torch.randint(0, longest, (num_rows, 1), generator=generator)
    position_T = torch.arange(num_positions)
    before_BT = (position_T - (position_T + offset_B1) % length_B1 - 1).to(hidden_BTD.device)
    states_BTD = hidden_BTD.gather(1, before_BT.clamp(min=0)[..., None].expand(-1, -1, width))
    return states_BTD.masked_fill(before_BT[..., None] < 0, 0.0)
