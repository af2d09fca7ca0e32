"""Medusa-1: heads on a frozen target (2401.10774, section 2.2.1), and the tree that suits them.

Shape suffixes: B rows, T positions, N supervised positions, D hidden width, K heads, R ranks.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from data.batches import Batch
from draftsmith import Target
from draftsmith.drafters.medusa import Config, Drafter
from trainers import Metrics, Needs, trees
from trainers.losses import chunked, cross_entropy

NUM_RANKS = 10


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The heads, their loss, and the size of their tree."""

    num_heads: int = 4
    """Heads; head k (from 0) predicts the token k + 2 places on."""
    num_blocks: int = 1
    """Residual blocks a head, each with weights of its own."""
    own_head: bool = False
    """Give each head an output matrix of its own, started as the target's, instead of sharing the target's."""
    decay: float = 0.8
    """Head k's loss counts `decay` to the power k + 1."""
    tree_nodes: int = 0
    """Nodes in the tree; 0 takes what gives most tokens a second as measured on this machine."""

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.decay > 0:
            raise ValueError(f"decay is {self.decay}; it must be positive")
        if self.tree_nodes < 0:
            raise ValueError(f"tree_nodes is {self.tree_nodes}; it must not be negative")


def build(settings: Settings, target: Target) -> Drafter:
    """Returns heads that pass the target's last hidden state through unchanged, drafting a chain until `finish`."""
    config = Config(
        num_heads=settings.num_heads,
        num_blocks=settings.num_blocks,
        own_head=settings.own_head,
        tree=tuple((0,) * depth for depth in range(1, settings.num_heads + 1)),
    )
    return Drafter(config, target).float()


def needs(settings: Settings, target: Target) -> Needs:
    return Needs(layers=(target.num_layers,))


def loss(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> tuple[Tensor, Metrics]:
    """Returns the sum over heads k and positions t of decay^(k + 1) CE(head k at t, token t + 2 + k)."""
    total, metrics = torch.zeros((), device=batch.tokens_BT.device), {}
    for k, (z_ND, labels_N, _) in enumerate(_heads(drafter, batch)):
        head_loss, count = chunked(
            lambda z, labels, k=k: cross_entropy(drafter.head(k, z[None])[0], labels),
            z_ND,
            labels_N,
            vocab_size=target.vocab_size,
        )
        total = total + settings.decay ** (k + 1) * head_loss
        metrics[f"head{k}_loss"] = (head_loss.detach(), count)
    return total, metrics


def judge(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> Metrics:
    """Returns each head's top-1 accuracy, and as acceptance how many heads are right before the first wrong one."""
    ranks_KBT = _ranks(drafter, batch)
    metrics = {}
    for k, ranks_BT in enumerate(ranks_KBT):
        metrics[f"head{k}_accuracy"] = ((ranks_BT == 0).sum(), int((ranks_BT >= 0).sum()))
    run_BT = (ranks_KBT == 0).cumprod(0).sum(0)
    is_whole_BT = (ranks_KBT >= 0).all(0)
    return {"acceptance": (run_BT[is_whole_BT].sum(), int(is_whole_BT.sum())), **metrics}


@torch.no_grad()
def finish(drafter: Drafter, settings: Settings, target: Target, held_out: list[Batch]) -> Drafter:
    """Returns the drafter with the tree computed from its ranks on held-out text and the target's measured cost."""
    rows = [row_TK for batch in held_out for row_TK in _rows(drafter, batch)]
    nodes = trees.grow(trees.observed(torch.cat(rows), NUM_RANKS), settings.tree_nodes or trees.SIZES[-1])
    if not nodes:
        nodes = [((0,), 0.0)]
    if not settings.tree_nodes:
        hidden_1ND = held_out[0].hidden[target.num_layers][:1, :1]
        draft_ms = trees.quickest_ms(lambda: _guess(drafter, hidden_1ND))
        cost_ms = {size: draft_ms + cost for size, cost in trees.verify_ms(target).items()}
        nodes = nodes[: trees.best_size(nodes, rows, cost_ms)]
    print(f"tree of {len(nodes)} nodes: {trees.tokens_a_round(nodes, rows):.2f} tokens a round on held-out text")
    finished = Drafter(dataclasses.replace(drafter.config, tree=tuple(path for path, _ in nodes)), target)
    finished.load_state_dict(drafter.state_dict())
    return finished.eval()


def _heads(drafter: Drafter, batch: Batch) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields each head's features [N, D] and labels [N] where its label is supervised, and the mask [B, T] of where."""
    normed_BTD = drafter.target.norm(batch.hidden[drafter.target.num_layers])
    offsets = range(2, 2 + drafter.config.num_heads)
    masks = [_ahead(batch.loss_mask_BT, offset) for offset in offsets]
    any_BT = torch.stack(masks).any(0)
    features = drafter.heads(normed_BTD[any_BT][None])
    for z_1ND, mask_BT, offset in zip(features, masks, offsets, strict=True):
        yield z_1ND[0][mask_BT[any_BT]], _ahead(batch.tokens_BT, offset)[mask_BT], mask_BT


def _ahead(values_BT: Tensor, offset: int) -> Tensor:
    """Returns at t what stands at t + offset; zeros past the end."""
    return functional.pad(values_BT, (0, offset))[:, offset:]


def _ranks(drafter: Drafter, batch: Batch) -> Tensor:
    """Returns the place [K, B, T] of the right token among each head's guesses, -1 where nothing is supervised."""
    ranks_KBT = torch.full((drafter.config.num_heads, *batch.tokens_BT.shape), -1, device=batch.tokens_BT.device)
    for k, (z_ND, labels_N, mask_BT) in enumerate(_heads(drafter, batch)):
        parts = []
        for z, labels in zip(z_ND.split(1024), labels_N.split(1024), strict=True):
            logits_NV = drafter.head(k, z[None])[0]
            parts.append((logits_NV > logits_NV.gather(1, labels[:, None])).sum(1))
        ranks_KBT[k][mask_BT] = torch.cat(parts)
    return ranks_KBT


def _rows(drafter: Drafter, batch: Batch) -> list[Tensor]:
    """Returns each row's ranks [T, K], on the host, where at least the first head's token is supervised."""
    ranks_BTK = _ranks(drafter, batch).permute(1, 2, 0).cpu()
    return [ranks_TK[ranks_TK[:, 0] >= 0] for ranks_TK in ranks_BTK]


def _guess(drafter: Drafter, hidden_1ND: Tensor) -> Tensor:
    """Does the work of one draft, to be timed."""
    normed_1ND = drafter.target.norm(hidden_1ND)
    logits = torch.cat([drafter.head(k, z_1ND) for k, z_1ND in enumerate(drafter.heads(normed_1ND))])
    return logits.topk(NUM_RANKS, dim=-1).indices
