"""Drafts from tri-grams against a slow reference: what a text adds, the search, all paths followed; its store."""

import itertools
import math
import mmap
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

import draftsmith
from draftsmith import compiled
from draftsmith.compiled import Table
from draftsmith.drafters import trigram
from draftsmith.drafters.trigram import Config, Drafter
from draftsmith.tree import Draft
from tests.family import Watched, check_family, texts
from tests.law import check_law, law_target
from tests.models import SEQ2SEQ, VOCAB_SIZE, greedy_by_transformers, padded, prompts, tiny_target

EXAMPLE = Config(num_iterations=20, num_sequences=6, num_nodes=7)
MASK = 2**64 - 1
Weights = dict[tuple[int, int], dict[int, float]]


def test_family(tmp_path: Path) -> None:
    check_family(trigram, EXAMPLE, tmp_path)


# --- The slow reference: successors of a pair in dicts, the heaviest first and of equal ones the earlier -----------


def table_of(known: Weights, vocab_size: int) -> Table:
    """Returns the arrays of these weights."""
    pairs = sorted(known)
    flat = [successor for pair in pairs for successor in known[pair].items()]
    return Table(
        keys_K=np.array([first * vocab_size + second for first, second in pairs], np.int64),
        begins_K=np.cumsum([0, *(len(known[pair]) for pair in pairs)]),
        tokens_S=np.array([token for token, _ in flat], np.int32),
        weights_S=np.array([weight for _, weight in flat], np.float32),
    )


def ranked(known: Weights, before: int, pending: int) -> list[tuple[int, float]]:
    return sorted(known.get((before, pending), {}).items(), key=lambda successor: -successor[1])


def learn(known: Weights, recent: list[int], bump: float, largest: float) -> None:
    """What is new comes before what was known."""
    for first, second, third in zip(recent, recent[1:], recent[2:], strict=False):
        successors = known.setdefault((first, second), {})
        if third not in successors:
            known[first, second] = successors = {third: 0.0, **successors}
        successors[third] = min(successors[third] + bump, largest)


def mixed(number: int) -> int:
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & MASK
    number = (number ^ number >> 27) * 0x94D049BB133111EB & MASK
    return number ^ number >> 31


class Node:
    def __init__(self, text: tuple[int, ...], weight: float) -> None:
        self.text, self.weight, self.children = text, weight, list[Node]()
        self.visits, self.reward, self.is_asked = 0, 0.0, False


def search(known: Weights, before: int, pending: int, depth: int, config: Config) -> dict[tuple[int, ...], float]:
    """Returns the texts most visited and the share of iterations that visited them, in that order."""
    nodes = [Node((before, pending), 0.0)]
    state = mixed(config.chance + mixed(before * VOCAB_SIZE + pending) & MASK)
    for iteration in range(config.num_iterations):
        path = nodes[:1]
        while path[-1].children:
            node = path[-1]
            scale = config.explore + math.log((node.visits + config.explore_base + 1) / config.explore_base)
            scores = [
                child.reward / child.visits + scale * math.sqrt(node.visits) * child.weight / (1 + child.visits)
                if child.visits
                else math.inf
                for child in node.children
            ]
            path.append(node.children[scores.index(max(scores))])
        node = path[-1]
        if not node.is_asked and len(node.text) - 2 < depth:
            node.is_asked = True
            node.children = [Node((*node.text, token), weight) for token, weight in ranked(known, *node.text[-2:])]
            nodes += node.children
            path += node.children[:1]
        reward, text = 1.0, path[-1].text
        for node in path[1:]:
            reward += node.weight
        while len(text) - 2 < depth and (successors := ranked(known, *text[-2:])):
            place = iteration * depth + len(text) - 2
            uniform = (mixed(state + (place + 1) * 0x9E3779B97F4A7C15 & MASK) >> 11) * 2.0**-53
            left = uniform * sum(weight for _, weight in successors)
            for token, weight in successors:
                if left < weight or token == successors[-1][0]:
                    break
                left -= weight
            text, reward = (*text, token), reward + weight
        for node in path:
            node.visits += 1
            node.reward += reward
    # Of nodes visited equally often the earlier comes first.
    best = sorted((node for node in nodes if node.visits), key=lambda node: -node.visits)[: config.num_sequences + 1]
    return {node.text[2:]: node.visits / config.num_iterations for node in best}


def all_paths(known: Weights, before: int, pending: int, depth: int) -> dict[tuple[int, ...], float]:
    """Follows every path and returns each text's product of shares."""
    found = {(): 1.0}
    level = {(before, pending): 1.0}
    for _ in range(depth):
        longer = {}
        for text, score in level.items():
            successors = ranked(known, *text[-2:])
            total = sum(weight for _, weight in successors)
            longer |= {(*text, token): score * (weight / total) for token, weight in successors}
        level = longer
        found |= {text[2:]: score for text, score in level.items()}
    return found


def lengthened(
    known: Weights, before: int, pending: int, scores: dict[tuple[int, ...], float], depth: int
) -> dict[tuple[int, ...], float]:
    added = dict(scores)
    for text, score in scores.items():
        successors = ranked(known, *(before, pending, *text)[-2:])
        if successors and len(text) < depth:
            share = successors[0][1] / sum(weight for _, weight in successors)
            added.setdefault((*text, successors[0][0]), score * share)
    return {text: score for text, score in added.items() if text}


def read(nodes: Any) -> dict[tuple[int, ...], float]:
    """Returns what is read on the way to each node but node 0, and its score."""
    read_texts: list[tuple[int, ...]] = []
    for token, parent in zip(nodes[0].tolist(), nodes[1].tolist(), strict=True):
        read_texts.append((*read_texts[parent], token) if parent >= 0 else ())
    assert [len(text) for text in read_texts] == nodes[2].tolist()
    assert len(set(read_texts)) == len(read_texts)
    return dict(zip(read_texts[1:], nodes[3].tolist()[1:], strict=True))


TOKENS = some.integers(0, 3)
SUCCESSORS = some.dictionaries(TOKENS, some.integers(1, 8).map(lambda part: part / 8), min_size=1, max_size=4)
KNOWN = some.dictionaries(some.tuples(TOKENS, TOKENS), SUCCESSORS, max_size=16).map(
    # As in a store: the heaviest first.
    lambda known: {pair: dict(sorted(after.items(), key=lambda one: -one[1])) for pair, after in known.items()}
)
RECENT = some.lists(some.lists(TOKENS, max_size=9), max_size=4)
FEW = settings(max_examples=60, deadline=None)


def learnt(known: Weights, texts_met: list[list[int]], bump: float = 0.04, largest: float = 0.5) -> compiled.Known:
    """Returns the compiled form of what is known and of what texts add, `known` taking that up too."""
    table, overlay = Table(*map(trigram._frozen, table_of(known, VOCAB_SIZE))), compiled.new_overlay()
    for met in texts_met:
        overlay = compiled.learn(table, overlay, np.array(met, np.int64), VOCAB_SIZE, bump, largest)
        learn(known, met, bump, largest)
    return compiled.Known(table, overlay, VOCAB_SIZE, max(map(len, known.values()), default=0))


@FEW
@given(KNOWN, RECENT)
def test_a_text_adds_to_what_is_known(known: Weights, met: list[list[int]]) -> None:
    quick = learnt(known, met)
    assert max(quick.overlay.sizes[2], np.diff(quick.table.begins_K).max(initial=0)) == quick.widest
    tokens_C, weights_C = np.empty(quick.widest, np.int64), np.empty(quick.widest)
    for pair in itertools.product(range(4), repeat=2):
        count = compiled.following(quick, *pair, tokens_C, weights_C)
        found = list(zip(tokens_C[:count].tolist(), weights_C[:count].tolist(), strict=True))
        assert found == ranked(known, *pair)


def test_an_overlay_grows() -> None:
    """Some thousand pairs, met in an order without rhyme, and one pair that everything follows."""
    rng = np.random.default_rng(0)
    text = rng.integers(0, VOCAB_SIZE, 3_000).tolist()
    many = [token for third in range(VOCAB_SIZE) for token in (7, 7, third)]
    known: Weights = {}
    quick = learnt(known, [text, many])
    assert int(quick.overlay.sizes[0]) == len(known) > 1_000 and quick.widest == VOCAB_SIZE
    tokens_C, weights_C = np.empty(quick.widest, np.int64), np.empty(quick.widest)
    for pair in known:
        count = compiled.following(quick, *pair, tokens_C, weights_C)
        assert list(zip(tokens_C[:count].tolist(), weights_C[:count].tolist(), strict=True)) == ranked(known, *pair)


@FEW
@given(
    KNOWN, RECENT, TOKENS, TOKENS, some.integers(1, 4), some.integers(1, 30), some.integers(1, 9), some.integers(0, 3)
)
def test_the_search_is_that_of_the_reference(
    known: Weights, met: list[list[int]], before: int, pending: int, depth: int, tries: int, kept: int, chance: int
) -> None:
    quick = learnt(known, met)
    config = Config(num_iterations=tries, num_sequences=kept, explore=2.0, chance=chance)
    nodes = compiled.searched(quick, before, pending, depth, kept, tries, 2.0, config.explore_base, chance)
    scores = search(known, before, pending, depth, config)
    assert list(read(nodes).items()) == list(scores.items())[1:]
    longer = lengthened(known, before, pending, scores, depth + 1)
    assert list(read(compiled.lengthened(quick, before, nodes, depth + 1)).items()) == list(longer.items())


@FEW
@given(KNOWN, RECENT, TOKENS, TOKENS, some.integers(1, 4), some.integers(1, 30))
def test_the_likeliest_are_those_of_all_paths(
    known: Weights, met: list[list[int]], before: int, pending: int, depth: int, kept: int
) -> None:
    quick = learnt(known, met)
    nodes = compiled.likeliest(quick, before, pending, depth, kept)
    found, every = read(nodes), all_paths(known, before, pending, depth)
    assert found == pytest.approx({text: every[text] for text in found})
    best = sorted(every.values(), reverse=True)[1 : kept + 1]
    assert list(found.values()) == pytest.approx(best), "in falling order, and none left out is likelier"
    longer = lengthened(known, before, pending, {(): 1.0, **found}, depth)
    assert read(compiled.lengthened(quick, before, nodes, depth)) == pytest.approx(longer)


@FEW
@given(KNOWN, RECENT, TOKENS, TOKENS, some.integers(1, 4))
def test_the_chain_takes_the_heaviest_each_time(
    known: Weights, met: list[list[int]], before: int, pending: int, depth: int
) -> None:
    quick = learnt(known, met)
    text = [before, pending]
    while len(text) < depth + 2 and (successors := ranked(known, *text[-2:])):
        text.append(successors[0][0])
    nodes = compiled.chain(quick, before, pending, depth)
    assert nodes[0].tolist() == text[1:] and nodes[1].tolist() == list(range(-1, len(text) - 2))
    every = all_paths(known, before, pending, depth)
    assert read(nodes) == pytest.approx(
        {tuple(text[2:end]): every[tuple(text[2:end])] for end in range(3, len(text) + 1)}
    )


def test_a_search_by_hand() -> None:
    """Two successors of weight 0.75 and 0.25, both leaves: c1 = 1, c2 = 8, every reward is 1 and the weight.

    Third: 1.75 + (1 + ln 11/8) 0.75 sqrt 2 / 2 = 2.449 against 1.25 + (1 + ln 11/8) 0.25 sqrt 2 / 2 = 1.483.
    """
    quick = learnt({(1, 2): {3: 0.75, 4: 0.25}}, [])
    shares = [read(compiled.searched(quick, 1, 2, 1, 9, number, 1.0, 8.0, 0)) for number in (1, 2, 3)]
    assert shares == [{(3,): 1.0}, {(3,): 0.5, (4,): 0.5}, {(3,): pytest.approx(2 / 3), (4,): pytest.approx(1 / 3)}]


def test_chances_are_splitmix64() -> None:
    """The first outputs from seed 1234567, as published with the generator."""
    seed = np.uint64(1234567)
    assert [int(compiled.uniform(seed, place) * 2**53) for place in range(3)] == [
        6457827717110365317 >> 11,
        3203168211198807973 >> 11,
        9817491932198370423 >> 11,
    ]


# --- The drafter -------------------------------------------------------------------------------------------------


def own_text(target: Any) -> list[list[int]]:
    return greedy_by_transformers("llama", 5, 20) if target is tiny_target("llama") else []


def filled(config: Config, target: Any) -> Drafter:
    """Returns a drafter that knows the target's own greedy text, and some that it would not write."""
    known: Weights = {}
    for text in [*own_text(target), *prompts(5, seed=4)]:
        learn(known, text, 0.125, 1.0)
    return Drafter(config, target, table_of(known, target.vocab_size))


class Mixed(Watched):
    """Every other step is a plain one that this drafter did not propose; keeps the slow reference beside it."""

    def start(self, session: Any) -> None:
        super().start(session)
        table = self.inner.table
        spans = list(itertools.pairwise(table.begins_K.tolist()))
        self.known = [
            {
                divmod(key, VOCAB_SIZE): dict(
                    zip(table.tokens_S[a:b].tolist(), table.weights_S[a:b].tolist(), strict=True)
                )
                for key, (a, b) in zip(table.keys_K.tolist(), spans, strict=True)
            }
            for _ in session.rows
        ]
        self.num_rounds, self.is_running = 0, [True] * len(session.rows)
        for known, row in zip(self.known, session.rows, strict=True):
            learn(known, row[-16:], 0.04, 3.0)

    def propose(self, budget: int) -> Draft:
        self.num_rounds += 1
        draft = super().propose(budget)
        config: Config = self.config
        for row, known in enumerate(self.known):
            ids = self._session.rows[row]
            expected = {}
            if len(ids) > 1 and self.is_running[row]:
                expected = search(known, *ids[-2:], min(budget, config.depth), config)
                expected = lengthened(known, *ids[-2:], expected, budget)
                expected = dict(sorted(expected.items(), key=lambda one: -one[1])[: config.num_nodes])
            num_nodes = draft.num_nodes[row] if draft.num_nodes else draft.tree.num_nodes
            parents = draft.tree.parents_RN[row if len(draft.tree.parents_RN) > 1 else 0, :num_nodes].tolist()
            found: list[tuple[int, ...]] = []
            for token, parent in zip(draft.tokens_BN[row, :num_nodes].tolist(), parents, strict=True):
                found.append((*found[parent], token) if found else ())
            assert set(found[1:]) == set(expected)
        return draft if self.num_rounds % 2 else self._session.only_pending()

    def observe(self, step: Any) -> None:
        super().observe(step)
        self.is_running = [bool(path) for path in step.paths]
        for known, row, path in zip(self.known, self._session.rows, step.paths, strict=True):
            if path:
                learn(known, row[-16:], 0.04, 3.0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_learn_what_they_commit_whoever_proposed_it(temperature: float) -> None:
    target = tiny_target("llama")
    drafter = Mixed(filled(EXAMPLE, target))
    ids, mask = padded(prompts(5), side="left")
    # Rows that end earlier go on standing beside the others.
    eos = own_text(target)[1][-6]
    out = draftsmith.generate(
        target, ids, drafter, attention_mask=mask, max_new_tokens=14, temperature=temperature, seed=1, eos_token_id=eos
    )
    assert drafter.num_rounds > 4 and drafter.num_drafted > 0
    if temperature == 0:
        assert len(set(out.lengths.tolist())) > 2 and out.stats.tau > 1.3
        for found, text in zip(texts(out), own_text(target), strict=True):
            assert found == text[: len(found)]


@pytest.mark.parametrize("maker", ["full", "greedy"])
def test_the_other_makers(maker: str) -> None:
    """Greedy output is the target's own; with room for one text only, the likeliest are the chain."""
    target = tiny_target("llama")
    drafter = filled(Config(maker=maker), target)
    ids, mask = padded(prompts(5), side="left")
    out = draftsmith.generate(target, ids, Watched(drafter), attention_mask=mask, max_new_tokens=20)
    assert texts(out) == own_text(target) and out.stats.tau > 2
    sampling = Drafter(Config(maker=maker), law_target(), table_of({(4, 2): {7: 0.5, 1: 0.5}, (2, 7): {4: 1.0}}, 8))
    check_law(sampling, law_target(), num_samples=1_000)


def test_no_more_nodes_than_asked_for() -> None:
    target = tiny_target("llama")
    shapes = []
    for num_nodes in (1, 3, 64):
        drafter = Watched(filled(Config(num_nodes=num_nodes), target))
        draftsmith.generate(target, torch.tensor(prompts(1)), drafter, max_new_tokens=6)
        shapes.append(max(len(tokens) for draft in drafter.drafts for tokens in draft) - 1)
    assert shapes[:2] == [1, 3] and shapes[2] > 3


def test_the_same_text_gets_the_same_draft() -> None:
    """Whatever row it is in, and whatever else is drawn in the call."""
    target = tiny_target("llama")
    firsts = []
    for rows, seed in (([[3, 4, 5, 3, 4]], 1), ([[6, 7], [3, 4, 5, 3, 4]], 2)):
        ids, mask = padded(rows)
        drafter = Watched(filled(Config(), target))
        settings = {"temperature": 1.0, "seed": seed, "max_new_tokens": 6}
        draftsmith.generate(target, ids, drafter, attention_mask=mask, **settings)
        firsts.append(drafter.drafts[0][-1])
    assert len(firsts[0]) > 2 and firsts[1][: len(firsts[0])] == firsts[0] and not any(firsts[1][len(firsts[0]) :])


@pytest.mark.parametrize("architecture", SEQ2SEQ)
def test_an_encoder_decoder_is_given_one_branch(architecture: str) -> None:
    target = tiny_target(architecture)
    expected = greedy_by_transformers(architecture, 5, 20)
    known: Weights = {}
    for text in expected:
        learn(known, text, 0.25, 1.0)
    drafter = Watched(Drafter(Config(), target, table_of(known, target.vocab_size)))
    ids, mask = padded(prompts(5), side="right")
    out = draftsmith.generate(target, ids, drafter, attention_mask=mask, max_new_tokens=20)
    assert texts(out) == expected and drafter.num_drafted > 0 and out.stats.tau > 1.3


# --- The store ---------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    target = tiny_target("llama")
    draftsmith.save(filled(Config(), target), tmp_path / "artifact", target=target)
    return tmp_path / "artifact"


def memory_of(array: Any) -> Any:
    return memory_of(array.base) if isinstance(array, np.ndarray) else array


def test_a_store_is_read_from_its_files(saved: Path) -> None:
    target = tiny_target("llama")
    drafter, loaded = filled(Config(), target), draftsmith.load(saved, target)
    for one, other in zip(drafter.table, loaded.table, strict=True):
        assert np.array_equal(one, other) and one.dtype == other.dtype and len(one) > 30
        assert type(other) is np.ndarray and isinstance(memory_of(other), mmap.mmap) and not other.flags.writeable
    ids, mask = padded(prompts(5))
    drafts = []
    for one in (drafter, loaded):
        watched = Watched(one)
        draftsmith.generate(target, ids, watched, attention_mask=mask, max_new_tokens=12)
        drafts.append(watched.drafts)
    assert drafts[0] == drafts[1]


ODD: dict[str, list[Any]] = {
    "keys": [lambda array: array[::-1], lambda array: array - array[0] - 1, lambda array: array + VOCAB_SIZE**2],
    "begins": [lambda array: array[::-1], lambda array: array + 1, lambda array: array * 2],
    "tokens": [lambda array: array - VOCAB_SIZE, lambda array: array + VOCAB_SIZE],
    "weights": [lambda array: array * 0, lambda array: array + 1, lambda array: array * np.float32("nan")],
}


@pytest.mark.parametrize("name", ODD)
def test_a_file_that_is_truncated_or_odd_is_refused(saved: Path, name: str) -> None:
    file, target = saved / f"{name}.npy", tiny_target("llama")
    array, whole = np.load(file), file.read_bytes()
    for change in (*ODD[name], lambda array: array[:-1], lambda array: np.append(array, array[-1:])):
        np.save(file, change(array))
        with pytest.raises(
            ValueError, match=r"\.npy does not fit the rest of the store; the artifact must be made again"
        ):
            draftsmith.load(saved, target)
    for odd in (array[None], array.astype("f8"), np.array(["x"])):
        np.save(file, odd)
        with pytest.raises(ValueError, match=rf"{name}\.npy holds \S+\[.*\]; the artifact must be made again"):
            draftsmith.load(saved, target)
    for cut in (whole[:-8], whole[:50], b"", b"no array at all"):
        file.write_bytes(cut)
        with pytest.raises(ValueError, match=f"{name}.npy is missing, truncated or no array"):
            draftsmith.load(saved, target)
    file.unlink()
    with pytest.raises(ValueError, match=f"{name}.npy is missing, truncated or no array"):
        draftsmith.load(saved, target)


def test_without_the_compiler_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(draftsmith, "compiled")
    monkeypatch.setitem(sys.modules, "draftsmith.compiled", None)
    with pytest.raises(ValueError, match=r"needs numba: pip install 'draftsmith\[compiled\]'"):
        Drafter(Config(), tiny_target("llama"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"maker": "random"}, "maker is 'random'; there are mcts, full, greedy"),
        ({"num_iterations": 0}, "num_iterations is 0; it must be at least 1"),
        ({"depth": 0}, "depth is 0"),
        ({"num_sequences": 0}, "num_sequences is 0"),
        ({"num_nodes": 0}, "num_nodes is 0"),
        ({"bump": -0.1}, "bump is -0.1; it must not be negative"),
        ({"explore": -1.0}, "explore is -1.0"),
        ({"chance": -1}, "chance is -1"),
        ({"explore_base": 0.0}, "explore_base is 0.0; it must be positive"),
        ({"largest": 0.0}, "largest is 0.0"),
        ({"window": 2}, "window is 2; it must hold a tri-gram"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**changes)
