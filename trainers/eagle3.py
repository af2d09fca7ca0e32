"""EAGLE-3's training-time test (2503.01840, section 3.2): drafts from every position, fed their own features.

Step s of the draft that begins at position t reads token t + 1 + s and learns the target's prediction at t + 1 + s.
Drafts of whose steps none is supervised, those in a prompt, are not run; the prompt's keys and values are.

Shape suffixes: B rows, T positions, M drafts of a row, N supervised positions, S steps, H heads, D hidden width,
E width of the layer's input, V vocabulary, W draft vocabulary.
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
from draftsmith.parts.checks import MAX_DEPTH, MAX_WIDTH, check_at_least, check_each, check_positive
from draftsmith.parts.neural.layers import Attention, ffn_width
from trainers import Metrics, Needs
from trainers.corpora import corpus
from trainers.parts.heads import shift_left
from trainers.parts.losses import map_in_chunks, sum_in_chunks
from trainers.parts.recursive.drafts import Drafts, draft_starts, step_metrics


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
        check_each(self, 0, "layers", most=MAX_DEPTH)
        check_at_least(self, 1, "num_heads", "num_steps", most=MAX_DEPTH)
        check_at_least(self, 0, "num_kv_heads", most=MAX_DEPTH)
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
    steps_S = torch.arange(settings.num_steps, device=batch.tokens_BT.device)
    drafts = unroll(drafter, batch, settings.num_steps)
    # The outputs of all steps at one position are stacked, as they share the target's distribution there.
    mask_BT = shift_left(batch.loss_mask_BT, 1)
    rows_N, positions_N = mask_BT.nonzero(as_tuple=True)
    starts_NS = positions_N[:, None] - 1 - steps_S  # negative before the row's first token, where nothing is counted
    outputs_NSD = torch.stack(drafts.outputs, dim=2)[rows_N[:, None], drafts.index(rows_N[:, None], starts_NS), steps_S]

    def teach(theirs_ND: Tensor) -> Tensor:
        """Returns the target's probabilities over the draft vocabulary, and whether its likeliest token is in it."""
        logits_NV = target.logits(theirs_ND[None])[0]
        probs_NW = logits_NV[:, drafter.vocabulary()].float().softmax(-1)
        return torch.cat([probs_NW, drafter.t2d[logits_NV.argmax(-1)][:, None].to(probs_NW.dtype)], dim=1)

    def compare(taught_NX: Tensor, outputs_NSD: Tensor, positions_N: Tensor) -> Tensor:
        logits_NSW = drafter.head(outputs_NSD).float()
        with torch.autocast(logits_NSW.device.type, enabled=False):  # a product of float32, not of rounded logits
            expected_NS = (logits_NSW @ taught_NX[:, :-1, None])[..., 0]
        losses_NS = logits_NSW.logsumexp(-1) - expected_NS  # the probabilities sum to 1
        counts_NS = taught_NX[:, -1:].bool() & (steps_S < positions_N[:, None])
        return torch.stack([losses_NS * counts_NS, counts_NS.float()], dim=1)

    # Outside of the checkpointed chunks, the target's head runs once.
    taught_NX = map_in_chunks(teach, batch.hidden[target.num_layers][mask_BT], vocab_size=target.vocab_size)
    num_logits = settings.num_steps * len(drafter.d2t)
    sums_2S, _ = sum_in_chunks(compare, taught_NX, outputs_NSD, positions_N, vocab_size=num_logits)
    losses_S, counts = sums_2S[0], sums_2S[1].tolist()
    metrics = {f"step{s}_loss": (losses_S[s].detach(), int(count)) for s, count in enumerate(counts)}
    return (settings.decay**steps_S * losses_S).sum(), metrics


def evaluate(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> Metrics:
    """Returns the metrics of `trainers.parts.recursive.drafts.step_metrics`."""
    return metrics_of(drafter, batch, settings.num_steps)


def metrics_of(drafter: Drafter, batch: Batch, num_steps: int) -> Metrics:
    """Returns the metrics of `evaluate` for `num_steps` steps."""
    return step_metrics(unroll(drafter, batch, num_steps), batch, lambda _, normed: drafter.logits(normed))


def unroll(drafter: Drafter, batch: Batch, num_steps: int) -> Drafts:
    """Runs the steps of every draft of which one is supervised, all drafts at a time."""
    starts_BM, index_BT = draft_starts(batch, num_steps)
    rows_B1, last = torch.arange(len(starts_BM), device=starts_BM.device)[:, None], batch.tokens_BT.shape[1] - 1
    order_1T = torch.arange(last + 1, device=starts_BM.device)[None]
    features_BTD = drafter.fuse(drafter.join(batch.hidden))
    given_BTE = drafter.attention_input(shift_left(batch.tokens_BT, 1), features_BTD)
    given = drafter.attention.keys_and_values(given_BTE, order_1T)
    features_BMD, outputs = features_BTD[rows_B1, starts_BM], []
    own: list[tuple[Tensor, Tensor]] = []
    for step in range(num_steps):
        # Past the end of the row nothing is supervised, and any token will do.
        tokens_BM = batch.tokens_BT[rows_B1, (starts_BM + 1 + step).clamp(max=last)]
        features_BMD, normed_BMD = drafter(
            tokens_BM,
            features_BMD,
            lambda x_BME, step=step: attention_in_step(drafter.attention, x_BME, step, starts_BM, given, own),
        )
        outputs.append(normed_BMD)
    return Drafts(starts_BM=starts_BM, index_BT=index_BT, outputs=outputs)


def attention_in_step(
    attention: Attention,
    x_BME: Tensor,
    step: int,
    starts_BM: Tensor,
    given: tuple[Tensor, Tensor],
    own: list[tuple[Tensor, Tensor]],
) -> Tensor:
    """Returns the attention [B, M, D] in a step of the drafts that begin at `starts_BM`.

    A draft attends to the keys of step 0, `given` [B, H, T, D] by the target's features, up to the position where it
    begins, and to its own later steps. `own` holds the keys and values [B, H, M, D] of the steps from 1 on; this
    step's are appended.
    """
    positions_BM = starts_BM + step
    group = attention.num_heads // attention.num_kv_heads
    if step:
        own.append(_repeated(attention.keys_and_values(x_BME, positions_BM), group))
    scaled_BHMD = attention.queries(x_BME, positions_BM) / attention.head_width**0.5
    key_BHTD, value_BHTD = _repeated(given, group)
    order_T = torch.arange(key_BHTD.shape[2], device=x_BME.device)
    scores_BHMT = scaled_BHMD @ key_BHTD.transpose(-1, -2)
    scores_BHMT = scores_BHMT.masked_fill((starts_BM[..., None] < order_T)[:, None], -torch.inf)
    own_scores = [(scaled_BHMD * key).sum(-1, keepdim=True) for key, _ in own]
    weights = torch.cat([scores_BHMT, *own_scores], dim=-1).softmax(-1)
    out_BHMD = weights[..., : len(order_T)] @ value_BHTD
    for index, (_, value) in enumerate(own, start=len(order_T)):
        out_BHMD = out_BHMD + weights[..., index, None] * value
    return attention.output(out_BHMD.transpose(1, 2).flatten(2))


def _repeated(pair: tuple[Tensor, Tensor], group: int) -> tuple[Tensor, Tensor]:
    """Returns keys and values for every attention head, each repeated for the `group` heads that share it."""
    key_BHTD, value_BHTD = pair
    return key_BHTD.repeat_interleave(group, dim=1), value_BHTD.repeat_interleave(group, dim=1)
