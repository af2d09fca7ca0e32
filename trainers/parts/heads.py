"""Shared code of trainers of token heads: labels, loss, metrics, and the choice of the draft tree.

Heads are numbered by k, from 0; head k at position t predicts token t + 2 + k.

Shape suffixes: B rows, T positions, N supervised positions of one head, D hidden width, V vocabulary, K heads, R ranks.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from data.batches import Batch
from draftsmith import Target
from draftsmith.length.costs import SIZES, quickest_ms, verify_ms
from draftsmith.parts.neural.shortlist import Shortlist
from trainers import Metrics
from trainers.parts import trees
from trainers.parts.fused.linear_cross_entropy import Matrix
from trainers.parts.losses import sum_label_losses

NUM_RANKS = 10
CHUNK_SIZE = 1024
Head = Callable[[int, Tensor], Tensor]
"""(k, features [B, T, D]) -> head k's logits [B, T, V]."""


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadOutputs:
    """Features and labels of one head at its supervised positions in a batch."""

    z_ND: Tensor
    """Features before the output matrix."""
    labels_N: Tensor
    """Tokens to be predicted."""
    mask_BT: Tensor
    """True at these positions of the batch."""


def shift_left(values_BT: Tensor, offset: int) -> Tensor:
    """Returns at position t the value at t + offset; zeros past the end."""
    return functional.pad(values_BT, (0, offset))[:, offset:]


def label_masks(batch: Batch, num_heads: int) -> list[Tensor]:
    """Returns for each head a mask [B, T] of the positions whose label is supervised."""
    return [shift_left(batch.loss_mask_BT, 2 + k) for k in range(num_heads)]


def head_outputs(
    features: Callable[[Tensor], Iterable[Tensor]], normed_BTD: Tensor, batch: Batch, num_heads: int
) -> Iterator[HeadOutputs]:
    """Yields the outputs of each head; `features` maps normed states [1, T, D] to all heads' features [1, T, D]."""
    masks_BT = label_masks(batch, num_heads)
    any_BT = torch.stack(masks_BT).any(0)
    for k, (z_1TD, mask_BT) in enumerate(zip(features(normed_BTD[any_BT][None]), masks_BT, strict=True)):
        labels_N = shift_left(batch.tokens_BT, 2 + k)[mask_BT]
        yield HeadOutputs(z_ND=z_1TD[0][mask_BT[any_BT]], labels_N=labels_N, mask_BT=mask_BT)


def on_shortlist(output: HeadOutputs, shortlist: Shortlist) -> tuple[Tensor, Tensor]:
    """Returns features and labels at positions whose label is on the shortlist, as indices on it."""
    if shortlist.is_whole:
        return output.z_ND, output.labels_N
    is_listed_N = shortlist.contains(output.labels_N)
    return output.z_ND[is_listed_N], shortlist.indices(output.labels_N[is_listed_N])


def loss(
    outputs: Iterable[HeadOutputs],
    head: Head,
    *,
    decay: float,
    vocab_size: int,
    shortlist: Shortlist | None = None,
    matrix: Callable[[int], Matrix | None] = lambda _: None,
) -> tuple[Tensor, Metrics]:
    """Returns the sum over heads k and positions t of decay^(k + 1) CE(head k at t, token t + 2 + k).

    With a shortlist, `head` returns its tokens' logits, and other labels do not count: they cannot be drafted.
    `matrix` returns the matrix that head k multiplies features with, None if it is no matrix product.
    """
    losses, metrics = [], {}
    for k, output in enumerate(outputs):
        z_ND, labels_N = on_shortlist(output, shortlist) if shortlist is not None else (output.z_ND, output.labels_N)
        logits = partial(_logits, head, k)
        head_loss, count = sum_label_losses(logits, matrix(k), z_ND, labels_N, vocab_size=vocab_size)
        losses.append(decay ** (k + 1) * head_loss)
        metrics[f"head{k}_loss"] = (head_loss.detach(), count)
    return torch.stack(losses).sum(), metrics


def _logits(head: Head, k: int, z_ND: Tensor) -> Tensor:
    return head(k, z_ND[None])[0]


def label_ranks(outputs: Iterable[HeadOutputs], head: Head, batch: Batch) -> Tensor:
    """Returns the rank [K, B, T], from 0, of the label in each head's logits, -1 where nothing is supervised."""
    head_ranks = []
    for k, output in enumerate(outputs):
        ranks = []
        for z_ND, labels_N in zip(output.z_ND.split(CHUNK_SIZE), output.labels_N.split(CHUNK_SIZE), strict=True):
            logits_NV = head(k, z_ND[None])[0]
            # Negated, so that a label whose logit is NaN has the last rank.
            ranks.append((~(logits_NV <= logits_NV.gather(1, labels_N[:, None]))).sum(1))
        ranks_BT = torch.full_like(batch.tokens_BT, -1)
        ranks_BT[output.mask_BT] = torch.cat(ranks)
        head_ranks.append(ranks_BT)
    return torch.stack(head_ranks)


def accuracy_metrics(ranks_KBT: Tensor) -> Metrics:
    """Returns each head's top-1 accuracy and, as acceptance, the number of correct heads before the first wrong one."""
    metrics = {}
    for k, ranks_BT in enumerate(ranks_KBT):
        metrics[f"head{k}_accuracy"] = ((ranks_BT == 0).sum(), int((ranks_BT >= 0).sum()))
    run_BT = (ranks_KBT == 0).cumprod(0).sum(0)
    is_whole_BT = (ranks_KBT >= 0).all(0)
    return {"acceptance": (run_BT[is_whole_BT].sum(), int(is_whole_BT.sum())), **metrics}


def top_tokens(features: Iterable[Tensor], head: Head) -> Tensor:
    """Returns each head's most likely tokens [K, T, R] from features [1, T, D], as in drafting, where T = 1."""
    logits_KTV = torch.cat([head(k, z_1TD) for k, z_1TD in enumerate(features)])
    return logits_KTV.topk(NUM_RANKS, dim=-1).indices


def choose_tree(
    batch_ranks: Iterable[Tensor], draft: Callable[[], object], target: Target, num_nodes: int
) -> tuple[trees.NodePath, ...]:
    """Returns the tree for ranks [K, B, T] on held-out text; `draft` computes one draft and is timed.

    With `num_nodes` 0, its size maximises tokens per second at the target's measured cost.
    """
    rows = ranks_by_row(batch_ranks)
    draft_ms = 0.0 if num_nodes else quickest_ms(draft)
    return plan_tree(
        trees.conditional_accuracy(torch.cat(rows), NUM_RANKS), rows, lambda _: draft_ms, target, num_nodes
    )


def plan_tree(
    children: trees.ChildProbs,
    rows: list[Tensor],
    draft_ms: Callable[[tuple[trees.NodePath, ...]], float],
    target: Target,
    num_nodes: int,
) -> tuple[trees.NodePath, ...]:
    """Returns the tree grown from the probabilities `children`, of the size that decodes `rows` (ranks [T, K]) fastest.

    `draft_ms` returns the time to draft a tree; the target's cost is measured. A nonzero `num_nodes` fixes the size.
    """
    nodes = trees.grow(children, num_nodes or SIZES[-1]) or [((0,), 0.0)]
    paths = tuple(path for path, _ in nodes)
    if not num_nodes:
        cost_ms = {size: draft_ms(paths[:size]) + cost for size, cost in verify_ms(target).items()}
        nodes = nodes[: trees.best_size(nodes, rows, cost_ms)]
    print(f"tree of {len(nodes)} nodes: {trees.tokens_per_round(nodes, rows):.2f} tokens per round on held-out text")
    return paths[: len(nodes)]


def ranks_by_row(batch_ranks: Iterable[Tensor]) -> list[Tensor]:
    """Returns each row's ranks [T, K], on the CPU, at positions where the first head's label is supervised."""
    rows = [ranks_TK for ranks_KBT in batch_ranks for ranks_TK in ranks_KBT.permute(1, 2, 0).cpu()]

    return [ranks_TK[ranks_TK[:, 0] >= 0] for ranks_TK in rows]
