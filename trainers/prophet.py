"""Trains a prophet on windows of the text: the target's states before a token, that token, and those after it.

Shape suffixes: B rows, T positions, W windows, S states of a window, P tokens that it predicts, N places of the batch
or predictions, D the target's hidden width, E the prophet's.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from data.batches import Batch
from draftsmith import Target
from draftsmith.drafters.prophet import Config, Drafter, window_positions
from trainers import Metrics, Needs
from trainers.parts.losses import (
    DIVERGENCES,
    Teacher,
    acceptance,
    cross_entropy,
    divergence,
    outcome_log_probs,
    sum_in_chunks,
)
from trainers.training.settings import part_of


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The decoder, its loss, how many windows it learns from, and how it drafts."""

    num_states: int = 2
    """Hidden states of the target that a window begins with, and tokens that follow them, the pending one the last."""
    num_draft: int = 7
    """Tokens that a window predicts, and most drafted at a time."""
    num_layers: int = 2
    """Blocks of the decoder."""
    hidden_size: int = 0
    """Its width, 0 for the target's."""
    num_heads: int = 4
    """Its attention heads."""
    own_head: bool = False
    """Give it an output matrix of its own, started as the target's, instead of sharing the target's head."""
    loss: str = field(default="ce", metadata={"choices": ["ce", *DIVERGENCES]})
    """Cross-entropy on the text, or a divergence from the target's law at each of its tokens."""
    windows: int = 16
    """Windows learnt from and judged by, for each row of a batch; they are spread over the supervised tokens."""
    length: str = "refit=0.4"
    """How long its chains are, unless told otherwise: a policy of draftsmith/length/policies.py, and its number."""
    width: int = 0
    """If not 0, it drafts trees that grow where it is confident: so many nodes a level with as many children each."""
    num_nodes: int = 16
    """Nodes kept of such a tree."""
    joint: bool = False
    """Train a copy of the target too, on the text beside the prophet's loss. It is a changed target that is drafted for
    then: the artifact holds it, and its texts are its own."""
    detach: bool = False
    """In joint training, keep the prophet's loss from the target, which then learns from the text alone."""

    def __post_init__(self) -> None:
        if self.detach and not (self.joint and self.own_head):
            raise ValueError("detach belongs to joint training with own_head: a head that is shared learns from both")
        if self.windows < 1:
            raise ValueError(f"windows is {self.windows}; it must be at least 1")
        self.config()

    def config(self) -> Config:
        """Returns the drafter's configuration; raises ValueError for one that cannot be."""
        return part_of(Config, self)


@dataclass(frozen=True, kw_only=True, eq=False)
class Windows:
    """Windows of a batch, each at a token whose next one is supervised, and what is to be predicted in them."""

    rows_W: Tensor
    """The batch's row that each is of."""
    pending_W: Tensor
    """Where in its row the pending token stands."""
    z_WPE: Tensor
    """What the prophet's head reads, at the pending token and the P - 1 after it."""
    labels_WP: Tensor
    """The tokens that follow each of these."""
    mask_WP: Tensor
    """Where they are supervised."""
    share: float
    """How many windows of the batch each stands for."""


def build(settings: Settings, target: Target) -> Drafter:
    """Returns a new prophet; in joint training its target is a copy whose weights are the drafter's own."""
    drafter = Drafter(settings.config(), target).float()
    drafter.on_weights_loaded()
    return drafter.requires_grad_()


def needs(settings: Settings, target: Target) -> Needs:
    return Needs(layers=() if settings.joint else (target.num_layers,))


def loss(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> tuple[Tensor, Metrics]:
    """Returns the loss of the P predictions of every window, summed and divided by P: each token counts about once.

    The windows, where they are not all taken, begin at a random one: torch's generator, which a resumed run restores.
    In joint training the copy's own loss on the text is added.
    """
    normed_BTD = _read(drafter, batch)
    states_BTD = normed_BTD.detach() if settings.detach else normed_BTD
    chosen = select_windows(drafter, batch, states_BTD, settings.windows, float(torch.rand(())))
    z_NE, labels_N = chosen.z_WPE[chosen.mask_WP], chosen.labels_WP[chosen.mask_WP]
    if settings.loss == "ce":
        total, _ = sum_in_chunks(
            lambda z, labels: cross_entropy(drafter.head(z[None])[0], labels),
            z_NE,
            labels_N,
            vocab_size=target.vocab_size,
        )
    else:
        compare = divergence(settings.loss)
        total, _ = sum_in_chunks(
            lambda z, theirs: compare(drafter.head(z[None])[0], _teacher(drafter, theirs)),
            z_NE,
            _theirs(chosen, normed_BTD.detach()),
            vocab_size=target.vocab_size,
        )
    total = total * chosen.share / settings.num_draft
    if not settings.joint:
        return total, {}
    main, count = _main_loss(drafter, batch, normed_BTD)
    return main + total, {"main_loss": (main.detach(), count), "prophet_loss": (total.detach(), count)}


def evaluate(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> Metrics:
    """Returns as acceptance how many tokens are right before the first wrong one, in windows supervised throughout.

    And, of the first token, how often it is right and sum_x min(p, q), the chance that it is accepted when sampled;
    in joint training also what the changed target has learnt of the text.
    """
    normed_BTD = _read(drafter, batch)
    chosen = select_windows(drafter, batch, normed_BTD, settings.windows, 0.0)

    def first(z_NE: Tensor, theirs_ND: Tensor) -> Tensor:
        return acceptance(*outcome_log_probs(drafter.head(z_NE[None])[0], _teacher(drafter, theirs_ND)))

    def run(z_NPE: Tensor, labels_NP: Tensor, mask_NP: Tensor) -> Tensor:
        is_right_NP = drafter.head(z_NPE).argmax(-1) == labels_NP
        run_N, is_whole_N = is_right_NP.long().cumprod(1).sum(1), mask_NP.all(1)
        return torch.stack([is_right_NP[:, 0], run_N * is_whole_N, is_whole_N], dim=1)

    theirs_WD = normed_BTD[chosen.rows_W, chosen.pending_W]
    accepted, count = sum_in_chunks(first, chosen.z_WPE[:, 0], theirs_WD, vocab_size=target.vocab_size)
    parts = (chosen.z_WPE, chosen.labels_WP, chosen.mask_WP)
    sums_3, _ = sum_in_chunks(run, *parts, vocab_size=target.vocab_size * settings.num_draft)
    right, run_length, num_whole = sums_3
    return {
        "acceptance": (run_length, int(num_whole)),
        "first_acceptance": (accepted, count),
        "first_accuracy": (right, count),
        **({"main_loss": _main_loss(drafter, batch, normed_BTD)} if settings.joint else {}),
    }


def select_windows(drafter: Drafter, batch: Batch, normed_BTD: Tensor, windows: int, phase: float) -> Windows:
    """Returns at most `windows` windows a row of the batch, evenly spread; `phase`, in [0, 1), moves them along."""
    num_states, num_draft = drafter.config.num_states, drafter.config.num_draft
    rows_N, pending_N = functional.pad(batch.loss_mask_BT, (0, 1))[:, 1:].nonzero(as_tuple=True)
    num_found, num_taken = len(rows_N), min(len(rows_N), windows * len(batch.tokens_BT))
    taken_W = ((torch.arange(num_taken, dtype=torch.float64) + phase) * num_found / num_taken).long()
    rows_W, pending_W = rows_N[taken_W.to(rows_N.device)], pending_N[taken_W.to(rows_N.device)]

    states_WS, tokens_WS = window_positions(pending_W, num_states)
    ahead_WP = pending_W[:, None] + torch.arange(1, num_draft + 1, device=pending_W.device)
    last = batch.tokens_BT.shape[1] - 1
    tokens_WT = torch.cat([tokens_WS, ahead_WP[:, :-1]], dim=1).clamp(0, last)
    rows_W1 = rows_W[:, None]
    z_WPE = drafter(
        normed_BTD[rows_W1, states_WS.clamp(min=0)],
        batch.tokens_BT[rows_W1, tokens_WT],
        torch.cat([states_WS, tokens_WS], dim=1) >= 0,
    )
    return Windows(
        rows_W=rows_W,
        pending_W=pending_W,
        z_WPE=z_WPE,
        labels_WP=batch.tokens_BT[rows_W1, ahead_WP.clamp(max=last)],
        mask_WP=batch.loss_mask_BT[rows_W1, ahead_WP.clamp(max=last)] & (ahead_WP <= last),
        share=num_found / num_taken,
    )


def _read(drafter: Drafter, batch: Batch) -> Tensor:
    """Returns the last hidden states, normed [B, T, D], of the target or, in joint training, of its copy as it is."""
    own, last = drafter.target, drafter.target.num_layers
    return own.norm(own.read(batch.tokens_BT, (last,))[last] if drafter.config.joint else batch.hidden[last])


def _main_loss(drafter: Drafter, batch: Batch, normed_BTD: Tensor) -> tuple[Tensor, int]:
    """Returns the cross-entropy of the drafter's target on the text, summed, and the number of tokens."""
    mask_BT = batch.loss_mask_BT[:, 1:]
    return sum_in_chunks(
        lambda normed, labels: cross_entropy(drafter.target.head(normed[None])[0], labels),
        normed_BTD[:, :-1][mask_BT],
        batch.tokens_BT[:, 1:][mask_BT],
        vocab_size=drafter.target.vocab_size,
    )


@torch.no_grad()
def _teacher(drafter: Drafter, normed_ND: Tensor) -> Teacher:
    return Teacher(logits=drafter.target.head(normed_ND[None])[0])


def _theirs(chosen: Windows, normed_BTD: Tensor) -> Tensor:
    """Returns the target's normed hidden states [N, D] at the tokens that supervised predictions follow."""
    order_P = torch.arange(chosen.labels_WP.shape[1], device=chosen.pending_W.device)
    at_WP = (chosen.pending_W[:, None] + order_P).clamp(max=normed_BTD.shape[1] - 1)
    return normed_BTD[chosen.rows_W[:, None], at_WP][chosen.mask_WP]
