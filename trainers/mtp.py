"""Trains a multi-token prediction head recursively (FastMTP, 2509.18362) on the target's own text.

Step s, from 0, of the draft that begins at position t reads token t + 1 + s, and the hidden state of the target (s = 0)
or its own of the step before, and learns token t + 2 + s. As in drafting, a step sees the keys of step 0 up to the
position where its draft begins, and those of its draft's steps.

With several heads, step s < heads is head s at position t, over its own keys up to there (DeepSeek-V3, 2412.19437,
section 2.2); later steps are the last head's, applied to its own output.

Shape suffixes: B rows, T positions, M drafts of a row, N supervised positions of a step or nodes of a tree, S steps,
D hidden width, W tokens of the shortlist.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from data.batches import Batch, Example
from draftsmith import Target
from draftsmith.artifacts.published.mtp import layer_config, text_config
from draftsmith.artifacts.published.mtp_forms import form_of
from draftsmith.core.tree import Tree, chain
from draftsmith.drafters.mtp import Config, Drafter
from draftsmith.loading.model_info import TargetInfo
from draftsmith.parts.checks import MAX_DEPTH, check_at_least, check_positive
from draftsmith.parts.neural.shortlist import check_size
from trainers import Metrics, Needs
from trainers.corpora import corpus
from trainers.parts.fused.linear_cross_entropy import shared_matrix
from trainers.parts.heads import shift_left
from trainers.parts.losses import DIVERGENCES, Teacher, divergence, on_shortlist, sum_in_chunks, sum_label_losses
from trainers.parts.recursive.drafts import Drafts, draft_starts, step_metrics
from trainers.parts.recursive.growing_cache import GrowingCache


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The length of drafts, in decoding and in training, and the loss."""

    config: Config = field(
        default=Config(model={}),
        # The layer is the target's, and the checkpoint's form says what it reads, see `with_layer`.
        metadata={"omit": ("model", "is_chained", "reads_normed", "zeroes_first")},
    )
    num_steps: int = 3
    """Number of steps of each draft in training."""
    decay: float = 0.6
    """Step s has the weight decay^s / sum of decay^i over all steps i: 0.51, 0.31 and 0.18 of three (FastMTP)."""
    loss: str = field(default="ce", metadata={"choices": ["ce", *DIVERGENCES]})
    """Cross-entropy on the text (ce), or a divergence from the target's distribution at each of its tokens."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "num_steps", most=MAX_DEPTH)
        check_positive(self, "decay")
        if self.num_steps < self.config.num_heads:
            raise ValueError(
                f"num_steps is {self.num_steps}; each of the {self.config.num_heads} heads is trained in a step of its"
                f" own: give --num-steps {self.config.num_heads} or more"
            )


def check(settings: Settings, target: TargetInfo) -> None:
    """Raises ValueError for a target that has no layer to be a head, from its folder alone."""
    if target.is_encoder_decoder:
        raise ValueError(f"target {target.name} is an encoder-decoder; MTP heads need a causal target")
    with_layer(settings.config, target, text_config(target))
    check_size(settings.config.shortlist, target.vocab_size)


@torch.no_grad()
def build(settings: Settings, target: Target) -> Drafter:
    """Returns new heads, whose layers are of the kind that the target's checkpoint brings or, without one, has itself.

    At first the projection hands the normed hidden state on, and the final norm is the target's, which its LM head
    expects. To train the checkpoint's own heads, import them and start from those.
    """
    config = with_layer(settings.config, target, target.model.config.get_text_config(decoder=True))
    drafter = Drafter(config, target).float()
    for head in drafter.heads:
        head.projection.weight[:, target.hidden_size :] += torch.eye(target.hidden_size, device=target.device)
        head.final_norm().load_state_dict(target.copy_norm().state_dict())
    return drafter


def with_layer(config: Config, target: TargetInfo | Target, text_model: Any) -> Config:
    """Returns a drafter's configuration with the layer, and what it reads, as the target's checkpoint has them.

    `text_model` is the transformers configuration of the target's text model.
    """
    form = form_of(target)
    return dataclasses.replace(
        config,
        model=layer_config(text_model, target.name, form),
        is_chained=form.is_chained if form else True,
        reads_normed=form.reads_normed if form else True,
        zeroes_first=form.zeroes_first if form else False,
    )


def prepare(drafter: Drafter, settings: Settings, target: Target, rows: Sequence[Example]) -> None:
    """Fills the shortlist."""
    corpus.fill_shortlist(drafter.shared_head.shortlist, rows)


def needs(settings: Settings, target: Target) -> Needs:
    """Returns the last hidden layer."""
    return Needs(layers=(target.num_layers,))


def loss(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> tuple[Tensor, Metrics]:
    """Returns the sum over steps and supervised positions of weight * loss.

    With a shortlist a divergence is between distributions over its tokens, and other labels of cross-entropy do not
    count. Raises ValueError if DeepSpeed has sharded the weights: it does not hook the weight-sharing copies of modules
    that the layer is run through.
    """
    if hasattr(drafter.projection.weight, "ds_id"):
        raise ValueError("an MTP head cannot be trained in DeepSpeed's stage 3; give --deepspeed zero2")
    shared, shortlist = drafter.shared_head, drafter.shared_head.shortlist
    weights = step_weights(settings)
    matrix = shared_matrix(shared, batch.tokens_BT.device)

    def compare(z_ND: Tensor, given_N: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = Teacher(logits=target.logits(given_N[None])[0])
        return divergence(settings.loss)(*on_shortlist(shared.listed(z_ND), teacher, shortlist))

    total, metrics = torch.zeros((), device=batch.tokens_BT.device), {}
    for step, output in enumerate(unroll(drafter, batch, settings.num_steps).steps(batch)):
        z_ND, given_N = output.z_ND, output.labels_N
        if settings.loss == "ce":
            is_listed_N = shortlist.contains(given_N)
            z_ND, given_N = z_ND[is_listed_N], shortlist.indices(given_N[is_listed_N])
            step_loss, count = sum_label_losses(shared.listed, matrix, z_ND, given_N, vocab_size=len(shortlist))
        else:
            # The target's distribution of token t + 2 + s comes from its state at the position before.
            rows_N, starts_N = output.mask_BT.nonzero(as_tuple=True)
            given_N = batch.hidden[target.num_layers][rows_N, starts_N + 1 + step]
            step_loss, count = sum_in_chunks(compare, z_ND, given_N, vocab_size=len(shortlist))
        total = total + weights[step] * step_loss
        if count:
            metrics[f"step{step}_loss"] = (step_loss.detach(), count)
    return total, metrics


def step_weights(settings: Settings) -> list[float]:
    """Returns the weight of each step's loss, decay^s / sum of decay^i (FastMTP, section 3)."""
    powers = [settings.decay**step for step in range(settings.num_steps)]
    return [power / sum(powers) for power in powers]


def evaluate(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> Metrics:
    """Returns the metrics of `trainers.parts.recursive.drafts.step_metrics`."""
    return metrics_of(drafter, batch, settings.num_steps)


def metrics_of(drafter: Drafter, batch: Batch, num_steps: int) -> Metrics:
    """Returns the metrics of `evaluate` for `num_steps` steps."""
    head = drafter.shared_head
    return step_metrics(unroll(drafter, batch, num_steps), batch, lambda _, normed: head(normed))


def unroll(drafter: Drafter, batch: Batch, num_steps: int) -> Drafts:
    """Runs the steps of every draft of which one is supervised, all drafts at a time.

    Each head runs over the whole text. For the last one they are one tree: the text is a chain, from each of whose
    nodes the later steps of a draft go off.
    """
    starts_BM, index_BT = draft_starts(batch, num_steps)
    (num_rows, num_drafts), length = starts_BM.shape, batch.tokens_BT.shape[1]
    rows_B1 = torch.arange(num_rows, device=starts_BM.device)[:, None]
    states_BTD, outputs = drafter.fuse(drafter.join(batch.hidden)), []
    text = chain(length, batch.tokens_BT.device)
    for number, head in enumerate(drafter.heads[:num_steps]):
        cache = GrowingCache(num_layers=1, batch_size=num_rows)
        hidden_BTD, normed_BTD = head.run(shift_left(batch.tokens_BT, 1 + number), states_BTD, text, cache)
        if drafter.is_chained:
            states_BTD = hidden_BTD
        outputs.append(normed_BTD[rows_B1, starts_BM])
    hidden_BMD = hidden_BTD[rows_B1, starts_BM]
    for step in range(len(outputs), num_steps):
        own_step = step - len(drafter.heads) + 1
        tree = draft_tree(starts_BM, length, own_step)
        # Past the end of the row nothing is supervised, and any token will do.
        tokens_BM = batch.tokens_BT[rows_B1, (starts_BM + 1 + step).clamp(max=length - 1)]
        first = length + (own_step - 1) * num_drafts
        hidden_BMD, normed_BMD = drafter.heads[-1].run(tokens_BM, hidden_BMD, tree, cache, first)
        outputs.append(normed_BMD)
    return Drafts(starts_BM=starts_BM, index_BT=index_BT, outputs=outputs)


def draft_tree(starts_BM: Tensor, length: int, num_steps: int) -> Tree:
    """Returns the tree of a text's positions and of steps 1 to `num_steps` of the drafts that begin at some of them.

    Node t < `length` is position t, and node length + (s - 1) M + m step s of draft m.
    """
    (num_rows, num_drafts), device = starts_BM.shape, starts_BM.device
    order_T = torch.arange(length, device=device)
    steps_S1 = torch.arange(1, num_steps + 1, device=device)[:, None]
    depths_BN = torch.cat([order_T.expand(num_rows, -1), (starts_BM[:, None] + steps_S1).flatten(1)], dim=1)
    later = torch.arange(num_drafts, device=device) + length + (steps_S1 - 2) * num_drafts
    parents_BN = torch.cat(
        [order_T.expand(num_rows, -1) - 1, starts_BM, later[1:].flatten().expand(num_rows, -1)], dim=1
    )
    num_later = num_steps * num_drafts
    own_QQ = torch.eye(num_drafts, dtype=torch.bool, device=device).repeat(num_steps, num_steps).tril()
    text_BQT = (order_T <= starts_BM[..., None]).repeat(1, num_steps, 1)
    ancestors_BNN = torch.cat(
        [
            torch.ones(length, length, dtype=torch.bool, device=device).tril().expand(num_rows, -1, -1),
            torch.zeros(num_rows, length, num_later, dtype=torch.bool, device=device),
        ],
        dim=2,
    )
    later_BQN = torch.cat([text_BQT, own_QQ.expand(num_rows, -1, -1)], dim=2)
    return Tree(
        parents_RN=parents_BN,
        depths_RN=depths_BN,
        ancestors_RNN=torch.cat([ancestors_BNN, later_BQN], dim=1),
        depth=length - 1 + num_steps,
        is_chain=False,
    )
