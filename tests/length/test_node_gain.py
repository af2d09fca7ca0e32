"""The policy "node_gain": which nodes it keeps, how many at which costs, and lossless output."""

import random
from statistics import mean
from typing import Any

import pytest
import torch

from draftsmith.artifacts.families import find
from draftsmith.core.tree import Draft, Tree, chain
from draftsmith.drafters import lm, lookup, medusa
from draftsmith.length.controller import make_control, with_length_control
from draftsmith.length.node_gain import NodeControlled, NodeGain, keep_nodes
from draftsmith.parts.composites import Part, part_config
from tests.support.distributions import check_distribution, distribution_target
from tests.support.drafters import SAMPLED_SMALL, TREE, generate_rows, tiny_drafter
from tests.support.family import built, texts
from tests.support.models import greedy_by_transformers, tiny_target

PARENTS = [-1, 0, 0, 1, 1, 2]
"""Node 0 has two children; the first of them has two, the second one."""


def taught(rounds: int = 400) -> NodeGain:
    """Returns a policy after rounds in which node 1 was accepted in 3 of 4, and then node 3 in 1 of 2."""
    policy = NodeGain()
    policy.start(1)
    for number in range(rounds):
        path = [0, 1, 3] if number % 2 and number % 4 else [0, 1] if number % 4 else [0]
        policy.learn([PARENTS], [path], None)
    return policy


def test_a_nodes_probability_is_the_product_of_rates_along_its_path() -> None:
    probs = taught().node_probs(PARENTS)
    # Node 3 was tested in 300 rounds and accepted in 200; nodes 2, 4 and 5 never were accepted.
    assert probs[:2] == pytest.approx([1.0, 0.75], abs=0.01)
    assert probs[3] == pytest.approx(0.75 * 2 / 3, abs=0.01)
    assert max(probs[2], probs[4], probs[5]) < 0.02
    assert NodeGain().node_probs([-1, 0, 0]) == pytest.approx([1, 1 / 2, 1 / 3])


def run(policy: NodeGain, cost_ms: Any, rounds: int = 120) -> list[int]:
    """Returns the number of nodes verified in each round at the cost `cost_ms(nodes)`; node 1 is always accepted."""
    found = []
    for _ in range(rounds):
        kept = policy.select([PARENTS], [True])[0] if policy.will_draft() else [0]
        number = {node: at for at, node in enumerate(kept)}
        parents = [-1, *(number[PARENTS[node]] for node in kept[1:])]
        path = [0, number[1]] if 1 in number else [0]
        policy.learn([parents], [path], cost_ms(len(kept) - 1))
        found.append(len(kept) - 1)
    return found


def test_the_number_of_nodes_follows_their_cost() -> None:
    trials = [2, 0, 2, 0, 3]
    cheap, dear = run(NodeGain(), lambda nodes: 10 + 0.01 * nodes), run(NodeGain(), lambda nodes: 10 + 4 * nodes)
    assert cheap[:5] == dear[:5] == trials and 5 in cheap
    # One more token for 4 ms of 10 pays, and a second node at 4 ms more does not.
    assert dear[5:].count(1) > 0.9 * len(dear[5:]) and max(dear[5:]) == 2


@pytest.mark.parametrize("slope", [0.03, 0.1, 0.2, 0.4])
@pytest.mark.parametrize("found", [0.4, 0.8])
@pytest.mark.parametrize("num_rows", [8, 16])
def test_drafting_loses_at_most_3_percent_whatever_nodes_cost(num_rows: int, found: float, slope: float) -> None:
    """Simulates 200 steps of a look-up whose chains of ten are found in a share of the rows."""
    speeds = [simulated_speed(num_rows, found, slope, random.Random(seed)) for seed in range(4)]
    assert mean(speeds) > 0.97
    expected = [found * 0.35 * 0.6**depth for depth in range(10)]
    best = max((1 + sum(expected[:nodes])) / (1.01 + slope * nodes) for nodes in range(1, 11))
    assert mean(speeds) > 0.9 * best


def simulated_speed(num_rows: int, found: float, slope: float, rng: random.Random) -> float:
    """Returns plain decoding's time over that with a new policy, if a node in each row costs `slope` plain steps."""
    policy, num_tokens, spent_ms = NodeGain(), 0, 0.0
    policy.start(num_rows)
    while num_tokens < 200 * num_rows:
        trees = [[-1, *range(10)] if rng.random() < found else [-1] for _ in range(num_rows)]
        drafts = policy.will_draft()
        kept = policy.select(trees, [True] * num_rows) if drafts else [[0]] * num_rows
        paths = []
        for nodes in kept:
            accepted = [rng.random() < (0.6 if depth else 0.35) for depth in range(len(nodes) - 1)]
            paths.append(list(range(1 + [*accepted, False].index(False))))
        verify_ms = 100 * (1 + slope * (max(map(len, kept)) - 1)) * (1 + 0.03 * rng.random())
        policy.learn([[-1, *range(len(nodes) - 1)] for nodes in kept], paths, verify_ms, float(drafts))
        num_tokens += sum(map(len, paths))
        spent_ms += verify_ms + drafts
    return 200 * 100 * 1.015 / spent_ms


def test_drafting_that_does_not_pay_is_tried_ever_less_often() -> None:
    never = run(NodeGain(), lambda nodes: 10 + (nodes > 0) * 15 + nodes, rounds=4 + 17 + 33 + 65 + 100)
    assert [at for at, nodes in enumerate(never) if nodes] == [0, 2, 4 + 16, 4 + 17 + 32, 4 + 17 + 33 + 64]


def test_a_draft_that_few_rows_have_found_is_not_verified() -> None:
    policy = NodeGain()
    policy.start(4)
    several, one = [[-1, 0]] * 4, [[-1, 0], [-1], [-1], [-1]]
    sizes = []
    for number in range(60):
        trees = one if number % 2 else several
        drafts = policy.will_draft()
        kept = policy.select(trees, [True] * 4) if drafts else [[0]] * 4
        nodes = max(map(len, kept)) - 1
        policy.learn([[-1, 0][: len(row)] for row in kept], kept, 10 + 6.0 * nodes, 0.1)
        sizes.append((trees is one, drafts, nodes))
    # Every drafted token is accepted: for 6 ms of 10, four tokens pay and one of four rows does not.
    assert [nodes for few, drafts, nodes in sizes[20:] if drafts and not few].count(1) >= 18
    assert [nodes for few, drafts, nodes in sizes[20:] if drafts and few].count(1) <= 2


def test_a_draft_that_cannot_be_cut_is_kept_whole_or_not_at_all() -> None:
    policy = NodeGain()
    policy.start(1)
    sizes = []
    for _ in range(40):
        kept = policy.select([PARENTS], [True], is_whole=True)[0] if policy.will_draft() else [0]
        policy.learn([PARENTS[: len(kept)]], [kept[:2]], 10 + 4 * (len(kept) - 1))
        sizes.append(len(kept) - 1)
    # One token of five is accepted, which pays for one node but not for five.
    assert set(sizes) == {0, 5} and set(sizes[4:20]) == {0}


def test_a_row_that_accepts_less_than_others_is_expected_to() -> None:
    policy = NodeGain()
    policy.start(2)
    for _ in range(40):
        policy.learn([[-1, 0]] * 2, [[0, 1], [0]], None)
    assert policy.node_probs([-1, 0], 0)[1] > 0.7 and policy.node_probs([-1, 0], 1)[1] < 0.3
    policy.start(2)
    assert policy.node_probs([-1, 0], 0) == policy.node_probs([-1, 0], 1)


def test_each_batch_size_has_its_own_costs() -> None:
    policy = NodeGain()
    assert run(policy, lambda nodes: 10 + 4 * nodes)[-1] == 1
    policy.start(8)
    assert run(policy, lambda nodes: 10 + 30 * nodes)[-1] == 0
    policy.start(1)
    assert run(policy, lambda nodes: 10 + 4 * nodes, rounds=1) == [1]


def test_a_batch_of_nearly_as_many_rows_begins_with_known_costs() -> None:
    policy = NodeGain()
    policy.start(8)
    run(policy, lambda nodes: 10 + 30 * nodes, rounds=10)
    policy.start(7)
    assert not policy.will_draft()
    policy.start(4)
    assert policy.will_draft()


def test_kept_nodes_keep_their_tokens_and_parents() -> None:
    tokens_BN = torch.arange(12).view(2, 6)
    draft = Draft(tokens_BN=tokens_BN, tree=Tree.from_parents([PARENTS]))
    kept = keep_nodes(draft, [[0, 1, 3], [0, 2]])
    assert kept.tokens_BN[0].tolist() == [0, 1, 3] and kept.tokens_BN[1, :2].tolist() == [6, 8]
    assert kept.num_nodes == [3, 2]
    assert kept.tree.parents_RN.tolist() == [[-1, 0, 1]] and kept.tree.is_chain
    assert keep_nodes(draft, [list(range(6))] * 2) is draft
    assert keep_nodes(Draft(tokens_BN=tokens_BN, tree=chain(6)), [[0, 1], [0]]).num_nodes == [2, 1]


@pytest.mark.parametrize("name", ["medusa", "lookup", "copy", "merge", "cascade"])
def test_greedy_output_equals_the_target(name: str) -> None:
    target, policy = tiny_target("llama"), NodeGain()
    drafter = composite(name) if name in ("merge", "cascade") else tiny_drafter(name, "llama")
    sizes = set()
    for num_rows, side in ((1, "right"), (5, "left"), (5, "right")):
        out = generate_rows(target, num_rows, drafter, side=side, length=policy)
        assert texts(out) == greedy_by_transformers("llama", num_rows, 20)
        sizes |= {nodes for _, nodes in out.stats.verified}
    assert len(sizes) > 1


def composite(name: str) -> Any:
    """Returns a composite of a look-up and heads."""
    parts = [Part(tiny_drafter(one, "llama")) for one in ("lookup", "medusa")]
    configs = tuple(part_config(one.drafter) for one in parts)
    return find(name).Drafter(find(name).Config(parts=configs), tiny_target("llama"), parts)


def test_a_cascade_learns_from_drafts_that_were_cut() -> None:
    target, drafter = tiny_target("llama"), composite("cascade")
    generate_rows(target, 3, drafter, length=NodeGain())
    (estimates,) = drafter._estimates_by_call.values()
    assert estimates[0].tokens_per_ms() < float("inf")


@pytest.mark.parametrize("family", ["medusa", "lookup", "lm"])
def test_sampling_is_lossless(family: str) -> None:
    drafter: Any = lookup.Drafter(lookup.Config(num_draft=3), distribution_target())
    if family == "medusa":
        drafter = built(medusa, medusa.Config(num_heads=3, tree=TREE), distribution_target())
    if family == "lm":
        drafter = built(lm, lm.Config(model=SAMPLED_SMALL, num_draft=3), distribution_target())
    check_distribution(NodeControlled(drafter, NodeGain()), distribution_target(), num_samples=5_000)


def test_drafters_that_draft_token_by_token_are_told_the_length() -> None:
    policy = NodeGain()
    drafter = with_length_control(tiny_drafter("copy", "llama"), policy)
    out = generate_rows(tiny_target("llama"), 3, drafter, length="fixed")
    # Two tokens of five are tried first, then none.
    assert {nodes for _, nodes in out.stats.verified} >= {2, 0}


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown length policy 'node_gains'"):
        make_control("node_gains")
