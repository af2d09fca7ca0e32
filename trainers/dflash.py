"""Trains DFlash (2602.06036) on random blocks of the target's text, all blocks of a batch in one pass.

A block begins at an anchor a, a token whose next one is supervised. Its slot k reads a mask token at position a + k,
sees the target's hidden states at positions before a, and learns token a + k. The bias by the token before reads the
text's own token a + k - 1.

Shape suffixes: B rows, T positions, M blocks of a row, L tokens of a block, K = L - 1 drafted, A blocks of the batch, N
slots, Q = M L, D hidden width, V vocabulary, W tokens of the shortlist.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from data.batches import Batch, Example
from draftsmith import Target
from draftsmith.drafters.dflash import Config, Drafter
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
from draftsmith.parts.neural.shortlist import check_size
from trainers import Metrics, Needs
from trainers.corpora import corpus
from trainers.parts.losses import (
    DIVERGENCES,
    Teacher,
    acceptance,
    cross_entropy,
    divergence,
    map_in_chunks,
    on_shortlist,
    outcome_log_probs,
    sum_in_chunks,
)
from trainers.parts.parallel.anchors import draw_anchors
from trainers.parts.parallel.block_attention import block_attention
from trainers.parts.parallel.unused_token import unused_token

NUM_FUSED = 3
"""Least number of hidden layers that are fused by default."""
NUM_RANDOM = 64
"""Number of random outputs by which the final norm's first scales are chosen."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The layers, the blocks that they learn on, and the loss."""

    layers: tuple[int, ...] = ()
    """Hidden layers of the target that are fused; empty for as many as `num_layers`, at least three, evenly spaced."""
    num_heads: int = 4
    """Number of attention heads."""
    num_kv_heads: int = 0
    """Number of key-value heads, 0 for as many as attention heads."""
    ffn_size: int = 0
    """Width of the feed-forward layers, 0 for 8/3 of the target's width."""
    mask_token: int = -1
    """The token that stands for those to be drafted; -1 chooses one that is in no text."""
    config: Config = field(
        default=Config(
            layers=(0,), mask_token=0, num_layers=2, num_heads=1, num_kv_heads=1, head_width=1, inner_width=1
        ),
        metadata={
            # Shapes that depend on the target are set in `build`; the rest is for published drafters.
            "omit": (
                *("layers", "mask_token", "num_heads", "num_kv_heads", "head_width", "inner_width"),
                *("theta", "stretch", "eps"),
            ),
            "flags": {"num_nodes": "tree_nodes"},
        },
    )
    num_anchors: int = 16
    """Number of blocks per row and step, each at a random supervised token."""
    loss: str = field(default="ce", metadata={"choices": ["ce", *DIVERGENCES]})
    """Cross-entropy on the text (ce), or a divergence from the target's distribution at each of its tokens."""
    weights: str = field(default="dpace", metadata={"choices": ["dpace", "decay"]})
    """Weights of a block's slots: by how likely drafts reach them (D-PACE), or exp(-(k - 1) / decay) for slot k."""
    decay: float = 4.0
    """Number of tokens after which those weights are divided by e; published: 7, 5 and 4 for blocks of 16, 10 and 8."""
    text_steps: int = 0
    """Number of first steps that train from text alone by cross-entropy, without running the target: the embedding
    stands for the lowest fused layer, and the others' weights begin at zero (speculators, RFC 1127)."""

    def __post_init__(self) -> None:
        check_hidden_layers(self, "layers")
        check_at_least(self, 1, "num_heads", most=MAX_DEPTH)
        check_at_least(self, 0, "num_kv_heads", most=MAX_DEPTH)
        check_head_groups(self)
        check_at_least(self, 0, "ffn_size", most=MAX_WIDTH)
        check_at_least(self, -1, "mask_token")
        check_at_least(self, 1, "num_anchors", most=2**16)
        check_at_least(self, 0, "text_steps")
        check_positive(self, "decay")


def check(settings: Settings, target: TargetInfo) -> None:
    """Raises ValueError for layers or tokens that the target does not have, from its folder alone."""
    if target.is_encoder_decoder:
        raise ValueError(f"target {target.name} is an encoder-decoder; DFlash needs a causal target")
    if max(settings.layers, default=0) > target.num_layers:
        raise ValueError(f"layers is {list(settings.layers)}; {target.name} has hidden layers 0 to {target.num_layers}")
    if settings.mask_token >= target.vocab_size:
        raise ValueError(f"mask_token is {settings.mask_token}; {target.name} has {target.vocab_size} tokens")
    if target.hidden_size % (2 * settings.num_heads):
        raise ValueError(f"num_heads is {settings.num_heads}; twice that must divide the width {target.hidden_size}")
    check_size(settings.config.shortlist, target.vocab_size)


@torch.no_grad()
def build(settings: Settings, target: Target) -> Drafter:
    """Returns new layers, whose final norm has the scales of the target's, which its LM head expects, but for a factor.

    With it, logits of random outputs have a standard deviation of one at most. Larger ones are wrong by so much that
    the first steps would only undo them.
    """
    width = target.hidden_size
    config = dataclasses.replace(
        settings.config,
        layers=_layers(settings, target.num_layers),
        mask_token=unused_token(target) if settings.mask_token < 0 else settings.mask_token,
        num_heads=settings.num_heads,
        num_kv_heads=settings.num_kv_heads or settings.num_heads,
        head_width=width // settings.num_heads,
        inner_width=settings.ffn_size or ffn_width(width),
    )
    drafter = Drafter(config, target).float()
    # Of alternating signs, a norm of either kind returns its scales.
    signs_D = 1.0 - 2.0 * (torch.arange(width, device=target.device) % 2)
    drafter.norm.weight.copy_(target.norm(signs_D.to(target.dtype)[None, None])[0, 0].float() * signs_D)
    random_ND = torch.randn(NUM_RANDOM, width, generator=torch.Generator().manual_seed(0)).to(target.device)
    logits_NV = target.head((random_ND * drafter.norm.weight).to(target.dtype)[None])[0]
    drafter.norm.weight.div_(logits_NV.float().std(-1).mean().clamp(min=1))
    if settings.text_steps:
        # So that the first step with hidden states begins with what the text has taught.
        drafter.fusion.weight[:, width:] = 0
    return drafter


def _layers(settings: Settings, num_layers: int) -> tuple[int, ...]:
    return settings.layers or default_layers(num_layers, max(settings.config.num_layers, NUM_FUSED))


def default_layers(num_layers: int, num_fused: int) -> tuple[int, ...]:
    """Returns the published choice, evenly spaced from the output of the second block to that of the fourth last."""
    last = max(num_layers - 2, 2)
    if num_fused == 1:
        return (num_layers // 2 + 1,)
    spaced = {2 + round(index * (last - 2) / (num_fused - 1)) for index in range(num_fused)}
    return tuple(sorted({min(layer, num_layers) for layer in spaced}))


def prepare(drafter: Drafter, settings: Settings, target: Target, rows: Sequence[Example]) -> None:
    """Fills the shortlist."""
    corpus.fill_shortlist(drafter.shared_head.shortlist, rows)


def needs(settings: Settings, target: Target) -> Needs:
    """Returns the fused layers, and for a divergence the last one."""
    last = () if settings.loss == "ce" else (target.num_layers,)
    return Needs(layers=tuple(sorted({*_layers(settings, target.num_layers), *last})))


def first_steps(settings: Settings) -> tuple[str, int]:
    """Returns the number of steps from text alone, after the setting's name."""
    return "text_steps", settings.text_steps


def step_needs(settings: Settings, target: Target, step: int) -> Needs:
    """Returns nothing for the steps that train from text alone."""
    return Needs() if step < settings.text_steps else needs(settings, target)


def begin_step(drafter: Drafter, settings: Settings, step: int, num_steps: int) -> None:
    """Sets what the step's anchors are drawn by, beside the rows' keys, and whether it trains from text alone."""
    drafter.step_salt, drafter.reads_text = str(step), step < settings.text_steps


def loss(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> tuple[Tensor, Metrics]:
    """Returns the sum over rows of (number of supervised tokens) * (weighted mean loss of the row's supervised slots).

    So tokens count about once, whatever the number of blocks. With a shortlist a divergence is between distributions
    over its tokens, and other labels of cross-entropy do not count. The confidence's loss is added: its cross-entropy
    with each token's acceptance 1 - TV, or under "ce" with the probability given to the text's token, which is 0 off
    the shortlist.
    """
    shortlist, is_ce = drafter.shared_head.shortlist, settings.loss == "ce" or drafter.reads_text
    blocks = select_blocks(drafter, batch, settings.num_anchors, drafter.step_salt, reads_text=drafter.reads_text)
    mask_AK = blocks.mask_AK & shortlist.contains(blocks.labels_AK) if is_ce else blocks.mask_AK
    a_listed_token = 0 if shortlist.is_whole else int(shortlist.ids_W[0])
    labels_AK = shortlist.indices(blocks.labels_AK.masked_fill(~mask_AK, a_listed_token))
    inputs = [blocks.z_AKD, blocks.previous_AK, labels_AK, mask_AK, blocks.mask_AK, blocks.weight_A]
    if not is_ce:
        inputs.append(batch.hidden[target.num_layers][blocks.rows_A[:, None], blocks.before_AK])

    def compare(
        z_AKD: Tensor,
        previous_AK: Tensor,
        labels_AK: Tensor,
        mask_AK: Tensor,
        supervised_AK: Tensor,
        weight_A: Tensor,
        *theirs: Tensor,
    ) -> Tensor:
        logits_NW, shape = drafter.logits(z_AKD, previous_AK).flatten(0, 1), mask_AK.shape
        if is_ce:
            losses_AK = cross_entropy(logits_NW, labels_AK.flatten()).view(shape)
            reached_AK = torch.exp(-losses_AK.detach())
        else:
            with torch.no_grad():
                teacher = Teacher(logits=target.logits(theirs[0].flatten(0, 1)[None])[0])
            compared = on_shortlist(logits_NW, teacher, shortlist)
            losses_AK = divergence(settings.loss)(*compared).view(shape)
            with torch.no_grad():
                reached_AK = acceptance(*outcome_log_probs(*compared)).view(shape)
        weights_AK = dpace_weights(reached_AK) if settings.weights == "dpace" else decaying_weights(settings, shape)
        weights_AK = weights_AK.to(losses_AK)
        weighted_A = (losses_AK * weights_AK * mask_AK).sum(1) * weight_A
        found = [losses_AK * mask_AK, mask_AK.to(losses_AK)]
        if drafter.confidence is not None:
            errors_AK = functional.binary_cross_entropy_with_logits(
                drafter.confidence_logits(z_AKD, previous_AK).float(),
                reached_AK * mask_AK,
                reduction="none",
            )
            weighted_A = weighted_A + (errors_AK * weights_AK * supervised_AK).sum(1) * weight_A
            found += [errors_AK * supervised_AK, supervised_AK.to(losses_AK)]
        return torch.cat([weighted_A[:, None], *found], dim=1)

    num_draft = drafter.config.num_draft
    sums, _ = sum_in_chunks(compare, *inputs, vocab_size=len(shortlist) * num_draft)
    total, losses_K, counts_K, *errors = sums.split([1, *([num_draft] * ((len(sums) - 1) // num_draft))])
    counts = [int(count) for count in counts_K.tolist()]
    metrics = {f"slot{k}_loss": (losses_K[k].detach(), count) for k, count in enumerate(counts) if count}
    if errors and (num_errors := int(errors[1].sum())):
        metrics["confidence_loss"] = (errors[0].sum().detach(), num_errors)
    return total[0], metrics


def dpace_weights(reached_AK: Tensor) -> Tensor:
    """Returns D-PACE's weights [A, K]: slot j's is the sum over m >= j of the product of s_i over i <= m.

    With s_i = (1 + q_i) / 2 for the probability q_i that slot i's token is right, `reached_AK`. It is the expected
    length of a draft's accepted part from slot j on (speculators, RFC 979).
    """
    products_AK = (0.5 * reached_AK + 0.5).cumprod(1)
    return products_AK.flip(1).cumsum(1).flip(1)


def decaying_weights(settings: Settings, shape: torch.Size) -> Tensor:
    """Returns exp(-(k - 1) / decay) for the drafted tokens k = 1, 2, ... of each block [A, K]."""
    return torch.exp(-torch.arange(shape[1]) / settings.decay).expand(shape)


def evaluate(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> Metrics:
    """Returns each slot's top-1 accuracy and, as acceptance, the number of correct slots before the first wrong one.

    The latter over blocks that are supervised as a whole; with greedy text it is the number of accepted tokens. Of a
    confidence it returns the mean squared error against whether the slot is correct.
    """
    return slot_metrics(drafter, batch, settings.num_anchors)


def slot_metrics(drafter: Drafter, batch: Batch, num_anchors: int) -> Metrics:
    """Returns the metrics of `evaluate` on `num_anchors` blocks of each row."""
    blocks = select_blocks(drafter, batch, num_anchors, "held out")

    def is_right(z_AKD: Tensor, previous_AK: Tensor, labels_AK: Tensor) -> Tensor:
        return shortlist.tokens(drafter.logits(z_AKD, previous_AK).argmax(-1)) == labels_AK

    shortlist = drafter.shared_head.shortlist
    inputs, num_logits = (blocks.z_AKD, blocks.previous_AK, blocks.labels_AK), len(shortlist) * drafter.config.num_draft
    right_AK = map_in_chunks(is_right, *inputs, vocab_size=num_logits) & blocks.mask_AK
    is_whole_A = blocks.mask_AK.all(1)
    run_A = right_AK.long().cumprod(1).sum(1) * is_whole_A
    metrics = {
        f"slot{k}_accuracy": (right_AK[:, k].sum(), int(blocks.mask_AK[:, k].sum())) for k in range(right_AK.shape[1])
    }
    if drafter.confidence is not None:
        confidence_AK = drafter.confidence_logits(blocks.z_AKD, blocks.previous_AK).float().sigmoid()
        errors_AK = (confidence_AK - right_AK.float()).square() * blocks.mask_AK
        metrics["confidence_error"] = (errors_AK.sum(), int(blocks.mask_AK.sum()))
    return {"acceptance": (run_A.sum(), int(is_whole_A.sum())), **metrics}


@dataclass(frozen=True, kw_only=True, eq=False)
class Blocks:
    """The outputs and labels of a batch's blocks."""

    rows_A: Tensor
    """Row of the batch."""
    z_AKD: Tensor
    """Inputs of the LM head at the slots of drafted tokens."""
    previous_AK: Tensor
    """The tokens of the text before them."""
    labels_AK: Tensor
    """The tokens of the text there."""
    before_AK: Tensor
    """The positions before them."""
    mask_AK: Tensor
    """True where the label is supervised."""
    weight_A: Tensor
    """Number of the row's supervised tokens per supervised slot."""


def select_blocks(drafter: Drafter, batch: Batch, num_anchors: int, salt: str, *, reads_text: bool = False) -> Blocks:
    """Runs at most `num_anchors` blocks of each row, drawn by the row's key and `salt`."""
    anchors_BM, is_block_BM = draw_anchors(batch, num_anchors, salt)
    states_BTD = text_states(drafter, batch) if reads_text else drafter.fuse(drafter.join(batch.hidden))
    normed_BMLD = run_blocks(drafter, batch, anchors_BM, states_BTD)
    last = batch.tokens_BT.shape[1] - 1
    order_K = torch.arange(1, drafter.config.block_size, device=anchors_BM.device)
    ahead_BMK = anchors_BM[..., None] + order_K
    rows_B11 = torch.arange(len(anchors_BM), device=anchors_BM.device)[:, None, None]
    at_BMK = ahead_BMK.clamp(max=last)
    mask_BMK = batch.loss_mask_BT[rows_B11, at_BMK] & (ahead_BMK <= last) & is_block_BM[..., None]
    num_tokens_B, num_slots_B = batch.loss_mask_BT[:, 1:].sum(1), mask_BMK.sum((1, 2))
    weight_BM = (num_tokens_B / num_slots_B.clamp(min=1))[:, None].expand_as(anchors_BM)
    return Blocks(
        rows_A=rows_B11[..., 0].expand_as(anchors_BM)[is_block_BM],
        z_AKD=normed_BMLD[:, :, 1:][is_block_BM],
        previous_AK=batch.tokens_BT[rows_B11, at_BMK - 1][is_block_BM],
        labels_AK=batch.tokens_BT[rows_B11, at_BMK][is_block_BM],
        before_AK=at_BMK[is_block_BM] - 1,
        mask_AK=mask_BMK[is_block_BM],
        weight_A=weight_BM[is_block_BM],
    )


def text_states(drafter: Drafter, batch: Batch) -> Tensor:
    """Returns what the fusion gives if the lowest fused layer is the embedding, and the others are zero [B, T, D]."""
    embedded_BTD = drafter.target.model.get_input_embeddings()(batch.tokens_BT).detach()
    weight_DD = drafter.fusion.weight[:, : embedded_BTD.shape[-1]]
    return drafter.fusion_norm(functional.linear(embedded_BTD, weight_DD))


def run_blocks(drafter: Drafter, batch: Batch, anchors_BM: Tensor, states_BTD: Tensor) -> Tensor:
    """Returns the normed outputs [B, M, L, D] of the blocks that begin at these positions, of a text's fused states."""
    (num_rows, num_blocks), size = anchors_BM.shape, drafter.config.block_size
    device = anchors_BM.device
    tokens_BM1 = batch.tokens_BT.gather(1, anchors_BM)[..., None]
    tokens_BQ = functional.pad(tokens_BM1, (0, size - 1), value=drafter.config.mask_token).flatten(1)
    positions_BQ = (anchors_BM[..., None] + torch.arange(size, device=device)).flatten(1)
    order_1T = torch.arange(batch.tokens_BT.shape[1], device=device)[None]

    def attend(number: int, attention: Attention, x_BQD: Tensor) -> Tensor:
        query_BHQD, *blocks = attention.project(x_BQD, positions_BQ)
        text = attention.keys_and_values(states_BTD, order_1T)
        return attention.output(block_attention(query_BHQD, text, (blocks[0], blocks[1]), anchors_BM))

    return drafter(tokens_BQ, attend).view(num_rows, num_blocks, size, -1)
