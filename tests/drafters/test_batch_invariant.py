"""Batch-invariant decoding: with every family's drafter the text is that of plain decoding, greedy and coupled.

Shape suffixes: B rows, N nodes, V vocabulary.
"""

from functools import cache
from typing import Any

import pytest
import torch

import draftsmith
from draftsmith import Target
from draftsmith.artifacts.families import find, names
from tests.drafters.test_every_family import example_of
from tests.support.family import Watched, built, texts
from tests.support.models import CAUSAL, SEQ2SEQ, padded, prompts, tiny_model

NUM_NEW = 20
MODES: tuple[dict[str, Any], ...] = ({}, {"temperature": 1.0, "seed": 7, "verifier": "coupled"})
FAST = ("lookup", "medusa", "kangaroo")
"""Families of the default suite: a chain without weights, a tree, a chain that resumes the target from a layer."""


@cache
def invariant_target(architecture: str, dtype: torch.dtype) -> Target:
    return Target(tiny_model(architecture).to(dtype), batch_invariant=True)


@cache
def plain_texts(target: Target, num_rows: int, mode: int) -> list[list[int]]:
    ids, mask = padded(prompts(num_rows), side="left")
    return texts(draftsmith.generate(target, ids, attention_mask=mask, max_new_tokens=NUM_NEW, **MODES[mode]))


def check(family: str, target: Target, *batches: int) -> None:
    drafter = built(find(family), example_of(family), target)
    for num_rows in batches:
        ids, mask = padded(prompts(num_rows), side="left")
        for mode, settings in enumerate(MODES):
            watched = Watched(drafter)
            given = {"attention_mask": mask, "max_new_tokens": NUM_NEW} | settings
            out = draftsmith.generate(drafter.target, ids, watched, **given)
            assert texts(out) == plain_texts(drafter.target, num_rows, mode), (family, num_rows, settings)
            assert watched.num_drafted > 0, "nothing was drafted"


@pytest.mark.parametrize("family", FAST)
def test_text_is_that_of_plain_decoding(family: str) -> None:
    check(family, invariant_target("llama", torch.bfloat16), 3)


@pytest.mark.slow
@pytest.mark.parametrize("family", names())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("architecture", CAUSAL)
def test_text_is_that_of_plain_decoding_everywhere(architecture: str, dtype: torch.dtype, family: str) -> None:
    check(family, invariant_target(architecture, dtype), 1, 3)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("architecture", SEQ2SEQ)
def test_text_is_that_of_plain_decoding_for_encoder_decoders(architecture: str, dtype: torch.dtype) -> None:
    for family in ("lookup", "suffix", "ngram"):
        check(family, invariant_target(architecture, dtype), 1, 3)
