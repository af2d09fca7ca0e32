"""Tests of SuffixDecoding: drafts against counted trees in dictionaries, texts of earlier calls, and the datastore."""

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as some

import draftsmith
from draftsmith import Target
from draftsmith.core.drafter import Step
from draftsmith.drafters import suffix
from draftsmith.drafters.suffix import Config, Drafter
from draftsmith.drafters.suffix.growing_text import GrowingText
from draftsmith.parts.trie import TokenTree
from tests.support.families.retrieval import DOCUMENTS, TOKENS, paths_of, shards_for
from tests.support.families.retrieval import VOCAB_SIZE as FEW_TOKENS
from tests.support.family import Alternating, Watched, check_family, texts
from tests.support.models import SEQ2SEQ, greedy_by_transformers, padded, prompts, tiny_target
from tests.support.runs import make_data, make_target, trainer_settings
from trainers import suffix as trainer
from trainers.corpora import suffix_arrays
from trainers.corpora.suffix_arrays import build
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings

LENIENT = Config(max_match=6, factor=2.0, offset=2.0, num_draft=6, max_matches=4, recent_tokens=400)


def drafter_with_datastore(target: Target, config: Config = LENIENT) -> Drafter:
    """Returns a drafter with a datastore."""
    return Drafter(config, target, shards_for(target))


EXAMPLE = drafter_with_datastore


def test_family(tmp_path: Path) -> None:
    check_family(suffix, drafter_with_datastore, tmp_path)


# --- Drafts --------------------------------------------------------------------------------------------------------

Probabilities = dict[tuple[int, ...], float]


class CountedTree:
    """The counted suffix tree of documents: how often each string occurs, and how often a token follows it."""

    def __init__(self, documents: list[list[int]], depth: int) -> None:
        self.counts: Counter[tuple[int, ...]] = Counter()
        self.followed: Counter[tuple[int, ...]] = Counter()
        for document in documents:
            for begin in range(len(document)):
                for end in range(begin + 1, min(begin + depth, len(document)) + 1):
                    self.counts[tuple(document[begin:end])] += 1
                    self.followed[tuple(document[begin:end])] += end < len(document)

    def probabilities(self, match: tuple[int, ...], depth: int, least: float) -> Probabilities:
        """Returns the product of count(child) / count(node) along every path after the match, if at least `least`."""
        found: Probabilities = {}
        for string in self.counts:
            path = string[len(match) :]
            if string[: len(match)] == match and 0 < len(path) <= depth:
                probability, before = 1.0, self.followed[match]
                for end in range(1, len(path) + 1):
                    count = self.counts[match + path[:end]]
                    probability, before = probability * count / before, count
                if probability >= least - 1e-9:
                    found[path] = probability
        return found


def slow_options(
    config: Config, trees: list[CountedTree], row: list[int], budget: int
) -> list[tuple[float, int, Probabilities]]:
    """Returns, for every length of match in every tree, the best score of a draft, the length and all likely paths."""
    found = []
    for tree in trees:
        for length in range(1, min(config.max_match, len(row)) + 1):
            match, size = tuple(row[-length:]), min(config.draft_size(length), budget)
            if tree.followed[match] and size > 0:
                likely = tree.probabilities(match, size, config.min_chance)
                found.append((sum(sorted(likely.values(), reverse=True)[:size]), length, likely))
    return found


CONFIGS = some.builds(
    Config,
    max_match=some.integers(1, 6),
    factor=some.sampled_from([0.5, 1.0, 1.5, 3.0]),
    offset=some.sampled_from([0.5, 1.0, 2.0]),
    num_draft=some.integers(1, 6),
    min_chance=some.sampled_from([0.0, 0.1, 0.3, 0.6]),
    max_matches=some.just(10_000),
    branches=some.booleans(),
)


@hypothesis_settings(max_examples=60, deadline=None)
@given(CONFIGS, DOCUMENTS, DOCUMENTS, some.lists(TOKENS, min_size=1, max_size=24), some.integers(1, 6))
def test_drafts_equal_those_of_counted_trees(
    config: Config, kept: list[list[int]], recent: list[list[int]], row: list[int], budget: int
) -> None:
    """The reference counts every string and skips no length of match."""
    drafter = few_tokens(config, kept, recent)
    depth = config.max_match + config.num_draft
    trees = [CountedTree(documents, depth) for documents in ([row], recent, kept)]
    own = GrowingText(config.max_match, FEW_TOKENS, row)
    drafted = drafter._best(row, own, budget)
    options = slow_options(config, trees, row, budget)
    if not options:
        assert drafted.tokens == []
        return
    paths = paths_of(drafted)
    fitting = [(likely, length) for _, length, likely in options if is_valid(config, paths, likely, length, budget)]
    assert fitting, "the tree is that of no text and match length"
    if config.branches:
        best = max((score, length) for score, length, _ in options)
        own_scores = [(sum(likely[path] for path in paths), length) for likely, length in fitting]
        assert max(own_scores) == pytest.approx(best)
    else:
        assert drafted.parents == list(range(len(paths)))


def few_tokens(config: Config, kept: list[list[int]], recent: list[list[int]]) -> Drafter:
    """Returns a drafter with a vocabulary of FEW_TOKENS tokens and a placeholder as target."""
    target: Any = type("FewTokens", (), {"vocab_size": FEW_TOKENS, "takes_trees": True})()
    shard = build([np.array(document, np.int64) for document in kept], FEW_TOKENS)
    tokens = [token for document in recent for token in (*document, FEW_TOKENS)]
    return Drafter(config, target, (shard,), tokens)


def is_valid(config: Config, paths: list[tuple[int, ...]], likely: Probabilities, length: int, budget: int) -> bool:
    """Returns whether the paths are the likeliest ones, or without branches the path of likeliest children."""
    size = min(config.draft_size(length), budget)
    if not set(paths) <= set(likely):
        return False
    if config.branches:
        return sorted((likely[path] for path in paths), reverse=True) == sorted(likely.values(), reverse=True)[:size]
    node: tuple[int, ...] = ()
    for path in [*paths, None]:
        children = [child for child in likely if child[:-1] == node and len(child) <= size]
        if path is None:
            return not children
        if path not in children or likely[path] < max(likely[child] for child in children):
            return False
        node = path
    raise AssertionError


def best_draft(
    config: Config, own: list[int], recent: Sequence[list[int]] = (), kept: Sequence[list[int]] = ()
) -> TokenTree:
    drafter = few_tokens(config, list(kept), list(recent))
    return drafter._best(own, GrowingText(config.max_match, FEW_TOKENS, own), 9)


def test_draft_by_hand() -> None:
    # (0, 1) was followed by 2 twice and by 0 once: two tokens of the likelier path, of probability 2/3 and 1/3.
    text = [0, 1, 2, 2, 0, 1, 0, 0, 1, 2, 0, 0, 1]
    plain = Config(max_match=2, branches=False)
    assert best_draft(plain, text).tokens == [2, 2]
    # The shares 2/3 and 1/2, behind two and three matching tokens.
    assert best_draft(plain, text).weights == pytest.approx([2 / 3 * 2 / 6, 2 / 3 * 2 / 6 * 1 / 2 * 3 / 7])
    assert best_draft(Config(max_match=2, branches=False, min_chance=0.5), text).tokens == [2]
    # A tree of three tokens: the one that occurred twice, and two of those that occurred once.
    tree = best_draft(Config(max_match=2, offset=1.0), text)
    assert len(tree.tokens) == 3 and tree.weights[0] == max(tree.weights) and {(2,)} < set(paths_of(tree))
    assert best_draft(plain, [0, 1, 2]).tokens == [], "no match"
    assert best_draft(Config(factor=0.0, offset=3.0, max_match=1), [0, 1, 2, 0]).tokens == [1, 2, 0]
    assert best_draft(Config(factor=0.5), [0, 1, 2, 0]).tokens == [], "a match of one token is too short for a draft"


def test_equal_scores_prefer_the_longer_match_then_the_rows_own_text() -> None:
    one = Config(num_draft=1)
    assert best_draft(one, [0, 1, 0], recent=[[0, 2]]).tokens == [1]
    assert best_draft(one, [0, 1, 0], kept=[[0, 2]]).tokens == [1]
    assert best_draft(one, [1, 0], recent=[[0, 1]], kept=[[0, 2]]).tokens == [1]
    assert best_draft(one, [0, 1, 1, 0], recent=[[1, 0, 2]]).tokens == [2], "a longer match in another text"
    assert best_draft(one, [0, 1, 0, 2, 0], kept=[[0, 2]]).tokens == [2], "a likelier continuation in another text"


def test_many_matches_are_read_evenly_spread() -> None:
    target = tiny_target("llama")
    rows = [[number, 40, 50 + number % 2] for number in range(40)]
    shard = build([np.array(row) for row in rows], target.vocab_size)
    drafter = Drafter(Config(max_matches=8, offset=1.0), target, (shard,))
    found = drafter._best([40], GrowingText(24, target.vocab_size, [40]), 5)
    # Every fifth of forty matches is read, sorted by the number before: as many odd as even numbers.
    assert sorted(zip(found.tokens, found.weights, strict=True)) == [(50, 4 / 8 * 1 / 5), (51, 4 / 8 * 1 / 5)]


def test_rows_draft_from_their_own_text_within_the_budget() -> None:
    target = tiny_target("llama")
    ids, mask = padded([[1, 2, 3, 4, 1, 2], [5, 6, 7], [8, 8]], side="left")
    drafter = Watched(Drafter(Config(), target))
    draftsmith.generate(target, ids, drafter, attention_mask=mask, max_new_tokens=6)
    assert drafter.drafts[0] == [[2, 3, 4], [7, 0, 0], [8, 8, 0]]
    drafter = Watched(Drafter(Config(recent_tokens=0), target))
    draftsmith.generate(target, ids, drafter, attention_mask=mask, max_new_tokens=2)
    assert drafter.drafts[0] == [[2, 3], [7, 0], [8, 8]]


@pytest.mark.parametrize("architecture", SEQ2SEQ)
def test_source_of_an_encoder_decoder_is_searched(architecture: str) -> None:
    target = tiny_target(architecture)
    text = greedy_by_transformers(architecture, 1, 20)[0]
    ids, mask = padded([prompts(1)[0], text[1:12]], side="left")
    plain = texts(draftsmith.generate(target, ids, attention_mask=mask, max_new_tokens=20))
    for config in (LENIENT, Config(branches=False)):
        drafter = Watched(Drafter(config, target))
        out = draftsmith.generate(target, ids, drafter, attention_mask=mask, max_new_tokens=20)
        assert texts(out) == plain and drafter.num_drafted > 0
        assert drafter.inner._rows[1].own.tokens[:12] == [*text[1:12], target.vocab_size]


# --- Texts of earlier calls ----------------------------------------------------------------------------------------


def steps(drafter: Drafter, seed: int = 0, num_new: int = 20) -> int:
    ids, mask = padded(prompts(2, seed=seed))
    out = draftsmith.generate(drafter.target, ids, drafter, attention_mask=mask, max_new_tokens=num_new)
    return out.stats.steps


def test_later_calls_use_texts_of_earlier_ones(tmp_path: Path) -> None:
    target = tiny_target("llama")
    drafter = Drafter(Config(), target)
    first, second = steps(drafter), steps(drafter)
    assert second < first / 2, "the same text is drafted again"
    draftsmith.save(drafter, tmp_path / "artifact", target)
    loaded = draftsmith.load(tmp_path / "artifact", target)
    assert loaded.recent.tokens == drafter.recent.tokens != []
    assert steps(loaded) == second, "also after saving and loading"
    without = Drafter(Config(recent_tokens=0), target)
    assert steps(without) == steps(without) == first


def test_oldest_texts_are_dropped() -> None:
    target = tiny_target("llama")
    drafter = Drafter(Config(recent_tokens=100), target)
    for seed in range(4):
        steps(drafter, seed)
    drafter._keep_last_call()
    assert 60 < len(drafter.recent.tokens) <= 100
    ids, mask = padded(prompts(2, seed=3))
    written = texts(draftsmith.generate(target, ids, attention_mask=mask, max_new_tokens=20))
    assert drafter.recent.tokens[-len(written[1]) - 1 : -1] == written[1]


def test_drafts_continue_after_steps_of_another_drafter() -> None:
    target = tiny_target("llama")
    ids, mask = padded(prompts(5))
    drafter = Drafter(Config(), target)
    out = draftsmith.generate(target, ids, Alternating(Watched(drafter)), attention_mask=mask, max_new_tokens=20)
    assert texts(out) == greedy_by_transformers("llama", 5, 20)


def test_rewind_drops_text_that_was_taken_back() -> None:
    target = tiny_target("llama")
    rng = random.Random(0)
    rows = [[rng.randrange(4) for _ in range(12)] for _ in range(3)]
    session: Any = type("Rows", (), {"rows": rows, "source": None, "target": target})()
    drafter = Drafter(Config(recent_tokens=0), target)
    drafter.start(session)
    for lengths in ([7, 12, 3], [9, 2, 5]):
        drafter.propose(4)
        drafter.rewind(lengths)
        for row, length in zip(rows, lengths, strict=True):
            row[length:] = [rng.randrange(4) for _ in range(5)]
        again = Drafter(Config(recent_tokens=0), target)
        again.start(session)
        assert drafter.propose(4).tokens_BN.tolist() == again.propose(4).tokens_BN.tolist()


# --- The datastore -------------------------------------------------------------------------------------------------


def test_load_rejects_missing_truncated_and_invalid_files(tmp_path: Path) -> None:
    target = tiny_target("llama")
    drafter = drafter_with_datastore(target)
    steps(drafter)
    folder = tmp_path / "artifact"
    for name in ("recent.npy", "shard-0001-of-0002.safetensors"):
        draftsmith.save(drafter, folder, target)
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=f"{name} is missing or truncated"):
            draftsmith.load(folder, target)
        (folder / name).unlink()
        with pytest.raises(ValueError, match=f"{name} is missing"):
            draftsmith.load(folder, target)
    for odd in (np.zeros(3, np.float32), np.zeros((2, 2), np.uint16), np.full(3, target.vocab_size + 1, np.uint16)):
        draftsmith.save(drafter, folder, target)
        np.save(folder / "recent.npy", odd)
        with pytest.raises(ValueError, match="recent.npy is no text of a vocabulary of 64"):
            draftsmith.load(folder, target)
    np.save(folder / "recent.npy", np.array([{}]))
    with pytest.raises(ValueError, match=r"recent.npy is missing or truncated"):
        draftsmith.load(folder, target)


def test_resumed_build_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The artifact has no texts of the evaluation."""
    torch.set_num_threads(1)
    make_data(make_target(tmp_path / "target"), tmp_path / "data")
    chosen = trainer_settings(trainer, shard_tokens=200, context=2, factor=2.0)

    def run(name: str) -> RunSettings:
        target, data, output = (str(tmp_path / one) for one in ("target", "data", name))
        return RunSettings(target=target, data=data, output=output, batch_size=4)

    whole = train(trainer, chosen, run("whole"))
    built: list[Any] = []

    def interrupted_build(texts: list[np.ndarray], vocab_size: int) -> Any:
        if len(built) == 1:
            raise KeyboardInterrupt
        built.append(texts)
        return build(texts, vocab_size)

    monkeypatch.setattr(suffix_arrays, "build", interrupted_build)
    with pytest.raises(KeyboardInterrupt):
        train(trainer, chosen, run("broken"))
    monkeypatch.undo()
    again = train(trainer, chosen, run("broken"))
    names = [path.name for path in sorted(whole.glob("shard-*"))]
    assert len(names) > 2
    for name in [*names, "recent.npy"]:
        assert (whole / name).read_bytes() == (again / name).read_bytes()
    drafter = draftsmith.load(whole, Target.from_pretrained(str(tmp_path / "target"), dtype="float32"))
    assert drafter.config == Config(factor=2.0) and drafter.recent.tokens == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_match": 0}, "max_match is 0; it must be at least 1"),
        ({"num_draft": 0}, "num_draft is 0; it must be at least 1"),
        ({"max_matches": 0}, "max_matches is 0; it must be at least 1"),
        ({"factor": -1.0}, "factor is -1.0; it must be at least 0"),
        ({"recent_tokens": -1}, "recent_tokens is -1; it must be at least 0"),
        ({"min_chance": 1.5}, "min_chance is 1.5; it must lie between 0 and 1"),
        ({"factor": 0.0}, "factor 0.0 and offset 0.0 draft no token"),
        ({"offset": -30.0}, "factor 1.0 and offset -30.0 draft no token"),
    ],
)
def test_config_rejects_invalid_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**changes)
    with pytest.raises(ValueError, match=message):
        trainer_settings(trainer, **changes)


def test_trainer_rejects_a_negative_budget() -> None:
    with pytest.raises(ValueError, match="budget_mb is -1"):
        trainer_settings(trainer, budget_mb=-1.0)


def test_finished_rows_are_not_looked_up() -> None:
    """`observe` notes which rows are running."""
    target = tiny_target("llama")
    text = greedy_by_transformers("llama", 2, 20)
    ids, mask = padded(prompts(2))
    first = text[0][len(prompts(2)[0])]

    class Recorder(Watched):
        def observe(self, step: Step) -> None:
            super().observe(step)
            matches.append(self.inner._is_running == [len(path) > 0 for path in step.paths])

    matches: list[bool] = []
    drafter = Drafter(Config(), target)
    out = draftsmith.generate(
        target, ids, Recorder(drafter), attention_mask=mask, max_new_tokens=20, eos_token_id=first
    )
    assert matches and all(matches) and out.lengths[0] < out.lengths[1]
    assert len(drafter._rows[0].own.tokens) <= len(prompts(2)[0]) + 1
