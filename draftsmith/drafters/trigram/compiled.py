"""Compiled searches in tri-gram tables; the only file that needs numba.

A table holds the successors of pairs of tokens with their weights. An overlay replaces the table's entries for the
pairs that occur in one text. Their arrays are not checked here: the caller has made sure that no index is out of range.

Shape suffixes: K keys, S successors of all keys, H slots of a hash table, E entries of an overlay, T last tokens of a
text, C successors of one pair, N nodes of a tree, node 0 being the pending token.
"""

import math
from typing import NamedTuple

import numpy as np
from numba import njit

Nodes = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Tokens, parents, depths (int64) and scores (float64) [N], every parent before its children."""
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
NONE = -1


class Table(NamedTuple):
    """Sorted keys, first * vocabulary + second, and the successors of each in descending order of weight."""

    keys_K: np.ndarray
    """int64."""
    begins_K: np.ndarray
    """int64, K + 1: the successors of key k are those from begins[k] up to begins[k + 1]."""
    tokens_S: np.ndarray
    """int32."""
    weights_S: np.ndarray
    """float32."""


class Overlay(NamedTuple):
    """The successors of the pairs that occur in one text: a hash table of linked lists."""

    keys_H: np.ndarray
    """int64, `NONE` in a free slot; their number is a power of two."""
    heads_H: np.ndarray
    """int64: the first entry of each key's list."""
    tokens_E: np.ndarray
    """int32."""
    weights_E: np.ndarray
    """float64."""
    nexts_E: np.ndarray
    """int64: the next entry of the list, `NONE` at its end."""
    sizes: np.ndarray
    """int64: the numbers of keys, of entries, and of entries of the longest list."""


class Trigrams(NamedTuple):
    """A table and the overlay of one text."""

    table: Table
    overlay: Overlay
    vocab_size: int
    widest: int
    """Largest number of successors of a pair."""


def new_overlay() -> Overlay:
    """Returns an empty overlay."""
    free_H, entries_E = np.full(64, NONE), np.zeros(256, dtype=np.int64)
    return Overlay(
        keys_H=free_H,
        heads_H=free_H.copy(),
        tokens_E=entries_E.astype(np.int32),
        weights_E=entries_E.astype(np.float64),
        nexts_E=entries_E,
        sizes=np.zeros(3, dtype=np.int64),
    )


@njit(cache=True)
def splitmix64(number: np.uint64) -> np.uint64:
    """Returns the output of SplitMix64 for a state, used as a hash (Steele, Lea and Flood, OOPSLA 2014)."""
    number = (number ^ (number >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    number = (number ^ (number >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return number ^ (number >> np.uint64(31))


@njit(cache=True)
def uniform(seed: np.uint64, index: int) -> float:
    """Returns number `index` of the stream of uniforms in [0, 1) that SplitMix64 generates from the seed."""
    return np.float64(splitmix64(seed + np.uint64(index + 1) * GOLDEN) >> np.uint64(11)) * 2.0**-53


@njit(cache=True)
def _find(overlay: Overlay, key: int) -> np.int64:
    """Returns the slot of the key in the hash table, or the free slot where it belongs."""
    last = len(overlay.keys_H) - 1
    slot = np.int64(splitmix64(np.uint64(key)) & np.uint64(last))
    while overlay.keys_H[slot] != key and overlay.keys_H[slot] != NONE:
        slot = (slot + 1) & last
    return slot


@njit(cache=True)
def _span(table: Table, key: int) -> tuple[int, int]:
    """Returns where the key's successors begin and end in the table, or two zeros if the key is missing."""
    at = np.searchsorted(table.keys_K, key)
    if at == len(table.keys_K) or table.keys_K[at] != key:
        return 0, 0
    return table.begins_K[at], table.begins_K[at + 1]


@njit(cache=True)
def _push(overlay: Overlay, slot: int, token: int, weight: float) -> None:
    """Inserts an entry at the head of a slot's list."""
    entry = overlay.sizes[1]
    overlay.tokens_E[entry], overlay.weights_E[entry] = token, weight
    overlay.nexts_E[entry], overlay.heads_H[slot] = overlay.heads_H[slot], entry
    overlay.sizes[1] += 1


@njit(cache=True)
def _with_room(overlay: Overlay, num_keys: int, num_entries: int) -> Overlay:
    """Returns the overlay, or a larger copy, with room for this many more keys and entries."""
    keys_H, heads_H, tokens_E, weights_E, nexts_E, sizes = overlay
    if 2 * (sizes[0] + num_keys) > len(keys_H):
        # At least half of the slots stay free, so that searches are short.
        keys_H, heads_H = np.full(4 * len(keys_H), NONE), np.full(4 * len(keys_H), NONE)
        larger = Overlay(keys_H, heads_H, tokens_E, weights_E, nexts_E, sizes)
        for old in range(len(overlay.keys_H)):
            if overlay.keys_H[old] != NONE:
                slot = _find(larger, overlay.keys_H[old])
                keys_H[slot], heads_H[slot] = overlay.keys_H[old], overlay.heads_H[old]
    if sizes[1] + num_entries > len(tokens_E):
        more = max(len(tokens_E), num_entries)
        tokens_E = np.concatenate((tokens_E, np.zeros(more, tokens_E.dtype)))
        weights_E = np.concatenate((weights_E, np.zeros(more, weights_E.dtype)))
        nexts_E = np.concatenate((nexts_E, np.zeros(more, nexts_E.dtype)))
    return Overlay(keys_H, heads_H, tokens_E, weights_E, nexts_E, sizes)


@njit(cache=True)
def add_trigrams(
    table: Table, overlay: Overlay, recent_T: np.ndarray, vocab_size: int, bump: float, largest: float
) -> Overlay:
    """Returns the overlay with `bump` added to the weight of each tri-gram of `recent_T`, up to `largest`.

    A new pair starts with its successors in the table, and a new successor with weight 0.
    """
    for end in range(2, len(recent_T)):
        key, token = recent_T[end - 2] * vocab_size + recent_T[end - 1], recent_T[end]
        begin, stop = _span(table, key)
        overlay = _with_room(overlay, 1, stop - begin + 1)
        slot = _find(overlay, key)
        if overlay.keys_H[slot] == NONE:
            overlay.keys_H[slot] = key
            overlay.sizes[0] += 1
            for at in range(stop - 1, begin - 1, -1):
                _push(overlay, slot, table.tokens_S[at], table.weights_S[at])
        entry, size = overlay.heads_H[slot], 0
        while entry != NONE and overlay.tokens_E[entry] != token:
            entry, size = overlay.nexts_E[entry], size + 1
        if entry == NONE:
            _push(overlay, slot, token, 0.0)
            entry = overlay.heads_H[slot]
            overlay.sizes[2] = max(overlay.sizes[2], size + 1)
        overlay.weights_E[entry] = min(overlay.weights_E[entry] + bump, largest)
    return overlay


@njit(cache=True)
def write_successors(trigrams: Trigrams, first: int, second: int, tokens_C: np.ndarray, weights_C: np.ndarray) -> int:
    """Writes a pair's successors in descending order of weight, the latest first if equal, and returns their number."""
    table, overlay, key, count = trigrams.table, trigrams.overlay, first * trigrams.vocab_size + second, 0
    slot = _find(overlay, key)
    if overlay.keys_H[slot] == NONE:
        begin, stop = _span(table, key)
        for at in range(begin, stop):
            tokens_C[count], weights_C[count] = table.tokens_S[at], table.weights_S[at]
            count += 1
        return count
    entry = overlay.heads_H[slot]
    while entry != NONE:
        weight, at = overlay.weights_E[entry], count
        while at > 0 and weights_C[at - 1] < weight:
            tokens_C[at], weights_C[at] = tokens_C[at - 1], weights_C[at - 1]
            at -= 1
        tokens_C[at], weights_C[at] = overlay.tokens_E[entry], weight
        entry, count = overlay.nexts_E[entry], count + 1
    return count


@njit(cache=True)
def greedy_chain(trigrams: Trigrams, before: int, pending: int, depth: int) -> Nodes:
    """Returns the chain of at most `depth` heaviest successors; scores are products of their shares of the weights."""
    tokens_C, weights_C = np.empty(trigrams.widest, np.int64), np.empty(trigrams.widest)
    tokens_N, scores_N = np.full(depth + 1, pending), np.ones(depth + 1)
    last = 0
    while last < depth:
        count = write_successors(trigrams, before, tokens_N[last], tokens_C, weights_C)
        if count == 0:
            break
        before, tokens_N[last + 1] = tokens_N[last], tokens_C[0]
        scores_N[last + 1] = scores_N[last] * (weights_C[0] / weights_C[:count].sum())
        last += 1
    order_N = np.arange(last + 1)
    return tokens_N[: last + 1], order_N - 1, order_N, scores_N[: last + 1]


@njit(cache=True)
def likeliest_paths(trigrams: Trigrams, before: int, pending: int, depth: int, num_nodes: int) -> Nodes:
    """Returns the `num_nodes` paths of at most `depth` tokens with the largest products of shares, in that order.

    The product never increases along a path, so that expanding the best open node each time gives the same result as
    following every path. Of equal ones the one found first comes first.
    """
    tokens_C, weights_C = np.empty(trigrams.widest, np.int64), np.empty(trigrams.widest)
    most = 1 + trigrams.widest * (num_nodes + 1)
    tokens_N, parents_N, depths_N = np.empty(most, np.int64), np.empty(most, np.int64), np.zeros(most, np.int64)
    scores_N, is_open_N = np.ones(most), np.ones(most, np.bool_)
    tokens_N[0], parents_N[0] = pending, NONE
    # Nodes are numbered in the order found; `taken` lists those returned.
    taken, num_found = np.empty(num_nodes + 1, np.int64), 1
    for num_taken in range(num_nodes + 1):
        best = NONE
        for node in range(num_found):
            if is_open_N[node] and (best == NONE or scores_N[node] > scores_N[best]):
                best = node
        if best == NONE:
            taken = taken[:num_taken]
            break
        taken[num_taken], is_open_N[best] = best, False
        if depths_N[best] == depth:
            continue
        above = before if best == 0 else tokens_N[parents_N[best]]
        count = write_successors(trigrams, above, tokens_N[best], tokens_C, weights_C)
        total = weights_C[:count].sum()
        for rank in range(count):
            tokens_N[num_found], parents_N[num_found] = tokens_C[rank], best
            depths_N[num_found] = depths_N[best] + 1
            scores_N[num_found] = scores_N[best] * (weights_C[rank] / total)
            num_found += 1
    return _select(tokens_N, parents_N, depths_N, scores_N, taken)


@njit(cache=True)
def monte_carlo_search(
    trigrams: Trigrams,
    before: int,
    pending: int,
    depth: int,
    num_nodes: int,
    num_iterations: int,
    explore: float,
    base: float,
    seed: int,
) -> Nodes:
    """Returns the `num_nodes` paths of at most `depth` tokens that a Monte Carlo tree search visits most often.

    Each iteration descends to the child of largest token preference score (2407.12021, the draft maker's variant of
    PUCT), W / n + (explore + ln((N + base + 1) / base)) P sqrt(N) / (1 + n), where N and n are the visits of parent and
    child, W the sum of the child's rewards and P its weight; unvisited children come first, the heaviest of them first.
    A leaf is expanded by all its successors, and the path is completed to `depth` tokens by sampling in proportion to
    the weights. The reward, 1 plus the sum of all weights on the path, is added to each of its nodes. Scores are shares
    of the iterations; the same pair of tokens gets the same random numbers.
    """
    tokens_C, weights_C = np.empty(trigrams.widest, np.int64), np.empty(trigrams.widest)
    most = 1 + trigrams.widest * (num_iterations + 1)
    tokens_N, parents_N, depths_N = np.empty(most, np.int64), np.empty(most, np.int64), np.zeros(most, np.int64)
    weights_N, rewards_N, visits_N = np.empty(most), np.zeros(most), np.zeros(most)
    # A node's children are adjacent, from its first one on; NONE for a node that has not been expanded.
    firsts_N, counts_N = np.full(most, NONE), np.zeros(most, np.int64)
    tokens_N[0], parents_N[0] = pending, NONE
    num_found = 1
    stream = splitmix64(np.uint64(seed) + splitmix64(np.uint64(before * trigrams.vocab_size + pending)))
    for iteration in range(num_iterations):
        node, reward = 0, 1.0
        while counts_N[node] > 0:
            scale = (explore + math.log((visits_N[node] + base + 1) / base)) * math.sqrt(visits_N[node])
            best, best_score = NONE, -1.0
            for child in range(firsts_N[node], firsts_N[node] + counts_N[node]):
                if visits_N[child] == 0:
                    best = child
                    break
                score = rewards_N[child] / visits_N[child] + scale * weights_N[child] / (1 + visits_N[child])
                if score > best_score:
                    best, best_score = child, score
            node = best
            reward += weights_N[node]
        above = before if node == 0 else tokens_N[parents_N[node]]
        if firsts_N[node] == NONE and depths_N[node] < depth:
            count = write_successors(trigrams, above, tokens_N[node], tokens_C, weights_C)
            firsts_N[node], counts_N[node] = num_found, count
            for rank in range(count):
                tokens_N[num_found], weights_N[num_found] = tokens_C[rank], weights_C[rank]
                parents_N[num_found], depths_N[num_found] = node, depths_N[node] + 1
                num_found += 1
            if count > 0:
                above, node = tokens_N[node], firsts_N[node]
                reward += weights_N[node]
        token, length = tokens_N[node], depths_N[node]
        while length < depth:
            count = write_successors(trigrams, above, token, tokens_C, weights_C)
            if count == 0:
                break
            left, drawn = uniform(stream, iteration * depth + length) * weights_C[:count].sum(), 0
            while drawn < count - 1 and left >= weights_C[drawn]:
                left, drawn = left - weights_C[drawn], drawn + 1
            above, token, length = token, tokens_C[drawn], length + 1
            reward += weights_C[drawn]
        while node != NONE:
            visits_N[node], rewards_N[node] = visits_N[node] + 1, rewards_N[node] + reward
            node = parents_N[node]
    # A parent has at least as many visits as its children together, and comes before them.
    visited = np.flatnonzero(visits_N[:num_found])
    taken = visited[np.argsort(-visits_N[visited], kind="mergesort")[: num_nodes + 1]]
    return _select(tokens_N, parents_N, depths_N, visits_N / num_iterations, taken)


@njit(cache=True)
def extend_paths(trigrams: Trigrams, before: int, nodes: Nodes, depth: int) -> Nodes:
    """Returns the tree with the heaviest successor of every path added, unless it is there or too deep.

    The score of an added node is its share of its parent's score.
    """
    tokens_N, parents_N, depths_N, scores_N = nodes
    tokens_C, weights_C = np.empty(trigrams.widest, np.int64), np.empty(trigrams.widest)
    num_nodes, num_all = len(tokens_N), len(tokens_N)
    tokens_N, parents_N = np.append(tokens_N, tokens_N), np.append(parents_N, parents_N)
    depths_N, scores_N = np.append(depths_N, depths_N), np.append(scores_N, scores_N)
    for node in range(num_nodes):
        above = before if node == 0 else tokens_N[parents_N[node]]
        count = write_successors(trigrams, above, tokens_N[node], tokens_C, weights_C)
        is_new = count > 0 and depths_N[node] < depth
        for child in range(node + 1, num_nodes):
            is_new = is_new and not (parents_N[child] == node and tokens_N[child] == tokens_C[0])
        if is_new:
            tokens_N[num_all], parents_N[num_all], depths_N[num_all] = tokens_C[0], node, depths_N[node] + 1
            scores_N[num_all] = scores_N[node] * (weights_C[0] / weights_C[:count].sum())
            num_all += 1
    return tokens_N[:num_all], parents_N[:num_all], depths_N[:num_all], scores_N[:num_all]


@njit(cache=True)
def _select(
    tokens_N: np.ndarray, parents_N: np.ndarray, depths_N: np.ndarray, scores_N: np.ndarray, taken: np.ndarray
) -> Nodes:
    """Returns the nodes `taken`, in that order; every node's parent must come before it."""
    number_N = np.full(len(tokens_N), NONE)
    for number, node in enumerate(taken):
        number_N[node] = number
    parents = parents_N[taken]
    for number in range(1, len(taken)):
        parents[number] = number_N[parents[number]]
    return tokens_N[taken], parents, depths_N[taken], scores_N[taken]
