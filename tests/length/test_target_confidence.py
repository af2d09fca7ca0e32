"""The confidence threshold on the target: when rows skip drafting, and that decoding stays lossless.

Shape suffixes: B rows, N nodes, V vocabulary.
"""

from typing import Any, cast

import pytest
import torch

import draftsmith
from draftsmith.core.drafter import Drafter, Session, Step
from draftsmith.core.sampling import Sampling
from draftsmith.core.tree import Draft, Tree, chain
from draftsmith.drafters import lookup, medusa
from draftsmith.length.target_confidence import TargetConfidenceThreshold
from draftsmith.verify import choose
from tests.support.distributions import check_distribution, distribution_target
from tests.support.drafters import TREE, Scripted, generate_rows, sampled_drafter, tiny_drafter
from tests.support.family import Watched, built, texts
from tests.support.models import greedy_by_transformers, padded, prompts, tiny_target

NUM_NEW = 20
NUM_SAMPLES = 5_000


class FixedDraft(Drafter):
    """Proposes a given draft and counts calls."""

    config, target = None, cast(Any, None)

    def __init__(self, draft: Draft) -> None:
        self.draft, self.num_proposed, self.num_observed = draft, 0, 0

    def start(self, session: Session) -> None:
        """Does nothing."""

    def propose(self, budget: int) -> Draft:
        self.num_proposed += 1
        return self.draft

    def observe(self, step: Step) -> None:
        self.num_observed += 1


def start_drafter(draft: Draft, threshold: float = 0.5) -> tuple[Any, FixedDraft]:
    inner = FixedDraft(draft)
    drafter = TargetConfidenceThreshold(inner, threshold)  # type: ignore[arg-type]
    rows = [[5]] * len(draft.tokens_BN)
    given: dict[str, Any] = {"cache": None, "sampling": Sampling(), "generator": torch.Generator()}
    drafter.start(Session(target=tiny_target("llama"), rows=rows, **given))
    return drafter, inner


def step(drafter: Any, *rows: list[tuple[int, float]], is_finished: bool = False) -> list[int]:
    """Makes a step, given (token, probability) of the target at the nodes of each row; returns the nodes used.

    At other nodes token 3 has probability 1. The rest is shared by the other tokens of eight.
    """
    draft = drafter.propose(9)
    probs_BNV = torch.zeros(len(rows), draft.tree.num_nodes, 8)
    probs_BNV[..., 3] = 1
    for row, wanted in enumerate(rows):
        for node, (token, probability) in enumerate(wanted[: draft.tree.num_nodes]):
            probs_BNV[row, node] = (1 - probability) / 7
            probs_BNV[row, node, token] = probability
    logits_BNV = probs_BNV.log() + 3.0
    verdict = choose("greedy", Sampling(), draft).verify(logits_BNV, draft, logits_BNV)
    counts = verdict.num_accepted_B.tolist()
    paths = [[] if is_finished else verdict.path_BP[row, : count + 1].tolist() for row, count in enumerate(counts)]
    drafter.observe(Step(draft=draft, logits_BNV=logits_BNV, hidden={}, verdict=verdict, paths=paths, cost_ms=1.0))
    return draft.num_nodes or [draft.tree.num_nodes] * len(rows)


def test_skipping_hand_worked() -> None:
    """One row that drafts tokens 1 and 2, with the target's tokens and confidences."""
    drafter, inner = start_drafter(Draft(tokens_BN=torch.tensor([[5, 1, 2]]), tree=chain(3)))
    assert step(drafter, [(1, 0.9), (2, 0.4), (7, 0.3)]) == [3]  # all accepted: the bonus token is no correction
    assert step(drafter, [(7, 0.6)]) == [3]  # a correction above the threshold
    assert step(drafter, [(1, 0.9), (7, 0.4)]) == [3]  # a correction below it
    assert step(drafter, [(1, 0.3)]) == [1]  # no draft, and still below the threshold
    assert step(drafter, [(4, 0.49)]) == [1]
    assert step(drafter, [(4, 0.501)]) == [1]  # back at the threshold
    assert step(drafter, [(1, 0.2), (2, 0.2), (3, 0.2)]) == [3]
    assert step(drafter, [(7, 0.499)]) == [3]
    assert step(drafter, [(7, 0.499)]) == [1]
    assert (inner.num_proposed, inner.num_observed) == (5, 9), "skipped rounds are observed but not proposed"


def test_rows_skip_independently() -> None:
    drafter, inner = start_drafter(Draft(tokens_BN=torch.tensor([[5, 1], [5, 1]]), tree=chain(2), num_nodes=[2, 2]))
    assert step(drafter, [(7, 0.3)], [(1, 0.3), (4, 0.3)]) == [2, 2]
    assert step(drafter, [(1, 0.3)], [(7, 0.3)]) == [1, 2]
    assert step(drafter, [(7, 0.9)], [(7, 0.1)]) == [1, 1]
    assert inner.num_proposed == 2, "if all rows skip, nothing is proposed"
    assert step(drafter, [(1, 0.9)], [(7, 0.9)]) == [2, 1]
    assert step(drafter, [(1, 0.9)], [(1, 0.9)], is_finished=True) == [2, 2]
    assert step(drafter, [(1, 0.9)], [(1, 0.9)]) == [1, 1], "finished rows need no draft"


def test_a_row_without_drafted_tokens_has_no_correction() -> None:
    draft = {"tokens_BN": torch.tensor([[5, 1], [5, 1]]), "tree": chain(2)}
    drafter, inner = start_drafter(Draft(**draft, num_nodes=[1, 2]))
    assert step(drafter, [(7, 0.3)], [(7, 0.3)]) == [1, 2]
    inner.draft = Draft(**draft)
    assert step(drafter, [(1, 0.9)], [(7, 0.3)]) == [2, 1]


def test_the_token_after_an_accepted_leaf_is_no_correction() -> None:
    tree = Tree.from_parents([[-1, 0, 0, 1]])
    drafter, _ = start_drafter(Draft(tokens_BN=torch.tensor([[5, 1, 2, 6]]), tree=tree))
    assert step(drafter, [(2, 0.9), (0, 0.9), (7, 0.1)]) == [4]  # node 2, a leaf above the deepest
    assert step(drafter, [(1, 0.9), (7, 0.1)]) == [4]  # node 1, whose child is rejected
    assert step(drafter, [(7, 0.1)]) == [1]


@pytest.mark.parametrize("threshold", [0.2, 0.5])
def test_skipped_steps_follow_from_the_target_probabilities(threshold: float) -> None:
    """With drafts that are always wrong, they follow from the probabilities along the greedy text."""
    target, expected = tiny_target("llama"), greedy_by_transformers("llama", 5, NUM_NEW)
    ids, mask = padded(prompts(5))
    watched = Watched(TargetConfidenceThreshold(Scripted(target, expected, trees=False, wrong_every=1), threshold))
    drafts, propose = [], watched.propose

    def propose_and_record(budget: int) -> Draft:
        draft = propose(budget)
        drafts.append([used > 1 for used in draft.num_nodes or [draft.tree.num_nodes] * 5])
        return draft

    watched.propose = propose_and_record  # type: ignore[method-assign]
    out = draftsmith.generate(target, ids, watched, attention_mask=mask, max_new_tokens=NUM_NEW)
    assert texts(out) == expected
    for row, text in enumerate(expected):
        probs_TV = target.model(torch.tensor([text])).logits[0].softmax(-1)
        is_skipping = False
        for number in range(NUM_NEW - 1):
            assert drafts[number][row] == (not is_skipping)
            position = len(text) - NUM_NEW + number
            is_skipping = bool(probs_TV[position - 1, text[position]] < threshold)
    assert {flag for flags in drafts for flag in flags} == {False, True}


@pytest.mark.parametrize("name", ["copy", "lm", "medusa", "lookup"])
@pytest.mark.parametrize("length", ["auto", "heuristic"])
def test_greedy_output_equals_the_target(name: str, length: str) -> None:
    target = tiny_target("llama")
    thresholded = Watched(TargetConfidenceThreshold(tiny_drafter(name, "llama"), 0.4))
    bare = Watched(tiny_drafter(name, "llama"))
    for num_rows, side in ((1, "right"), (5, "left"), (5, "right")):
        for drafter in (thresholded, bare):
            out = generate_rows(target, num_rows, drafter, side=side, length=length)
            assert texts(out) == greedy_by_transformers("llama", num_rows, NUM_NEW)
    assert 0 < thresholded.num_drafted < bare.num_drafted, "some steps must have been skipped"


class CountsSkips(TargetConfidenceThreshold):
    """Counts the running rows that skip drafting."""

    num_skipping = 0

    def observe(self, step: Step) -> None:
        super().observe(step)
        self.num_skipping += sum(
            skips and len(path) > 0 for skips, path in zip(self._is_skipping, step.paths, strict=True)
        )


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("lm", {"top_k": 5}),
        pytest.param("lm", {}, marks=pytest.mark.slow),
        pytest.param("lookup", {}, marks=pytest.mark.slow),
        ("medusa", {}),
    ],
)
def test_sampling_is_lossless(name: str, settings: dict[str, Any]) -> None:
    inner: Any = lookup.Drafter(lookup.Config(), distribution_target()) if name == "lookup" else sampled_drafter(name)
    if name == "medusa":
        inner = built(medusa, medusa.Config(num_heads=3, tree=TREE), distribution_target())
    thresholded = CountsSkips(inner, 0.4)
    watched = Watched(thresholded)
    check_distribution(watched, distribution_target(), num_samples=NUM_SAMPLES, **settings)
    assert watched.num_drafted > 0 and thresholded.num_skipping > NUM_SAMPLES / 10


def test_confidence_is_taken_before_temperature() -> None:
    """At temperature 0 the distribution is one-hot, so its probabilities must not be used."""
    drafted = []
    for temperature in (0.0, 0.05):
        watched = Watched(TargetConfidenceThreshold(tiny_drafter("copy", "llama"), 0.999))
        generate_rows(tiny_target("llama"), 5, watched, temperature=temperature, seed=0)
        bare = Watched(tiny_drafter("copy", "llama"))
        generate_rows(tiny_target("llama"), 5, bare, temperature=temperature, seed=0)
        drafted.append(watched.num_drafted / bare.num_drafted)
    assert max(drafted) < 0.9


@pytest.mark.parametrize("threshold", [0.0, 1.0, float("nan")])
def test_a_threshold_out_of_range_is_rejected(threshold: float) -> None:
    with pytest.raises(ValueError, match="it must lie between 0 and 1"):
        TargetConfidenceThreshold(tiny_drafter("lookup", "llama"), threshold)
