"""Hydra's heads on a frozen target (2402.05109, section 3; Hydra++, section 4), and the tree that suits them.

Shape suffixes: B rows, T positions, N supervised positions of one head, I tokens told to it, D hidden width, K heads.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from data.batches import Batch
from draftsmith import Target
from draftsmith.core.drafter import Session
from draftsmith.core.sampling import Sampling
from draftsmith.drafters.hydra import Config, Drafter
from draftsmith.length.costs import quickest_ms
from draftsmith.parts import autoregressive
from draftsmith.parts.neural.layers import ffn_width
from trainers import Metrics, Needs
from trainers.parts import heads, trees
from trainers.parts.losses import DIVERGENCES, Teacher, cross_entropy, divergence, sum_in_chunks


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The heads, their loss, and how they draft."""

    num_heads: int = 4
    """Heads; head k (from 0) predicts the token k + 2 places on, told the k + 1 tokens before it."""
    num_blocks: int = 1
    """Residual blocks a head, each with weights of its own; Hydra++ has 4."""
    own_head: bool = False
    """Give each head an output matrix of its own, started as the target's, instead of sharing the target's."""
    prefix_attention: bool = False
    """Let a decoder block read the hidden states of the whole text for the heads, as in Hydra++."""
    prefix_heads: int = 4
    """Attention heads of that block."""
    prefix_width: int = 0
    """Width of its feed-forward layer, 0 for 8/3 of the target's."""
    loss: str = field(default="forward_kl", metadata={"choices": ["ce", *DIVERGENCES]})
    """Cross-entropy on the text, or a divergence from the target's law before each token."""
    beta: float = 0.5
    """Of the Jensen-Shannon divergence (`jsd`)."""
    dropout: float = 0.0
    """Share of each head's input, and of its features before the output matrix, that is dropped in training."""
    siblings: str = field(default="without_replacement", metadata={"choices": list(autoregressive.SIBLINGS)})
    """How siblings in the tree are drawn where text is sampled; greedily they are the likeliest."""
    tree_nodes: int = 0
    """Nodes in the tree; 0 takes what gives most tokens a second as measured on this machine."""
    width: int = 0
    """If not 0, trees grow where the heads are confident, `width` nodes a level with as many children each."""
    num_nodes: int = 16
    """Nodes kept of such a tree."""

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_blocks", "prefix_heads", "num_nodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("prefix_width", "tree_nodes", "width"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and less than 1")
        if self.width and self.tree_nodes:
            raise ValueError("tree_nodes is for a fixed tree and width for trees that grow: set one of them")
        if self.loss != "ce":
            divergence(self.loss, beta=self.beta)


def build(settings: Settings, target: Target) -> Drafter:
    """Returns heads that pass the state through unchanged, drafting a chain until `finish`."""
    width = settings.prefix_width or ffn_width(target.hidden_size)
    config = Config(
        num_heads=settings.num_heads,
        num_blocks=settings.num_blocks,
        own_head=settings.own_head,
        prefix_heads=settings.prefix_heads if settings.prefix_attention else 0,
        prefix_width=width if settings.prefix_attention else 0,
        tree=() if settings.width else tuple((0,) * depth for depth in range(1, settings.num_heads + 1)),
        siblings=settings.siblings,
        width=settings.width,
        num_nodes=settings.num_nodes,
    )
    drafter = Drafter(config, target).float()
    for module in drafter.modules():
        if isinstance(module, nn.Dropout):
            module.p = settings.dropout
    return drafter


def needs(settings: Settings, target: Target) -> Needs:
    return Needs(layers=(target.num_layers,))


def loss(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> tuple[Tensor, Metrics]:
    """Returns the sum over heads k and positions t of CE(head k at t, token t + 2 + k), or of a divergence.

    That is between head k at t and the target's own law at t + 1 + k, of the same token.
    """
    total, metrics = torch.zeros((), device=batch.tokens_BT.device), {}
    hidden_BTD = batch.hidden[target.num_layers]
    for k, part in enumerate(_parts(drafter, batch)):
        if settings.loss == "ce":
            head_loss, count = sum_in_chunks(
                lambda z, labels, k=k: cross_entropy(drafter.head(k, z[None])[0], labels),
                part.z_ND,
                part.labels_N,
                vocab_size=target.vocab_size,
            )
        else:
            compare = divergence(settings.loss, beta=settings.beta)
            head_loss, count = sum_in_chunks(
                lambda z, theirs, k=k, compare=compare: compare(
                    drafter.head(k, z[None])[0], Teacher(logits=target.logits(theirs[None])[0])
                ),
                part.z_ND,
                hidden_BTD[:, 1 + k :][part.mask_BT[:, : -1 - k]],
                vocab_size=target.vocab_size,
            )
        total = total + head_loss
        metrics[f"head{k}_loss"] = (head_loss.detach(), count)
    return total, metrics


def evaluate(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> Metrics:
    """Returns each head's top-1 accuracy, and as acceptance how many heads are right before the first wrong one.

    Each is told the text's own tokens, as it is on the path of a tree that holds them.
    """
    return heads.accuracy_metrics(_ranks(drafter, batch))


@torch.no_grad()
def finish(drafter: Drafter, settings: Settings, target: Target, held_out: list[Batch]) -> Drafter:
    """Returns the drafter with the tree computed from its ranks on held-out text and measured costs, if it is fixed."""
    if settings.width:
        return drafter
    rows = heads.ranks_by_row(_ranks(drafter, batch) for batch in held_out)
    children = trees.non_increasing(trees.conditional_accuracy(torch.cat(rows), heads.NUM_RANKS))
    session = Session(
        target=target,
        rows=[[0, 0]],
        cache=target.new_cache(1),
        sampling=Sampling(),
        generator=torch.Generator(),
        hidden={target.num_layers: held_out[0].hidden[target.num_layers][:1, :1]},
    )
    drafter.start(session)

    def draft_ms(tree: autoregressive.Paths) -> float:
        return quickest_ms(
            lambda: autoregressive.draft_static_tree(drafter.logits, session, tree, "deterministic", settings.num_heads)
        )

    tree = heads.plan_tree(children, rows, draft_ms, target, settings.tree_nodes)
    finished = Drafter(dataclasses.replace(drafter.config, tree=tree), target)
    finished.load_state_dict(drafter.state_dict())
    return finished.eval()


def _parts(drafter: Drafter, batch: Batch) -> Iterator[heads.HeadOutputs]:
    """Yields each head's features and labels wherever its label is supervised."""
    num_heads, tokens_BT = drafter.config.num_heads, batch.tokens_BT
    states_BTD = drafter.states(batch.hidden[drafter.target.num_layers])
    for k, mask_BT in enumerate(heads.label_masks(batch, num_heads)):
        told_NI = torch.stack([heads.shift_left(tokens_BT, 1 + place)[mask_BT] for place in range(k + 1)], dim=-1)
        z_1ND = drafter.features(states_BTD[mask_BT][None], told_NI[None])
        yield heads.HeadOutputs(z_ND=z_1ND[0], labels_N=heads.shift_left(tokens_BT, 2 + k)[mask_BT], mask_BT=mask_BT)


def _ranks(drafter: Drafter, batch: Batch) -> Tensor:
    return heads.label_ranks(_parts(drafter, batch), drafter.head, batch)
