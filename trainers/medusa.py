"""Trains Medusa-1: heads on a frozen target (2401.10774, section 2.2.1), and chooses their draft tree.

Shape suffixes: B rows, T positions, D hidden width, K heads.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from data.batches import Batch, Example
from draftsmith import Target
from draftsmith.drafters.medusa import Config, Drafter
from draftsmith.loading.model_info import TargetInfo
from draftsmith.parts.checks import MAX_NODES, check_at_least, check_positive
from draftsmith.parts.neural.shortlist import check_size
from trainers import Metrics, Needs
from trainers.corpora import corpus
from trainers.parts import heads, trees
from trainers.parts.fused.linear_cross_entropy import matrix_of, shared_matrix


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The heads, their loss, and the size of their tree."""

    config: Config = field(default=Config(tree=((0,),)), metadata={"omit": ("tree",)})
    decay: float = 0.8
    """Head k's loss is weighted by decay^(k + 1)."""
    tree_nodes: int = 0
    """Number of nodes in the tree; 0 maximises tokens per second as measured on this machine."""

    def __post_init__(self) -> None:
        check_positive(self, "decay")
        check_at_least(self, 0, "tree_nodes", most=MAX_NODES)


def check(settings: Settings, target: TargetInfo) -> None:
    """Raises ValueError for a shortlist larger than the vocabulary."""
    check_size(settings.config.shortlist, target.vocab_size)


def build(settings: Settings, target: Target) -> Drafter:
    """Returns heads that pass the target's last hidden state through unchanged and draft a chain until `finish`."""
    config = dataclasses.replace(settings.config, tree=trees.chain(settings.config.num_heads))
    return Drafter(config, target).float()


def prepare(drafter: Drafter, settings: Settings, target: Target, rows: Sequence[Example]) -> None:
    """Fills the shortlist."""
    corpus.fill_shortlist(drafter.shared_head.shortlist, rows)


def needs(settings: Settings, target: Target) -> Needs:
    """Returns the last hidden layer."""
    return Needs(layers=(target.num_layers,))


def loss(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> tuple[Tensor, Metrics]:
    """Returns the sum over heads k and positions t of decay^(k + 1) CE(head k at t, token t + 2 + k)."""
    outputs, device = _head_outputs(drafter, batch), batch.tokens_BT.device
    if settings.config.own_head:
        return heads.loss(
            outputs,
            drafter.head,
            decay=settings.decay,
            vocab_size=target.vocab_size,
            matrix=lambda k: matrix_of(drafter.outputs[k], device),
        )
    shared = drafter.shared_head
    matrix = shared_matrix(shared, device)
    return heads.loss(
        outputs,
        lambda _, z_1ND: shared.listed(z_1ND),
        decay=settings.decay,
        vocab_size=len(shared.shortlist),
        shortlist=shared.shortlist,
        matrix=lambda _: matrix,
    )


def evaluate(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> Metrics:
    """Returns each head's top-1 accuracy and, as acceptance, the number of correct heads before the first wrong one."""
    return heads.accuracy_metrics(_ranks(drafter, batch))


@torch.no_grad()
def finish(drafter: Drafter, settings: Settings, target: Target, held_out: list[Batch]) -> Drafter:
    """Returns the drafter with the tree computed from its ranks on held-out text and the target's measured cost."""
    hidden_11D = held_out[0].hidden[target.num_layers][:1, :1]
    tree = heads.choose_tree(
        (_ranks(drafter, batch) for batch in held_out),
        lambda: heads.top_tokens(drafter.heads(drafter.target.norm(hidden_11D)), drafter.head),
        target,
        settings.tree_nodes,
    )
    finished = Drafter(dataclasses.replace(drafter.config, tree=tree), target)
    finished.load_state_dict(drafter.state_dict())
    return finished.eval()


def _head_outputs(drafter: Drafter, batch: Batch) -> Iterator[heads.HeadOutputs]:
    normed_BTD = drafter.target.norm(batch.hidden[drafter.target.num_layers])
    return heads.head_outputs(drafter.heads, normed_BTD, batch, drafter.config.num_heads)


def _ranks(drafter: Drafter, batch: Batch) -> Tensor:
    return heads.label_ranks(_head_outputs(drafter, batch), drafter.head, batch)
