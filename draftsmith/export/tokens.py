"""Exports token-only drafters: vLLM runs draftsmith's own proposer, and SGLang searches their text as a corpus.

Shape suffixes: S tokens of one text or several.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils.logging import tqdm

from draftsmith.export.launch import ARTIFACT_VARIABLE, PROPOSER, Launch, sglang_launch, vllm_launch
from draftsmith.export.source import ExportSource
from draftsmith.parts.suffix_array import read_shards

ARTIFACT, CORPUS = "artifact", "corpus.jsonl"


def proposer_writer(num_draft: Callable[[Any], int], *notes: str) -> Callable[[ExportSource, Path], Launch]:
    """Returns a writer of a copy of the artifact, which vLLM runs with draftsmith's `Proposer`.

    `num_draft` returns the maximum length of a chain for the family's configuration.
    """

    def write(source: ExportSource, folder: Path) -> Launch:
        source.copy_artifact(folder / ARTIFACT)
        settings = {"method": "custom_class", "model": PROPOSER, "num_speculative_tokens": num_draft(source.config)}
        environment = {ARTIFACT_VARIABLE: str(source.output / ARTIFACT)}
        requirements = (
            "vLLM verifies chains: only the first path of a tree is drafted.",
            "vLLM verifies the likeliest token at each position at every temperature, and accepts fewer above 0 than a"
            " drafter that samples its drafts.",
            "draftsmith must be installed beside vLLM, which requires an older transformers: pip install --no-deps.",
        )
        return vllm_launch(source, settings, environment=environment, notes=(*notes, *requirements))

    return write


def corpus_writer(num_draft: Callable[[Any], int]) -> Callable[[ExportSource, Path], Launch]:
    """Returns a writer of a datastore's texts as a corpus that SGLang searches in addition to its own output.

    SGLang tokenizes the texts again, and the tokens may differ.
    """

    def write(source: ExportSource, folder: Path) -> Launch:
        tokenizer = source.target_info.tokenizer
        if tokenizer is None:
            raise ValueError(
                f"{source.target_name} has no tokenizer, and SGLang's corpora are text; save one in its folder"
            )
        texts = list(_texts(source))
        if not texts:
            raise ValueError(f"{source.artifact} contains no text; build it from data first")
        num_tokens = num_same = 0
        with (folder / CORPUS).open("w") as file:
            for text_S in tqdm(texts, desc="Writing texts", unit="text"):
                ids = text_S.tolist()
                text = tokenizer.decode(ids)
                retokenized = tokenizer.encode(text, add_special_tokens=False)
                num_tokens, num_same = num_tokens + len(retokenized) + 1, num_same + (retokenized == ids)
                file.write(json.dumps(text) + "\n")
        max_draft = num_draft(source.config)
        settings = {
            "algorithm": "NGRAM",
            "num-draft-tokens": max_draft + 1,
            "ngram-external-corpus-path": str(source.output / CORPUS),
            "ngram-external-sam-budget": max_draft,
            "ngram-external-corpus-max-tokens": num_tokens,
        }
        same = f"{num_same} of {len(texts)} texts are tokenized as in the datastore."
        return sglang_launch(source, settings, notes=(same,))

    return write


def _texts(source: ExportSource) -> Iterator[np.ndarray]:
    """Yields the ids of each text in the artifact's suffix arrays, which separate texts by an id >= vocab_size."""
    vocab_size = source.target_info.vocab_size
    for shard in read_shards(source.artifact, vocab_size):
        for part_S in np.split(shard.tokens_S, (shard.tokens_S >= vocab_size).nonzero()[0]):
            text_S = part_S[part_S < vocab_size]
            if len(text_S):
                yield text_S
