"""Verifiers by exact enumeration of every draft and every uniform, completed by sampling from the target.

Those that sample a token at each node are in test_verify_draws.py.
"""

from types import ModuleType

import pytest
import torch

from draftsmith.verify import block, traversal
from draftsmith.verify.lossy import lenience
from draftsmith.verify.research import kseq, multipath, recursive, token
from eval.bakeoff.optimal_transport import optimal_acceptance
from tests.support.verify import enumeration
from tests.support.verify.enumeration import (
    EXACT,
    VOCAB_SIZE,
    Distributions,
    Shape,
    Text,
    error,
    expected_tokens,
    full,
    output_distribution,
    paths,
    random_distributions,
)

W = "without_replacement"
CHAINS = [paths(wide=1, deep=deep) for deep in (1, 2, 3)]
STOPPED = [paths(wide=1, deep=3, stops_at=stop) for stop in (0, 2)]
INDEPENDENT = [
    full(2, sampling_scheme="independent"),
    full(3, sampling_scheme="independent"),
    paths(wide=2, deep=2),
    Shape(parents=(-1, 0, 1, 1), sampling_scheme="independent"),
    Shape(parents=(-1, 0, 0, 2, 1), sampling_scheme="independent"),
]
WITHOUT = [
    full(2, sampling_scheme=W),
    full(3, sampling_scheme=W),
    full(2, 1, sampling_scheme=W),
    Shape(parents=(-1, 0, 1, 1, 2), sampling_scheme=W),
    Shape(parents=(-1, 0, 0, 0, 1, 1), sampling_scheme=W),
]
LARGE = [paths(wide=2, deep=3), paths(wide=3, deep=2), full(2, 2, sampling_scheme="independent")]
LARGE_WITHOUT = [
    full(2, 2, sampling_scheme=W),
    full(3, 1, sampling_scheme=W),
    Shape(parents=(-1, 0, 0, 1, 1, 3, 3), sampling_scheme=W),
]
ON_CHAINS, ON_TREES, ON_DISTINCT = (token, block), (recursive, traversal, kseq, multipath), (recursive, traversal)
CASES = [
    *((verifier, shape) for verifier in ON_CHAINS for shape in [*CHAINS, *STOPPED]),
    *((verifier, shape) for verifier in ON_TREES for shape in [CHAINS[1], STOPPED[0], *INDEPENDENT]),
    *((verifier, shape) for verifier in ON_DISTINCT for shape in WITHOUT),
]
LARGE_CASES = [
    *((verifier, shape) for verifier in ON_TREES for shape in LARGE),
    *((verifier, shape) for verifier in ON_DISTINCT for shape in LARGE_WITHOUT),
]


def name(value: object) -> str:
    if isinstance(value, ModuleType):
        return value.__name__.rpartition(".")[2]
    assert isinstance(value, Shape)
    return f"{value.sampling_scheme}{value.parents}{'stops' * (value.stops_at >= 0)}".replace(" ", "")


def check(verifier: ModuleType, shape: Shape, *, seed: int, zeros: bool) -> None:
    longest = shape.depth + 1
    target = random_distributions(longest, seed=seed, zeros=zeros)
    draft = random_distributions(longest, seed=seed + 10, zeros=zeros)
    found = output_distribution(verifier.verify, shape, draft, target)
    assert sum(found.values()) == pytest.approx(1, abs=EXACT)
    assert error(found, target, longest) < EXACT


@pytest.mark.parametrize(("verifier", "shape"), CASES, ids=name)
def test_verifiers_are_lossless(verifier: ModuleType, shape: Shape) -> None:
    check(verifier, shape, seed=0, zeros=False)
    check(verifier, shape, seed=1, zeros=True)


@pytest.mark.slow
@pytest.mark.parametrize(("verifier", "shape"), LARGE_CASES, ids=name)
def test_verifiers_are_lossless_on_larger_trees(verifier: ModuleType, shape: Shape) -> None:
    check(verifier, shape, seed=2, zeros=False)


@pytest.mark.parametrize("verifier", ON_DISTINCT, ids=name)
def test_rejected_siblings_stay_out_of_the_draft_distribution(
    verifier: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Needs four tokens: of three, the third sibling is all that remains, whatever the draft's mass is."""
    monkeypatch.setattr(enumeration, "TOKENS", range(4))
    monkeypatch.setattr(enumeration, "VOCAB_SIZE", 4)
    check(verifier, full(3, sampling_scheme=W), seed=4, zeros=False)


@pytest.mark.parametrize("drafted", [(0,), (2, 1), (1, 1, 0)])
def test_token_is_lossless_on_deterministic_chains(drafted: Text) -> None:
    """The distribution of such a draft is one-hot at its token."""
    one_hot = torch.eye(VOCAB_SIZE, dtype=torch.float64)
    draft = {
        text: one_hot[drafted[len(text)] if len(text) < len(drafted) else 0] for text in random_distributions(3, seed=0)
    }
    shape = Shape(parents=tuple(range(-1, len(drafted))), sampling_scheme="deterministic")
    for zeros in (False, True):
        target = random_distributions(4, seed=11, zeros=zeros)
        assert error(output_distribution(token.verify, shape, draft, target), target, len(drafted) + 1) < EXACT


@pytest.mark.parametrize("verifier", [*ON_CHAINS, *ON_TREES], ids=name)
def test_drafts_from_the_target_distribution_are_always_accepted(verifier: ModuleType) -> None:
    target = random_distributions(3, seed=3)
    found = output_distribution(verifier.verify, CHAINS[1], target, target)
    assert sum(weight for text, weight in found.items() if len(text) < 3) < EXACT


def mean_tokens(verifier: ModuleType, shape: Shape, draft: Distributions, target: Distributions) -> float:
    return expected_tokens(output_distribution(verifier.verify, shape, draft, target))


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_verifiers_rank_by_mean_accepted_length(seed: int) -> None:
    """Block is above token, traversal at least recursive rejection, and multi-path at least traversal."""
    target, draft = random_distributions(3, seed=seed), random_distributions(3, seed=seed + 20)
    chain, pair = CHAINS[2], paths(wide=2, deep=2)
    on_chain = {
        verifier: mean_tokens(verifier, chain, draft, target) for verifier in (token, block, recursive, traversal)
    }
    assert on_chain[block] > on_chain[token] + 1e-6
    assert on_chain[recursive] == pytest.approx(on_chain[token], abs=EXACT)
    assert on_chain[traversal] == pytest.approx(on_chain[block], abs=EXACT)
    on_pair = {verifier: mean_tokens(verifier, pair, draft, target) for verifier in (recursive, traversal, multipath)}
    assert on_pair[traversal] > on_pair[recursive] - EXACT
    assert on_pair[multipath] > on_pair[traversal] - EXACT
    for shape in WITHOUT:
        assert mean_tokens(traversal, shape, draft, target) > mean_tokens(recursive, shape, draft, target) - EXACT


@pytest.mark.parametrize("num_drafts", [2, 3])
def test_acceptance_rates_are_at_most_the_optimal_transport_bound(num_drafts: int) -> None:
    """On one level of independent drafts; K-SEQ reaches 1 - 1/e of the bound (SpecTr, theorem 3)."""
    shape = full(num_drafts, sampling_scheme="independent")
    for seed in range(4):
        target, draft = random_distributions(1, seed=seed), random_distributions(1, seed=seed + 30)
        optimum = float(optimal_acceptance(target[()], draft[()], num_drafts))
        reached = {
            rule: mean_tokens(rule, shape, draft, target) - 1 for rule in (recursive, kseq, traversal, multipath)
        }
        assert max(reached.values()) < optimum + EXACT
        assert reached[kseq] > (1 - 1 / torch.e) * optimum
        assert reached[kseq] > reached[recursive] - EXACT


def test_optimal_acceptance_hand_worked() -> None:
    """With (0.9, 0.1) and (0.5, 0.5) one draft is accepted with the sum of the minima, 0.6."""
    target_V, draft_V = torch.tensor([0.9, 0.1]).double(), torch.tensor([0.5, 0.5]).double()
    assert float(optimal_acceptance(target_V, draft_V, 1)) == pytest.approx(0.6)
    # Token 0 is among two drafts with probability 0.75 and can always be accepted, token 1 only with 0.1.
    assert float(optimal_acceptance(target_V, draft_V, 2)) == pytest.approx(0.85)


@pytest.mark.parametrize(("strength", "is_lossless"), [(1.0, True), (0.5, False)])
def test_lenience_is_lossy_unless_it_is_one(strength: float, is_lossless: bool) -> None:
    target, draft = random_distributions(2, seed=0), random_distributions(2, seed=40)

    def verify(*arguments: object) -> object:
        return lenience.verify(*arguments, lenience=strength)  # type: ignore[arg-type]

    found = output_distribution(verify, CHAINS[0], draft, target)  # type: ignore[arg-type]
    assert (error(found, target, 2) < EXACT) == is_lossless
    assert expected_tokens(found) >= mean_tokens(token, CHAINS[0], draft, target) - EXACT
