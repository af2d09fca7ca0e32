"""Trains Hydra's heads on a frozen target (2402.05109, section 3; Hydra++, section 4), and chooses their draft tree.

Shape suffixes: B rows, T positions, N supervised positions of a head, I tokens that it reads, D hidden width, K heads.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from data.batches import Batch, Example
from draftsmith import Target
from draftsmith.core.drafter import Session
from draftsmith.core.sampling import Sampling
from draftsmith.drafters.hydra import Config, Drafter
from draftsmith.length.costs import quickest_ms
from draftsmith.loading.model_info import TargetInfo
from draftsmith.parts import autoregressive
from draftsmith.parts.checks import MAX_DEPTH, MAX_NODES, MAX_WIDTH, check_at_least, check_below_one
from draftsmith.parts.neural.layers import ffn_width
from draftsmith.parts.neural.shortlist import check_size
from trainers import Metrics, Needs
from trainers.corpora import corpus
from trainers.parts import heads, trees
from trainers.parts.fused.linear_cross_entropy import matrix_of, shared_matrix
from trainers.parts.losses import DIVERGENCES, Teacher, divergence, sum_forward_kl, sum_in_chunks, sum_label_losses


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The heads, their loss, and how drafts are made."""

    config: Config = field(
        default=Config(tree=((0,),)), metadata={"omit": ("prefix_heads", "prefix_width", "tree", "width")}
    )
    prefix_attention: bool = False
    """Let a decoder block read the hidden states of the whole text for the heads, as in Hydra++."""
    prefix_heads: int = 4
    """Number of attention heads of that block."""
    prefix_width: int = 0
    """Width of that block's feed-forward layer, 0 for 8/3 of the target's width."""
    loss: str = field(default="forward_kl", metadata={"choices": ["ce", *DIVERGENCES]})
    """Cross-entropy on the text (ce), or a divergence from the target's distribution of each token."""
    beta: float = 0.5
    """Weight in the Jensen-Shannon divergence (jsd)."""
    dropout: float = 0.0
    """Dropout probability of each head's input, and of its features before the output matrix."""
    tree_nodes: int = 0
    """Number of nodes in the static tree; 0 maximises tokens per second as measured on this machine."""
    width: int = 0
    """If not 0, draft dynamic trees instead: number of nodes expanded per level, and of children of each."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "prefix_heads", most=MAX_DEPTH)
        check_at_least(self, 0, "prefix_width", most=MAX_WIDTH)
        check_at_least(self, 0, "tree_nodes", "width", most=MAX_NODES)
        check_at_least(self, 0, "beta", most=1)
        check_below_one(self, "dropout")
        if self.width and self.tree_nodes:
            raise ValueError("tree_nodes is the size of a static tree and width is for dynamic trees; set only one")
        if self.loss != "ce":
            divergence(self.loss, beta=self.beta)


def check(settings: Settings, target: TargetInfo) -> None:
    """Raises ValueError for a shortlist larger than the vocabulary."""
    check_size(settings.config.shortlist, target.vocab_size)


def build(settings: Settings, target: Target) -> Drafter:
    """Returns heads that pass the state through unchanged and draft a chain until `finish`."""
    width = settings.prefix_width or ffn_width(target.hidden_size)
    config = dataclasses.replace(
        settings.config,
        prefix_heads=settings.prefix_heads if settings.prefix_attention else 0,
        prefix_width=width if settings.prefix_attention else 0,
        tree=() if settings.width else trees.chain(settings.config.num_heads),
        width=settings.width,
    )
    drafter = Drafter(config, target).float()
    for module in drafter.modules():
        if isinstance(module, nn.Dropout):
            module.p = settings.dropout
    return drafter


def prepare(drafter: Drafter, settings: Settings, target: Target, rows: Sequence[Example]) -> None:
    """Fills the shortlist."""
    corpus.fill_shortlist(drafter.shared_head.shortlist, rows)


def needs(settings: Settings, target: Target) -> Needs:
    """Returns the last hidden layer."""
    return Needs(layers=(target.num_layers,))


def loss(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> tuple[Tensor, Metrics]:
    """Returns the sum over heads k and positions t of CE(head k at t, token t + 2 + k), or of a divergence.

    The divergence is between head k at t and the target at t + 1 + k, which predict the same token; with a shortlist,
    between their distributions over its tokens.
    """
    shared = drafter.shared_head

    def logits(k: int, z_ND: Tensor) -> Tensor:
        return drafter.head(k, z_ND[None])[0] if settings.config.own_head else shared.listed(z_ND)

    def target_logits(hidden_ND: Tensor) -> Tensor:
        return shared.listed(target.norm(hidden_ND))

    device = batch.tokens_BT.device
    shared_logits = shared_matrix(shared, device)
    total, metrics = torch.zeros((), device=device), {}
    hidden_BTD = batch.hidden[target.num_layers]
    for k, output in enumerate(_head_outputs(drafter, batch)):
        matrix = matrix_of(drafter.outputs[k], device) if settings.config.own_head else shared_logits
        theirs_ND = hidden_BTD[:, 1 + k :][output.mask_BT[:, : -1 - k]]
        if settings.loss == "ce":
            head_loss, count = sum_label_losses(
                partial(logits, k),
                matrix,
                *heads.on_shortlist(output, shared.shortlist),
                vocab_size=len(shared.shortlist),
            )
        elif settings.loss == "forward_kl" and matrix is not None:
            (head_loss,) = sum_forward_kl(matrix, [output.z_ND], target_logits, theirs_ND)
            count = len(theirs_ND)
        else:
            compare = divergence(settings.loss, beta=settings.beta)
            head_loss, count = sum_in_chunks(
                lambda z, theirs, k=k, compare=compare: compare(logits(k, z), Teacher(logits=target_logits(theirs))),
                output.z_ND,
                theirs_ND,
                vocab_size=len(shared.shortlist),
            )
        total = total + head_loss
        metrics[f"head{k}_loss"] = (head_loss.detach(), count)
    return total, metrics


def evaluate(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> Metrics:
    """Returns each head's top-1 accuracy and, as acceptance, the number of correct heads before the first wrong one.

    Each head reads the text's tokens, as it does on a path of the draft tree with these tokens.
    """
    return heads.accuracy_metrics(_ranks(drafter, batch))


@torch.no_grad()
def finish(drafter: Drafter, settings: Settings, target: Target, held_out: list[Batch]) -> Drafter:
    """Returns the drafter, with a static tree computed from held-out ranks and measured costs if trees are static."""
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
            lambda: autoregressive.draft_static_tree(
                drafter.logits, session, tree, "deterministic", drafter.config.num_heads, drafter.vocabulary
            )
        )

    tree = heads.plan_tree(children, rows, draft_ms, target, settings.tree_nodes)
    finished = Drafter(dataclasses.replace(drafter.config, tree=tree), target)
    finished.load_state_dict(drafter.state_dict())
    return finished.eval()


def _head_outputs(drafter: Drafter, batch: Batch) -> Iterator[heads.HeadOutputs]:
    """Yields each head's features and labels at positions where its label is supervised."""
    num_heads, tokens_BT = drafter.config.num_heads, batch.tokens_BT
    states_BTD = drafter.states(batch.hidden[drafter.target.num_layers])
    for k, mask_BT in enumerate(heads.label_masks(batch, num_heads)):
        read_NI = torch.stack([heads.shift_left(tokens_BT, offset)[mask_BT] for offset in range(1, k + 2)], dim=-1)
        z_1ND = drafter.features(states_BTD[mask_BT][None], read_NI[None])
        yield heads.HeadOutputs(z_ND=z_1ND[0], labels_N=heads.shift_left(tokens_BT, 2 + k)[mask_BT], mask_BT=mask_BT)


def _ranks(drafter: Drafter, batch: Batch) -> Tensor:
    return heads.label_ranks(_head_outputs(drafter, batch), drafter.head, batch)
