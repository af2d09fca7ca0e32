"""Length control: budgets per row, early stop per token, and lossless output for every policy."""

import dataclasses
import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import draftsmith
from draftsmith.core.drafter import Drafter, Session, Step
from draftsmith.core.sampling import Sampling
from draftsmith.core.stats import GenerationStats
from draftsmith.core.tree import Draft, Tree, chain
from draftsmith.drafters import lm, lookup, medusa
from draftsmith.length import controller
from draftsmith.length.controller import LengthControlled, cut, with_length_control
from draftsmith.length.policies import POLICIES, Confidence, Outcome, make
from tests.support.distributions import FALSE_ALARM, check_distribution, distribution_p_value, distribution_target
from tests.support.drafters import SAMPLED_SMALL, SMALL, TREE, generate_rows, tiny_drafter
from tests.support.family import Watched, built, texts
from tests.support.models import greedy_by_transformers, prompts, tiny_config, tiny_target

NUM_NEW = 20
NUM_SAMPLES = 5_000


class Chains(Drafter):
    """Drafts chains of the full budget and records the budgets."""

    target: Any = None

    def __init__(self, **config: Any) -> None:
        self.config, self.budgets = SimpleNamespace(**config), []

    def start(self, session: Session) -> None:
        self.session = session

    def propose(self, budget: int) -> Draft:
        self.budgets.append(budget)
        return Draft(
            tokens_BN=torch.zeros(len(self.session.rows), budget + 1, dtype=torch.long), tree=chain(budget + 1)
        )

    def observe(self, step: Step) -> None:
        self.step = step


def start_drafter(drafter: Any, num_rows: int = 3) -> Any:
    rows = [[3, 4]] * num_rows
    given = {"cache": None, "sampling": Sampling(), "generator": torch.Generator()}
    drafter.start(Session(target=tiny_target("llama"), rows=rows, **given))
    return drafter


def step_of(draft: Draft, paths: list[list[int]]) -> Step:
    return Step(draft=draft, logits_BNV=None, hidden={}, verdict=None, paths=paths, cost_ms=1.0)  # type: ignore


def test_each_row_has_its_own_budget() -> None:
    inner = Chains(num_draft=4)
    drafter = start_drafter(with_length_control(inner, "heuristic"))
    draft = drafter.propose(100)
    assert inner.budgets == [4] and draft.num_nodes is None
    drafter.observe(step_of(draft, [[0, 1, 2, 3, 4], [0, 1], [0]]))
    draft = drafter.propose(100)
    assert inner.budgets == [4, 4] and draft.num_nodes == [5, 4, 4]
    drafter.observe(step_of(draft, [[0, 1], [0, 1], []]))
    draft = drafter.propose(100)
    assert inner.budgets == [4, 4, 3] and draft.num_nodes == [4, 3, 1], "a finished row drafts nothing"
    assert inner.step.paths[0] == [0, 1]
    assert drafter.propose(1).tree.num_nodes == 2, "at most the loop's budget"


def test_early_stop_decides_after_each_token() -> None:
    inner = Chains(num_draft=5, length="confidence=0.5", supports_early_stop=True)
    drafter = start_drafter(with_length_control(inner, "auto"), 2)
    draft = drafter.propose(100)
    should_continue = inner.session.should_continue
    assert [should_continue(0, 0.9), should_continue(1, 0.5), should_continue(0, 0.4), should_continue(1, 0.9)] == [
        True,
        True,
        False,
        True,
    ]
    assert [should_continue(1, 0.9), should_continue(1, 0.9), should_continue(1, 0.9)] == [True, True, False], (
        "five is the maximum"
    )
    learned: list[Any] = []
    policy = Confidence(0.5)
    policy.learn = lambda outcomes, depth, cost_ms: learned.extend([*outcomes, depth, cost_ms])  # type: ignore
    drafter = start_drafter(with_length_control(inner, policy), 2)
    draft = drafter.propose(100)
    for row, confidence in ((0, 0.9), (1, 0.2), (0, 0.4)):
        inner.session.should_continue(row, confidence)
    draft = Draft(tokens_BN=draft.tokens_BN, tree=draft.tree, num_nodes=[3, 2])
    drafter.observe(step_of(draft, [[0, 1], [0]]))
    assert learned == [
        Outcome(row=0, num_drafted=2, num_accepted=1, confidences=[0.9, 0.4]),
        Outcome(row=1, num_drafted=1, num_accepted=0, confidences=[0.2]),
        5,
        1.0,
    ]


def test_cut_limits_trees_by_depth() -> None:
    parents = [[-1, 0, 0, 1, 2, 3], [-1, 0, 1, 1, 2, 3]]
    draft = Draft(tokens_BN=torch.zeros(2, 6, dtype=torch.long), tree=Tree.from_parents(parents))
    assert cut(draft, [3, 3]) is draft
    assert cut(draft, [2, 2]).num_nodes == [5, 4]
    assert cut(draft, [0, 1]).num_nodes == [1, 2]
    stats = GenerationStats(num_rows=2)
    for row, num_accepted in enumerate((0, 1)):
        stats.count(cut(draft, [0, 2]), row, num_accepted=num_accepted, num_kept=num_accepted + 1)
    assert (stats.drafted, stats.accepted) == ([1, 1], [1, 0]), "cut nodes do not count as drafted"
    out_of_order = Tree.from_parents([[-1, 0, 1, 0]])
    assert cut(Draft(tokens_BN=draft.tokens_BN[:1, :4], tree=out_of_order), [0]).num_nodes == [1]
    with pytest.raises(AssertionError):  # it would separate siblings
        cut(Draft(tokens_BN=draft.tokens_BN[:1, :4], tree=out_of_order), [1])
    used = Draft(tokens_BN=draft.tokens_BN, tree=draft.tree, num_nodes=[2, 6])
    assert cut(used, [2, 3]).num_nodes == [2, 6]


def test_length_is_chosen_by_name_or_by_the_artifact(tmp_path: Path) -> None:
    target = tiny_target("llama")
    drafter = tiny_drafter("lm", "llama")
    draftsmith.save(drafter, tmp_path / "draft", target)
    assert json.loads((tmp_path / "draft" / "draft_config.json").read_text())["config"]["length"] == "refit=0.1"
    loaded = draftsmith.load(tmp_path / "draft", target)
    drafted = {}
    for length in ("auto", "refit=0.1", "fixed", "fixed=1"):
        drafted[length] = generate_rows(target, 1, loaded, length=length).stats.drafted
    assert drafted["auto"] == drafted["refit=0.1"] != drafted["fixed"]
    assert len(drafted["fixed=1"]) == 1
    for name in POLICIES:
        assert type(make(name)) is POLICIES[name]
    faults = {
        "unknown length policy 'long'; choose one of fixed, heuristic,": "long",
        "'few' is not a number": "fixed=few",
        "number of drafted tokens must be at least 1": "fixed=0",
        "first number of drafted tokens must be at least 1": "heuristic=nan",
        "it must lie between 0 and 1": "refit=1",
        "must be 0 \\(measured\\) or positive": "expected_gain=-1",
        "length 'refit' needs the draft model's confidence": "refit",
    }
    for message, length in faults.items():
        with pytest.raises(ValueError, match=message):
            generate_rows(target, 1, lookup.Drafter(lookup.Config(), target), length=length)


# --- Output ------------------------------------------------------------------------------------------------------

WITH_CONFIDENCE = (
    "fixed=2",
    "heuristic",
    "confidence=0.4",
    "adaptive=0.4",
    "refit=0.3",
    "expected_gain=0.15",
    "expected_gain",
)
WITHOUT_CONFIDENCE = ("fixed=1", "heuristic", "expected_gain=0.1", "expected_gain")


class Lengths(Watched):
    """Records the numbers of nodes of the drafts that were verified."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.found: set[int] = set()

    def observe(self, step: Step) -> None:
        self.found |= set(step.draft.num_nodes or [step.draft.tree.num_nodes])
        super().observe(step)


@pytest.mark.parametrize(
    ("name", "length"),
    [("copy", one) for one in WITH_CONFIDENCE]
    + [(name, one) for name in ("medusa", "lookup") for one in WITHOUT_CONFIDENCE],
)
def test_greedy_output_equals_the_target(name: str, length: str) -> None:
    target = tiny_target("llama")
    drafter = Lengths(tiny_drafter(name, "llama"))
    for num_rows, side in ((1, "right"), (5, "left"), (5, "right")):
        out = generate_rows(target, num_rows, drafter, side=side, length=length)
        assert texts(out) == greedy_by_transformers("llama", num_rows, NUM_NEW)
    assert drafter.num_drafted > 0
    assert len(drafter.found) > 1 or length.startswith("fixed")


def test_a_draft_model_with_trees_has_no_early_stop() -> None:
    target = tiny_target("llama")
    model = tiny_config("llama", num_hidden_layers=1).to_dict()
    drafter = built(lm, lm.Config(model=model, num_draft=3, width=2, num_nodes=6), target)
    for length in ("auto", "heuristic", "expected_gain"):
        out = generate_rows(target, 5, drafter, length=length)
        assert texts(out) == greedy_by_transformers("llama", 5, NUM_NEW)
    with pytest.raises(ValueError, match="length 'refit' needs the draft model's confidence"):
        generate_rows(target, 5, drafter, length="refit")


@cache
def small() -> Any:
    return built(lm, lm.Config(model=SAMPLED_SMALL, num_draft=3, length="fixed"), distribution_target())


@pytest.mark.parametrize(
    "length", [*(pytest.param(one, marks=pytest.mark.slow) for one in WITH_CONFIDENCE[:-1]), WITH_CONFIDENCE[-1]]
)
def test_sampling_with_early_stop_is_lossless(length: str) -> None:
    """One policy object for all calls, so that its state and measured times matter."""
    drafter = Lengths(small())
    check_distribution(
        LengthControlled(drafter, make(length), supports_early_stop=True),
        distribution_target(),
        num_samples=NUM_SAMPLES,
    )
    assert len(drafter.found) > 1 or length == "fixed=2"


@pytest.mark.parametrize(
    "length", [*(pytest.param(one, marks=pytest.mark.slow) for one in WITHOUT_CONFIDENCE[:-1]), "expected_gain"]
)
@pytest.mark.parametrize("family", ["medusa", "lookup"])
def test_sampling_without_confidences_is_lossless(family: str, length: str) -> None:
    drafter: Any = lookup.Drafter(lookup.Config(num_draft=3), distribution_target())
    if family == "medusa":
        drafter = built(medusa, medusa.Config(num_heads=3, tree=TREE), distribution_target())
    check_distribution(
        LengthControlled(drafter, make(length), supports_early_stop=False),
        distribution_target(),
        num_samples=NUM_SAMPLES,
    )


def stream(drafter: Drafter, num_rows: int, **settings: Any) -> GenerationStats:
    """Returns the counts of a stream of `num_rows` rows at a time, after comparing its greedy text."""
    stats = GenerationStats(num_rows=0)
    given = {"max_new_tokens": NUM_NEW, "batch_size": num_rows, "stats": stats} | settings
    found = sorted(
        draftsmith.generate_stream(tiny_target("llama"), prompts(5), drafter, **given), key=lambda t: t.index
    )
    if "temperature" not in settings:
        assert [text.prompt_ids + text.new_ids for text in found] == greedy_by_transformers("llama", 5, NUM_NEW)
    return stats


def test_several_rows_whose_text_does_not_depend_on_drafts_are_decoded_by_node_gain() -> None:
    drafter = lookup.Drafter(lookup.Config(), tiny_target("llama"))
    stream(drafter, 3, length="own")
    stream(drafter, 3, temperature=1.0, seed=0)
    assert drafter not in controller._NODE_GAINS
    stream(drafter, 1)
    assert not controller._NODE_GAINS[drafter]._batches.keys() - {1}
    policy = controller._NODE_GAINS[drafter]
    stream(drafter, 3)
    stream(drafter, 4, temperature=1.0, seed=0, verifier="coupled")
    assert policy._batches.keys() >= {3, 4} and controller._NODE_GAINS[drafter] is policy, "it is kept between calls"


def test_drafters_with_a_fixed_length_or_a_policy_keep_it_in_streams() -> None:
    target = tiny_target("llama")
    drafters: list[Any] = [built(lm, dataclasses.replace(SMALL, length="fixed"), target)]
    drafters.append(lookup.Drafter(lookup.Config(), target))
    drafters[1].policy = make("fixed=2")
    for drafter, longest in zip(drafters, (4, 2), strict=True):
        assert max(nodes for _, nodes in stream(drafter, 3).verified) == longest
        assert drafter not in controller._NODE_GAINS


class Withholds(LengthControlled):
    """WRONG: withholds a token from verification depending on the token."""

    def propose(self, budget: int) -> Draft:
        draft = super().propose(budget)
        used = draft.num_nodes or [draft.tree.num_nodes] * len(draft.tokens_BN)
        withheld = [len(confidences) > 0 and confidences[-1] < 0.3 for confidences in self._confidences]
        kept = [nodes - is_withheld for nodes, is_withheld in zip(used, withheld, strict=True)]
        return Draft(**vars(draft) | {"num_nodes": kept})


def test_withholding_sampled_tokens_is_detected_as_biased() -> None:
    wrong = Withholds(small(), Confidence(0.3), supports_early_stop=True)
    assert distribution_p_value(wrong, distribution_target(), num_samples=NUM_SAMPLES) < FALSE_ALARM
