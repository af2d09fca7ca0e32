"""Documents that retrieval drafters are built from, their selection within a budget, and builds in resumable chunks.

Shape suffixes: T positions, N n-grams, V vocabulary, W tokens of a shortlist.
"""

import hashlib
import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from safetensors.numpy import save_file
from torch.utils.data import Subset
from tqdm import tqdm

from data.batches import Example
from data.shards import missing_shards, open_folder, write_atomically
from draftsmith.parts.neural.shortlist import Shortlist

MARKER = "parts.json"
NGRAM = 4
"""Length of the n-grams by which documents are compared."""
REFERENCE_EVERY = 10
"""One document in this many belongs to the reference set that documents are compared with."""
Row = TypeVar("Row")


def documents(rows: Sequence[Example], context: int = 0) -> Iterator[np.ndarray]:
    """Yields the documents (int64) of the rows: their supervised runs, each text once for each encoder input.

    A run is preceded by up to `context` tokens, none of them from the run before; for an encoder-decoder by its decoder
    start token, which is the pending token when the first token is drafted.
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
    """Returns the most useful `documents(rows, context)` that fit the budget, in their order; prints what was dropped.

    Greedily selects the document with the largest t h / l, ties going to the larger t: it occurred t times and is l
    tokens long; h sums over its n-grams (n = 4) the number of other reference documents (a tenth of all) that contain
    the n-gram, divided by (k + 1)^2 if k selected documents contain it already. Each document counts one token more,
    for the separator in a datastore. Raises ValueError if no document fits.
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
    chosen, coverage = _select(texts, times, budget_tokens)
    if not chosen:
        raise ValueError(f"no document fits into the budget of {budget_tokens:,} tokens; give a larger one")
    num_kept = sum(len(texts[name]) + 1 for name in chosen)
    print(
        f"the budget keeps {len(chosen):,} of {len(texts):,} documents, {num_kept:,} of {num_tokens:,} tokens;"
        f" they contain {coverage:.0%} of the recurring n-grams of the reference documents"
    )
    kept = set(chosen)
    return [text for name, text in texts.items() if name in kept]


def most_frequent_tokens(rows: Sequence[Example], num_tokens: int, vocab_size: int) -> torch.Tensor:
    """Returns the tokens [num_tokens] most often supervised in `rows`, ascending, ties going to lower ids.

    Prints the fraction of the text that they cover.
    """
    counts_V = torch.zeros(vocab_size, dtype=torch.long)
    for row in tqdm(rows, desc="counting tokens", unit="row"):
        counts_V += row.tokens_T[row.loss_mask_T].bincount(minlength=vocab_size)
    ids = counts_V.argsort(descending=True, stable=True)[:num_tokens].sort().values
    print(f"{num_tokens:,} of {vocab_size:,} tokens cover {counts_V[ids].sum() / counts_V.sum():.2%} of the text")
    return ids


def fill_shortlist(shortlist: Shortlist, rows: Sequence[Example]) -> None:
    """Fills a shortlist, unless it contains all tokens, with the tokens most often supervised in `rows`."""
    if not shortlist.is_whole:
        shortlist.set_tokens(
            most_frequent_tokens(rows, len(shortlist), shortlist.vocab_size).to(shortlist.ids_W.device)
        )


def build_chunks(
    rows: Sequence[Row], output: Path, size: int, make: Callable[[Sequence[Row]], dict[str, np.ndarray]]
) -> list[Path]:
    """Writes the arrays that `make` returns for every `size` rows to files of their own, and returns their paths.

    The files `output/parts/NNNN.safetensors` are written atomically, so that a killed build continues after the last
    one; they are removed once the run is finished. Raises ValueError for existing files of another number of rows or
    another size.
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
            arrays = make(Subset(rows, spans[number]))  # type: ignore[arg-type]
            tensors = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
            write_atomically(folder / names[number], lambda path, tensors=tensors: save_file(tensors, path))  # type: ignore[misc]
            bar.update(len(spans[number]))
    return [folder / name for name in names]


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


def _select(texts: dict[bytes, np.ndarray], times: Counter[bytes], budget_tokens: int) -> tuple[list[bytes], float]:
    """Returns the selected documents, in order of selection, and the fraction of recurring n-grams they contain."""
    indices, weights, recurring_N = _recurring(texts)
    num_selected_N = np.zeros(len(recurring_N))

    def rank(name: bytes) -> tuple[float, int, bytes]:
        value = (weights[name] / (num_selected_N[indices[name]] + 1) ** 2).sum()
        return -times[name] * float(value) / len(texts[name]), -times[name], name

    chosen: list[bytes] = []
    num_left = budget_tokens
    queue = [rank(name) for name in texts]
    heapq.heapify(queue)
    while queue:
        name = heapq.heappop(queue)[-1]
        # Values only fall as documents are selected, so one that is still first needs no comparison with the rest.
        if queue and (current := rank(name)) > queue[0]:
            heapq.heappush(queue, current)
        elif len(texts[name]) < num_left:
            chosen.append(name)
            num_left -= len(texts[name]) + 1
            num_selected_N[indices[name]] += 1
    total = recurring_N.sum()
    return chosen, float(recurring_N[num_selected_N > 0].sum() / total) if total else 1.0


def _recurring(
    texts: dict[bytes, np.ndarray],
) -> tuple[dict[bytes, np.ndarray], dict[bytes, np.ndarray], np.ndarray]:
    """Returns each document's n-grams among the reference documents' N n-grams (as indices), the number of other
    reference documents that contain each, and the number of reference documents with each n-gram [N], 0 for n-grams
    of a single document.
    """
    # Digests serve as random numbers that are the same in every run.
    reference = set(sorted(texts)[: max(1, len(texts) // REFERENCE_EVERY)])
    known_N, times_N = np.unique(np.concatenate([_ngrams(texts[name]) for name in reference]), return_counts=True)
    indices, weights = {}, {}
    num_documents_N = np.zeros(len(known_N), int)
    for name, text in texts.items():
        _, at, _ = np.intersect1d(known_N, _ngrams(text), assume_unique=True, return_indices=True)
        num_documents_N[at] += 1
        indices[name], weights[name] = at, times_N[at] - (name in reference)
    return indices, weights, np.where(num_documents_N > 1, times_N, 0)


def _ngrams(text: np.ndarray) -> np.ndarray:
    """Returns the hashes (uint64) of the text's distinct n-grams."""
    if len(text) < NGRAM:
        return np.zeros(0, np.uint64)
    hashes_N = np.zeros(len(text) - NGRAM + 1, np.uint64)
    for offset in range(NGRAM):
        hashes_N = hashes_N * np.uint64(0x9E3779B97F4A7C15) + text[offset : offset + len(hashes_N)].astype(np.uint64)
        hashes_N ^= hashes_N >> np.uint64(29)
    return np.unique(hashes_N)
