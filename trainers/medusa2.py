"""Trains Medusa-2: heads together with low-rank adapters of the target (2401.10774, sections 2.2.2 and 2.3.2).

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
from draftsmith.drafters.medusa2 import Config, Drafter
from draftsmith.loading.model_info import TargetInfo
from draftsmith.parts.checks import MAX_NODES, check_at_least, check_below_one, check_positive
from draftsmith.parts.self_drafting.fine_tuned import has_tied_head
from trainers import Metrics, Needs
from trainers.parts import adapters, heads, trees
from trainers.parts.losses import Teacher, cross_entropy, divergence, sum_in_chunks

SELF_DISTILLED, TWO_STAGE = "self_distilled", "two_stage"
HEADS_WEIGHT = {SELF_DISTILLED: 0.01, TWO_STAGE: 0.2}
ADAPTER_WARMUP_STEPS = 100
TOKENS_AT_ONCE = 1024

RUNS_BLOCKS = True


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The heads, the target's adapters, and the weights of their losses."""

    config: Config = field(default=Config(tree=((0,),)), metadata={"omit": ("tree",)})
    decay: float = 0.8
    """Head k's loss is weighted by decay^(k + 1)."""
    method: str = field(default=SELF_DISTILLED, metadata={"choices": [SELF_DISTILLED, TWO_STAGE]})
    """Distil from the original target while the heads' weight rises, or train on the text after `head_steps` steps of
    training the heads alone."""
    head_steps: int = 200
    """Steps of the first of the two stages, in which the target is frozen."""
    heads_weight: float = 0.0
    """Weight of the heads' loss relative to the target's; 0 for the paper's: 0.01 self-distilled, 0.2 in two stages."""
    head_rate: float = 4.0
    """Learning rate of the heads as a multiple of that of the adapters."""
    dropout: float = 0.05
    """Dropout probability of the adapters' inputs."""
    tree_nodes: int = 0
    """Number of nodes in the tree; 0 maximises tokens per second as measured on this machine."""

    def __post_init__(self) -> None:
        check_positive(self, "decay", "head_rate")
        check_at_least(self, 0, "tree_nodes", most=MAX_NODES)
        check_at_least(self, 0, "head_steps")
        check_at_least(self, 0, "heads_weight", most=1e6)
        check_below_one(self, "dropout")


def check(settings: Settings, target: TargetInfo) -> None:
    """Raises ValueError if peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise ValueError("training adapters of the target needs peft, which is not installed: pip install peft")


def first_steps(settings: Settings) -> tuple[str, int]:
    """Returns the number of steps that train the heads alone, after the setting's name."""
    return "head_steps", settings.head_steps if settings.method == TWO_STAGE else 0


def build(settings: Settings, target: Target) -> Drafter:
    """Returns heads that pass the last hidden state through unchanged, and adapters that are zero.

    The drafter's target shares every weight with the given one and runs peft's layers over the drafter's adapters.
    """
    config = dataclasses.replace(settings.config, tree=trees.chain(settings.config.num_heads))
    drafter = Drafter(config, target).float()
    drafter.register_buffer("steps", torch.tensor([0, 1], device=target.device), persistent=False)
    rank, alpha, dropout = config.rank, config.alpha, settings.dropout
    trained = adapters.attach_adapters(
        target, config.modules, drafter.adapters, rank=rank, alpha=alpha, dropout=dropout
    )
    object.__setattr__(drafter, "target", trained)
    return drafter


def needs(settings: Settings, target: Target) -> Needs:
    """Returns the last hidden layer."""
    return Needs(layers=(target.num_layers,))


def begin_step(drafter: Drafter, settings: Settings, step: int, num_steps: int) -> None:
    """Stores the step, which the loss depends on."""
    drafter.get_buffer("steps").copy_(torch.tensor([step, num_steps]))


def learning_rate_factors(settings: Settings) -> dict[str, Callable[[int], float]]:
    """Returns the factors of the heads and of the adapters, which in two stages are 0 and then warm up to 1.

    Adam's second moment is empty when the second stage begins, so that its first steps would be too large.
    """

    def adapter_factor(step: int) -> float:
        if settings.method != TWO_STAGE:
            return 1.0
        return min(max(step + 1 - settings.head_steps, 0) / ADAPTER_WARMUP_STEPS, 1.0)

    return {"": lambda step: settings.head_rate, "adapters.": adapter_factor}


def loss(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> tuple[Tensor, Metrics]:
    """Returns the target's own loss plus `heads_weight` times the sum of decay^(k + 1) CE(head k) of all heads.

    Self-distilled, the target's loss is KL(target || fine-tuned target), and the weight rises as
    sin(pi / 2 step / steps). In two stages it is the text's cross-entropy; the first stage has the heads' loss only.
    """
    step, num_steps = drafter.get_buffer("steps").tolist()
    weight = settings.heads_weight or HEADS_WEIGHT[settings.method]
    theirs_BTD = target.norm(batch.hidden[target.num_layers])
    if settings.method == TWO_STAGE and step < settings.head_steps:
        heads_loss, metrics = _heads_loss(drafter, batch, settings, theirs_BTD)
        # Distributed training expects a gradient of every weight.
        return heads_loss + 0 * sum(factor.sum() for factor in drafter.adapters.parameters()), metrics
    normed_BTD = _read_normed(drafter, batch)
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
        # Counted from 1: with a weight of 0 the first gradient would be rounding noise, which Adam would normalise.
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
    """Returns the heads' accuracy against the fine-tuned target's own tokens, and the target's accuracy on the text."""
    ranks_KBT, greedy_BT = _ranks(drafter, batch)
    is_text_BT = (greedy_BT == batch.tokens_BT) & batch.loss_mask_BT
    accuracy = (is_text_BT[:, 1:].sum(), int(batch.loss_mask_BT[:, 1:].sum()))
    return {**heads.accuracy_metrics(ranks_KBT), "target_accuracy": accuracy}


@torch.no_grad()
def finish(drafter: Drafter, settings: Settings, target: Target, held_out: list[Batch]) -> Drafter:
    """Returns the drafter with its fine-tuned target and the tree computed from held-out ranks and measured costs."""
    hidden_11D = held_out[0].hidden[target.num_layers][:1, :1]
    tree = heads.choose_tree(
        (_ranks(drafter, batch)[0] for batch in held_out),
        lambda: heads.top_tokens(drafter.heads(drafter.target.norm(hidden_11D)), drafter.head),
        target,
        settings.tree_nodes,
    )
    finished = Drafter(dataclasses.replace(drafter.config, tree=tree), target)
    finished.load_state_dict(drafter.state_dict())
    finished.on_weights_loaded()
    tied = "; its LM head is tied to the embedding and unchanged" * has_tied_head(target)
    print(f"{len(finished.adapters)} matrices of {target.name} fine-tuned{tied}")
    return finished.eval()


def _read_normed(drafter: Drafter, batch: Batch) -> Tensor:
    """Returns the fine-tuned target's last hidden state, normed [B, T, D]."""
    last = drafter.target.num_layers
    return drafter.target.norm(drafter.target.read(batch.tokens_BT, (last,))[last])


def _heads_loss(drafter: Drafter, batch: Batch, settings: Settings, normed_BTD: Tensor) -> tuple[Tensor, Metrics]:
    outputs = _head_outputs(drafter, batch, normed_BTD)
    return heads.loss(outputs, drafter.head, decay=settings.decay, vocab_size=drafter.target.vocab_size)


def _head_outputs(drafter: Drafter, batch: Batch, normed_BTD: Tensor) -> Iterator[heads.HeadOutputs]:
    return heads.head_outputs(drafter.heads, normed_BTD, batch, drafter.config.num_heads)


def _ranks(drafter: Drafter, batch: Batch) -> tuple[Tensor, Tensor]:
    """Returns the rank [K, B, T] of the fine-tuned target's greedy token in each head's logits, and these tokens.

    Where the text is not supervised, the tokens are the text's.
    """
    normed_BTD = _read_normed(drafter, batch)
    is_before_BT = heads.shift_left(batch.loss_mask_BT, 1)
    chunks = normed_BTD[is_before_BT].split(TOKENS_AT_ONCE)
    greedy_BT = batch.tokens_BT.clone()
    greedy_BT[:, 1:][is_before_BT[:, :-1]] = torch.cat([drafter.target.head(one[None])[0].argmax(-1) for one in chunks])
    greedy = dataclasses.replace(batch, tokens_BT=greedy_BT)
    return heads.label_ranks(_head_outputs(drafter, greedy, normed_BTD), drafter.head, greedy), greedy_BT
