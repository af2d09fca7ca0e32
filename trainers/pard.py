"""Trains PARD (2504.18583) from text: masks after random positions of it, all of a batch in one forward of the model.

A chain begins at an anchor a, a token whose next one is supervised. Its mask i = 1, 2, ... has position a + i, sees the
text up to a, the chain's masks before it and itself, and learns token a + i + 1. Of a row's chains the fraction
max(share^i, least_share) have a mask i, among them all those that have a mask i + 1. The text itself is supervised too,
so that the model also drafts token by token.

PARD-2 (2605.08632) gives the model features of the target (`--features`), which are left out of some rows so that it
also drafts without them, and weights a mask by the target's probability of the chain's tokens before (`--loss pard2`).

Shape suffixes: B rows, T positions of the text, M masks of a row, S = T + M, N supervised positions, A chains,
K drafted tokens, D hidden width, V vocabulary.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from data.batches import Batch
from draftsmith import Target
from draftsmith.artifacts import artifact
from draftsmith.artifacts.artifact import check_fits, read_manifest
from draftsmith.core.sampling import hashed_seed
from draftsmith.core.tree import chain
from draftsmith.drafters.pard import Config, Drafter
from draftsmith.loading.model_info import TargetInfo
from draftsmith.parts.checks import MAX_DEPTH, check_at_least, check_below_one, check_positive
from trainers import Metrics, Needs, distill
from trainers.parts import composites, on_policy
from trainers.parts.losses import (
    DIVERGENCES,
    Teacher,
    cross_entropy,
    divergence,
    map_in_chunks,
    on_shortlist,
    sum_in_chunks,
)
from trainers.parts.parallel.anchors import draw_anchors
from trainers.parts.parallel.unused_token import unused_token

DRAFT_LM = "lm"
"""The family whose drafters are continued."""
PARD2, PARD2_CE_WEIGHT = "pard2", 0.1
"""PARD-2's loss, and the weight of cross-entropy in it."""
WITHOUT_FEATURES = "acceptance_without_features"
"""Metric of a model with features, run without them."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The model that is continued, its masks, and the loss."""

    parts: tuple[str, ...] = ()
    """Folder of the draft LM's artifact to continue (family lm); empty for the target's first `num_layers` layers."""
    num_layers: int = 1
    """Number of the target's layers to copy."""
    mask_token: int = -1
    """The token that stands for those to be drafted; -1 chooses one that is in no text."""
    config: Config = field(
        default=Config(model={}, mask_token=0),
        metadata={"omit": ("model", "mask_token", "rank", "shortlist"), "flags": {"num_nodes": "tree_nodes"}},
    )
    share: float = 0.7
    """Fraction of the chains with a mask i that also have a mask i + 1."""
    least_share: float = 0.2
    """Least fraction of all chains that have a mask i."""
    loss: str = field(default="ce", metadata={"choices": ["ce", *DIVERGENCES, PARD2]})
    """Cross-entropy on the text (ce); a divergence from the target's distribution at each of its tokens; or PARD-2's:
    0.1 cross-entropy + forward_kl, each mask weighted by the target's probability of the chain's tokens before it."""
    feature_dropout: float = 0.1
    """Fraction of the rows, chosen again at each step, that are trained without features."""
    num_anchors: int = 16
    """Number of whole chains per held-out row that it is evaluated on."""

    def __post_init__(self) -> None:
        if len(self.parts) > 1:
            raise ValueError(f"parts names {len(self.parts)} artifacts; it must name one draft LM at most")
        check_at_least(self, 1, "num_layers", most=MAX_DEPTH)
        check_at_least(self, -1, "mask_token")
        check_at_least(self, 1, "num_anchors", most=2**16)
        check_positive(self, "share", "least_share", most=1)
        check_below_one(self, "feature_dropout")


prior_train_s = composites.prior_train_s


def check(settings: Settings, target: TargetInfo) -> None:
    """Raises ValueError for an artifact of another family or target, and for settings that do not fit the target."""
    if target.is_encoder_decoder:
        raise ValueError(f"target {target.name} is an encoder-decoder; PARD needs a causal target")
    if settings.mask_token >= target.vocab_size:
        raise ValueError(f"mask_token is {settings.mask_token}; {target.name} has {target.vocab_size} tokens")
    if max(settings.config.features, default=0) > target.num_layers:
        raise ValueError(
            f"features is {list(settings.config.features)}; {target.name} has hidden layers 0 to {target.num_layers}"
        )
    if not settings.parts and settings.num_layers > target.num_layers:
        raise ValueError(f"num_layers is {settings.num_layers}; {target.name} has {target.num_layers} layers to copy")
    for path in settings.parts:
        manifest = read_manifest(path)
        if manifest["family"] != DRAFT_LM:
            raise ValueError(
                f"--parts {path} is of family {manifest['family']!r}; PARD continues a draft LM, of family {DRAFT_LM!r}"
            )
        check_fits(path, manifest, target)
        if manifest["config"].get("quantised"):
            raise ValueError(f"--parts {path} is quantised and cannot be trained; name the artifact before quantising")


def build(settings: Settings, target: Target) -> Drafter:
    """Returns the draft LM as a drafter in float32; raises ValueError for a model that masks cannot be trained in."""
    if settings.parts:
        given = artifact.load(settings.parts[0], target)
    else:
        cut = distill.Settings(start="layers", num_layers=settings.num_layers)
        given = distill.build(cut, target)
    config = dataclasses.replace(
        settings.config,
        model=given.config.model,
        rank=given.config.rank,
        shortlist=given.config.shortlist,
        mask_token=unused_token(target) if settings.mask_token < 0 else settings.mask_token,
    )
    drafter = Drafter(config, target)
    drafter.model.load_state_dict(given.model.state_dict())
    drafter = drafter.float()
    _check_masks(drafter)
    return drafter


def needs(settings: Settings, target: Target) -> Needs:
    """Returns the features' hidden layers, and for every loss but cross-entropy the last one."""
    last = () if settings.loss == "ce" else (target.num_layers,)
    return Needs(layers=tuple(sorted({*settings.config.features, *last})))


def begin_step(drafter: Drafter, settings: Settings, step: int, num_steps: int) -> None:
    """Sets what the step's chains are drawn by, beside the rows' keys."""
    drafter.step_salt = str(step)


def loss(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> tuple[Tensor, Metrics]:
    """Returns the sum over rows of (number of supervised tokens) * (mean loss of the text and of the row's masks).

    With a shortlist, other labels of cross-entropy do not count, and a divergence is between distributions over it.
    """
    masks = draw_masks(batch, settings, drafter.config.num_draft, drafter.step_salt)
    without = on_policy.select_rows(settings.feature_dropout, batch, f"{drafter.step_salt}:features")
    features_BSD = run_masks(drafter, batch, masks, added_features(drafter, batch, masks, without))
    num_text, last = batch.tokens_BT.shape[1], batch.tokens_BT.shape[1] - 1
    order_T = torch.arange(num_text, device=masks.anchors_BM.device).expand(len(masks.anchors_BM), -1)
    positions_BS = torch.cat([order_T, masks.anchors_BM + masks.depths_BM], dim=1)
    labelled_BS = torch.cat([torch.ones_like(order_T, dtype=torch.bool), masks.is_used_BM], dim=1)
    ahead_BS = (positions_BS + 1).clamp(max=last)
    rows_B1 = torch.arange(len(positions_BS), device=positions_BS.device)[:, None]
    mask_BS = labelled_BS & (positions_BS < last) & batch.loss_mask_BT[rows_B1, ahead_BS]
    depths_BS = torch.cat([torch.zeros_like(order_T), masks.depths_BM], dim=1)
    shortlist, labels_BS = drafter.shortlist, batch.tokens_BT[rows_B1, ahead_BS]
    weight_BS = torch.ones_like(mask_BS, dtype=torch.float32)
    if settings.loss == PARD2:
        weight_BS = torch.cat([weight_BS[:, :num_text], chain_probs(batch, masks, target)], dim=1)
    total_B1 = (mask_BS * weight_BS).sum(1, keepdim=True).clamp(min=torch.finfo(weight_BS.dtype).tiny)
    weight_BS = weight_BS * batch.loss_mask_BT[:, 1:].sum(1, keepdim=True) / total_B1
    if settings.loss == "ce":
        mask_BS = mask_BS & shortlist.contains(labels_BS)
    labels_N = labels_BS[mask_BS]
    is_listed_N = shortlist.contains(labels_N)
    a_listed_token = 0 if shortlist.is_whole else int(shortlist.ids_W[0])
    labels_N = shortlist.indices(labels_N.masked_fill(~is_listed_N, a_listed_token))
    inputs = [features_BSD[mask_BS], labels_N, is_listed_N, weight_BS[mask_BS], depths_BS[mask_BS]]
    if settings.loss != "ce":
        inputs.append(batch.hidden[target.num_layers][rows_B1, positions_BS.clamp(max=last)][mask_BS])
    head = _listed_head(drafter)

    def compare(
        features_ND: Tensor, labels_N: Tensor, is_listed_N: Tensor, weight_N: Tensor, depths_N: Tensor, *theirs: Tensor
    ) -> Tensor:
        logits_NW = head(features_ND)
        if settings.loss == "ce":
            losses_N = cross_entropy(logits_NW, labels_N)
        else:
            with torch.no_grad():
                teacher = Teacher(logits=target.logits(theirs[0][None])[0])
            compared = on_shortlist(logits_NW, teacher, shortlist)
            if settings.loss == PARD2:
                losses_N = divergence("forward_kl")(*compared)
                losses_N = losses_N + PARD2_CE_WEIGHT * cross_entropy(logits_NW, labels_N) * is_listed_N
            else:
                losses_N = divergence(settings.loss)(*compared)
        by_depth_NK = functional.one_hot(depths_N, drafter.config.num_draft).to(losses_N)
        return torch.cat([(losses_N * weight_N)[:, None], losses_N[:, None] * by_depth_NK, by_depth_NK], dim=1)

    sums, _ = sum_in_chunks(compare, *inputs, vocab_size=len(shortlist))
    num_draft = drafter.config.num_draft
    total, losses_K, counts_K = sums.split([1, num_draft, num_draft])
    counts = [int(count) for count in counts_K.tolist()]
    return total[0], {f"mask{k}_loss": (losses_K[k].detach(), count) for k, count in enumerate(counts) if count}


def evaluate(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> Metrics:
    """Returns the accuracy after 0, 1, ... masks and, as acceptance, the correct tokens before the first wrong one.

    The latter over chains that are supervised as a whole; with greedy text it is the number of accepted tokens. With
    features also `acceptance_without_features`, the same of the model alone.
    """
    metrics = _chain_metrics(drafter, batch, settings, target, without=())
    if drafter.hidden_layers:
        alone = _chain_metrics(drafter, batch, settings, target, without=range(len(batch.keys)))
        metrics[WITHOUT_FEATURES] = alone["acceptance"]
    return metrics


def _chain_metrics(
    drafter: Drafter, batch: Batch, settings: Settings, target: Target, *, without: Sequence[int]
) -> Metrics:
    num_draft, last = drafter.config.num_draft, batch.tokens_BT.shape[1] - 1
    anchors_BA, is_chain_BA = draw_anchors(batch, settings.num_anchors, "held out")
    depths_K = torch.arange(num_draft, device=anchors_BA.device)
    masks = Masks(
        anchors_BM=anchors_BA.repeat_interleave(num_draft - 1, 1),
        depths_BM=depths_K[1:].repeat(anchors_BA.shape[1]).expand(len(anchors_BA), -1),
        is_used_BM=is_chain_BA.repeat_interleave(num_draft - 1, 1),
    )
    features_BSD = run_masks(drafter, batch, masks, added_features(drafter, batch, masks, without))
    rows_B1 = torch.arange(len(anchors_BA), device=anchors_BA.device)[:, None]
    first_BA1D = features_BSD[rows_B1, anchors_BA][:, :, None]
    rest_BAKD = features_BSD[:, last + 1 :].unflatten(1, (-1, num_draft - 1)) if num_draft > 1 else first_BA1D[:, :, :0]
    features_AKD = torch.cat([first_BA1D, rest_BAKD], dim=2)[is_chain_BA]
    ahead_BAK = anchors_BA[..., None] + 1 + depths_K
    at_BAK = ahead_BAK.clamp(max=last)
    mask_AK = (batch.loss_mask_BT[rows_B1[..., None], at_BAK] & (ahead_BAK <= last))[is_chain_BA]
    labels_AK = batch.tokens_BT[rows_B1[..., None], at_BAK][is_chain_BA]

    def is_right(features_AKD: Tensor, labels_AK: Tensor) -> Tensor:
        return drafter.draft_model.head(features_AKD).argmax(-1) == labels_AK

    num_logits = target.vocab_size * num_draft
    right_AK = map_in_chunks(is_right, features_AKD, labels_AK, vocab_size=num_logits) & mask_AK
    is_whole_A = mask_AK.all(1)
    run_A = right_AK.long().cumprod(1).sum(1) * is_whole_A
    metrics = {f"mask{k}_accuracy": (right_AK[:, k].sum(), int(mask_AK[:, k].sum())) for k in range(num_draft)}
    return {"acceptance": (run_A.sum(), int(is_whole_A.sum())), **metrics}


@dataclass(frozen=True, kw_only=True, eq=False)
class Masks:
    """The masks that follow each row's text."""

    anchors_BM: Tensor
    """The last position of the text that each sees."""
    depths_BM: Tensor
    """Its number in its chain, from 1 on."""
    is_used_BM: Tensor
    """False for those that fill the row up."""


@torch.no_grad()
def chain_probs(batch: Batch, masks: Masks, target: Target) -> Tensor:
    """Returns the target's probability of a chain's tokens before each mask's label, given the text [B, M].

    Mask i of the chain at a is to draft token a + i + 1, and is reached if tokens a + 1 to a + i are accepted
    (2605.08632).
    """
    tokens_BT, num_text = batch.tokens_BT, batch.tokens_BT.shape[1]
    # Chains begin before a supervised token, and may cross others.
    order_T = torch.arange(1, num_text, device=tokens_BT.device)
    is_read_BP = (batch.loss_mask_BT[:, 1:].cumsum(1) > 0) & (order_T < batch.lengths_B[:, None].to(order_T.device))

    def log_prob(hidden_ND: Tensor, labels_N: Tensor) -> Tensor:
        return -cross_entropy(target.logits(hidden_ND[None])[0], labels_N)

    hidden_BTD = batch.hidden[target.num_layers]
    inputs = (hidden_BTD[:, :-1][is_read_BP], tokens_BT[:, 1:][is_read_BP])
    log_BT = torch.zeros(tokens_BT.shape, dtype=torch.float64, device=tokens_BT.device)
    log_BT[:, 1:][is_read_BP] = map_in_chunks(log_prob, *inputs, vocab_size=target.vocab_size).double()
    sums_BT = log_BT.cumsum(1)
    ends_BM = (masks.anchors_BM + masks.depths_BM).clamp(max=num_text - 1)
    return (sums_BT.gather(1, ends_BM) - sums_BT.gather(1, masks.anchors_BM)).exp().float()


def draw_masks(batch: Batch, settings: Settings, num_draft: int, salt: str) -> Masks:
    """Returns the masks of a step; those of a row depend on its key, its mask and `salt` alone.

    Of n chains, in random order, the first ceil(n * max(share^i, least_share)) have a mask i.
    """
    num_anchors = batch.tokens_BT.shape[1]
    anchors_BA, is_chain_BA = (one.cpu() for one in draw_anchors(batch, num_anchors, salt))
    rows = []
    for key, anchors_A, is_chain_A in zip(batch.keys, anchors_BA, is_chain_BA, strict=True):
        found = anchors_A[is_chain_A]
        generator = torch.Generator().manual_seed(hashed_seed(f"{key}:{salt}:depths"))
        found = found[torch.randperm(len(found), generator=generator)]
        kept = [-int(-len(found) * max(settings.share**i, settings.least_share) // 1) for i in range(1, num_draft)]
        pairs = [torch.stack([found[:count], torch.full((count,), i)]) for i, count in enumerate(kept, start=1)]
        rows.append(torch.cat(pairs, dim=1).T if pairs else torch.zeros(0, 2, dtype=torch.long))
    padded_BM2 = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(batch.tokens_BT.device)
    return Masks(anchors_BM=padded_BM2[..., 0], depths_BM=padded_BM2[..., 1], is_used_BM=padded_BM2[..., 1] > 0)


def added_features(drafter: Drafter, batch: Batch, masks: Masks, without: Sequence[int]) -> Tensor | None:
    """Returns what the target's features add at the text's tokens, then at the masks [B, S, D]; None without features.

    Of the rows in `without` it is zero. The product with zero keeps the projection's gradient, which data parallelism
    waits for.
    """
    if not drafter.hidden_layers:
        return None
    text_BTD = functional.pad(drafter.project(batch.hidden)[:, :-1], (0, 0, 1, 0))
    masks_BMD = text_BTD.gather(1, masks.anchors_BM[..., None].expand(-1, -1, text_BTD.shape[-1]))
    kept_B = torch.ones(len(batch.keys), device=text_BTD.device, dtype=text_BTD.dtype)
    kept_B[list(without)] = 0
    return torch.cat([text_BTD, masks_BMD], dim=1) * kept_B[:, None, None]


def run_masks(drafter: Drafter, batch: Batch, masks: Masks, added_BSD: Tensor | None = None) -> Tensor:
    """Returns the model's last normed hidden states [B, S, D] at the text's tokens, then at the masks.

    `added_BSD` is what `added_features` returns.
    """
    anchors_BM, depths_BM = masks.anchors_BM, masks.depths_BM
    num_text, device = batch.tokens_BT.shape[1], anchors_BM.device
    order_T = torch.arange(num_text, device=device)
    mask_tokens_BM = torch.full_like(anchors_BM, drafter.config.mask_token)
    positions_BM = (anchors_BM + depths_BM).clamp(max=drafter.draft_model.context_length - 1)
    seen_by_text_TT = order_T <= order_T[:, None]
    is_own_BMM = (anchors_BM[:, None] == anchors_BM[..., None]) & (depths_BM[:, None] <= depths_BM[..., None])
    is_own_BMM &= masks.is_used_BM[:, None]
    # One that fills the row up sees itself, because attention to nothing is undefined.
    is_own_BMM |= torch.eye(anchors_BM.shape[1], dtype=torch.bool, device=device)
    seen_BMS = torch.cat([order_T <= anchors_BM[..., None], is_own_BMM], dim=2)
    text_BTS = torch.nn.functional.pad(seen_by_text_TT, (0, anchors_BM.shape[1])).expand(len(anchors_BM), -1, -1)
    with drafter.adding(added_BSD):
        return _decoder(
            drafter,
            torch.cat([batch.tokens_BT, mask_tokens_BM], dim=1),
            torch.cat([order_T.expand(len(anchors_BM), -1), positions_BM], dim=1),
            torch.cat([text_BTS, seen_BMS], dim=1)[:, None],
        )


def _decoder(drafter: Drafter, tokens_BS: Tensor, positions_BS: Tensor, seen_B1SS: Tensor) -> Tensor:
    """Runs the model's own modules, because DeepSpeed does not hook weight-sharing copies of them."""
    dtype = drafter.model.dtype
    added_B1SS = torch.zeros(seen_B1SS.shape, dtype=dtype, device=seen_B1SS.device)
    added_B1SS.masked_fill_(~seen_B1SS, torch.finfo(dtype).min)
    given: dict[str, Any] = {"input_ids": tokens_BS, "position_ids": positions_BS, "use_cache": False}
    return drafter.model.get_decoder()(**given, attention_mask=added_B1SS).last_hidden_state


def _listed_head(drafter: Drafter) -> Any:
    """Returns the map from features to the logits of the shortlist's tokens, or of all tokens."""
    if drafter.shortlist.is_whole:
        return lambda features_ND: drafter.draft_model.head(features_ND[None])[0]
    return drafter.model.get_output_embeddings().listed


@torch.no_grad()
def _check_masks(drafter: Drafter) -> None:
    """Raises ValueError unless the model honours masks and positions that are given to it.

    Chains after the first and the third token of a text of four must have the states of texts that end there.
    """
    model = drafter.draft_model
    kind, device = type(drafter.model).__name__, model.device
    if "sliding_attention" in (getattr(drafter.model.config, "layer_types", None) or ()):
        raise ValueError(
            f"{kind} has layers that see a window of the text; PARD is trained on layers that see all of it"
        )
    tokens_1T = (torch.arange(4, device=device) * 7 % drafter.target.vocab_size)[None]
    anchors_1M = torch.tensor([[0, 0, 2]], device=device)
    masks = Masks(anchors_BM=anchors_1M, depths_BM=torch.tensor([[1, 2, 1]], device=device), is_used_BM=anchors_1M >= 0)
    batch = Batch(
        tokens_BT=tokens_1T, loss_mask_BT=tokens_1T >= 0, lengths_B=torch.tensor([4], device=device), keys=("check",)
    )
    try:
        found_1SD = run_masks(drafter, batch, masks)
    except TypeError as error:  # a decoder that takes no positions
        raise ValueError(f"{kind} takes no positions ({error}); PARD cannot be trained with it") from None
    for anchor, num_masks, index in ((0, 2, 5), (2, 1, 6)):
        alone_1T = torch.nn.functional.pad(tokens_1T[:, : anchor + 1], (0, num_masks), value=drafter.config.mask_token)
        alone_1TD = model.forward(alone_1T, chain(alone_1T.shape[1], device), model.new_cache(1)).hidden_BND
        expected_D = model.norm(alone_1TD)[0, -1]
        if not torch.allclose(found_1SD[0, index], expected_D, rtol=1e-3, atol=1e-3 * float(expected_D.abs().max())):
            raise ValueError(f"{kind} does not attend by a given mask; PARD cannot be trained with it")
