"""Drafters that go by tokens alone: settings by which vLLM runs draftsmith itself, and corpora for SGLang.

Shape suffixes: S tokens of one text or several.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils.logging import tqdm

from draftsmith.export.given import Given
from draftsmith.export.launch import ARTIFACT_VARIABLE, PROPOSER, Launch, for_sglang, for_vllm
from draftsmith.parts.suffix_array import read_shards

ARTIFACT, CORPUS = "artifact", "corpus.jsonl"


def for_proposer(num_draft: Callable[[Any], int], *notes: str) -> Callable[[Given, Path], Launch]:
    """Returns what writes a copy of the artifact and how vLLM is to run it by draftsmith's own class.

    `num_draft` tells of the family's configuration how many tokens a chain has at most.
    """

    def write(given: Given, folder: Path) -> Launch:
        given.copy_artifact(folder / ARTIFACT)
        settings = {"method": "custom_class", "model": PROPOSER, "num_speculative_tokens": num_draft(given.config)}
        environment = {ARTIFACT_VARIABLE: str(given.output / ARTIFACT)}
        own = (
            "vLLM verifies chains: of a tree the first path is drafted.",
            "draftsmith must be installed beside vLLM, which asks for an older transformers: pip install --no-deps.",
        )
        return for_vllm(given, settings, environment=environment, notes=(*notes, *own))

    return write


def for_corpus(num_draft: Callable[[Any], int]) -> Callable[[Given, Path], Launch]:
    """Returns what writes the texts of a store as a corpus that SGLang searches beside what it generates.

    SGLang cuts them into tokens anew, which may be others.
    """

    def write(given: Given, folder: Path) -> Launch:
        tokenizer = given.facts.tokenizer
        if tokenizer is None:
            raise ValueError(
                f"{given.target_name} has no tokenizer, and SGLang's corpora are text; save one in its folder"
            )
        texts = list(_texts(given))
        if not texts:
            raise ValueError(f"{given.artifact} holds no text; build it from data first")
        num_tokens = num_same = 0
        with (folder / CORPUS).open("w") as file:
            for text_S in tqdm(texts, desc="Writing texts", unit="text"):
                ids = text_S.tolist()
                text = tokenizer.decode(ids)
                again = tokenizer.encode(text, add_special_tokens=False)
                num_tokens, num_same = num_tokens + len(again) + 1, num_same + (again == ids)
                file.write(json.dumps(text) + "\n")
        most = num_draft(given.config)
        settings = {
            "algorithm": "NGRAM",
            "num-draft-tokens": most + 1,
            "ngram-external-corpus-path": str(given.output / CORPUS),
            "ngram-external-sam-budget": most,
            "ngram-external-corpus-max-tokens": num_tokens,
        }
        same = f"{num_same} of {len(texts)} texts are cut into the very tokens that the store has."
        return for_sglang(given, settings, notes=(same,))

    return write


def _texts(given: Given) -> Iterator[np.ndarray]:
    """Yields the ids of each text in the artifact's suffix arrays, where an id outside the vocabulary ends it."""
    vocab_size = given.facts.vocab_size
    for shard in read_shards(given.artifact, vocab_size):
        for part_S in np.split(shard.tokens_S, (shard.tokens_S >= vocab_size).nonzero()[0]):
            text_S = part_S[part_S < vocab_size]
            if len(text_S):
                yield text_S
