"""Tests of lookahead: windows, pools and drafts against a slow reference that reads each column as its own text."""

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

import draftsmith
from draftsmith import Target
from draftsmith.artifacts.artifact import read_manifest
from draftsmith.core.drafter import Session, Step
from draftsmith.core.tree import Draft
from draftsmith.drafters import lookahead
from draftsmith.drafters.lookahead import Config, Drafter, _Window
from tests.support.distributions import distribution_target
from tests.support.family import Watched, check_family, texts
from tests.support.models import SEQ2SEQ, VOCAB_SIZE, greedy_by_transformers, padded, prompts, tiny_target
from tests.support.runs import make_data, make_target, trainer_settings
from trainers import lookahead as trainer
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings

EXAMPLE = Config(window=3, level=3, num_guesses=2)
NUM_NEW = 20


def test_family(tmp_path: Path) -> None:
    check_family(lookahead, EXAMPLE, tmp_path)


class SlowLookahead:
    """One row's lookahead as in the paper's figures: entries by (level, column), with one forward per column."""

    def __init__(self, config: Config, target: Target, prompt: list[int]) -> None:
        self.config, self.target = config, target
        self.num_levels, self.num_columns = 1, config.window + config.level - 2
        first = random.Random(0).choices(prompt, k=self.num_columns)
        self.entries = {(0, column): token for column, token in enumerate(first)}
        self.seen: list[tuple[int, ...]] = []
        if config.pool_from_prompt:
            self.seen = [tuple(prompt[at : at + config.level]) for at in range(len(prompt) - config.level + 1)]

    def columns(self) -> list[tuple[int, ...]]:
        """Returns, for each column, the tokens after the pending one up to the column's end."""
        before = []
        for column in range(self.num_columns):
            seen = [(0, at) for at in range(1, column + 1)] + [(level, column) for level in range(1, self.num_levels)]
            before.append(tuple(self.entries[entry] for entry in seen))
        return before

    def guesses(self, pending: int) -> list[tuple[int, ...]]:
        latest = list(dict.fromkeys(ngram for ngram in reversed(self.seen) if ngram[0] == pending))
        return [ngram[1:] for ngram in latest[: self.config.num_guesses]]

    def move(self, row: list[int]) -> None:
        """Reads the columns after the row's text, whose last token is pending."""
        following = [self.next(row + list(column)) for column in self.columns()]
        self.entries[0, 0] = row[-1]
        if self.num_levels == self.config.level - 1:
            for column, token in enumerate(following):
                ngram = [self.entries[level, column] for level in range(self.num_levels)]
                self.seen.append((*ngram, token))
            self.entries = {(level - 1, column): token for (level, column), token in self.entries.items() if level}
        else:
            # The text moves on by one column, and a level is added.
            self.entries = {(level, column - 1): token for (level, column), token in self.entries.items() if column}
            self.num_levels, self.num_columns, following = self.num_levels + 1, self.num_columns - 1, following[1:]
        self.entries |= {(self.num_levels - 1, column): token for column, token in enumerate(following)}

    @torch.inference_mode()
    def next(self, text: list[int]) -> int:
        return int(self.target.model(torch.tensor([text])).logits[0, -1].argmax())


class Compared(Watched):
    """Compares every draft with the slow reference."""

    def start(self, session: Session) -> None:
        super().start(session)
        self.slow = [SlowLookahead(self.config, self.target, list(row)) for row in session.rows]
        self.num_guesses = 0

    def propose(self, budget: int) -> Draft:
        self._before = [list(row) for row in self._session.rows]
        draft = super().propose(budget)
        for number, (slow, row) in enumerate(zip(self.slow, self._before, strict=True)):
            columns, guesses = slow.columns(), slow.guesses(row[-1])
            self._is_window_in = max(map(len, columns)) <= budget
            tried = {text[:end] for text in guesses for end in range(1, min(len(text), budget) + 1)}
            if self._is_window_in:
                tried |= {text[:end] for text in columns for end in range(1, len(text) + 1)}
            assert paths_of(draft, number) == sorted(tried)
            self.num_guesses += len(guesses)
        return draft

    def observe(self, step: Step) -> None:
        super().observe(step)
        for slow, row, path in zip(self.slow, self._before, step.paths, strict=True):
            if path and self._is_window_in:
                slow.move(row)


def paths_of(draft: Draft, row: int) -> list[tuple[int, ...]]:
    """Returns the tokens on the path to each node of a row, sorted, without node 0 and padding."""
    used = draft.num_nodes[row] if draft.num_nodes else draft.tree.num_nodes
    parents_N = draft.tree.parents_RN[row if len(draft.tree.parents_RN) > 1 else 0]
    found: list[tuple[int, ...]] = [()]
    for node in range(1, used):
        found.append((*found[parents_N[node]], int(draft.tokens_BN[row, node])))
    return sorted(found[1:])


@pytest.mark.parametrize(
    "config",
    [
        Config(window=3, level=3, num_guesses=2),
        Config(window=2, level=5, num_guesses=3, pool_from_prompt=False),
        Config(window=1, level=2, num_guesses=1),
    ],
    ids=lambda config: f"{config.window}-{config.level}-{config.num_guesses}",
)
def test_drafts_equal_the_slow_reference(config: Config) -> None:
    """With ragged rows, from an empty pool to the last tokens."""
    for architecture, num_rows in (("llama", 3), ("gemma3_text", 1)):
        drafter = Compared(Drafter(config, tiny_target(architecture)))
        ids, mask = padded(prompts(num_rows), side="left")
        out = draftsmith.generate(drafter.target, ids, drafter, attention_mask=mask, max_new_tokens=NUM_NEW)
        assert texts(out) == greedy_by_transformers(architecture, num_rows, NUM_NEW)
        assert drafter.num_guesses > 5


def test_windows_are_greedy_for_sampled_text() -> None:
    """The pool's n-grams do not depend on what is sampled: windows follow the likeliest tokens."""
    drafter = Compared(Drafter(EXAMPLE, distribution_target()))
    draftsmith.generate(
        drafter.target, torch.tensor([[1, 4, 2, 7, 4]]), drafter, max_new_tokens=NUM_NEW, temperature=1.0, seed=0
    )
    assert drafter.num_guesses > 5


def test_window_by_hand() -> None:
    """Two columns and n-grams of three tokens: a level is added, then levels move down and n-grams are kept."""
    window = _Window(Config(window=2, level=3, num_guesses=1, pool_from_prompt=False), [7])
    assert window.columns() == [[], [7], [7, 7]]
    window.move(1, [10, 11, 12])
    assert window.columns() == [[11], [7, 12]], "one column less, because the text moved on by a token"
    assert window.guesses(1) == window.guesses(7) == []
    window.move(2, [20, 21])
    assert window.guesses(2) == [(11, 20)] and window.guesses(7) == [(12, 21)]
    assert window.columns() == [[20], [12, 21]]
    window.move(2, [30, 31])
    assert window.guesses(2) == [(20, 30)], "only the latest n-gram of a first token is kept"
    assert window.guesses(12) == [(21, 31)]


def test_first_window_depends_only_on_the_prompt() -> None:
    target = tiny_target("llama")
    firsts = []
    for seed in (0, 1):
        drafter = Watched(Drafter(Config(), target))
        draftsmith.generate(
            target, torch.tensor([[5, 6, 7, 8]]), drafter, max_new_tokens=16, temperature=1.0, seed=seed
        )
        firsts.append(drafter.drafts[0])
    assert firsts[0] == firsts[1]
    assert set(firsts[0][0]) <= {5, 6, 7, 8} and len(firsts[0][0]) > 3


@settings(deadline=None)
@given(
    some.lists(some.integers(0, 3), min_size=1, max_size=20), some.integers(2, 4), some.integers(1, 3), some.booleans()
)
def test_pool_keeps_the_latest_ngrams(prompt: list[int], level: int, num_guesses: int, is_seeded: bool) -> None:
    """Compares with a search, also for prompts shorter than an n-gram or of equal tokens."""
    config = Config(level=level, num_guesses=num_guesses, pool_from_prompt=is_seeded)
    window = _Window(config, prompt)
    for token in range(4):
        ngrams = [tuple(prompt[at : at + level]) for at in range(len(prompt) - level, -1, -1)]
        latest = list(dict.fromkeys(ngram[1:] for ngram in ngrams if ngram[0] == token))
        assert window.guesses(token) == (latest[:num_guesses] if is_seeded else [])


class Interrupted(Watched):
    """Replaces every second draft by an empty one, or by one that shares nothing with the window."""

    def __init__(self, inner: Drafter, *, is_plain: bool) -> None:
        super().__init__(inner)
        self.is_plain, self.windows, self.is_own = is_plain, [], []

    def propose(self, budget: int) -> Draft:
        draft = super().propose(budget)
        self.is_own.append(len(self.is_own) % 2 == 0)
        self.windows.append([[list(level) for level in window._levels] for window in self.inner._windows])
        if self.is_own[-1]:
            return draft
        if self.is_plain:
            return self._session.empty_draft()
        others_BN = (draft.tokens_BN + 1) % VOCAB_SIZE
        others_BN[:, 0] = draft.tokens_BN[:, 0]
        return Draft(tokens_BN=others_BN, tree=draft.tree, num_nodes=draft.num_nodes)


@pytest.mark.parametrize("is_plain", [True, False])
def test_window_stays_after_other_drafts(is_plain: bool) -> None:
    target = tiny_target("llama")
    drafter = Interrupted(Drafter(EXAMPLE, target), is_plain=is_plain)
    ids, mask = padded(prompts(3))
    out = draftsmith.generate(target, ids, drafter, attention_mask=mask, max_new_tokens=NUM_NEW)
    assert texts(out) == greedy_by_transformers("llama", 3, NUM_NEW)
    for was_own, (before, after) in zip(drafter.is_own, pairwise(drafter.windows[:8]), strict=False):
        assert all((one == other) != was_own for one, other in zip(before, after, strict=True))


def test_length_policy_cuts_trees() -> None:
    target = tiny_target("llama")
    drafter = Watched(Drafter(EXAMPLE, target))
    ids, mask = padded(prompts(5))
    out = draftsmith.generate(target, ids, drafter, attention_mask=mask, max_new_tokens=NUM_NEW, length="heuristic")
    assert texts(out) == greedy_by_transformers("llama", 5, NUM_NEW)
    assert drafter.num_drafted > 0


def test_repetitive_text_is_accepted() -> None:
    """An n-gram of the prompt is accepted completely once the model repeats itself."""
    target = tiny_target("gemma3_text")
    text = greedy_by_transformers("gemma3_text", 1, NUM_NEW)[0]
    assert text[9:18] == [text[9]] * 9, "the tiny model has changed: choose another one that repeats itself"
    num_steps = []
    for pool_from_prompt in (True, False):
        drafter = Drafter(Config(window=2, level=4, pool_from_prompt=pool_from_prompt), target)
        out = draftsmith.generate(target, torch.tensor([text[:13]]), drafter, max_new_tokens=4)
        assert texts(out) == [text[:17]]
        num_steps.append(out.stats.steps)
    assert num_steps[0] == 1 < num_steps[1]


@pytest.mark.parametrize("architecture", SEQ2SEQ)
def test_encoder_decoder_is_rejected(architecture: str) -> None:
    with pytest.raises(ValueError, match="is an encoder-decoder: it verifies chains, and lookahead needs trees"):
        Drafter(Config(), tiny_target(architecture))


def test_config_rejects_invalid_settings() -> None:
    wrong: dict[str, Any]
    for wrong, least in (({"window": 0}, 1), ({"level": 1}, 2), ({"num_guesses": 0}, 1)):
        with pytest.raises(ValueError, match=rf"{next(iter(wrong))} is \d; it must be at least {least}"):
            Config(**wrong)


def test_recipe(tmp_path: Path) -> None:
    """The artifact has the given settings and a measured acceptance."""
    make_data(make_target(tmp_path / "target"), tmp_path / "data", num_rows=20)
    output = tmp_path / "output"
    run = RunSettings(target=str(tmp_path / "target"), data=str(tmp_path / "data"), output=str(output))
    assert train(trainer, trainer_settings(trainer, window=2, level=3), run) == output
    assert read_manifest(output)["measured_acceptance"]["acceptance"] >= 0
    drafter = draftsmith.load(output, Target.from_pretrained(run.target, dtype="float32"))
    assert drafter.config == Config(window=2, level=3)
