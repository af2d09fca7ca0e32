"""Text for stores: what drafters that look things up are built from, part by part, and how well they then draft.

Shape suffixes: B rows, T positions, N n-grams.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors.numpy import save_file
from torch.utils.data import Subset
from tqdm import tqdm

import draftsmith
from data.batches import Batch, Example
from data.shards import missing_shards, open_folder, write_whole
from draftsmith import Target
from trainers import Metrics

MARKER = "parts.json"
NGRAM = 4
"""Tokens in a row by which two texts are told to be alike."""
ASIDE = 50
"""One document of so many is what the others are compared with."""
Row = TypeVar("Row")


def documents(rows: Sequence[Example], context: int = 0) -> Iterator[np.ndarray]:
    """Yields the text to learn from (int64): each row's supervised runs, each text once.

    A run comes with up to `context` tokens that stand before it, but none of the run before.
    """
    seen = set()
    for text in _runs(rows, context):
        digest = _digest(text)
        if digest not in seen:
            seen.add(digest)
            yield text


def keep(rows: Sequence[Example], budget_tokens: int, context: int = 0) -> list[np.ndarray]:
    """Returns as many of `documents(rows, context)`, in their order, as the budget holds, and prints what it dropped.

    Those are kept for which t * (h + 1) / (l + n) is largest: the text came t times and is l tokens long, and h of its
    n-grams (n = 4) occur in text set aside, a fiftieth of the documents, which is not compared with itself. One token
    more is reckoned for each, as a store parts it from the next. Raises ValueError if the budget holds none.
    """
    times: Counter[bytes] = Counter()
    texts: dict[bytes, np.ndarray] = {}
    for text in _runs(tqdm(rows, desc="reading", unit="row"), context):
        digest = _digest(text)
        times[digest] += 1
        texts.setdefault(digest, text)
    num_tokens = sum(len(text) + 1 for text in texts.values())
    if num_tokens <= budget_tokens:
        return list(texts.values())
    hits = _hits(texts)
    worth = {name: times[name] * (hits[name] + 1) / (len(text) + NGRAM) for name, text in texts.items()}
    kept, num_left = set(), budget_tokens
    for name in sorted(texts, key=worth.__getitem__, reverse=True):
        if len(texts[name]) < num_left:
            kept.add(name)
            num_left -= len(texts[name]) + 1
    if not kept:
        raise ValueError(f"a budget of {budget_tokens:,} tokens holds no document; give a larger one")
    num_hits = sum(hits.values())
    lost = sum(hits[name] for name in texts if name not in kept) / num_hits if num_hits else 0
    print(
        f"the budget keeps {len(kept):,} of {len(texts):,} documents, {budget_tokens - num_left:,} of {num_tokens:,}"
        f" tokens; dropped with the rest: {lost:.0%} of what recurs in text set aside"
    )
    return [text for name, text in texts.items() if name in kept]


def parts(
    rows: Sequence[Row], output: Path, size: int, make: Callable[[Sequence[Row]], dict[str, np.ndarray]]
) -> list[Path]:
    """Returns the files `output/parts/NNNN.safetensors`, each what `make` returns for the next `size` rows.

    Every file is there whole or not at all, and those that a killed build left are kept; they go once the run is
    finished. Raises ValueError for parts made of another number of rows or of another size.
    """
    folder = output / "parts"
    open_folder(folder, MARKER, {"num_rows": len(rows), "size": size}, notes={})
    begins = range(0, len(rows), size)
    names = [f"{number:04d}.safetensors" for number in range(len(begins))]
    missing = missing_shards(folder, names)
    spans = [range(begin, min(begin + size, len(rows))) for begin in begins]
    num_left = sum(len(spans[number]) for number in missing)
    with tqdm(total=len(rows), initial=len(rows) - num_left, desc="building", unit="row") as bar:
        for number in missing:
            made = make(Subset(rows, spans[number]))  # type: ignore[arg-type]
            tensors = {name: np.ascontiguousarray(array) for name, array in made.items()}
            write_whole(folder / names[number], lambda path, tensors=tensors: save_file(tensors, path))  # type: ignore[misc]
            bar.update(len(spans[number]))
    return [folder / name for name in names]


def judge(drafter: Any, batch: Batch, target: Target, new_tokens: int = 48) -> Metrics:
    """Returns the tokens accepted a round, the target's own not counted, in greedily continuing each row's first half.

    At most `new_tokens` are written to a row, fewer where the target's context ends.
    """
    halves_B = (batch.lengths_B // 2).clamp(min=1)
    longest = int(halves_B.max())
    stats = draftsmith.generate(
        target,
        batch.tokens_BT[:, :longest].to(target.device),
        drafter,
        attention_mask=(torch.arange(longest) < halves_B[:, None]).to(target.device),
        max_new_tokens=min(new_tokens, target.context_length - longest),
    ).stats
    return {"acceptance": (torch.tensor(stats.new_tokens - stats.steps), stats.steps)}


def _runs(rows: Iterable[Example], context: int) -> Iterator[np.ndarray]:
    for row in rows:
        tokens_T, mask_T = row.tokens_T.numpy(), row.loss_mask_T.numpy()
        edges = np.flatnonzero(np.diff(mask_T, prepend=False, append=False)).tolist()
        last = 0
        for begin, end in zip(edges[::2], edges[1::2], strict=True):
            yield tokens_T[max(last, begin - context) : end]
            last = end


def _digest(text: np.ndarray) -> bytes:
    return hashlib.blake2b(text.astype("<i8").tobytes(), digest_size=16).digest()


def _hits(texts: dict[bytes, np.ndarray]) -> dict[bytes, int]:
    """Returns for each text how many of its n-grams, each counted once, occur in texts set aside other than itself."""
    # A digest is as good as chance, and the same wherever the text is met.
    aside = set(sorted(texts)[: max(1, len(texts) // ASIDE)])
    known_N, times_N = np.unique(np.concatenate([_ngrams(texts[name]) for name in aside]), return_counts=True)
    hits = {}
    for name, text in texts.items():
        own_N = _ngrams(text)
        places_N = np.searchsorted(known_N, own_N).clip(max=max(len(known_N) - 1, 0))
        is_known_N = known_N[places_N] == own_N if len(known_N) else np.zeros(len(own_N), bool)
        hits[name] = int((times_N[places_N[is_known_N]] > (name in aside)).sum())
    return hits


def _ngrams(text: np.ndarray) -> np.ndarray:
    """Returns a hash (uint64) of each n-gram of the text, every one once."""
    if len(text) < NGRAM:
        return np.zeros(0, np.uint64)
    hashes_N = np.zeros(len(text) - NGRAM + 1, np.uint64)
    for place in range(NGRAM):
        hashes_N = hashes_N * np.uint64(0x9E3779B97F4A7C15) + text[place : place + len(hashes_N)].astype(np.uint64)
        hashes_N ^= hashes_N >> np.uint64(29)
    return np.unique(hashes_N)
