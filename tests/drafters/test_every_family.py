"""Tests of every family with every architecture: decoding is lossless, greedy and sampled.

A family's own test defines `EXAMPLE`, a configuration, or a function of the target that returns one or the drafter.
"""

import importlib
from typing import Any

import pytest
import torch
from torch import nn

import draftsmith
from draftsmith import Target
from draftsmith.artifacts.families import find, names
from draftsmith.core.drafter import Session
from tests.support.distributions import check_distribution, distribution_target
from tests.support.family import Watched, built, texts
from tests.support.models import (
    CAUSAL,
    VOCAB_SIZE,
    greedy_by_model,
    greedy_by_transformers,
    padded,
    prompts,
    tiny_model,
    tiny_target,
)

NUM_NEW = 20
NUM_SAMPLES = 20_000


def example_of(family: str) -> Any:
    return importlib.import_module(f"tests.drafters.test_{family}").EXAMPLE


def check(family: str, architecture: str, dtype: torch.dtype, *batches: tuple[int, str]) -> None:
    target = tiny_target(architecture, dtype=dtype)
    drafter = built(find(family), example_of(family), target)
    modules = module_names(drafter)
    for num_rows, side in batches:
        ids, mask = padded(prompts(num_rows), side=side)
        watched = Watched(drafter)
        out = draftsmith.generate(drafter.target, ids, watched, attention_mask=mask, max_new_tokens=NUM_NEW)
        if drafter.target is target:
            expected = greedy_by_transformers(architecture, num_rows, NUM_NEW, dtype)
        else:
            expected = greedy_by_model(drafter.target.model, num_rows, NUM_NEW)
        assert texts(out) == expected, (num_rows, side)
        assert watched.num_drafted > 0, "nothing was drafted"
        assert module_names(drafter) == modules, "what a call keeps must not be among the weights"


def module_names(drafter: Any) -> list[str]:
    return [name for name, _ in drafter.named_modules()] if isinstance(drafter, nn.Module) else []


PAIRS = [
    (family, architecture)
    for row, family in enumerate(names())
    for column, architecture in enumerate(CAUSAL)
    if (row + column) % 3 == 0 and architecture != "llama"
]
"""A third of all pairs, each family with several architectures, besides llama, which each family's own test has.

The slow suite has all pairs.
"""


@pytest.mark.parametrize(("family", "architecture"), PAIRS)
def test_greedy_output_equals_transformers(family: str, architecture: str) -> None:
    check(family, architecture, torch.float32, (1, "right"), (5, "left"))


ENDS = tuple(range(3, VOCAB_SIZE, 9))
DEPEND_ON_MORE = {"cascade", "early_exit", "lookahead", "merge", "recycling", "suffix"}
"""Families whose drafts for a text depend on earlier texts, on time, or on where in it they started."""
RESTART = {"staged"}
"""Families that start again when rows come or go."""


class Changing(Watched):
    """Notes whether changes of rows are followed; with `restarts` none is."""

    def __init__(self, drafter: Any, *, restarts: bool) -> None:
        super().__init__(drafter)
        self._restarts = restarts
        self.followed: list[bool] = []

    def change_rows(self, origins: list[int | None], new: Session | None) -> bool:
        self.followed.append(not self._restarts and self.inner.change_rows(origins, new))
        return self.followed[-1]


@pytest.mark.parametrize("family", names())
def test_rows_that_come_and_go_are_followed(family: str) -> None:
    """The text is that of plain decoding, and the drafts are those of a drafter that starts again with each change."""
    found = []
    for restarts in (False, True):
        target = tiny_target("llama", dtype=torch.float64)
        torch.manual_seed(0)
        drafter = built(find(family), example_of(family), target)
        changing = Changing(drafter, restarts=restarts)
        settings: dict[str, Any] = {"batch_size": 3, "max_new_tokens": NUM_NEW, "eos_token_id": ENDS}
        stream = draftsmith.generate_stream(drafter.target, prompts(9), changing, length="fixed", **settings)
        written = {text.index: text.new_ids for text in stream}
        plain = draftsmith.generate_stream(drafter.target, prompts(9), **settings)
        assert written == {text.index: text.new_ids for text in plain}
        assert len(changing.followed) > 4
        assert restarts or all(changing.followed) == (family not in RESTART)
        found.append(changing.drafts)
    assert found[0] == found[1] or family in DEPEND_ON_MORE


@pytest.mark.parametrize("family", names())
def test_has_draft_model_says_what_the_drafters_have(family: str) -> None:
    drafter = built(find(family), example_of(family), tiny_target("llama"))
    assert type(drafter).has_draft_model == (drafter.draft_model is not None)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("architecture", CAUSAL)
@pytest.mark.parametrize("family", names())
def test_greedy_output_equals_transformers_in_every_precision(
    family: str, architecture: str, dtype: torch.dtype
) -> None:
    check(family, architecture, dtype, (1, "right"), (5, "left"), (5, "right"))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"top_p": 0.9}, {"top_k": 5}], ids=str)
@pytest.mark.parametrize("family", names())
def test_sampled_text_follows_the_target_distribution(family: str, settings: dict[str, float]) -> None:
    drafter = built(find(family), example_of(family), distribution_target())
    check_distribution(drafter, drafter.target, num_samples=NUM_SAMPLES, seed=2, **settings)


@pytest.mark.gpu
@pytest.mark.parametrize("family", names())
def test_greedy_output_equals_transformers_on_a_gpu(family: str) -> None:
    target = Target(tiny_model("llama").to("cuda"))
    drafter = built(find(family), example_of(family), target)
    for num_rows in (1, 5):
        ids, mask = (tensor.cuda() for tensor in padded(prompts(num_rows), side="left"))
        given = {"attention_mask": mask, "max_new_tokens": NUM_NEW}
        out = draftsmith.generate(drafter.target, ids, Watched(drafter), **given)
        expected = drafter.target.model.generate(ids, do_sample=False, **given)
        assert [row[-NUM_NEW:] for row in texts(out)] == expected[:, -NUM_NEW:].tolist()
        draftsmith.generate(drafter.target, ids, Watched(drafter), **given, temperature=1.0, seed=0)
