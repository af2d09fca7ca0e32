"""Fills the successor matrix of Token Recycling (2408.08696) with the target's most likely tokens on the data.

Shape suffixes: B rows, T positions, N pairs of token and successor, K successors of a token, V vocabulary, D depths.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import Tensor
from torch.utils.data import Subset

from data.batches import Batch, Example, collate, order, truncate
from data.teacher import complete
from draftsmith import Target
from draftsmith.core.drafter import Session
from draftsmith.core.sampling import Sampling
from draftsmith.drafters.recycling import Config, Drafter
from draftsmith.length.costs import quickest_ms
from draftsmith.parts import autoregressive
from draftsmith.parts.checks import MAX_NODES, check_at_least
from trainers import Metrics, Needs
from trainers.corpora import corpus, evaluation
from trainers.parts import heads, trees
from trainers.training.run_settings import RunSettings

BATCHES_PER_CHUNK, DEPTH = 16, 6
SPARE = 4
"""Factor by which a chunk keeps more successors of a token: the heaviest overall need not be so in each chunk."""
NAMES = ("codes", "weights")
Pairs = tuple[np.ndarray, np.ndarray]
"""codes [N], token * V + successor (int64), and the weight [N] of each (float64)."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The successor matrix and the size of the tree; `--max-steps` is the number of batches that the target reads."""

    config: Config = field(default=Config(tree=((0,),)), metadata={"omit": ("tree",)})
    tree_nodes: int = 0
    """Number of nodes in the tree; 0 maximises tokens per second as measured on this machine."""

    def __post_init__(self) -> None:
        check_at_least(self, 0, "tree_nodes", most=MAX_NODES)


def needs(settings: Settings, target: Target) -> Needs:
    return Needs(top_k=settings.config.num_successors)


def fit(settings: Settings, target: Target, rows: Sequence[Example], run: RunSettings, output: Path) -> Drafter:
    """Returns a drafter with the successors of largest total probability after each token of the data."""
    num_rows = min(len(rows), run.max_steps * run.batch_size)
    indices = order(len(rows), seed=run.seed, epoch=0)[:num_rows]
    vocab_size, num_kept = target.vocab_size, settings.config.num_successors

    def make(chunk: Sequence[Example]) -> dict[str, np.ndarray]:
        length = min(run.max_length, target.context_length)
        read = [truncate(dataclasses.replace(chunk[at], hidden={}), length) for at in range(len(chunk))]
        rows = [row for row in read if row.loss_mask_T[1:].any()]
        batches = [rows[begin : begin + run.batch_size] for begin in range(0, len(rows), run.batch_size)]
        pairs = sum_weights(top_k_pairs(batch, target, num_kept) for batch in batches)
        return dict(zip(NAMES, heaviest_pairs(*pairs, vocab_size, SPARE * num_kept), strict=True))

    files = corpus.build_chunks(Subset(rows, indices), output, BATCHES_PER_CHUNK * run.batch_size, make)  # type: ignore[arg-type]
    chunks = [load_file(file) for file in files]
    total = sum_weights((chunk["codes"], chunk["weights"]) for chunk in chunks)
    codes_N, _ = heaviest_pairs(*total, vocab_size, num_kept)
    tokens_N = codes_N // vocab_size
    # Number of preceding pairs of the same token.
    ranks_N = np.arange(len(codes_N)) - np.searchsorted(tokens_N, tokens_N)
    drafter = Drafter(settings.config, target)
    successors_VK = drafter.successors.cpu()
    successors_VK[tokens_N, ranks_N] = torch.from_numpy(codes_N % vocab_size).int()
    drafter.successors.copy_(successors_VK)
    print(f"successors of {len(np.unique(tokens_N)):,} of {vocab_size:,} tokens, from {num_rows:,} rows")
    return drafter


@torch.no_grad()
def finish(drafter: Drafter, settings: Settings, target: Target, held_out: list[Batch]) -> Drafter:
    """Returns the drafter with the tree computed from its ranks on held-out text and the measured costs."""
    if target.is_encoder_decoder:
        return drafter.with_tree(trees.chain(DEPTH))
    rows = heads.ranks_by_row(successor_ranks(drafter.successors, batch) for batch in held_out)
    session = _session(target, int(held_out[0].tokens_BT[0, 0]))

    def draft_ms(tree: autoregressive.Paths) -> float:
        trial = drafter.with_tree(tree)
        trial.start(session)
        return quickest_ms(lambda: trial.propose(DEPTH))

    children = trees.non_increasing(trees.conditional_accuracy(torch.cat(rows), settings.config.num_successors))
    return drafter.with_tree(heads.plan_tree(children, rows, draft_ms, target, settings.tree_nodes))


def evaluate(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> Metrics:
    """Returns the accepted tokens per round; successors learned while decoding are dropped afterwards."""
    return evaluation.evaluate(drafter.with_tree(drafter.config.tree), batch, settings, target)


def top_k_pairs(rows: Sequence[Example], target: Target, num_successors: int) -> Pairs:
    """Returns the target's most likely next tokens, with probabilities, at positions before supervised tokens."""
    batch = complete(collate(rows), target, top_k=num_successors)
    assert batch.top_ids_BTK is not None and batch.top_logits_BTK is not None and batch.log_normaliser_BT is not None
    mask_BT = heads.shift_left(batch.loss_mask_BT, 1)
    codes_BTK = batch.tokens_BT[..., None] * target.vocab_size + batch.top_ids_BTK
    probs_BTK = (batch.top_logits_BTK - batch.log_normaliser_BT[..., None]).exp()
    return codes_BTK[mask_BT].flatten().cpu().numpy(), probs_BTK[mask_BT].flatten().double().cpu().numpy()


def sum_weights(pairs: Iterable[Pairs]) -> Pairs:
    """Returns the distinct pairs, sorted, with the sum of their weights."""
    codes, weights = zip((np.zeros(0, np.int64), np.zeros(0)), *pairs, strict=True)
    codes_N, inverse = np.unique(np.concatenate(codes), return_inverse=True)
    return codes_N, np.bincount(inverse, weights=np.concatenate(weights), minlength=len(codes_N))


def heaviest_pairs(codes_N: np.ndarray, weights_N: np.ndarray, vocab_size: int, num_kept: int) -> Pairs:
    """Returns the heaviest pairs of each token, heaviest first, ties going to smaller successors."""
    order_N = np.lexsort((codes_N, -weights_N, codes_N // vocab_size))
    tokens_N = codes_N[order_N] // vocab_size
    kept_N = order_N[np.arange(len(order_N)) - np.searchsorted(tokens_N, tokens_N) < num_kept]
    return codes_N[kept_N], weights_N[kept_N]


def successor_ranks(successors_VK: Tensor, batch: Batch) -> Tensor:
    """Returns the rank [D, B, T] of token t + d + 1 among the successors of token t + d, K if it is none of them.

    The successors are those known when token t is pending: the target's most likely tokens at the last occurrence of
    token t + d in the row before t, else those in `successors_VK`. The rank is -1 if token t + d + 1 is unsupervised.
    """
    assert batch.top_ids_BTK is not None
    num_kept, ranks_DBT = successors_VK.shape[1], batch.tokens_BT.new_full((DEPTH, *batch.tokens_BT.shape), -1)
    kept_before: list[list[int]] = successors_VK.tolist()
    for row, (tokens, is_learnt, top) in enumerate(
        zip(batch.tokens_BT.tolist(), batch.loss_mask_BT.tolist(), batch.top_ids_BTK.tolist(), strict=True)
    ):
        last: dict[int, list[int]] = {}
        for at, pending in enumerate(tokens):
            for depth, (token, following) in enumerate(pairwise(tokens[at : at + DEPTH + 1])):
                if is_learnt[at + depth + 1]:
                    kept = last.get(token, kept_before[token])
                    ranks_DBT[depth, row, at] = kept.index(following) if following in kept else num_kept
            last[pending] = top[at]
    return ranks_DBT


def _session(target: Target, token: int) -> Session:
    return Session(
        target=target,
        rows=[[token]],
        cache=target.new_cache(1),
        sampling=Sampling(),
        generator=torch.Generator(),
    )
