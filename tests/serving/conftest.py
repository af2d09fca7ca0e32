"""The pocket target, its prompts and its greedy texts, for the engines' tests."""

import pytest

from data import POCKET
from draftsmith import Target
from tests.serving.served_drafters import PROMPTS, greedy_texts


@pytest.fixture(scope="session")
def target() -> Target:
    return Target.from_pretrained(str(POCKET), dtype="float32")


@pytest.fixture(scope="session")
def rows(target: Target) -> list[list[int]]:
    return [target.tokenizer.encode(prompt) for prompt in PROMPTS]


@pytest.fixture(scope="session")
def texts(target: Target, rows: list[list[int]]) -> list[list[int]]:
    return greedy_texts(target, rows)
