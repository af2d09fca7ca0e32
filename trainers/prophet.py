"""Trains a prophet on windows of the text: the target's hidden states before a token, that token, and the next ones.

Shape suffixes: B rows, T positions, W windows, S states of a window, P tokens that it predicts, N positions of the
batch or predictions, D the target's hidden width, E the prophet's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from data.batches import Batch, Example
from draftsmith import Target
from draftsmith.drafters.prophet import Config, Drafter, window_positions
from draftsmith.loading.model_info import TargetInfo
from draftsmith.parts.checks import check_at_least
from draftsmith.parts.neural.shortlist import check_size
from trainers import Metrics, Needs
from trainers.corpora import corpus
from trainers.parts.fused.linear_cross_entropy import Matrix, matrix_of, shared_matrix
from trainers.parts.losses import (
    DIVERGENCES,
    Teacher,
    acceptance,
    cross_entropy,
    divergence,
    outcome_log_probs,
    sum_in_chunks,
    sum_label_losses,
)

RUNS_BLOCKS = True


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The decoder, its loss, the number of training windows, and how drafts are made."""

    config: Config = field(default_factory=Config)
    loss: str = field(default="ce", metadata={"choices": ["ce", *DIVERGENCES]})
    """Cross-entropy on the text (ce), or a divergence from the target's distribution at each of its tokens."""
    windows: int = 16
    """Number of windows per row for training and evaluation, evenly spaced over the supervised tokens."""
    detach: bool = False
    """In joint training, stop the gradient of the prophet's loss at the target, which learns from the text alone."""

    def __post_init__(self) -> None:
        if self.detach and not (self.config.joint and self.config.own_head):
            raise ValueError("detach needs joint and own_head: a shared head would learn from the prophet's loss too")
        check_at_least(self, 1, "windows")


@dataclass(frozen=True, kw_only=True, eq=False)
class Windows:
    """Windows of a batch, each at a token whose next token is supervised, with features and labels."""

    rows_W: Tensor
    """Row of the batch."""
    pending_W: Tensor
    """Position of the pending token in its row."""
    z_WPE: Tensor
    """Inputs of the prophet's head at the pending token and the P - 1 tokens after it."""
    labels_WP: Tensor
    """The token after each of these."""
    mask_WP: Tensor
    """True where the label is supervised."""
    weight: float
    """Number of possible windows per selected window."""


def check(settings: Settings, target: TargetInfo) -> None:
    """Raises ValueError for a shortlist larger than the vocabulary."""
    check_size(settings.config.shortlist, target.vocab_size)


def build(settings: Settings, target: Target) -> Drafter:
    """Returns a new prophet; in joint training its target is a copy whose weights belong to the drafter."""
    drafter = Drafter(settings.config, target).float()
    drafter.on_weights_loaded()
    return drafter.requires_grad_()


def prepare(drafter: Drafter, settings: Settings, target: Target, rows: Sequence[Example]) -> None:
    """Fills the shortlist."""
    corpus.fill_shortlist(drafter.shared_head.shortlist, rows)


def needs(settings: Settings, target: Target) -> Needs:
    """Returns the last hidden layer, or nothing in joint training, which runs its own target."""
    return Needs(layers=() if settings.config.joint else (target.num_layers,))


def loss(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> tuple[Tensor, Metrics]:
    """Returns the loss of the P predictions of every window, summed and divided by P, so that tokens count about once.

    If not all windows are used, they are shifted at random, by torch's generator, which a resumed run restores. In
    joint training the copy's own loss on the text is added. With a shortlist a divergence is between distributions over
    its tokens, and other labels of cross-entropy do not count.
    """
    shared, is_listing = drafter.shared_head, bool(settings.config.shortlist)
    normed_BTD = _read_normed(drafter, batch)
    states_BTD = normed_BTD.detach() if settings.detach else normed_BTD
    chosen = select_windows(drafter, batch, states_BTD, settings.windows, float(torch.rand(())))
    z_NE, labels_N = chosen.z_WPE[chosen.mask_WP], chosen.labels_WP[chosen.mask_WP]

    def logits(z_NE: Tensor) -> Tensor:
        return shared.listed(drafter.output(z_NE)) if is_listing else drafter.head(z_NE[None])[0]

    if settings.loss == "ce":
        is_listed_N = shared.shortlist.contains(labels_N)
        # Its product with the LM head is the loss of the inputs of that.
        matrix = _matrix(drafter, batch.tokens_BT.device)
        total, _ = sum_label_losses(
            logits,
            matrix,
            z_NE[is_listed_N] if matrix is None else drafter.output(z_NE[is_listed_N]),
            shared.shortlist.indices(labels_N[is_listed_N]),
            vocab_size=len(shared.shortlist),
        )
    else:
        compare = divergence(settings.loss)
        total, _ = sum_in_chunks(
            lambda z, theirs: compare(
                logits(z), Teacher(logits=shared.listed(theirs)) if is_listing else _teacher(drafter, theirs)
            ),
            z_NE,
            _target_states(chosen, normed_BTD.detach()),
            vocab_size=len(shared.shortlist),
        )
    total = total * chosen.weight / settings.config.num_draft
    if not settings.config.joint:
        return total, {}
    main, count = _main_loss(drafter, batch, normed_BTD)
    return main + total, {"main_loss": (main.detach(), count), "prophet_loss": (total.detach(), count)}


def _matrix(drafter: Drafter, device: torch.device) -> Matrix | None:
    """Returns the matrix of the LM head: its own, or the target's frozen one; None if the head is not one."""
    if drafter.config.own_head:
        return matrix_of(drafter.outputs[0], device)
    return None if drafter.config.joint else shared_matrix(drafter.shared_head, device)


def evaluate(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> Metrics:
    """Returns as acceptance the number of correct tokens before the first wrong one, in fully supervised windows.

    Also the accuracy of the first token and its probability of acceptance when sampled, sum_x min(p, q); in joint
    training the fine-tuned target's loss on the text.
    """
    normed_BTD = _read_normed(drafter, batch)
    chosen = select_windows(drafter, batch, normed_BTD, settings.windows, 0.0)

    def first(z_NE: Tensor, theirs_ND: Tensor) -> Tensor:
        return acceptance(*outcome_log_probs(drafter.head(z_NE[None])[0], _teacher(drafter, theirs_ND)))

    def run(z_NPE: Tensor, labels_NP: Tensor, mask_NP: Tensor) -> Tensor:
        is_right_NP = drafter.head(z_NPE).argmax(-1) == labels_NP
        run_N, is_whole_N = is_right_NP.long().cumprod(1).sum(1), mask_NP.all(1)
        return torch.stack([is_right_NP[:, 0], run_N * is_whole_N, is_whole_N], dim=1)

    theirs_WD = normed_BTD[chosen.rows_W, chosen.pending_W]
    accepted, count = sum_in_chunks(first, chosen.z_WPE[:, 0], theirs_WD, vocab_size=target.vocab_size)
    inputs = (chosen.z_WPE, chosen.labels_WP, chosen.mask_WP)
    sums_3, _ = sum_in_chunks(run, *inputs, vocab_size=target.vocab_size * settings.config.num_draft)
    right, run_length, num_whole = sums_3
    return {
        "acceptance": (run_length, int(num_whole)),
        "first_acceptance": (accepted, count),
        "first_accuracy": (right, count),
        **({"main_loss": _main_loss(drafter, batch, normed_BTD)} if settings.config.joint else {}),
    }


def select_windows(drafter: Drafter, batch: Batch, normed_BTD: Tensor, windows: int, phase: float) -> Windows:
    """Returns at most `windows` windows per row of the batch, evenly spaced and shifted by `phase`, in [0, 1)."""
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
        weight=num_found / num_taken,
    )


def _read_normed(drafter: Drafter, batch: Batch) -> Tensor:
    """Returns the normed last hidden states [B, T, D] of the target or, in joint training, of its copy."""
    own, last = drafter.target, drafter.target.num_layers
    return own.norm(own.read(batch.tokens_BT, (last,))[last] if drafter.config.joint else batch.hidden[last])


def _main_loss(drafter: Drafter, batch: Batch, normed_BTD: Tensor) -> tuple[Tensor, int]:
    """Returns the summed cross-entropy of the drafter's target on the text and the number of tokens."""
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


def _target_states(chosen: Windows, normed_BTD: Tensor) -> Tensor:
    """Returns the target's normed hidden states [N, D] at the tokens before supervised predictions."""
    order_P = torch.arange(chosen.labels_WP.shape[1], device=chosen.pending_W.device)
    at_WP = (chosen.pending_W[:, None] + order_P).clamp(max=normed_BTD.shape[1] - 1)
    return normed_BTD[chosen.rows_W[:, None], at_WP][chosen.mask_WP]
