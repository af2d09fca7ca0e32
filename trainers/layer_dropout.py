"""Trains a copy of the target with layer dropout and early-exit loss (LayerSkip, 2404.16710).

The drafter drafts for that fine-tuned copy, which the artifact contains.

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
from draftsmith.core.views import blocks_of
from draftsmith.drafters.early_exit import Config, Drafter
from draftsmith.length import policies
from draftsmith.loading.model_info import TargetInfo
from draftsmith.parts.checks import MAX_DEPTH, check_at_least, check_below_one, check_positive
from trainers import Metrics, Needs
from trainers.parts import adapters, exits
from trainers.parts.losses import cross_entropy, sum_in_chunks

ROTATIONAL, GRADUAL, ALL = "rotational", "gradual", "all"

RUNS_BLOCKS = True


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Layer dropout, the losses of the exits, and how drafts are made."""

    exit_layer: int = 0
    """Number of target blocks that drafts run; 0 keeps, of several, the one with most predicted tokens per second, from
    held-out acceptance and costs measured on this machine."""
    max_dropout: float = 0.1
    """Probability that a row skips the last block, lower for earlier blocks; the first is never skipped."""
    exit_scale: float = 0.2
    """Weight of earlier exits' losses relative to the last one's."""
    curriculum: str = field(default=ROTATIONAL, metadata={"choices": [ROTATIONAL, GRADUAL, ALL]})
    """Exits trained at a step: every `rotation`-th, a different set at each step (rotational); more and more, from the
    last one on, and all from half of training (gradual); or all."""
    rotation: int = 4
    """Number of steps in which each exit is trained once, with the rotational curriculum."""
    dropout: float = 0.05
    """Dropout probability of the adapters' inputs, if rank is not 0."""
    config: Config = field(
        default=Config(own_norm=False, tunes=True),
        metadata={
            "omit": (
                *("exit_layer", "num_blocks", "num_heads", "inner_width"),
                *("own_norm", "own_head", "shortlist", "recycling", "tunes"),
            )
        },
    )

    def __post_init__(self) -> None:
        check_at_least(self, 0, "exit_layer", most=MAX_DEPTH)
        check_below_one(self, "max_dropout", "dropout")
        check_positive(self, "exit_scale")
        check_at_least(self, 1, "rotation", most=MAX_DEPTH)


def check(settings: Settings, target: TargetInfo) -> None:
    """Raises ValueError if adapters are to be trained and peft is not installed."""
    if settings.config.rank and importlib.util.find_spec("peft") is None:
        raise ValueError("a rank other than 0 needs peft, which is not installed: pip install peft")


def build(settings: Settings, target: Target) -> Drafter:
    """Returns an early exit of a copy of the target, whose blocks are skipped at random in training."""
    config = dataclasses.replace(settings.config, exit_layer=exits.exit_layers(settings, target)[0])
    drafter = Drafter(config, target).float()
    drafter.register_buffer("steps", torch.tensor([0, 1], device=target.device), persistent=False)
    if config.rank:
        rank, alpha, dropout = config.rank, config.alpha, settings.dropout
        modules, factors = config.modules, drafter.adapters
        trained = adapters.attach_adapters(target, modules, factors, rank=rank, alpha=alpha, dropout=dropout)
        object.__setattr__(drafter, "target", trained)
    else:
        drafter.on_weights_loaded()

    def current(rate: float) -> float:
        return rate if drafter.training else 0.0

    rates = dropout_rates(target.num_layers, settings.max_dropout)
    for block, rate in zip(blocks_of(drafter.target.model), rates, strict=True):
        block.register_forward_hook(partial(_skip_at_random, partial(current, rate)))
    return drafter.requires_grad_()


def needs(settings: Settings, target: Target) -> Needs:
    """Returns no outputs of the original target: the loss is on the text."""
    return Needs()


def begin_step(drafter: Drafter, settings: Settings, step: int, num_steps: int) -> None:
    """Stores the step, which the curriculum depends on."""
    drafter.get_buffer("steps").copy_(torch.tensor([step, num_steps]))


def loss(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> tuple[Tensor, Metrics]:
    """Returns the weighted cross-entropy of the text at this step's exits, through the copy's own norm and head.

    J = sum_l weight_l CE(head(norm(hidden_l)), text), the weights summing to 1 (2404.16710, section 4.1.2).
    """
    step, num_steps = drafter.get_buffer("steps").tolist()
    is_trained = curriculum(settings.curriculum, target.num_layers, step, num_steps, settings.rotation)
    weights = exit_weights(is_trained, settings.exit_scale)
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
    """Returns acceptance, the mean of sum_x min(p, q) at temperature 1, and the rate of agreement of both argmaxes.

    Both compare the fine-tuned target's exit with its last layer; while several exits are trained, they are means over
    exits, and the acceptance of each is returned as well. `target_accuracy` is the fine-tuned target's top-1 accuracy
    on the text, which on target-generated text shows the damage of fine-tuning.
    """
    own, is_training = drafter.target, "steps" in dict(drafter.named_buffers())
    layers = exits.exit_layers(settings, target) if is_training else (drafter.config.exit_layer,)
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
    """Returns the drafter with its fine-tuned target and the exit with most predicted tokens per second."""
    finished = Drafter(drafter.config, target)
    finished.load_state_dict(drafter.state_dict())
    finished.on_weights_loaded()
    own, layers, candidates = finished.target, exits.exit_layers(settings, target), []
    for layer in layers if len(layers) > 1 else ():
        read = [own.read(batch.tokens_BT, (layer, own.num_layers)) for batch in held_out]
        batches = [dataclasses.replace(one, hidden=states) for one, states in zip(held_out, read, strict=True)]
        config = Config(exit_layer=layer, own_norm=False, num_draft=settings.config.num_draft, length="fixed")
        outcomes = exits.row_outcomes(own.logits, [states[layer] for states in read], batches, own)
        candidates.append((Drafter(config, own), outcomes))
    policy = partial(policies.make, settings.config.length)
    best = layers[exits.fastest(candidates, policy) if candidates else 0]
    finished.config = dataclasses.replace(finished.config, exit_layer=best)
    return finished.eval()


def dropout_rates(num_layers: int, largest: float) -> list[float]:
    """Returns each block's dropout probability, p_l = largest (2^(l / (L - 1)) - 1) (2404.16710, section 4.1.1)."""
    return [largest * (2 ** (layer / max(num_layers - 1, 1)) - 1) for layer in range(num_layers)]


def curriculum(kind: str, num_layers: int, step: int, num_steps: int, rotation: int) -> list[bool]:
    """Returns for each block if its exit is trained at this step; the last always is (2404.16710, section 4.1.2)."""
    if kind == ROTATIONAL:
        is_trained = [(layer - step) % rotation == 0 for layer in range(num_layers)]
    elif kind == GRADUAL:
        is_trained = [step >= (num_layers - 1 - layer) * num_steps / (2 * num_layers) for layer in range(num_layers)]
    else:
        is_trained = [True] * num_layers
    return [*is_trained[:-1], True]


def exit_weights(is_trained: list[bool], scale: float) -> dict[int, float]:
    """Returns the hidden layers of the trained exits and their weights e(l) / sum e.

    e(l) = scale (1 + 2 + ... + (l + 1)) after block l, and without the scale after the last.
    """
    last = len(is_trained) - 1
    raw = {
        layer + 1: (layer + 1) * (layer + 2) / 2 * (1.0 if layer == last else scale)
        for layer in range(len(is_trained))
        if is_trained[layer]
    }
    return {layer: weight / sum(raw.values()) for layer, weight in raw.items()}


def _skip_at_random(rate: Callable[[], float], block: nn.Module, inputs: tuple[Any, ...], out: Any) -> Any:
    """Replaces a block's output by its input in rows chosen at random; a forward hook."""
    if not (probability := rate()):
        return out
    input_BTD, out_BTD = inputs[0], out[0] if isinstance(out, tuple) else out
    is_skipped_B = (torch.rand(len(input_BTD)) < probability).to(input_BTD.device)
    mixed_BTD = torch.where(is_skipped_B[:, None, None], input_BTD, out_BTD)
    return (mixed_BTD, *out[1:]) if isinstance(out, tuple) else mixed_BTD
