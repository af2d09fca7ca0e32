"""Text for stores: what drafters that look things up are built from, part by part, and how well they then draft.

Shape suffixes: B rows, T positions, N n-grams.
"""

import hashlib
import heapq
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
from draftsmith.parts.neural.shortlist import Shortlist
from trainers import Metrics

MARKER = "parts.json"
NGRAM = 4
"""Tokens in a row by which two texts are told to be alike."""
ASIDE = 10
"""One document of so many is what the others are compared with."""
Row = TypeVar("Row")


def documents(rows: Sequence[Example], context: int = 0) -> Iterator[np.ndarray]:
    """Yields the text to learn from (int64): each row's supervised runs, each text once of each source.

    A run comes with up to `context` tokens that stand before it, but none of the run before; an encoder-decoder's with
    the token that its decoder begins with, which is what is pending when the first token is drafted.
    """
    seen = set()
    for row in rows:
        source = np.zeros(0, np.int64) if row.source_S is None else row.source_S.numpy()
        for text in _runs([row], context):
            digest = _digest(np.concatenate([source, [-1], text]))
            if digest not in seen:
                seen.add(digest)
                yield text


def select_documents(rows: Sequence[Example], budget_tokens: int, context: int = 0) -> list[np.ndarray]:
    """Returns as many of `documents(rows, context)`, in their order, as the budget holds, and prints what it dropped.

    The next one kept is always that with the largest t h / l, of equal ones the one that came oftenest: the text came t
    times and is l tokens long; h is what its n-grams (n = 4) are worth: the number of other texts set aside that hold
    one, a tenth of all, over (k + 1)^2 where k texts kept before hold it too. One token more is reckoned for each, as a
    store parts it from the next. Raises ValueError if the budget holds none.
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
    chosen, share = _chosen(texts, times, budget_tokens)
    if not chosen:
        raise ValueError(f"a budget of {budget_tokens:,} tokens holds no document; give a larger one")
    num_kept = sum(len(texts[name]) + 1 for name in chosen)
    print(
        f"the budget keeps {len(chosen):,} of {len(texts):,} documents, {num_kept:,} of {num_tokens:,} tokens;"
        f" {share:.0%} of what recurs in text set aside is among them, the rest was dropped"
    )
    kept = set(chosen)
    return [text for name, text in texts.items() if name in kept]


def most_frequent_tokens(rows: Sequence[Example], num_tokens: int, vocab_size: int) -> torch.Tensor:
    """Returns the tokens [num_tokens] most often supervised in `rows`, ascending, ties going to lower ids.

    Prints what share of the text they cover.
    """
    counts_V = torch.zeros(vocab_size, dtype=torch.long)
    for row in tqdm(rows, desc="counting tokens", unit="row"):
        counts_V += row.tokens_T[row.loss_mask_T].bincount(minlength=vocab_size)
    ids = counts_V.argsort(descending=True, stable=True)[:num_tokens].sort().values
    print(f"{num_tokens:,} of {vocab_size:,} tokens cover {counts_V[ids].sum() / counts_V.sum():.2%} of the text")
    return ids


def fill_shortlist(shortlist: Shortlist, rows: Sequence[Example]) -> None:
    """Makes a shortlist, unless it is of all tokens, that of the tokens most often supervised in `rows`."""
    if not shortlist.is_whole:
        shortlist.take(most_frequent_tokens(rows, len(shortlist), shortlist.vocab_size).to(shortlist.ids_W.device))


def build_chunks(
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


def evaluate(drafter: Any, batch: Batch, target: Target, new_tokens: int = 48) -> Metrics:
    """Returns the tokens accepted a round, the target's own not counted, in greedily continuing each row's first half.

    An encoder-decoder reads each row's source and writes from the beginning. At most `new_tokens` are written to a row,
    fewer where the target's context ends.
    """
    if batch.source_BS is None or batch.source_lengths_B is None:
        prompts_BT, lengths_B = batch.tokens_BT, (batch.lengths_B // 2).clamp(min=1)
    else:
        prompts_BT, lengths_B = batch.source_BS, batch.source_lengths_B
    longest = int(lengths_B.max())
    room = target.context_length - (1 if target.is_encoder_decoder else longest)
    stats = draftsmith.generate(
        target,
        prompts_BT[:, :longest].to(target.device),
        drafter,
        attention_mask=(torch.arange(longest, device=lengths_B.device) < lengths_B[:, None]).to(target.device),
        max_new_tokens=min(new_tokens, room),
    ).stats
    return {"acceptance": (torch.tensor(stats.new_tokens - stats.steps), stats.steps)}


def _runs(rows: Iterable[Example], context: int) -> Iterator[np.ndarray]:
    for row in rows:
        tokens_T, mask_T = row.tokens_T.numpy(), row.loss_mask_T.numpy()
        edges = np.flatnonzero(np.diff(mask_T, prepend=False, append=False)).tolist()
        last, before = 0, context if row.source_S is None else max(context, 1)
        for begin, end in zip(edges[::2], edges[1::2], strict=True):
            yield tokens_T[max(last, begin - before) : end]
            last = end


def _digest(text: np.ndarray) -> bytes:
    return hashlib.blake2b(text.astype("<i8").tobytes(), digest_size=16).digest()


def _chosen(texts: dict[bytes, np.ndarray], times: Counter[bytes], budget_tokens: int) -> tuple[list[bytes], float]:
    """Returns what `keep` keeps, in the order of choice, and the share of recurring n-grams set aside that it holds."""
    places, weights, recurring_N = _recurring(texts)
    num_before_N = np.zeros(len(recurring_N))

    def rank(name: bytes) -> tuple[float, int, bytes]:
        worth = (weights[name] / (num_before_N[places[name]] + 1) ** 2).sum()
        return -times[name] * float(worth) / len(texts[name]), -times[name], name

    chosen: list[bytes] = []
    num_left = budget_tokens
    queue = [rank(name) for name in texts]
    heapq.heapify(queue)
    while queue:
        name = heapq.heappop(queue)[-1]
        # Ranks only fall while others are kept: one that still comes first need not be compared with the rest.
        if queue and (now := rank(name)) > queue[0]:
            heapq.heappush(queue, now)
        elif len(texts[name]) < num_left:
            chosen.append(name)
            num_left -= len(texts[name]) + 1
            num_before_N[places[name]] += 1
    total = recurring_N.sum()
    return chosen, float(recurring_N[num_before_N > 0].sum() / total) if total else 1.0


def _recurring(
    texts: dict[bytes, np.ndarray],
) -> tuple[dict[bytes, np.ndarray], dict[bytes, np.ndarray], np.ndarray]:
    """Returns which n-grams of texts set aside each text holds, how many others of these hold each, and, of every
    such n-gram that more than one text holds, how many of those set aside do.
    """
    # A digest is as good as chance, and the same wherever the text is met.
    aside = set(sorted(texts)[: max(1, len(texts) // ASIDE)])
    known_N, times_N = np.unique(np.concatenate([_ngrams(texts[name]) for name in aside]), return_counts=True)
    places, weights = {}, {}
    holders_N = np.zeros(len(known_N), int)
    for name, text in texts.items():
        _, at, _ = np.intersect1d(known_N, _ngrams(text), assume_unique=True, return_indices=True)
        holders_N[at] += 1
        places[name], weights[name] = at, times_N[at] - (name in aside)
    return places, weights, np.where(holders_N > 1, times_N, 0)


def _ngrams(text: np.ndarray) -> np.ndarray:
    """Returns a hash (uint64) of each n-gram of the text, every one once."""
    if len(text) < NGRAM:
        return np.zeros(0, np.uint64)
    hashes_N = np.zeros(len(text) - NGRAM + 1, np.uint64)
    for place in range(NGRAM):
        hashes_N = hashes_N * np.uint64(0x9E3779B97F4A7C15) + text[place : place + len(hashes_N)].astype(np.uint64)
        hashes_N ^= hashes_N >> np.uint64(29)
    return np.unique(hashes_N)
