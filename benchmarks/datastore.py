"""Measures a datastore: tokens sorted per second, and microseconds per look-up.

    .venv/bin/python benchmarks/datastore.py                # ten million tokens made from the pocket's text
    .venv/bin/python benchmarks/datastore.py --num-shards 4

The text is made of `--data`'s documents, sampled repeatedly with every tenth token replaced, so that matches have all
lengths; look-ups are at random positions of documents sampled in the same way. Times are thread CPU times.

A shared core of an AMD EPYC, 10 million tokens: sorted at 4.5 million tokens/s (6.1 in four shards), 59 MB; the longest
match in 45 us (99 at the 99th percentile), with the tree 116 (451); in four shards 161 and 234. Two threads over eight
shards took longer than one, 0.36 ms against 0.28: Python's lock is held throughout.
"""

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data import POCKET
from data.examples import open_examples
from draftsmith import Target
from draftsmith.drafters.rest import Config, Drafter
from draftsmith.length.costs import num_threads
from eval import hardware
from trainers.corpora.corpus import documents
from trainers.corpora.suffix_arrays import build
from trainers.training.run_settings import DEFAULT_DATA
from trainers.training.settings import parse_settings


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
    """Sizes of the datastore and number of look-ups."""

    target: str = str(POCKET)
    """A transformers folder or hub name, for its tokenizer."""
    data: str = DEFAULT_DATA
    """Source of the datastore's text."""
    num_tokens: int = 10_000_000
    """Tokens in the datastore, rounded to whole documents."""
    num_shards: int = 1
    """Number of files that it is split into."""
    changed: float = 0.1
    """Share of tokens that are replaced."""
    num_queries: int = 3_000
    """Number of look-ups timed."""
    seed: int = 0
    """Seed of the sampled documents."""


def main(run: BenchmarkSettings, config: Config) -> None:
    target = Target.from_pretrained(run.target)
    texts = list(documents(open_examples(run.data, target)))
    draw = np.random.default_rng(run.seed)
    known = np.concatenate(texts)
    groups = [
        sample_documents(texts, known, run.num_tokens // run.num_shards, run.changed, draw)
        for _ in range(run.num_shards)
    ]
    num_tokens = sum(len(text) + 1 for group in groups for text in group)
    with num_threads(1):
        machine = hardware.describe(torch.device("cpu"))
        print(f"{machine}, 1 thread; {num_tokens:,} tokens; commit {hardware.commit() or 'unknown'}")
        began = time.process_time()
        shards = tuple(build(group, target.vocab_size) for group in groups)
        seconds = time.process_time() - began
        num_bytes = sum(array.nbytes for shard in shards for array in shard.arrays().values())
        print(f"sorted: {num_tokens / seconds / 1e6:.2f} million tokens/s; {num_bytes / 1e6:.0f} MB")
        look_up(
            Drafter(config, target, shards),
            sample_documents(texts, known, 200 * run.num_queries, run.changed, draw),
            run,
            draw,
        )


def sample_documents(
    texts: list[np.ndarray], known: np.ndarray, num_tokens: int, changed: float, draw: np.random.Generator
) -> list[np.ndarray]:
    """Returns `num_tokens` of documents sampled with replacement, a share `changed` of their tokens replaced."""
    found: list[np.ndarray] = []
    while num_tokens > 0:
        text = texts[draw.integers(len(texts))]
        others = known[draw.integers(len(known), size=len(text))]
        found.append(np.where(draw.random(len(text)) < changed, others, text))
        num_tokens -= len(text) + 1
    return found


def look_up(drafter: Drafter, texts: list[np.ndarray], run: BenchmarkSettings, draw: np.random.Generator) -> None:
    """Prints the median and 99th-percentile time of finding the longest match and of building its tree."""
    config = drafter.config
    lengths, matching_us, drafting_us = [], [], []
    for _ in range(run.num_queries):
        text = texts[draw.integers(len(texts))]
        given = text[: draw.integers(1, len(text) + 1)].tolist()
        began = time.thread_time()
        matches = [shard.match(given, config.max_match, config.min_match) for shard in drafter.shards]
        matching_us.append(1e6 * (time.thread_time() - began))
        drafter.tree(given, config.num_draft)
        drafting_us.append(1e6 * (time.thread_time() - began) - matching_us[-1])
        lengths.append(max(length for length, _ in matches))
    for name, times in (("longest match", matching_us), ("match and tree", drafting_us)):
        print(f"{name}: {statistics.median(times):.0f} us, {np.percentile(times, 99):.0f} us at the 99th percentile")
    print(f"longest matches: {statistics.mean(lengths):.1f} tokens, none {lengths.count(0) / len(lengths):.0%}")


if __name__ == "__main__":
    try:
        main(*parse_settings(BenchmarkSettings, Config, description=__doc__))
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
