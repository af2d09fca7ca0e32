"""Medusa-2: heads and low-rank changes of the target trained together (2401.10774, sections 2.2.2 and 2.3.2).

Shape suffixes: B rows, T positions, N supervised positions, D hidden width, V vocabulary, K heads.
"""

import dataclasses
import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from data.batches import Batch
from draftsmith import Target
from draftsmith.core.model_info import TargetInfo
from draftsmith.drafters.medusa2 import Config, Drafter
from draftsmith.parts.self_drafting.fine_tuned import has_tied_head
from trainers import Metrics, Needs
from trainers.parts import adapters, heads
from trainers.parts.losses import Teacher, cross_entropy, divergence, sum_in_chunks

SELF_DISTILLED, TWO_STAGE = "self_distilled", "two_stage"
HEADS_WEIGHT = {SELF_DISTILLED: 0.01, TWO_STAGE: 0.2}
SLOW_START = 100
TOKENS_AT_ONCE = 1024


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The heads, what of the target is changed, and how the two are weighed."""

    num_heads: int = 4
    """Heads; head k (from 0) predicts the token k + 2 places on."""
    num_blocks: int = 1
    """Residual blocks a head, each with weights of its own."""
    own_head: bool = False
    """Give each head an output matrix of its own, started as the target's, instead of sharing the tuned target's."""
    decay: float = 0.8
    """Head k's loss counts `decay` to the power k + 1."""
    method: str = field(default=SELF_DISTILLED, metadata={"choices": [SELF_DISTILLED, TWO_STAGE]})
    """Keep the target's law while heads gain weight, or learn the text after `head_steps` of heads alone."""
    head_steps: int = 200
    """Steps of the first of two stages, in which the target stays as it is."""
    heads_weight: float = 0.0
    """What the heads' loss counts beside the target's; 0 is the paper's: 0.01 self-distilled, 0.2 in two stages."""
    head_rate: float = 4.0
    """The heads' learning rate, as a multiple of that of the target's changes."""
    rank: int = 32
    """Rank of the change of each matrix."""
    alpha: float = 16.0
    """The change is alpha / rank times the product of its factors."""
    dropout: float = 0.05
    """Of what goes into the factors, in training."""
    modules: tuple[str, ...] = ()
    """Ends of the names of the linear layers changed, as q_proj; if empty all in the target's blocks, and its head
    unless that is tied to the embedding."""
    tree_nodes: int = 0
    """Nodes in the tree; 0 takes what gives most tokens a second as measured on this machine."""

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_blocks", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("decay", "alpha", "head_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        for name in ("tree_nodes", "head_steps", "heads_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must lie between 0 and 1, the latter excluded")


def check(settings: Settings, facts: TargetInfo) -> None:
    if importlib.util.find_spec("peft") is None:
        raise ValueError("training changes of the target needs peft, which is not installed: pip install peft")


def build(settings: Settings, target: Target) -> Drafter:
    """Returns heads that pass the last hidden state through unchanged, and changes that change nothing yet.

    Its target is one that shares every weight with the given one, and runs peft's layers over the drafter's factors.
    """
    config = Config(
        num_heads=settings.num_heads,
        num_blocks=settings.num_blocks,
        own_head=settings.own_head,
        rank=settings.rank,
        alpha=settings.alpha,
        modules=settings.modules,
        tree=tuple((0,) * depth for depth in range(1, settings.num_heads + 1)),
    )
    drafter = Drafter(config, target).float()
    drafter.register_buffer("steps", torch.tensor([0, 1], device=target.device), persistent=False)
    rank, alpha, dropout = settings.rank, settings.alpha, settings.dropout
    trained = adapters.attach_adapters(
        target, config.modules, drafter.adapters, rank=rank, alpha=alpha, dropout=dropout
    )
    object.__setattr__(drafter, "target", trained)
    return drafter


def needs(settings: Settings, target: Target) -> Needs:
    return Needs(layers=(target.num_layers,))


def begin_step(drafter: Drafter, settings: Settings, step: int, num_steps: int) -> None:
    drafter.get_buffer("steps").copy_(torch.tensor([step, num_steps]))


def learning_rate_factors(settings: Settings) -> dict[str, Callable[[int], float]]:
    """Returns the heads' factor, and that of the changes: in two stages 0, and then slowly up to 1.

    Adam's second moment is empty when the second stage begins, so that its first steps would be too long.
    """

    def of_changes(step: int) -> float:
        is_late = settings.method == TWO_STAGE
        return min(max(step + 1 - settings.head_steps, 0) / SLOW_START, 1.0) if is_late else 1.0

    return {"": lambda step: settings.head_rate, "adapters.": of_changes}


def loss(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> tuple[Tensor, Metrics]:
    """Returns the target's own loss and, weighted by `heads_weight`, the sum of decay^(k + 1) CE(head k) of all heads.

    Self-distilled the former is KL(target || tuned target), and the weight rises as sin(pi / 2 step / steps). In two
    stages it is the text's cross-entropy, and the first stage has the heads' loss alone.
    """
    step, num_steps = drafter.get_buffer("steps").tolist()
    weight = settings.heads_weight or HEADS_WEIGHT[settings.method]
    theirs_BTD = target.norm(batch.hidden[target.num_layers])
    if settings.method == TWO_STAGE and step < settings.head_steps:
        heads_loss, metrics = _heads_loss(drafter, batch, settings, theirs_BTD)
        # Other ranks wait for a gradient of every weight.
        return heads_loss + 0 * sum(factor.sum() for factor in drafter.adapters.parameters()), metrics
    normed_BTD = _read(drafter, batch)
    heads_loss, metrics = _heads_loss(drafter, batch, settings, normed_BTD)
    mask_BT = heads.shift_left(batch.loss_mask_BT, 1)
    if settings.method == TWO_STAGE:
        labels_N = heads.shift_left(batch.tokens_BT, 1)[mask_BT]
        target_loss, count = sum_in_chunks(
            lambda own_ND, labels_N: cross_entropy(drafter.target.head(own_ND[None])[0], labels_N),
            normed_BTD[mask_BT],
            labels_N,
            vocab_size=target.vocab_size,
        )
    else:
        # From 1 on: with no weight at all the first gradient would be rounding, which Adam takes for a direction.
        weight *= math.sin(math.pi / 2 * (step + 1) / num_steps)
        forward_kl = divergence("forward_kl")
        target_loss, count = sum_in_chunks(
            lambda own_ND, theirs_ND: forward_kl(
                drafter.target.head(own_ND[None])[0], Teacher(logits=target.head(theirs_ND[None])[0])
            ),
            normed_BTD[mask_BT],
            theirs_BTD[mask_BT],
            vocab_size=target.vocab_size,
        )
    return target_loss + weight * heads_loss, {"target_loss": (target_loss.detach(), count), **metrics}


def evaluate(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> Metrics:
    """Returns how the heads fare against what the tuned target itself says, and how often that is the text."""
    ranks_KBT, said_BT = _ranks(drafter, batch)
    is_text_BT = (said_BT == batch.tokens_BT) & batch.loss_mask_BT
    kept = (is_text_BT[:, 1:].sum(), int(batch.loss_mask_BT[:, 1:].sum()))
    return {**heads.accuracy_metrics(ranks_KBT), "target_accuracy": kept}


@torch.no_grad()
def finish(drafter: Drafter, settings: Settings, target: Target, held_out: list[Batch]) -> Drafter:
    """Returns the drafter with its target tuned, and the tree computed from its ranks there and the measured cost."""
    hidden_11D = held_out[0].hidden[target.num_layers][:1, :1]
    tree = heads.best_tree(
        (_ranks(drafter, batch)[0] for batch in held_out),
        lambda: heads.top_tokens(drafter.heads(drafter.target.norm(hidden_11D)), drafter.head),
        target,
        settings.tree_nodes,
    )
    finished = Drafter(dataclasses.replace(drafter.config, tree=tree), target)
    finished.load_state_dict(drafter.state_dict())
    finished.on_weights_loaded()
    tied = "; its output head, tied to the embedding, was left as it is" * has_tied_head(target)
    print(f"{len(finished.adapters)} matrices of {target.name} changed{tied}")
    return finished.eval()


def _read(drafter: Drafter, batch: Batch) -> Tensor:
    """Returns the tuned target's last hidden state, normed [B, T, D]."""
    last = drafter.target.num_layers
    return drafter.target.norm(drafter.target.read(batch.tokens_BT, (last,))[last])


def _heads_loss(drafter: Drafter, batch: Batch, settings: Settings, normed_BTD: Tensor) -> tuple[Tensor, Metrics]:
    parts = _parts(drafter, batch, normed_BTD)
    return heads.loss(parts, drafter.head, decay=settings.decay, vocab_size=drafter.target.vocab_size)


def _parts(drafter: Drafter, batch: Batch, normed_BTD: Tensor) -> Iterator[heads.HeadOutputs]:
    return heads.head_outputs(drafter.heads, normed_BTD, batch, drafter.config.num_heads)


def _ranks(drafter: Drafter, batch: Batch) -> tuple[Tensor, Tensor]:
    """Returns the place [K, B, T] of the tuned target's token among each head's guesses, and what it says [B, T]."""
    normed_BTD = _read(drafter, batch)
    parts = normed_BTD.flatten(0, 1).split(TOKENS_AT_ONCE)
    next_BT = torch.cat([drafter.target.head(part_ND[None])[0].argmax(-1) for part_ND in parts]).view_as(
        batch.tokens_BT
    )
    said_BT = torch.cat([batch.tokens_BT[:, :1], next_BT[:, :-1]], dim=1)
    told = dataclasses.replace(batch, tokens_BT=said_BT)
    return heads.label_ranks(_parts(drafter, told, normed_BTD), drafter.head, told), said_BT
