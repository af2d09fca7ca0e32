"""Tests of prompt lookup: copies against a search without an index."""

import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

import draftsmith
from draftsmith import Target
from draftsmith.artifacts.artifact import read_manifest
from draftsmith.core.drafter import Session
from draftsmith.core.tree import Draft
from draftsmith.drafters import lookup
from draftsmith.drafters.lookup import Config, Drafter, _Index
from tests.support.family import Watched, check_family, texts
from tests.support.models import SEQ2SEQ, greedy_by_transformers, padded, prompts, tiny_target
from tests.support.runs import make_data, make_target, trainer_settings
from trainers import lookup as trainer
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings

EXAMPLE = Config()


def test_family(tmp_path: Path) -> None:
    check_family(lookup, Config(), tmp_path)


@pytest.mark.slow
def test_family_with_several_continuations(tmp_path: Path) -> None:
    check_family(lookup, Config(num_draft=6, num_continuations=3), tmp_path, architectures=("llama",))


def slow_continuations(config: Config, text: list[int], num_tokens: int) -> list[list[int]]:
    """Returns the continuations of the n-gram that ends the text, those of the longest and latest matches first.

    Only the first with each first token is kept, and each is shorter than the one before; copied tokens may be copied
    again.
    """
    found: dict[int, int] = {}
    for size in range(config.max_ngram, config.min_ngram - 1, -1):
        for begin in range(len(text) - size - 1, -1, -1):
            if text[begin : begin + size] == text[len(text) - size :]:
                found.setdefault(text[begin + size], begin + size)
    copies = []
    for rank, begin in enumerate([*found.values()][: config.num_continuations], start=1):
        longer = list(text)
        for at in range(num_tokens // rank):
            longer.append(longer[begin + at])
        copies.append(longer[len(text) :])
    return copies


@settings(deadline=None)
@given(
    some.builds(
        lambda low, more, number: Config(min_ngram=low, max_ngram=low + more, num_continuations=number),
        some.integers(1, 3),
        some.integers(0, 3),
        some.integers(1, 4),
    ),
    some.lists(some.integers(0, 2), max_size=8),
    some.lists(some.lists(some.integers(0, 2), max_size=5), min_size=1, max_size=6),
    some.integers(1, 7),
)
def test_index_equals_a_search(config: Config, source: list[int], steps: list[list[int]], num_tokens: int) -> None:
    """With any source and any tokens per step, including no token and equal tokens."""
    index, row = _Index(config, source), [1]
    for new in steps:
        index.extend(row)
        assert index.continuations(num_tokens) == slow_continuations(config, source + row, num_tokens)
        row += new


def test_continuations_by_hand() -> None:
    def found(text: list[int], **settings: int) -> list[list[int]]:
        index = _Index(Config(**settings), [])
        index.extend(text)
        return index.continuations(4)

    assert found([1, 2, 3, 4, 1, 2]) == [[3, 4, 1, 2]]
    assert found([1, 2, 7, 5, 2, 8, 1, 2]) == [[7, 5, 2, 8]], "a longer match is preferred to a later one"
    assert found([1, 2, 7, 1, 2, 8, 1, 2]) == [[8, 1, 2, 8]], "of equal matches the latest; the copy wraps around"
    assert found([5, 6, 6]) == [[6, 6, 6, 6]]
    assert found([1, 2, 3]) == found([1]) == []
    assert found([1, 2, 3, 9, 3], min_ngram=2) == []
    several = found([1, 2, 7, 1, 2, 8, 3, 2, 9, 1, 2], num_continuations=3)
    assert several == [[8, 3, 2, 9], [7, 1], [9]], "longer matches first, then later ones, each copied shorter"
    assert found([1, 2, 7, 1, 2, 8, 3, 2, 9, 1, 2], num_continuations=2) == several[:2]


@pytest.mark.parametrize("num_continuations", [1, 3])
def test_update_takes_constant_time(num_continuations: int) -> None:
    """Counts the function calls for 100 more tokens after short and long texts."""
    counts = []
    for length in (100, 2_000):
        rng = random.Random(0)
        text = [rng.randrange(5) for _ in range(length)]
        index = _Index(Config(num_continuations=num_continuations), [])
        index.extend(text)
        num_calls = 0

        def count(frame: Any, event: str, argument: Any) -> None:
            nonlocal num_calls
            num_calls += 1

        sys.setprofile(count)
        for _ in range(100):
            text.append(rng.randrange(5))
            index.extend(text)
            index.continuations(4)
        sys.setprofile(None)
        counts.append(num_calls)
        assert max(map(len, index._ends.values())) == num_continuations
    assert counts[1] < 1.2 * counts[0]


class Copied(Watched):
    """Records what each row copied, without padding, and compares it with the slow search."""

    def start(self, session: Session) -> None:
        super().start(session)
        self.copied: list[list[list[int]]] = []
        source = session.source
        masks = source.mask_BT.bool() if source is not None else ()
        self._sources = [source.tokens_BT[row, mask].tolist() for row, mask in enumerate(masks)] if source else []

    def propose(self, budget: int) -> Draft:
        draft = super().propose(budget)
        num_nodes = draft.num_nodes or [draft.tree.num_nodes] * len(draft.tokens_BN)
        assert draft.tree.is_chain
        copied = [ids[1:used] for ids, used in zip(draft.tokens_BN.tolist(), num_nodes, strict=True)]
        sources = self._sources or [[] for _ in copied]
        for source, row, found in zip(sources, self._session.rows, copied, strict=True):
            expected = slow_continuations(self.config, source + row, min(budget, self.config.num_draft))
            assert found == (expected[0] if expected else [])
        self.copied.append(copied)
        return draft


def test_rows_copy_from_their_own_text() -> None:
    target = tiny_target("llama")
    rows = [[1, 2, 3, 4, 1, 2], [5, 6, 7], [8, 8]]
    ids, mask = padded(rows, side="left")
    drafter = Copied(Drafter(Config(num_draft=3), target))
    draftsmith.generate(target, ids, drafter, attention_mask=mask, max_new_tokens=6)
    assert drafter.copied[0] == [[3, 4, 1], [], [8, 8, 8]]
    draftsmith.generate(target, ids, drafter, attention_mask=mask, max_new_tokens=3)
    assert drafter.copied[0] == [[3, 4], [], [8, 8]], "no more than the remaining tokens"


@pytest.mark.parametrize("architecture", SEQ2SEQ)
def test_source_of_an_encoder_decoder_is_searched(architecture: str) -> None:
    """Copies run from the end of the source into the decoder's own text."""
    index = _Index(Config(), [20, 21, 22, 23, 24])
    index.extend([0, 21, 22])
    assert index.continuations(4) == [[23, 24, 0, 21]]
    target = tiny_target(architecture)
    text = greedy_by_transformers(architecture, 1, 20)[0]
    ids, mask = padded([prompts(1)[0], text[1:12]], side="left")
    for num_continuations in (1, 3):
        drafter = Copied(Drafter(Config(num_draft=4, num_continuations=num_continuations), target))
        draftsmith.generate(target, ids, drafter, attention_mask=mask, max_new_tokens=20)
        assert any(copied for step in drafter.copied for copied in step), (
            "only the best continuation is drafted, as a chain"
        )


def test_several_continuations_make_a_tree() -> None:
    target = tiny_target("llama")
    drafter = Watched(Drafter(Config(num_draft=3, num_continuations=2), target))
    ids, mask = padded([[9, 7, 7, 9, 8, 8, 5, 9], [4, 5, 6]])
    draftsmith.generate(target, ids, drafter, attention_mask=mask, max_new_tokens=4)
    assert drafter.drafts[0] == [[9, 8, 7, 8, 5], [6, 0, 0, 0, 0]], "level by level: 8 8 5, and 7"


def test_length_policy_cuts_trees_per_row() -> None:
    target = tiny_target("llama")
    drafter = Watched(Drafter(Config(num_draft=4, num_continuations=3), target))
    ids, mask = padded(prompts(5))
    out = draftsmith.generate(target, ids, drafter, attention_mask=mask, max_new_tokens=20, length="heuristic")
    assert texts(out) == greedy_by_transformers("llama", 5, 20)


def test_repetitive_text_is_accepted() -> None:
    """All copied tokens are accepted once the model repeats itself."""
    target = tiny_target("gemma3_text")
    text = greedy_by_transformers("gemma3_text", 1, 20)[0]
    assert text[10:18] == [text[9]] * 8, "the tiny model has changed: choose another one that repeats itself"
    out = draftsmith.generate(target, torch.tensor([text[:12]]), Drafter(Config(num_draft=3), target), max_new_tokens=5)
    assert texts(out) == [text[:17]]
    assert out.stats.steps == 2


def test_config_rejects_invalid_settings() -> None:
    for changes in ({"max_ngram": 1, "min_ngram": 2}, {"min_ngram": 0}, {"max_ngram": 0}):
        with pytest.raises(ValueError, match="must be at least 1 and at most max_ngram"):
            Config(**changes)
    with pytest.raises(ValueError, match="num_draft is 0; it must be at least 1"):
        Config(num_draft=0)
    with pytest.raises(ValueError, match="num_continuations is 0; it must be at least 1"):
        Config(num_continuations=0)


def test_recipe(tmp_path: Path) -> None:
    """The artifact has the given settings and a measured acceptance."""
    make_data(make_target(tmp_path / "target"), tmp_path / "data", num_rows=20)
    output = tmp_path / "output"
    run = RunSettings(target=str(tmp_path / "target"), data=str(tmp_path / "data"), output=str(output))
    assert train(trainer, trainer_settings(trainer, num_continuations=2), run) == output
    assert read_manifest(output)["measured_acceptance"]["acceptance"] >= 0
    drafter = draftsmith.load(output, Target.from_pretrained(run.target, dtype="float32"))
    assert drafter.config == Config(num_continuations=2)
