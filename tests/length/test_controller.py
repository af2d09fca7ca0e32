"""Policies around drafters: who is asked what, per row; and no choice of length changes the output or its law."""

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
from draftsmith.length.controller import LengthControlled, cut, with_length_control
from draftsmith.length.policies import POLICIES, Confidence, Outcome, make
from tests.support.distributions import FALSE_ALARM, check_distribution, distribution_target, sampled_p_value
from tests.support.drafters import SAMPLED_SMALL, TREE, generate_rows, tiny_drafter
from tests.support.family import Watched, built, texts
from tests.support.models import greedy_by_transformers, tiny_config, tiny_target

NUM_NEW = 20
NUM_SAMPLES = 5_000


class Chains(Drafter):
    """Drafts chains as deep as it may, and keeps the budgets that it was given."""

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


def begun(drafter: Any, num_rows: int = 3) -> Any:
    rows = [[3, 4]] * num_rows
    given = {"cache": None, "sampling": Sampling(), "generator": torch.Generator()}
    drafter.start(Session(target=tiny_target("llama"), rows=rows, **given))
    return drafter


def seen(draft: Draft, paths: list[list[int]]) -> Step:
    return Step(draft=draft, logits_BNV=None, hidden={}, verdict=None, paths=paths, cost_ms=1.0)  # type: ignore


def test_each_row_has_a_budget_of_its_own() -> None:
    inner = Chains(num_draft=4)
    drafter = begun(with_length_control(inner, "heuristic"))
    draft = drafter.propose(100)
    assert inner.budgets == [4] and draft.num_nodes is None
    drafter.observe(seen(draft, [[0, 1, 2, 3, 4], [0, 1], [0]]))
    draft = drafter.propose(100)
    assert inner.budgets == [4, 4] and draft.num_nodes == [5, 4, 4]
    drafter.observe(seen(draft, [[0, 1], [0, 1], []]))
    draft = drafter.propose(100)
    assert inner.budgets == [4, 4, 3] and draft.num_nodes == [4, 3, 1], "a finished row drafts nothing"
    assert inner.step.paths[0] == [0, 1]
    assert drafter.propose(1).tree.num_nodes == 2, "no deeper than the loop allows"


def test_a_drafter_that_asks_is_asked_for_each_token() -> None:
    inner = Chains(num_draft=5, length="confidence=0.5", supports_early_stop=True)
    drafter = begun(with_length_control(inner, "auto"), 2)
    draft = drafter.propose(100)
    ask = inner.session.should_continue
    assert [ask(0, 0.9), ask(1, 0.5), ask(0, 0.4), ask(1, 0.9)] == [True, True, False, True]
    assert [ask(1, 0.9), ask(1, 0.9), ask(1, 0.9)] == [True, True, False], "five is the most"
    judged: list[Any] = []
    policy = Confidence(0.5)
    policy.learn = lambda outcomes, depth, cost_ms: judged.extend([*outcomes, depth, cost_ms])  # type: ignore
    drafter = begun(with_length_control(inner, policy), 2)
    draft = drafter.propose(100)
    for row, confidence in ((0, 0.9), (1, 0.2), (0, 0.4)):
        inner.session.should_continue(row, confidence)
    draft = Draft(tokens_BN=draft.tokens_BN, tree=draft.tree, num_nodes=[3, 2])
    drafter.observe(seen(draft, [[0, 1], [0]]))
    assert judged == [
        Outcome(row=0, num_drafted=2, num_matched=1, confidences=[0.9, 0.4]),
        Outcome(row=1, num_drafted=1, num_matched=0, confidences=[0.2]),
        5,
        1.0,
    ]


def test_trees_are_cut_by_depth() -> None:
    parents = [[-1, 0, 0, 1, 2, 3], [-1, 0, 1, 1, 2, 3]]
    draft = Draft(tokens_BN=torch.zeros(2, 6, dtype=torch.long), tree=Tree.from_parents(parents))
    assert cut(draft, [3, 3]) is draft
    assert cut(draft, [2, 2]).num_nodes == [5, 4]
    assert cut(draft, [0, 1]).num_nodes == [1, 2]
    stats = GenerationStats(num_rows=2)
    for row, num_accepted in enumerate((0, 1)):
        stats.count(cut(draft, [0, 2]), row, num_accepted=num_accepted, num_kept=num_accepted + 1)
    assert (stats.drafted, stats.accepted) == ([1, 1], [1, 0]), "what was cut was not drafted"
    out_of_order = Tree.from_parents([[-1, 0, 1, 0]])
    assert cut(Draft(tokens_BN=draft.tokens_BN[:1, :4], tree=out_of_order), [0]).num_nodes == [1]
    with pytest.raises(AssertionError):  # siblings would be parted
        cut(Draft(tokens_BN=draft.tokens_BN[:1, :4], tree=out_of_order), [1])
    used = Draft(tokens_BN=draft.tokens_BN, tree=draft.tree, num_nodes=[2, 6])
    assert cut(used, [2, 3]).num_nodes == [2, 6]


def test_policies_by_name_and_by_what_the_artifact_says(tmp_path: Path) -> None:
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
        "unknown length policy 'long'; there are fixed, heuristic,": "long",
        "'few' is no number": "fixed=few",
        "at least one token": "fixed=0",
        "begin with at least one": "heuristic=nan",
        "it must lie between 0 and 1": "refit=1",
        "must be 0 \\(measured\\) or positive": "expected_gain=-1",
        "length 'refit' goes by the draft's confidence": "refit",
    }
    for message, length in faults.items():
        with pytest.raises(ValueError, match=message):
            generate_rows(target, 1, lookup.Drafter(lookup.Config(), target), length=length)


# --- The output --------------------------------------------------------------------------------------------------

TELLING = ("fixed=2", "heuristic", "confidence=0.4", "adaptive=0.4", "refit=0.3", "expected_gain=0.15", "expected_gain")
SILENT = ("fixed=1", "heuristic", "expected_gain=0.1", "expected_gain")


class Lengths(Watched):
    """Keeps how many nodes each row's draft had in the end."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.found: set[int] = set()

    def observe(self, step: Step) -> None:
        self.found |= set(step.draft.num_nodes or [step.draft.tree.num_nodes])
        super().observe(step)


@pytest.mark.parametrize(
    ("name", "length"),
    [("copy", one) for one in TELLING] + [(name, one) for name in ("medusa", "lookup") for one in SILENT],
)
def test_greedy_output_is_the_targets(name: str, length: str) -> None:
    target = tiny_target("llama")
    drafter = Lengths(tiny_drafter(name, "llama"))
    for num_rows, side in ((1, "right"), (5, "left"), (5, "right")):
        out = generate_rows(target, num_rows, drafter, side=side, length=length)
        assert texts(out) == greedy_by_transformers("llama", num_rows, NUM_NEW)
    assert drafter.num_drafted > 0
    assert len(drafter.found) > 1 or length.startswith("fixed")


def test_a_draft_model_is_not_asked_about_trees() -> None:
    target = tiny_target("llama")
    model = tiny_config("llama", num_hidden_layers=1).to_dict()
    drafter = built(lm, lm.Config(model=model, num_draft=3, width=2, num_nodes=6), target)
    for length in ("auto", "heuristic", "expected_gain"):
        out = generate_rows(target, 5, drafter, length=length)
        assert texts(out) == greedy_by_transformers("llama", 5, NUM_NEW)
    with pytest.raises(ValueError, match="length 'refit' goes by the draft's confidence"):
        generate_rows(target, 5, drafter, length="refit")


@cache
def small() -> Any:
    return built(lm, lm.Config(model=SAMPLED_SMALL, num_draft=3, length="fixed"), distribution_target())


@pytest.mark.parametrize("length", TELLING)
def test_sampled_text_follows_the_law(length: str) -> None:
    """One policy object for all calls, so that what it has learnt, and the clock, decide."""
    drafter = Lengths(small())
    check_distribution(
        LengthControlled(drafter, make(length), supports_early_stop=True),
        distribution_target(),
        num_samples=NUM_SAMPLES,
    )
    assert len(drafter.found) > 1 or length == "fixed=2"


@pytest.mark.parametrize("length", SILENT)
@pytest.mark.parametrize("family", ["medusa", "lookup"])
def test_sampled_text_of_drafters_that_tell_nothing_follows_the_law(family: str, length: str) -> None:
    silent: Any = lookup.Drafter(lookup.Config(num_draft=3), distribution_target())
    if family == "medusa":
        silent = built(medusa, medusa.Config(num_heads=3, tree=TREE), distribution_target())
    check_distribution(
        LengthControlled(silent, make(length), supports_early_stop=False),
        distribution_target(),
        num_samples=NUM_SAMPLES,
    )


class Withholds(LengthControlled):
    """WRONG: a token is not judged for what it turned out to be."""

    def propose(self, budget: int) -> Draft:
        draft = super().propose(budget)
        used = draft.num_nodes or [draft.tree.num_nodes] * len(draft.tokens_BN)
        doubts = [len(told) > 0 and told[-1] < 0.3 for told in self._confidences]
        kept = [nodes - doubt for nodes, doubt in zip(used, doubts, strict=True)]
        return Draft(**vars(draft) | {"num_nodes": kept})


def test_a_token_withheld_for_what_it_is_would_be_seen() -> None:
    wrong = Withholds(small(), Confidence(0.3), supports_early_stop=True)
    assert sampled_p_value(wrong, distribution_target(), num_samples=NUM_SAMPLES) < FALSE_ALARM
