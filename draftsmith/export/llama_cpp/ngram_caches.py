"""N-gram cache files of llama.cpp (--lookup-cache-dynamic): the token to draft after contexts of one to four tokens.

A file has no header. Each context is four int32 tokens, -1 after the last; then the number of entries, and a token and
a count for each, all int32 in the machine's byte order. llama.cpp looks up the text's last four tokens, then three, two
and one, and drafts the likeliest entry if the counts are high enough; it never writes the file.

Only what llama.cpp would draft is written, each context with its likeliest token alone, and no context whose token is
drafted after fewer tokens anyway: every request holds a copy of the whole file.

Shape suffixes: S tokens of texts, P positions, X contexts, L length of a context.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from draftsmith.artifacts.artifact import family_of
from draftsmith.export.launch import Launch
from draftsmith.export.llama_cpp.launch import llama_cpp_launch
from draftsmith.export.llama_cpp.targets import served_target
from draftsmith.export.source import ExportSource
from draftsmith.length import policies
from draftsmith.parts.suffix_array import read_shards

CACHE_FILE = "ngrams.bin"
LONGEST = 4
MIN_COUNTS, MIN_PERCENTS = (4, 3, 2, 2), (75, 66, 66, 66)
"""What llama.cpp asks of a context of 1, 2, 3 and 4 tokens: the sum of its counts, and the share of the likeliest."""
CERTAIN = 4
"""A count that it always drafts."""
MIN_CHANCE = 0.5
"""Least probability of a token that is written, for stores of probabilities whose drafter has no such threshold."""
NOTES = (
    "llama.cpp looks up contexts of one to four tokens and drafts eight tokens at most; it also looks up the text"
    " itself, by rules of its own. It drafts other tokens than draftsmith does, and the same text.",
)
Contexts = Mapping[tuple[int, ...], int]
"""The token drafted after each context."""


def cache_writer(contexts: Callable[[ExportSource], Contexts], *notes: str) -> Callable[[ExportSource, Path], Launch]:
    """Returns a writer of an n-gram cache file with the `contexts` of an artifact."""

    def write(source: ExportSource, folder: Path) -> Launch:
        if source.quantise:
            raise ValueError(f"--quantise is {source.quantise!r}, and an n-gram cache has no weights; drop it")
        served = served_target(source)
        found = contexts(source)
        if not found:
            raise ValueError(
                f"{source.artifact} holds no context after which llama.cpp would draft; build it from more text"
            )
        write_cache(folder / CACHE_FILE, found)
        served.write(folder)
        settings = {"lookup-cache-dynamic": str(source.output / CACHE_FILE)}
        return llama_cpp_launch(served, "ngram-cache", settings, notes=(*notes, *NOTES))

    return write


def write_cache(path: Path, contexts: Contexts) -> None:
    """Writes a cache file with one certain token for each context, without those that shorter ones make needless."""
    kept = needed(contexts)
    records = np.full((len(kept), LONGEST + 3), -1, dtype=np.int32)
    for record, (context, token) in zip(records, kept.items(), strict=True):
        record[: len(context)] = context
        record[LONGEST:] = (1, token, CERTAIN)
    records.tofile(path)


def read_cache(path: Path) -> dict[tuple[int, ...], int]:
    """Returns the contexts of a file that `write_cache` wrote."""
    records = np.fromfile(path, dtype=np.int32).reshape(-1, LONGEST + 3)
    return {tuple(token for token in row[:LONGEST] if token >= 0): row[LONGEST + 1] for row in records.tolist()}


def needed(contexts: Contexts) -> dict[tuple[int, ...], int]:
    """Returns the contexts without those after whose last, fewer tokens the same token is drafted."""
    kept: dict[tuple[int, ...], int] = {}
    for context in sorted(contexts, key=len):
        shorter = next((kept[context[at:]] for at in range(1, len(context)) if context[at:] in kept), None)
        if shorter != contexts[context]:
            kept[context] = contexts[context]
    return kept


def contexts_of_texts(source: ExportSource) -> Contexts:
    """Returns the contexts of a datastore of texts (rest, suffix) with counts that llama.cpp drafts from."""
    vocab_size = source.target_info.vocab_size
    return counted([shard.tokens_S for shard in read_shards(source.artifact, vocab_size)], vocab_size)


def counted(texts: list[np.ndarray], vocab_size: int) -> dict[tuple[int, ...], int]:
    """Returns the contexts of texts, in which ids from `vocab_size` up end a text, that pass llama.cpp's thresholds."""
    tokens_S = np.concatenate([*(np.append(text_S, vocab_size) for text_S in texts), []]).astype(np.int64)
    found: dict[tuple[int, ...], int] = {}
    for length in range(1, LONGEST + 1):
        if len(tokens_S) <= length:
            break
        windows_PL = np.lib.stride_tricks.sliding_window_view(tokens_S, length + 1)
        windows_PL = windows_PL[(windows_PL < vocab_size).all(axis=1)]
        if not len(windows_PL):
            break
        ngrams_PL, counts_P = np.unique(windows_PL, axis=0, return_counts=True)  # sorted by context
        firsts_X = np.flatnonzero(np.append(True, (ngrams_PL[1:, :-1] != ngrams_PL[:-1, :-1]).any(axis=1)))
        sums_X = np.add.reduceat(counts_P, firsts_X)
        contexts_P = np.repeat(np.arange(len(firsts_X)), np.diff(np.append(firsts_X, len(counts_P))))
        best_X = np.lexsort((counts_P, contexts_P))[np.append(firsts_X[1:], len(counts_P)) - 1]
        passes_X = (sums_X >= MIN_COUNTS[length - 1]) & (100 * counts_P[best_X] >= MIN_PERCENTS[length - 1] * sums_X)
        for *context, token in ngrams_PL[best_X[passes_X]].tolist():
            found[tuple(context)] = token
    return found


def contexts_of_ngram_model(source: ExportSource) -> Contexts:
    """Returns the contexts of an n-gram model after which a token is likelier than the drafter's threshold."""
    family = family_of(source.manifest, source.artifact)
    model = family.Drafter.load_state(source.artifact, source.config, source.target_info).model
    policy = policies.make(source.config.length)
    min_chance = policy.threshold if isinstance(policy, policies.Confidence) else MIN_CHANCE
    found: dict[tuple[int, ...], int] = {}
    contexts: list[tuple[int, ...]] = [()]
    for node in range(1, len(model.keys_C)):
        parent, farthest = divmod(int(model.keys_C[node]), model.vocab_size + 1)
        contexts.append((farthest, *contexts[parent]))
        # Contexts that begin before a text hold an id outside the vocabulary; their children hold it too.
        if model.vocab_size not in contexts[node] and model.chances_C[node] >= min_chance:
            found[contexts[node]] = int(model.best_C[node])
    return found


def contexts_of_trigrams(source: ExportSource) -> Contexts:
    """Returns the pairs of tokens in a table of tri-grams whose likeliest successor passes llama.cpp's threshold."""
    table: dict[str, Any] = {
        name: np.load(source.artifact / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        for name in ("keys", "begins", "tokens", "weights")
    }
    return dict(_likely_pairs(**table, vocab_size=source.target_info.vocab_size))


def _likely_pairs(
    *, keys: np.ndarray, begins: np.ndarray, tokens: np.ndarray, weights: np.ndarray, vocab_size: int
) -> Iterator[tuple[tuple[int, ...], int]]:
    for number, key in enumerate(keys.tolist()):
        span = slice(begins[number], begins[number + 1])
        best = int(weights[span].argmax())
        if 100 * weights[span][best] >= MIN_PERCENTS[1]:
            yield divmod(key, vocab_size), int(tokens[span][best])
