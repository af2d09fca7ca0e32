"""On-policy text of draft models for training and evaluation (DistillSpec, 2310.08461; GKD, 2306.13649).

A row's text depends on the row, the weights and a salt alone, not on other rows of the batch or on earlier calls.

Shape suffixes: B rows, T positions, N nodes of a draft.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from data.batches import Batch
from data.teacher import complete
from draftsmith import Target
from draftsmith.core.drafter import Session, Step
from draftsmith.core.sampling import Sampling
from draftsmith.core.target import Source
from draftsmith.core.tree import Draft, Verdict
from draftsmith.inputs.batching import until_end
from draftsmith.length.costs import CONTEXT, quickest_ms, verify_ms


def is_sharded(drafter: nn.Module) -> bool:
    """Returns True if ZeRO-3 shards the drafter's weights, so that it can only run as a whole module."""
    return any(hasattr(weight, "ds_tensor") for weight in drafter.parameters())


def select_rows(share: float, batch: Batch, salt: str) -> list[int]:
    """Returns the rows of the batch selected with probability `share`, deterministic in (row, salt)."""
    return [row for row in range(len(batch.keys)) if _hash(batch, row, f"coin:{salt}") < share * 2**63]


def rewrite_rows(
    drafter: Any,
    batch: Batch,
    target: Target,
    rows: Sequence[int],
    *,
    temperature: float,
    salt: str,
    most_tokens: int | None = None,
) -> Batch:
    """Returns the batch with these rows' supervised tokens replaced by text that the drafter generates.

    It continues the tokens before the first supervised one (or the first token, if that is supervised) with as many
    tokens as were supervised, at most `most_tokens`, or until an end-of-sequence token. The target's features are
    dropped. Sampling has no gradient. Raises ValueError for a batch that was made with another target.
    """
    if not rows:
        return batch
    batch = complete(batch, target)
    texts = [ids[:length] for ids, length in zip(batch.tokens_BT.tolist(), batch.lengths_B.tolist(), strict=True)]
    masks = [mask[: len(text)] for mask, text in zip(batch.loss_mask_BT.tolist(), texts, strict=True)]
    prompts = [texts[row][: max(masks[row].index(True), 1)] for row in rows]
    num_supervised = [sum(masks[row][len(prompt) :]) for row, prompt in zip(rows, prompts, strict=True)]
    generated = generate_alone(
        drafter,
        target,
        prompts,
        limits=[min(count, most_tokens or count) for count in num_supervised],
        seeds=[_hash(batch, row, f"text:{salt}") for row in rows],
        temperature=temperature,
        source=_select_source(batch.source, rows),
    )
    for row, prompt, text in zip(rows, prompts, generated, strict=True):
        texts[row], masks[row] = text, [False] * len(prompt) + [True] * (len(text) - len(prompt))
    device = target.device
    return dataclasses.replace(
        batch,
        tokens_BT=pad_sequence([torch.tensor(text, device=device) for text in texts], batch_first=True),
        loss_mask_BT=pad_sequence([torch.tensor(mask, device=device) for mask in masks], batch_first=True),
        lengths_B=torch.tensor([len(text) for text in texts], device=device),
    )


def generate_alone(
    drafter: Any,
    target: Target,
    prompts: Sequence[Sequence[int]],
    *,
    limits: Sequence[int],
    seeds: Sequence[int],
    temperature: float,
    source: Source | None = None,
) -> list[list[int]]:
    """Returns each prompt continued by the drafter alone, with up to `limits` tokens or until an end-of-sequence token.

    Every token is sampled from the drafter's own distribution in drafting, with random numbers from the row's seed.
    """
    rows = [list(prompt) for prompt in prompts]
    longest = [len(row) + limit for row, limit in zip(rows, limits, strict=True)]
    eos = frozenset(target.eos_token_ids)
    is_running = [len(row) < length for row, length in zip(rows, longest, strict=True)]
    with _drafting_chains(drafter) as drafting, torch.no_grad():
        drafting.start(_session(target, rows, seeds, temperature, source))
        while any(is_running):
            most = max(length - len(row) for length, row, runs in zip(longest, rows, is_running, strict=True) if runs)
            draft = drafting.propose(most)
            if draft.tree.num_nodes == 1:  # its context is full
                break
            tokens = draft.tokens_BN.tolist()
            counts = [0] * len(rows)
            for row, ids in enumerate(rows):
                if is_running[row]:
                    new = until_end(tokens[row][1:], longest[row] - len(ids), eos)
                    ids += new
                    counts[row] = len(new)
                    is_running[row] = len(ids) < longest[row] and ids[-1] not in eos
            if any(is_running):
                drafting.observe(_accept_all(draft, counts))
    return rows


def cost_ratio(drafter: Any, target: Target) -> float:
    """Returns the time of a drafted token over that of a plain step of the target, both after `CONTEXT` tokens."""
    prompt = [1] * min(CONTEXT, target.context_length // 2)
    source = None
    if target.is_encoder_decoder:
        source_BT = torch.tensor([prompt], device=target.device)
        source = target.encode(source_BT, torch.ones_like(source_BT))
    rows, num_drafted = [prompt], 0

    def draft() -> None:
        nonlocal num_drafted
        proposed = drafting.propose(drafting.config.num_draft)
        num_drafted = proposed.tree.num_nodes - 1

    with _drafting_chains(drafter) as drafting, torch.no_grad():
        drafting.start(_session(target, rows, [0], 1.0, source))
        draft_ms = quickest_ms(draft)
    return draft_ms / max(num_drafted, 1) / verify_ms(target, sizes=(0,))[0]


@dataclass(frozen=True, kw_only=True, eq=False)
class _RowSeededSession(Session):
    """A session without verification in which each row has its own random generator."""

    generators: tuple[torch.Generator, ...]

    def uniforms(self) -> Tensor:
        """Returns one uniform number for each row [B], float64."""
        numbers = [torch.rand((), generator=one, dtype=torch.float64) for one in self.generators]
        return torch.stack(numbers).to(self.target.device)


def _session(
    target: Target, rows: list[list[int]], seeds: Sequence[int], temperature: float, source: Source | None
) -> _RowSeededSession:
    return _RowSeededSession(
        target=target,
        rows=rows,
        cache=target.new_cache(len(rows), source=source),
        sampling=Sampling(temperature=temperature),
        generator=torch.Generator(),
        generators=tuple(torch.Generator().manual_seed(seed) for seed in seeds),
        source=source,
    )


@contextmanager
def _drafting_chains(drafter: Any) -> Iterator[Any]:
    """Yields the drafter set to draft chains without dropout, and restores its configuration and mode afterwards."""
    # A copy would share weights but not the tensors that a drafter caches from them.
    config = drafter.config
    shape = {name: empty for name, empty in (("width", 0), ("tree", ())) if hasattr(config, name)}
    drafter.config = dataclasses.replace(config, **shape)
    was_training = isinstance(drafter, nn.Module) and drafter.training
    if was_training:
        drafter.eval()
    try:
        yield drafter
    finally:
        drafter.config = config
        if was_training:
            drafter.train()


def _accept_all(draft: Draft, counts: list[int]) -> Step:
    """Returns the step that commits the first `counts` drafted tokens of each row, the last one as the next token."""
    paths = [list(range(count)) for count in counts]
    counts_B = torch.tensor(counts, device=draft.tokens_BN.device)
    accepted_B = (counts_B - 1).clamp(min=0)
    order_P = torch.arange(max(counts), device=draft.tokens_BN.device)
    verdict = Verdict(
        path_BP=torch.minimum(order_P, accepted_B[:, None]),
        num_accepted_B=accepted_B,
        next_token_B=draft.tokens_BN.gather(1, counts_B[:, None])[:, 0],
    )
    logits_BNV = torch.empty(*draft.tokens_BN.shape, 0, device=draft.tokens_BN.device)
    return Step(draft=draft, logits_BNV=logits_BNV, hidden={}, verdict=verdict, paths=paths, cost_ms=0.0)


def _select_source(source: Source | None, rows: Sequence[int]) -> Source | None:
    return None if source is None else Source(**{name: part[list(rows)] for name, part in vars(source).items()})


def _hash(batch: Batch, row: int, salt: str) -> int:
    """Returns a number below 2^63 that depends on the row's key and text."""

    text = batch.tokens_BT[row, : int(batch.lengths_B[row])].tolist()
    digest = hashlib.sha256(f"{salt}:{batch.keys[row]}:{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
