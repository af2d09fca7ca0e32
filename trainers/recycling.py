"""Fills the matrix of successors with what the target finds likeliest in the data (Token Recycling, 2408.08696).

Shape suffixes: B rows, T positions, N pairs of a token and a successor, K successors of a token, V vocabulary.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import Tensor
from torch.utils.data import Subset

from data.batches import Batch, Example, collate, cut, order
from data.teacher import complete
from draftsmith import Target
from draftsmith.core.drafter import Session
from draftsmith.core.sampling import Sampling
from draftsmith.drafters.recycling import Config, Drafter
from draftsmith.length.costs import quickest_ms
from draftsmith.parts import autoregressive
from trainers import Metrics, Needs
from trainers.corpora import corpus
from trainers.parts import heads, trees
from trainers.training.run_settings import RunSettings

BATCHES_A_PART, DEPTH = 16, 6
SPARE = 4
"""So many times the successors wanted are kept of a token in a part: what counts in all may not be first in each."""
NAMES = ("codes", "weights")
Pairs = tuple[np.ndarray, np.ndarray]
"""codes [N], token * V + successor (int64), and the weight [N] of each (float64)."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is kept, and the size of the tree; `--max-steps` says how many batches of the data the target reads."""

    num_successors: int = 8
    """Tokens kept after each token."""
    tree_nodes: int = 0
    """Nodes in the tree; 0 takes what gives most tokens a second as measured on this machine."""

    def __post_init__(self) -> None:
        if self.num_successors < 1:
            raise ValueError(f"num_successors is {self.num_successors}; it must be at least 1")
        if self.tree_nodes < 0:
            raise ValueError(f"tree_nodes is {self.tree_nodes}; it must not be negative")


def needs(settings: Settings, target: Target) -> Needs:
    return Needs(top_k=settings.num_successors)


def fit(settings: Settings, target: Target, rows: Sequence[Example], run: RunSettings, output: Path) -> Drafter:
    """Returns a drafter whose successors are those of the largest summed probability after each token of the data."""
    num_rows = min(len(rows), run.max_steps * run.batch_size)
    indices = order(len(rows), seed=run.seed, epoch=0)[:num_rows]
    vocab_size, num_kept = target.vocab_size, settings.num_successors

    def found(part: Sequence[Example]) -> dict[str, np.ndarray]:
        length = min(run.max_length, target.context_length)
        read = [cut(dataclasses.replace(part[at], hidden={}), length) for at in range(len(part))]
        rows = [row for row in read if row.loss_mask_T[1:].any()]
        batches = [rows[begin : begin + run.batch_size] for begin in range(0, len(rows), run.batch_size)]
        pairs = sum_weights(top_k_pairs(batch, target, num_kept) for batch in batches)
        return dict(zip(NAMES, heaviest_pairs(*pairs, vocab_size, SPARE * num_kept), strict=True))

    files = corpus.build_chunks(Subset(rows, indices), output, BATCHES_A_PART * run.batch_size, found)  # type: ignore[arg-type]
    parts = [load_file(file) for file in files]
    codes_N, _ = heaviest_pairs(*sum_weights((part["codes"], part["weights"]) for part in parts), vocab_size, num_kept)
    tokens_N = codes_N // vocab_size
    # How many pairs of the same token come before each.
    ranks_N = np.arange(len(codes_N)) - np.searchsorted(tokens_N, tokens_N)
    drafter = Drafter(Config(num_successors=num_kept, tree=((0,),)), target)
    successors_VK = drafter.successors.cpu()
    successors_VK[tokens_N, ranks_N] = torch.from_numpy(codes_N % vocab_size).int()
    drafter.successors.copy_(successors_VK)
    print(f"successors of {len(np.unique(tokens_N)):,} of {vocab_size:,} tokens, from {num_rows:,} rows")
    return drafter


@torch.no_grad()
def finish(drafter: Drafter, settings: Settings, target: Target, held_out: list[Batch]) -> Drafter:
    """Returns the drafter with the tree that suits its guesses on held-out text and the target's measured cost."""
    if target.is_encoder_decoder:
        return drafter.like(tuple((0,) * depth for depth in range(1, DEPTH + 1)))
    rows = heads.ranks_by_row(successor_ranks(drafter.successors, batch) for batch in held_out)
    session = _session(target, int(held_out[0].tokens_BT[0, 0]))

    def draft_ms(tree: autoregressive.Paths) -> float:
        trial = drafter.like(tree)
        trial.start(session)
        return quickest_ms(lambda: trial.propose(DEPTH))

    children = trees.non_increasing(trees.conditional_accuracy(torch.cat(rows), settings.num_successors))
    return drafter.like(heads.plan_tree(children, rows, draft_ms, target, settings.tree_nodes))


def evaluate(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> Metrics:
    """Returns the tokens accepted a round in decoding; what is learnt in doing so is forgotten again."""
    return corpus.evaluate(drafter.like(drafter.config.tree), batch, target)


def top_k_pairs(rows: Sequence[Example], target: Target, num_successors: int) -> Pairs:
    """Returns what the target finds likeliest after each token that comes before a supervised one."""
    batch = complete(collate(rows), target, top_k=num_successors)
    assert batch.top_ids_BTK is not None and batch.top_logits_BTK is not None and batch.log_normaliser_BT is not None
    is_learnt_BT = heads.shift_left(batch.loss_mask_BT, 1)
    codes_BTK = batch.tokens_BT[..., None] * target.vocab_size + batch.top_ids_BTK
    chances_BTK = (batch.top_logits_BTK - batch.log_normaliser_BT[..., None]).exp()
    return codes_BTK[is_learnt_BT].flatten().cpu().numpy(), chances_BTK[is_learnt_BT].flatten().double().cpu().numpy()


def sum_weights(pairs: Iterable[Pairs]) -> Pairs:
    """Returns each pair once, its weights added up, sorted."""
    codes, weights = zip((np.zeros(0, np.int64), np.zeros(0)), *pairs, strict=True)
    codes_N, places_N = np.unique(np.concatenate(codes), return_inverse=True)
    return codes_N, np.bincount(places_N, weights=np.concatenate(weights), minlength=len(codes_N))


def heaviest_pairs(codes_N: np.ndarray, weights_N: np.ndarray, vocab_size: int, num_kept: int) -> Pairs:
    """Returns the heaviest pairs of each token, heaviest first; of equal ones the one of the smaller successor."""
    order_N = np.lexsort((codes_N, -weights_N, codes_N // vocab_size))
    tokens_N = codes_N[order_N] // vocab_size
    kept_N = order_N[np.arange(len(order_N)) - np.searchsorted(tokens_N, tokens_N) < num_kept]
    return codes_N[kept_N], weights_N[kept_N]


def successor_ranks(successors_VK: Tensor, batch: Batch) -> Tensor:
    """Returns the place [D, B, T] of token t + d + 1 among the successors of token t + d, K if it is none of them.

    They are what is kept of that token when token t is pending: the target's likeliest where it last stood in the row
    before t, else those in `successors_VK`. The place is -1 where token t + d + 1 is not supervised.
    """
    assert batch.top_ids_BTK is not None
    num_kept, places_DBT = successors_VK.shape[1], batch.tokens_BT.new_full((DEPTH, *batch.tokens_BT.shape), -1)
    kept_before: list[list[int]] = successors_VK.tolist()
    for row, (tokens, is_learnt, top) in enumerate(
        zip(batch.tokens_BT.tolist(), batch.loss_mask_BT.tolist(), batch.top_ids_BTK.tolist(), strict=True)
    ):
        last: dict[int, list[int]] = {}
        for at, pending in enumerate(tokens):
            for depth, (token, following) in enumerate(pairwise(tokens[at : at + DEPTH + 1])):
                if is_learnt[at + depth + 1]:
                    kept = last.get(token, kept_before[token])
                    places_DBT[depth, row, at] = kept.index(following) if following in kept else num_kept
            last[pending] = top[at]
    return places_DBT


def _session(target: Target, token: int) -> Session:
    return Session(
        target=target,
        rows=[[token]],
        cache=target.new_cache(1),
        sampling=Sampling(),
        generator=torch.Generator(),
    )
