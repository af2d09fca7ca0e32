"""Layer dropout and early-exit loss (LayerSkip, 2404.16710): a copy of the target learns to be left early.

What is drafted for afterwards is that copy, a changed target, and the artifact brings it along.

Shape suffixes: B rows, T positions, N supervised positions, D hidden width, L layers of the target, C exits trained.
"""

import dataclasses
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from data.batches import Batch
from draftsmith import Target
from draftsmith.core.model_info import TargetInfo
from draftsmith.core.views import blocks_of
from draftsmith.drafters.early_exit import Config, Drafter
from draftsmith.length import policies
from trainers import Metrics, Needs
from trainers.parts import adapters, exits
from trainers.parts.losses import cross_entropy, sum_in_chunks

ROTATIONAL, GRADUAL, ALL = "rotational", "gradual", "all"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is left out in training, which exits learn, and how the copy's drafts are."""

    exit_layer: int = 0
    """Blocks that drafts pass; 0 keeps, of several, what promises most tokens a second, by held-out text and the costs
    measured on this machine."""
    max_dropout: float = 0.1
    """Chance that a row leaves out the last block; the first is never left out."""
    exit_scale: float = 0.2
    """Weight of earlier exits' losses beside the last one's."""
    curriculum: str = field(default=ROTATIONAL, metadata={"choices": [ROTATIONAL, GRADUAL, ALL]})
    """Exits that learn at a step: every `rotation`-th, others at the next; ever more, from the last one on, until all
    do at half of training; or all."""
    rotation: int = 4
    """Exits learn once in so many steps."""
    rank: int = 0
    """Change each matrix by a product of this rank (LoRA), which needs peft; 0 trains every weight."""
    alpha: float = 16.0
    """Such a change is alpha / rank times the product of its factors."""
    dropout: float = 0.05
    """Of what goes into the factors, in training."""
    modules: tuple[str, ...] = ()
    """Ends of the names of the linear layers changed so, as q_proj; if empty all in the target's blocks, and its head
    unless that is tied to the embedding."""
    num_draft: int = 6
    """Most tokens drafted at a time."""
    length: str = "confidence=0.6"
    """How long its chains are, unless told otherwise: a policy of draftsmith/length/policies.py, and its number."""
    width: int = 0
    """If not 0, trees grow where the exit is confident: so many nodes a level are given so many children."""
    num_nodes: int = 16
    """Nodes kept of such a tree."""

    def __post_init__(self) -> None:
        if self.exit_layer < 0:
            raise ValueError(f"exit_layer is {self.exit_layer}; it must not be negative")
        for name in ("max_dropout", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1, the latter excluded")
        if not self.exit_scale > 0 or self.rotation < 1:
            raise ValueError(f"exit_scale {self.exit_scale} must be positive and rotation {self.rotation} at least 1")
        _config(self, 1)


def check(settings: Settings, facts: TargetInfo) -> None:
    if settings.rank and importlib.util.find_spec("peft") is None:
        raise ValueError("training changes of a rank needs peft, which is not installed: pip install peft")


def build(settings: Settings, target: Target) -> Drafter:
    """Returns an exit of a copy that is still as the target is; its blocks are left out at random while it trains."""
    drafter = Drafter(_config(settings, _layers(settings, target)[0]), target).float()
    drafter.register_buffer("steps", torch.tensor([0, 1], device=target.device), persistent=False)
    if settings.rank:
        rank, alpha, dropout = settings.rank, settings.alpha, settings.dropout
        changed = drafter.config.modules
        trained = adapters.attach_adapters(target, changed, drafter.adapters, rank=rank, alpha=alpha, dropout=dropout)
        object.__setattr__(drafter, "target", trained)
    else:
        drafter.on_weights_loaded()

    def now(rate: float) -> float:
        return rate if drafter.training else 0.0

    rates = dropout_rates(target.num_layers, settings.max_dropout)
    for block, rate in zip(blocks_of(drafter.target.model), rates, strict=True):
        block.register_forward_hook(partial(_leave_out, partial(now, rate)))
    return drafter.requires_grad_()


def needs(settings: Settings, target: Target) -> Needs:
    return Needs()


def begin_step(drafter: Drafter, settings: Settings, step: int, num_steps: int) -> None:
    drafter.get_buffer("steps").copy_(torch.tensor([step, num_steps]))


def loss(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> tuple[Tensor, Metrics]:
    """Returns the cross-entropy of the text at this step's exits, weighted, all through the copy's own norm and head.

    J = sum_l weight_l CE(head(norm(hidden_l)), text), the weights summing to 1 (2404.16710, section 4.1.2).
    """
    step, num_steps = drafter.get_buffer("steps").tolist()
    is_on = curriculum(settings.curriculum, target.num_layers, step, num_steps, settings.rotation)
    weights = exit_weights(is_on, settings.exit_scale)
    mask_BT = batch.loss_mask_BT[:, 1:]
    hidden = drafter.target.read(batch.tokens_BT, tuple(weights))

    def losses(labels_N: Tensor, *hidden_ND: Tensor) -> Tensor:
        return torch.stack([cross_entropy(drafter.target.logits(one[None])[0], labels_N) for one in hidden_ND], dim=1)

    sums_C, count = sum_in_chunks(
        losses,
        batch.tokens_BT[:, 1:][mask_BT],
        *(hidden[layer][:, :-1][mask_BT] for layer in weights),
        vocab_size=target.vocab_size * len(weights),
    )
    total = (sums_C * sums_C.new_tensor(list(weights.values()))).sum()
    return total, {"target_loss": (sums_C[-1].detach(), count)}


def evaluate(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> Metrics:
    """Returns acceptance, the mean of sum_x min(p, q) at temperature 1, and how often both laws' likeliest agree.

    Both are of the changed target's exit and its own law; until one is chosen of several, of each and their mean. And
    how often its likeliest token is the text's: what the change has cost, where the target wrote that.
    """
    own, is_training = drafter.target, "steps" in dict(drafter.named_buffers())
    layers = _layers(settings, target) if is_training else (drafter.config.exit_layer,)
    mask_BT = batch.loss_mask_BT[:, 1:]
    hidden = own.read(batch.tokens_BT, (*layers, own.num_layers))
    hidden_ND = {layer: states_BTD[:, :-1][mask_BT] for layer, states_BTD in hidden.items()}
    metrics = exits.acceptance_metrics(
        dict.fromkeys(layers, own.logits), [hidden_ND[layer] for layer in layers], hidden_ND[own.num_layers], own
    )
    right, count = sum_in_chunks(
        lambda states, labels: (own.logits(states[None])[0].argmax(-1) == labels).float(),
        hidden_ND[own.num_layers],
        batch.tokens_BT[:, 1:][mask_BT],
        vocab_size=own.vocab_size,
    )
    return metrics | {"target_accuracy": (right, count)}


@torch.no_grad()
def finish(drafter: Drafter, settings: Settings, target: Target, held_out: list[Batch]) -> Drafter:
    """Returns the drafter with its target changed, exiting where its chains promise most tokens a second."""
    finished = Drafter(drafter.config, target)
    finished.load_state_dict(drafter.state_dict())
    finished.on_weights_loaded()
    own, layers, found = finished.target, _layers(settings, target), []
    for layer in layers if len(layers) > 1 else ():
        read = [own.read(batch.tokens_BT, (layer, own.num_layers)) for batch in held_out]
        judged = [dataclasses.replace(one, hidden=states) for one, states in zip(held_out, read, strict=True)]
        chains = Drafter(Config(exit_layer=layer, own_norm=False, num_draft=settings.num_draft, length="fixed"), own)
        found.append((chains, exits.row_outcomes(own.logits, [states[layer] for states in read], judged, own)))
    best = layers[exits.fastest(found, partial(policies.make, settings.length)) if found else 0]
    finished.config = dataclasses.replace(finished.config, exit_layer=best)
    return finished.eval()


def dropout_rates(num_layers: int, largest: float) -> list[float]:
    """Returns each block's chance to be left out, p_l = largest (2^(l / (L - 1)) - 1) (2404.16710, section 4.1.1)."""
    return [largest * (2 ** (layer / max(num_layers - 1, 1)) - 1) for layer in range(num_layers)]


def curriculum(kind: str, num_layers: int, step: int, num_steps: int, rotation: int) -> list[bool]:
    """Returns after which blocks the exit learns at this step; the last always does (2404.16710, section 4.1.2)."""
    if kind == ROTATIONAL:
        is_on = [(layer - step) % rotation == 0 for layer in range(num_layers)]
    elif kind == GRADUAL:
        is_on = [step >= (num_layers - 1 - layer) * num_steps / (2 * num_layers) for layer in range(num_layers)]
    else:
        is_on = [True] * num_layers
    return [*is_on[:-1], True]


def exit_weights(is_on: list[bool], scale: float) -> dict[int, float]:
    """Returns hidden layers and their weights e(l) / sum e of the exits that learn.

    e(l) = scale (1 + 2 + ... + (l + 1)) after block l, and without the scale after the last.
    """
    last = len(is_on) - 1
    raw = {
        layer + 1: (layer + 1) * (layer + 2) / 2 * (1.0 if layer == last else scale)
        for layer in range(len(is_on))
        if is_on[layer]
    }
    return {layer: weight / sum(raw.values()) for layer, weight in raw.items()}


def _leave_out(rate: Callable[[], float], block: nn.Module, given: tuple[Any, ...], out: Any) -> Any:
    """Puts, in rows drawn at random, a block's input in the place of its output."""
    if not (chance := rate()):
        return out
    given_BTD, out_BTD = given[0], out[0] if isinstance(out, tuple) else out
    is_out_B = (torch.rand(len(given_BTD)) < chance).to(given_BTD.device)
    mixed_BTD = torch.where(is_out_B[:, None, None], given_BTD, out_BTD)
    return (mixed_BTD, *out[1:]) if isinstance(out, tuple) else mixed_BTD


def _layers(settings: Settings, target: Target) -> tuple[int, ...]:
    return (settings.exit_layer,) if settings.exit_layer else exits.candidate_layers(target.num_layers)


def _config(settings: Settings, exit_layer: int) -> Config:
    shared = ("rank", "alpha", "modules", "num_draft", "length", "width", "num_nodes")
    kept = {name: getattr(settings, name) for name in shared}
    return Config(exit_layer=exit_layer, own_norm=False, tunes=True, **kept)
