"""A slow reference of tri-gram drafts: successors of each pair in a dict, the heaviest first."""

import math
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as some

from draftsmith.drafters import trigram
from draftsmith.drafters.trigram import Config, compiled
from draftsmith.drafters.trigram.compiled import Table
from tests.support.models import VOCAB_SIZE

MASK = 2**64 - 1
Weights = dict[tuple[int, int], dict[int, float]]


def table_of(known: Weights, vocab_size: int) -> Table:
    """Returns the table with these weights."""
    pairs = sorted(known)
    flat = [successor for pair in pairs for successor in known[pair].items()]
    return Table(
        keys_K=np.array([first * vocab_size + second for first, second in pairs], np.int64),
        begins_K=np.cumsum([0, *(len(known[pair]) for pair in pairs)]),
        tokens_S=np.array([token for token, _ in flat], np.int32),
        weights_S=np.array([weight for _, weight in flat], np.float32),
    )


def successors_of(known: Weights, before: int, pending: int) -> list[tuple[int, float]]:
    return sorted(known.get((before, pending), {}).items(), key=lambda successor: -successor[1])


def add_trigrams(known: Weights, recent: list[int], bump: float, largest: float) -> None:
    """Adds the tri-grams of `recent`, new successors before the known ones."""
    for first, second, third in zip(recent, recent[1:], recent[2:], strict=False):
        successors = known.setdefault((first, second), {})
        if third not in successors:
            known[first, second] = successors = {third: 0.0, **successors}
        successors[third] = min(successors[third] + bump, largest)


def splitmix64(number: int) -> int:
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & MASK
    number = (number ^ number >> 27) * 0x94D049BB133111EB & MASK
    return number ^ number >> 31


class Node:
    def __init__(self, text: tuple[int, ...], weight: float) -> None:
        self.text, self.weight, self.children = text, weight, list[Node]()
        self.visits, self.reward, self.is_expanded = 0, 0.0, False


def search(known: Weights, before: int, pending: int, depth: int, config: Config) -> dict[tuple[int, ...], float]:
    """Returns the most visited paths in order, with the share of iterations that visited them."""
    nodes = [Node((before, pending), 0.0)]
    state = splitmix64(config.chance + splitmix64(before * VOCAB_SIZE + pending) & MASK)
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
        if not node.is_expanded and len(node.text) - 2 < depth:
            node.is_expanded = True
            node.children = [
                Node((*node.text, token), weight) for token, weight in successors_of(known, *node.text[-2:])
            ]
            nodes += node.children
            path += node.children[:1]
        reward, text = 1.0, path[-1].text
        for node in path[1:]:
            reward += node.weight
        while len(text) - 2 < depth and (successors := successors_of(known, *text[-2:])):
            index = iteration * depth + len(text) - 2
            uniform = (splitmix64(state + (index + 1) * 0x9E3779B97F4A7C15 & MASK) >> 11) * 2.0**-53
            left = uniform * sum(weight for _, weight in successors)
            for token, weight in successors:
                if left < weight or token == successors[-1][0]:
                    break
                left -= weight
            text, reward = (*text, token), reward + weight
        for node in path:
            node.visits += 1
            node.reward += reward
    # Of nodes with equal visits the earlier one comes first.
    best = sorted((node for node in nodes if node.visits), key=lambda node: -node.visits)[: config.num_sequences + 1]
    return {node.text[2:]: node.visits / config.num_iterations for node in best}


def all_paths(known: Weights, before: int, pending: int, depth: int) -> dict[tuple[int, ...], float]:
    """Returns the product of shares of every path."""
    found = {(): 1.0}
    level = {(before, pending): 1.0}
    for _ in range(depth):
        longer = {}
        for text, score in level.items():
            successors = successors_of(known, *text[-2:])
            total = sum(weight for _, weight in successors)
            longer |= {(*text, token): score * (weight / total) for token, weight in successors}
        level = longer
        found |= {text[2:]: score for text, score in level.items()}
    return found


def extend_paths(
    known: Weights, before: int, pending: int, scores: dict[tuple[int, ...], float], depth: int
) -> dict[tuple[int, ...], float]:
    added = dict(scores)
    for text, score in scores.items():
        successors = successors_of(known, *(before, pending, *text)[-2:])
        if successors and len(text) < depth:
            share = successors[0][1] / sum(weight for _, weight in successors)
            added.setdefault((*text, successors[0][0]), score * share)
    return {text: score for text, score in added.items() if text}


def scores_by_path(nodes: Any) -> dict[tuple[int, ...], float]:
    """Returns the score of each node but node 0, by the tokens on its path."""
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(nodes[0].tolist(), nodes[1].tolist(), strict=True):
        paths.append((*paths[parent], token) if parent >= 0 else ())
    assert [len(path) for path in paths] == nodes[2].tolist()
    assert len(set(paths)) == len(paths)
    return dict(zip(paths[1:], nodes[3].tolist()[1:], strict=True))


TOKENS = some.integers(0, 3)
SUCCESSORS = some.dictionaries(TOKENS, some.integers(1, 8).map(lambda part: part / 8), min_size=1, max_size=4)
KNOWN = some.dictionaries(some.tuples(TOKENS, TOKENS), SUCCESSORS, max_size=16).map(
    # As in a table: the heaviest first.
    lambda known: {pair: dict(sorted(after.items(), key=lambda one: -one[1])) for pair, after in known.items()}
)
RECENT = some.lists(some.lists(TOKENS, max_size=9), max_size=4)
FEW = settings(max_examples=60, deadline=None)


def compiled_trigrams(
    known: Weights, added: list[list[int]], bump: float = 0.04, largest: float = 0.5
) -> compiled.Trigrams:
    """Returns the table of `known` and an overlay of the `added` texts, which are added to `known` as well."""
    table, overlay = Table(*map(trigram._frozen, table_of(known, VOCAB_SIZE))), compiled.new_overlay()
    for text in added:
        overlay = compiled.add_trigrams(table, overlay, np.array(text, np.int64), VOCAB_SIZE, bump, largest)
        add_trigrams(known, text, bump, largest)
    return compiled.Trigrams(table, overlay, VOCAB_SIZE, max(map(len, known.values()), default=0))
