"""EAGLE-3's training-time test (2503.01840, section 3.2): drafts from every position, fed their own features.

Step s of the draft that begins at position t reads token t + 1 + s and learns the target's prediction at t + 1 + s.
Drafts of whose steps none is supervised, those in a prompt, are not run; the prompt's keys and values are.

Shape suffixes: B rows, T positions, P tokens of all rows, M drafts of all rows, A most drafts of a row, N supervised
positions, S steps, H heads, D hidden width, E width of the layer's input, V vocabulary, W draft vocabulary.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from data.batches import Batch, Example
from draftsmith import Target
from draftsmith.drafters.eagle3 import Config, Drafter
from draftsmith.loading.model_info import TargetInfo
from draftsmith.parts.checks import (
    MAX_DEPTH,
    MAX_WIDTH,
    check_at_least,
    check_head_groups,
    check_hidden_layers,
    check_positive,
)
from draftsmith.parts.neural.layers import Attention, ffn_width
from trainers import Metrics, Needs
from trainers.corpora import corpus
from trainers.parts.fused.linear_cross_entropy import SoftTargets, matrix_of, soft_targets
from trainers.parts.heads import shift_left
from trainers.parts.losses import MAX_LOGITS, sum_soft_losses
from trainers.parts.recursive.drafts import PackedDrafts, list_drafts, step_metrics


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The layer, its vocabulary, its loss, and how drafts are made."""

    layers: tuple[int, ...] = ()
    """Hidden layers of the target that are fused; empty for 2, L / 2 and L - 3 of L layers, or others if L is small."""
    num_heads: int = 4
    """Number of attention heads."""
    num_kv_heads: int = 0
    """Number of key-value heads, 0 for as many as attention heads."""
    ffn_size: int = 0
    """Width of the feed-forward layer, 0 for 8/3 of the target's width."""
    config: Config = field(
        default=Config(layers=(0,), num_heads=1, num_kv_heads=1, head_width=1, inner_width=1),
        metadata={
            # Shapes that depend on the target are set in `build`; the rest is for published heads.
            "omit": (
                *("layers", "num_heads", "num_kv_heads", "head_width", "inner_width"),
                *("theta", "stretch", "eps", "norm_residual", "own_embedding"),
            ),
            "flags": {"num_nodes": "tree_nodes"},
        },
    )
    num_steps: int = 7
    """Number of steps of each draft in training."""
    decay: float = 0.8
    """The loss of step s is weighted by decay^s."""

    def __post_init__(self) -> None:
        check_hidden_layers(self, "layers")
        check_at_least(self, 1, "num_heads", "num_steps", most=MAX_DEPTH)
        check_at_least(self, 0, "num_kv_heads", most=MAX_DEPTH)
        check_head_groups(self)
        check_at_least(self, 0, "ffn_size", most=MAX_WIDTH)
        check_positive(self, "decay")


def check(settings: Settings, target: TargetInfo) -> None:
    """Raises ValueError for layers or tokens that the target does not have, from its folder alone."""
    if target.is_encoder_decoder:
        raise ValueError(f"target {target.name} is an encoder-decoder; EAGLE-3 needs a causal target")
    if max(settings.layers, default=0) > target.num_layers:
        raise ValueError(f"layers are {list(settings.layers)}; {target.name} has {target.num_layers}")
    if settings.config.draft_vocab > target.vocab_size:
        raise ValueError(f"draft_vocab is {settings.config.draft_vocab}; {target.name} has {target.vocab_size} tokens")
    if target.hidden_size % (2 * settings.num_heads):
        raise ValueError(f"num_heads is {settings.num_heads}; twice that must divide the width {target.hidden_size}")


def build(settings: Settings, target: Target) -> Drafter:
    """Returns a new layer with the target's head; until `prepare` its vocabulary is the target's first tokens."""
    width = target.hidden_size
    config = dataclasses.replace(
        settings.config,
        layers=settings.layers or default_layers(target.num_layers),
        num_heads=settings.num_heads,
        num_kv_heads=settings.num_kv_heads or settings.num_heads,
        head_width=width // settings.num_heads,
        inner_width=settings.ffn_size or ffn_width(width),
    )
    drafter = Drafter(config, target).float()
    _set_vocabulary(drafter, drafter.vocabulary())
    return drafter


def default_layers(num_layers: int) -> tuple[int, ...]:
    """Returns the published choice, the inputs of blocks 2, L / 2 and L - 3; in small targets, ends and middle."""
    layers = (2, num_layers // 2, num_layers - 3) if num_layers > 6 else (1, (num_layers + 1) // 2, num_layers)
    return tuple(sorted(set(layers)))


def prepare(drafter: Drafter, settings: Settings, target: Target, rows: Sequence[Example]) -> None:
    """Sets the draft vocabulary to the tokens most often supervised in `rows`, ties going to lower ids."""
    if not settings.config.draft_vocab:
        return
    ids_W = corpus.most_frequent_tokens(rows, settings.config.draft_vocab, target.vocab_size)
    _set_vocabulary(drafter, ids_W.to(target.device))


@torch.no_grad()
def _set_vocabulary(drafter: Drafter, ids_W: Tensor) -> None:
    """Sets the draft vocabulary, and the head to the target's rows for it."""
    drafter.set_vocabulary(ids_W)
    drafter.head.weight.copy_(drafter.target.model.get_output_embeddings().weight[ids_W])


def needs(settings: Settings, target: Target) -> Needs:
    """Returns the fused layers and the last one."""
    fused = settings.layers or default_layers(target.num_layers)
    return Needs(layers=tuple(sorted({*fused, target.num_layers})))


def loss(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> tuple[Tensor, Metrics]:
    """Returns the sum over steps s and supervised positions of decay^s CE(target, step s).

    The target's distribution is over the draft vocabulary, at positions where its most likely token belongs to it.
    """
    device = batch.tokens_BT.device
    steps_S = torch.arange(settings.num_steps, device=device)
    drafts = unroll(drafter, batch, settings.num_steps)
    # The outputs of all steps at one position are stacked, as they share the target's distribution there.
    mask_BT = shift_left(batch.loss_mask_BT, 1)
    rows_N, positions_N = mask_BT.nonzero(as_tuple=True)
    starts_NS = positions_N[:, None] - 1 - steps_S  # negative before the row's first token, where nothing is counted
    outputs_NSD = torch.stack(drafts.outputs, dim=1)[drafts.index(rows_N[:, None], starts_NS), steps_S]
    targets, is_drafted_N = target_distributions(drafter, batch.hidden[target.num_layers][mask_BT])
    counts_NS = is_drafted_N[:, None] & (steps_S < positions_N[:, None])
    total, losses_X = sum_soft_losses(
        drafter.head,
        matrix_of(drafter.head, device),
        outputs_NSD.flatten(0, 1),
        targets,
        (settings.decay**steps_S * counts_NS).flatten(),
    )
    losses_S = (losses_X.view_as(counts_NS) * counts_NS).sum(0)
    counts = counts_NS.sum(0).tolist()
    return total, {f"step{s}_loss": (losses_S[s], count) for s, count in enumerate(counts)}


@torch.no_grad()
def target_distributions(drafter: Drafter, hidden_ND: Tensor) -> tuple[SoftTargets, Tensor]:
    """Returns the target's distributions over the draft vocabulary, and whether its likeliest token is in it [N]."""
    target, is_whole, kept, are_drafted = drafter.target, len(drafter.d2t) == len(drafter.t2d), [], []
    for chunk_RD in hidden_ND.split(max(1, MAX_LOGITS // target.vocab_size)):
        logits_RV = target.logits(chunk_RD[None])[0]
        kept.append(logits_RV if is_whole else logits_RV[:, drafter.vocabulary()])
        # In bfloat16 `max` is several times faster than `argmax` on a CPU.
        drafted_R = torch.ones_like(chunk_RD[:, 0], dtype=torch.bool) if is_whole else drafter.t2d[logits_RV.max(-1)[1]]
        are_drafted.append(drafted_R)
    return soft_targets(torch.cat(kept)), torch.cat(are_drafted)


def evaluate(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> Metrics:
    """Returns the metrics of `trainers.parts.recursive.drafts.step_metrics`."""
    return metrics_of(drafter, batch, settings.num_steps)


def metrics_of(drafter: Drafter, batch: Batch, num_steps: int) -> Metrics:
    """Returns the metrics of `evaluate` for `num_steps` steps."""
    return step_metrics(unroll(drafter, batch, num_steps), batch, lambda _, normed: drafter.logits(normed))


def unroll(drafter: Drafter, batch: Batch, num_steps: int) -> PackedDrafts:
    """Runs the steps of every draft of which one is supervised, all drafts at a time.

    Tokens and drafts are packed, without padding; attention alone is computed row by row, in padded form.
    """
    drafts = list_drafts(batch, num_steps)
    num_rows, length = batch.tokens_BT.shape
    is_token_BT = torch.arange(length, device=batch.tokens_BT.device) < batch.lengths_B[:, None]
    rows_P, positions_P = is_token_BT.nonzero(as_tuple=True)
    joined_PE = torch.cat([batch.hidden[layer][is_token_BT] for layer in drafter.hidden_layers], dim=-1)
    features_1PD = drafter.fuse(joined_PE[None])
    given_1PE = drafter.attention_input(shift_left(batch.tokens_BT, 1)[is_token_BT][None], features_1PD)
    group = drafter.attention.num_heads // drafter.attention.num_kv_heads
    given = [
        _repeated(_padded(packed, rows_P, positions_P, num_rows, length), group)
        for packed in drafter.attention.keys_and_values(given_1PE, positions_P[None])
    ]
    features_BTD = features_1PD.new_zeros(num_rows, length, features_1PD.shape[-1])
    features_BTD = features_BTD.index_put((rows_P, positions_P), features_1PD[0])
    features_1MD = features_BTD[drafts.rows_X, drafts.starts_X][None]
    own: list[tuple[Tensor, Tensor]] = []
    for step in range(num_steps):
        # Past the end of the row nothing is supervised, and any token will do.
        tokens_M = batch.tokens_BT[drafts.rows_X, (drafts.starts_X + 1 + step).clamp(max=length - 1)]
        features_1MD, normed_1MD = drafter(
            tokens_M[None],
            features_1MD,
            lambda x_1ME, step=step: attention_in_step(drafter.attention, x_1ME, step, drafts, given, own),
        )
        drafts.outputs.append(normed_1MD[0])
    return drafts


def attention_in_step(
    attention: Attention,
    x_1ME: Tensor,
    step: int,
    drafts: PackedDrafts,
    given: Sequence[Tensor],
    own: list[tuple[Tensor, Tensor]],
) -> Tensor:
    """Returns the attention [1, M, D] in a step of the drafts.

    A draft attends to the keys of step 0, `given` [B, H, T, D] by the target's features, up to the position where it
    begins, and to its own later steps. `own` holds the keys and values [B, H, A, D] of the steps from 1 on, A drafts
    of a row; this step's are appended.
    """
    num_rows, most = len(drafts.index_BT), int(drafts.order_X.max()) + 1
    positions_1M = (drafts.starts_X + step)[None]

    def by_row(packed_1HMD: Tensor) -> Tensor:
        return _padded(packed_1HMD, drafts.rows_X, drafts.order_X, num_rows, most)

    group = attention.num_heads // attention.num_kv_heads
    if step:
        key_1HMD, value_1HMD = attention.keys_and_values(x_1ME, positions_1M)
        own.append((_repeated(by_row(key_1HMD), group), _repeated(by_row(value_1HMD), group)))
    scaled_BHAD = by_row(attention.queries(x_1ME, positions_1M) / attention.head_width**0.5)
    key_BHTD, value_BHTD = given
    order_T = torch.arange(key_BHTD.shape[2], device=x_1ME.device)
    # Padding begins at position 0, whose key every row has.
    starts_BA = drafts.starts_X.new_zeros(num_rows, most).index_put((drafts.rows_X, drafts.order_X), drafts.starts_X)
    scores_BHAT = scaled_BHAD @ key_BHTD.transpose(-1, -2)
    scores_BHAT = scores_BHAT.masked_fill((starts_BA[..., None] < order_T)[:, None], -torch.inf)
    own_scores = [(scaled_BHAD * key).sum(-1, keepdim=True) for key, _ in own]
    weights = torch.cat([scores_BHAT, *own_scores], dim=-1).softmax(-1)
    out_BHAD = weights[..., : len(order_T)] @ value_BHTD
    for index, (_, value) in enumerate(own, start=len(order_T)):
        out_BHAD = out_BHAD + weights[..., index, None] * value
    return attention.output(out_BHAD.transpose(1, 2)[drafts.rows_X, drafts.order_X].flatten(1))[None]


def _repeated(x_BHND: Tensor, group: int) -> Tensor:
    """Returns keys or values for every attention head, each repeated for the `group` heads that share it."""
    return x_BHND.repeat_interleave(group, dim=1) if group > 1 else x_BHND


def _padded(packed_1HPD: Tensor, rows_P: Tensor, columns_P: Tensor, num_rows: int, num_columns: int) -> Tensor:
    """Returns the packed values by row and column, zeros where there are none, as [B, H, columns, D]."""
    _, num_heads, _, width = packed_1HPD.shape
    empty = packed_1HPD.new_zeros(num_rows, num_columns, num_heads, width)
    return empty.index_put((rows_P, columns_P), packed_1HPD[0].transpose(0, 1)).transpose(1, 2)
