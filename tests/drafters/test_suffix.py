"""SuffixDecoding: drafts against trees of counts in dictionaries, what is remembered, and the store."""

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
from tests.support.family import Alternating, Watched, check_family, texts
from tests.support.models import SEQ2SEQ, greedy_by_transformers, padded, prompts, tiny_target
from tests.support.retrieval import DOCUMENTS, TOKENS, paths_of
from tests.support.retrieval import VOCAB_SIZE as FEW_TOKENS
from tests.support.runs import make_data, make_target, trainer_settings
from trainers import suffix as trainer
from trainers.corpora import suffix_arrays
from trainers.corpora.suffix_arrays import build
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings

LENIENT = Config(max_match=6, factor=2.0, offset=2.0, num_draft=6, max_matches=4, recent_tokens=400)


def stored(target: Target, config: Config = LENIENT) -> Drafter:
    """Returns a drafter whose two shards hold the target's own text, and text that it would not write."""
    ids, mask = padded([[token % target.vocab_size for token in row] for row in prompts(5)])
    own = texts(draftsmith.generate(target, ids, attention_mask=mask, max_new_tokens=20, eos_token_id=()))
    noise = torch.randint(target.vocab_size, (8, 60), generator=torch.Generator().manual_seed(0)).tolist()
    shards = (own[:3], own[3:] + noise)
    built = tuple(build([np.array(row) for row in rows], target.vocab_size) for rows in shards)
    return Drafter(config, target, built)


EXAMPLE = stored


def test_family(tmp_path: Path) -> None:
    check_family(suffix, stored, tmp_path)


# --- What is drafted -----------------------------------------------------------------------------------------------

Chances = dict[tuple[int, ...], float]


class Counted:
    """The counted tree of some documents: how often each string occurs, and how often something follows it."""

    def __init__(self, documents: list[list[int]], depth: int) -> None:
        self.times: Counter[tuple[int, ...]] = Counter()
        self.followed: Counter[tuple[int, ...]] = Counter()
        for document in documents:
            for begin in range(len(document)):
                for end in range(begin + 1, min(begin + depth, len(document)) + 1):
                    self.times[tuple(document[begin:end])] += 1
                    self.followed[tuple(document[begin:end])] += end < len(document)

    def chances(self, match: tuple[int, ...], depth: int, least: float) -> Chances:
        """Returns the product of count(child) / count(node) along every path after the match that is likely enough."""
        found: Chances = {}
        for string in self.times:
            path = string[len(match) :]
            if string[: len(match)] == match and 0 < len(path) <= depth:
                chance, before = 1.0, self.followed[match]
                for end in range(1, len(path) + 1):
                    count = self.times[match + path[:end]]
                    chance, before = chance * count / before, count
                if chance >= least - 1e-9:
                    found[path] = chance
        return found


def slow_options(config: Config, trees: list[Counted], row: list[int], budget: int) -> list[tuple[float, int, Chances]]:
    """Returns for every length of match in every tree the best score of a tree, the length and all likely paths."""
    found = []
    for tree in trees:
        for length in range(1, min(config.max_match, len(row)) + 1):
            match, room = tuple(row[-length:]), min(config.room(length), budget)
            if tree.followed[match] and room > 0:
                chances = tree.chances(match, room, config.min_chance)
                found.append((sum(sorted(chances.values(), reverse=True)[:room]), length, chances))
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
def test_drafts_are_those_of_counted_trees(
    config: Config, kept: list[list[int]], recent: list[list[int]], row: list[int], budget: int
) -> None:
    """Counts in dictionaries of every string; no length of match is passed over."""
    drafter = few_tokens(config, kept, recent)
    depth = config.max_match + config.num_draft
    trees = [Counted([row], depth), Counted(recent, depth), Counted(kept, depth)]
    own = GrowingText(config.max_match, FEW_TOKENS, row)
    drafted = drafter._best(row, own, budget)
    options = slow_options(config, trees, row, budget)
    if not options:
        assert drafted.tokens == []
        return
    paths = paths_of(drafted)
    fitting = [
        (chances, length) for _, length, chances in options if is_fitting(config, paths, chances, length, budget)
    ]
    assert fitting, "a tree of no text and no length of match"
    if config.branches:
        best = max((score, length) for score, length, _ in options)
        own_scores = [(sum(chances[path] for path in paths), length) for chances, length in fitting]
        assert max(own_scores) == pytest.approx(best)
    else:
        assert drafted.parents == list(range(len(paths)))


def few_tokens(config: Config, kept: list[list[int]], recent: list[list[int]]) -> Drafter:
    """Returns a drafter of FEW_TOKENS tokens; what it drafts for is of no account."""
    target: Any = type("FewTokens", (), {"vocab_size": FEW_TOKENS, "takes_trees": True})()
    shard = build([np.array(document, np.int64) for document in kept], FEW_TOKENS)
    tokens = [token for document in recent for token in (*document, FEW_TOKENS)]
    return Drafter(config, target, (shard,), tokens)


def is_fitting(config: Config, paths: list[tuple[int, ...]], chances: Chances, length: int, budget: int) -> bool:
    """Whether the paths may be drafted where the chances are these: the likeliest, or from child to likeliest child."""
    room = min(config.room(length), budget)
    if not set(paths) <= set(chances):
        return False
    if config.branches:
        return sorted((chances[path] for path in paths), reverse=True) == sorted(chances.values(), reverse=True)[:room]
    node: tuple[int, ...] = ()
    for path in [*paths, None]:
        children = [child for child in chances if child[:-1] == node and len(child) <= room]
        if path is None:
            return not children
        if path not in children or chances[path] < max(chances[child] for child in children):
            return False
        node = path
    raise AssertionError


def drafted(
    config: Config, own: list[int], recent: Sequence[list[int]] = (), kept: Sequence[list[int]] = ()
) -> TokenTree:
    drafter = few_tokens(config, list(kept), list(recent))
    return drafter._best(own, GrowingText(config.max_match, FEW_TOKENS, own), 9)


def test_by_hand() -> None:
    # After (0, 1) came 2 twice and 0 once: two tokens of the likelier path, with chances 2/3 and 1/3.
    text = [0, 1, 2, 2, 0, 1, 0, 0, 1, 2, 0, 0, 1]
    plain = Config(max_match=2, branches=False)
    assert drafted(plain, text).tokens == [2, 2]
    assert [weight / 3 for weight in drafted(plain, text).weights] == pytest.approx([2 / 3, 1 / 3])
    assert drafted(Config(max_match=2, branches=False, min_chance=0.5), text).tokens == [2]
    # As a tree, of three tokens: that which came twice, and of those that came once the two first met.
    tree = drafted(Config(max_match=2, offset=1.0), text)
    assert tree.weights == [2, 1, 1] and {(2,)} < set(paths_of(tree))
    assert drafted(plain, [0, 1, 2]).tokens == [], "nothing was said before"
    assert drafted(Config(factor=0.0, offset=3.0, max_match=1), [0, 1, 2, 0]).tokens == [1, 2, 0]
    assert drafted(Config(factor=0.5), [0, 1, 2, 0]).tokens == [], "no room after a match of one token"


def test_of_equal_drafts_the_longer_match_wins_then_the_rows_own_text() -> None:
    one = Config(num_draft=1)
    assert drafted(one, [0, 1, 0], recent=[[0, 2]]).tokens == [1]
    assert drafted(one, [0, 1, 0], kept=[[0, 2]]).tokens == [1]
    assert drafted(one, [1, 0], recent=[[0, 1]], kept=[[0, 2]]).tokens == [1]
    assert drafted(one, [0, 1, 1, 0], recent=[[1, 0, 2]]).tokens == [2], "a longer match elsewhere"
    assert drafted(one, [0, 1, 0, 2, 0], kept=[[0, 2]]).tokens == [2], "a surer one elsewhere"


def test_of_many_matches_those_read_are_evenly_spread() -> None:
    target = tiny_target("llama")
    rows = [[number, 40, 50 + number % 2] for number in range(40)]
    shard = build([np.array(row) for row in rows], target.vocab_size)
    drafter = Drafter(Config(max_matches=8, offset=1.0), target, (shard,))
    found = drafter._best([40], GrowingText(24, target.vocab_size, [40]), 5)
    # Every fifth of forty, sorted by the number before: as many odd ones as even ones.
    assert sorted(zip(found.tokens, found.weights, strict=True)) == [(50, 4.0), (51, 4.0)]


def test_rows_of_a_batch_draft_each_their_own_and_no_deeper_than_wanted() -> None:
    target = tiny_target("llama")
    ids, mask = padded([[1, 2, 3, 4, 1, 2], [5, 6, 7], [8, 8]], side="left")
    drafter = Watched(Drafter(Config(), target))
    draftsmith.generate(target, ids, drafter, attention_mask=mask, max_new_tokens=6)
    assert drafter.drafts[0] == [[2, 3, 4], [7, 0, 0], [8, 8, 0]]
    drafter = Watched(Drafter(Config(recent_tokens=0), target))
    draftsmith.generate(target, ids, drafter, attention_mask=mask, max_new_tokens=2)
    assert drafter.drafts[0] == [[2, 3], [7, 0], [8, 8]]


@pytest.mark.parametrize("architecture", SEQ2SEQ)
def test_an_encoders_source_is_searched_too(architecture: str) -> None:
    target = tiny_target(architecture)
    text = greedy_by_transformers(architecture, 1, 20)[0]
    ids, mask = padded([prompts(1)[0], text[1:12]], side="left")
    plain = texts(draftsmith.generate(target, ids, attention_mask=mask, max_new_tokens=20))
    for config in (LENIENT, Config(branches=False)):
        drafter = Watched(Drafter(config, target))
        out = draftsmith.generate(target, ids, drafter, attention_mask=mask, max_new_tokens=20)
        assert texts(out) == plain and drafter.num_drafted > 0
        assert drafter.inner._own[1].tokens[:12] == [*text[1:12], target.vocab_size]


# --- What is remembered --------------------------------------------------------------------------------------------


def steps(drafter: Drafter, seed: int = 0, num_new: int = 20) -> int:
    ids, mask = padded(prompts(2, seed=seed))
    out = draftsmith.generate(drafter.target, ids, drafter, attention_mask=mask, max_new_tokens=num_new)
    return out.stats.steps


def test_later_calls_profit_from_earlier_ones(tmp_path: Path) -> None:
    target = tiny_target("llama")
    drafter = Drafter(Config(), target)
    first, second = steps(drafter), steps(drafter)
    assert second < first / 2, "the same text again"
    draftsmith.save(drafter, tmp_path / "artifact", target)
    loaded = draftsmith.load(tmp_path / "artifact", target)
    assert loaded.recent.tokens == drafter.recent.tokens != []
    assert steps(loaded) == second, "and after it was saved"
    forgetful = Drafter(Config(recent_tokens=0), target)
    assert steps(forgetful) == steps(forgetful) == first


def test_the_oldest_texts_are_forgotten() -> None:
    target = tiny_target("llama")
    drafter = Drafter(Config(recent_tokens=100), target)
    for seed in range(4):
        steps(drafter, seed)
    drafter._remember()
    assert 60 < len(drafter.recent.tokens) <= 100
    ids, mask = padded(prompts(2, seed=3))
    written = texts(draftsmith.generate(target, ids, attention_mask=mask, max_new_tokens=20))
    assert drafter.recent.tokens[-len(written[1]) - 1 : -1] == written[1]


def test_it_goes_on_from_steps_that_it_did_not_propose() -> None:
    target = tiny_target("llama")
    ids, mask = padded(prompts(5))
    drafter = Drafter(Config(), target)
    out = draftsmith.generate(target, ids, Alternating(Watched(drafter)), attention_mask=mask, max_new_tokens=20)
    assert texts(out) == greedy_by_transformers("llama", 5, 20)


def test_text_that_is_taken_back_leaves_nothing() -> None:
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


# --- The store -----------------------------------------------------------------------------------------------------


def test_what_is_missing_truncated_or_odd_is_refused(tmp_path: Path) -> None:
    target = tiny_target("llama")
    drafter = stored(target)
    steps(drafter)
    folder = tmp_path / "artifact"
    for name in ("recent.npy", "shard-0001-of-0002.safetensors"):
        draftsmith.save(drafter, folder, target)
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=f"{name} is missing or truncated"):
            draftsmith.load(folder, target)
        (folder / name).unlink()
        with pytest.raises(ValueError, match=f"{name} is missing or truncated"):
            draftsmith.load(folder, target)
    for odd in (np.zeros(3, np.float32), np.zeros((2, 2), np.uint16), np.full(3, target.vocab_size + 1, np.uint16)):
        draftsmith.save(drafter, folder, target)
        np.save(folder / "recent.npy", odd)
        with pytest.raises(ValueError, match="recent.npy holds no text of a vocabulary of 64"):
            draftsmith.load(folder, target)
    np.save(folder / "recent.npy", np.array([{}]))
    with pytest.raises(ValueError, match=r"recent.npy is missing or truncated"):
        draftsmith.load(folder, target)


def test_the_recipes_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build stopped before its last shard and begun again leaves the same bytes; what judging wrote is forgotten."""
    torch.set_num_threads(1)
    make_data(make_target(tmp_path / "target"), tmp_path / "data")
    chosen = trainer_settings(trainer, shard_tokens=200, context=2, factor=2.0)

    def run(name: str) -> RunSettings:
        target, data, output = (str(tmp_path / one) for one in ("target", "data", name))
        return RunSettings(target=target, data=data, output=output, batch_size=4)

    whole = train(trainer, chosen, run("whole"))
    built: list[Any] = []

    def stopping(texts: list[np.ndarray], vocab_size: int) -> Any:
        if len(built) == 1:
            raise KeyboardInterrupt
        built.append(texts)
        return build(texts, vocab_size)

    monkeypatch.setattr(suffix_arrays, "build", stopping)
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
        ({"factor": -1.0}, "factor is -1.0; it must not be negative"),
        ({"recent_tokens": -1}, "recent_tokens is -1; it must not be negative"),
        ({"min_chance": 1.5}, "min_chance is 1.5; it must lie between 0 and 1"),
        ({"factor": 0.0}, "factor 0.0 and offset 0.0 leave no token to draft"),
        ({"offset": -30.0}, "factor 1.0 and offset -30.0 leave no token to draft"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**changes)
    with pytest.raises(ValueError, match=message):
        trainer_settings(trainer, **changes)


def test_a_store_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="budget_mb is -1"):
        trainer_settings(trainer, budget_mb=-1.0)


def test_observing_says_which_rows_go_on() -> None:
    """A row that has finished is not looked up any more."""
    target = tiny_target("llama")
    text = greedy_by_transformers("llama", 2, 20)
    ids, mask = padded(prompts(2))
    first = text[0][len(prompts(2)[0])]

    class Noting(Watched):
        def observe(self, step: Step) -> None:
            super().observe(step)
            noted.append(self.inner._is_running == [len(path) > 0 for path in step.paths])

    noted: list[bool] = []
    drafter = Drafter(Config(), target)
    out = draftsmith.generate(target, ids, Noting(drafter), attention_mask=mask, max_new_tokens=20, eos_token_id=first)
    assert noted and all(noted) and out.lengths[0] < out.lengths[1]
    assert len(drafter._own[0].tokens) <= len(prompts(2)[0]) + 1
