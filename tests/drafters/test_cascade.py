"""Tests of cascades: the order in which parts are tried, their estimates, losslessness and artifacts."""

import dataclasses
import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import draftsmith
from draftsmith.artifacts.families import find, names
from draftsmith.core import drafter
from draftsmith.core.drafter import Session, Step
from draftsmith.core.sampling import Sampling
from draftsmith.core.tree import Draft, chain
from draftsmith.drafters import cascade, kangaroo, lm, lookup, medusa
from draftsmith.drafters.cascade import Config, Drafter, Estimate
from draftsmith.parts.composites import Part
from tests.support.distributions import PROMPT, check_distribution, distribution_target
from tests.support.family import Watched, built, check_family, part_config, texts
from tests.support.models import SEQ2SEQ, greedy_by_transformers, padded, prompts, tiny_config, tiny_target

HEADS = medusa.Config(num_heads=3, tree=((0,), (1,), (0, 0)))
NUM_NEW = 20


EXAMPLE = Config(parts=(part_config("lookup", lookup.Config(min_ngram=2)), part_config("medusa", HEADS)))
FIXED = dataclasses.replace(EXAMPLE, adaptive=False)


def cascade_of(drafters: list[Any], **settings: Any) -> Drafter:
    """Returns a cascade of drafters, each wrapped in `Watched`."""
    target = drafters[0].target
    parts = [Part(Watched(one)) for one in drafters]  # type: ignore[arg-type]
    return Drafter(Config(parts=EXAMPLE.parts, **settings), target, parts)


def test_family(tmp_path: Path) -> None:
    check_family(cascade, FIXED, tmp_path)


def test_adaptive_cascade_decodes_greedily_as_the_target() -> None:
    """The order depends on the clock; both random heads and look-ups get used."""
    target = tiny_target("llama")
    drafter = cascade_of([lookup.Drafter(lookup.Config(), target), built(medusa, HEADS, target)])
    ids, mask = padded(prompts(5), side="left")
    for _ in range(3):
        out = draftsmith.generate(target, ids, Watched(drafter), attention_mask=mask, max_new_tokens=NUM_NEW)
        assert texts(out) == greedy_by_transformers("llama", 5, NUM_NEW)
    assert all(part.drafter.num_drafted > 0 for part in drafter.parts)  # type: ignore[attr-defined]
    check_distribution(built(cascade, EXAMPLE, distribution_target()), distribution_target(), num_samples=2_000)


class Scripted(drafter.Drafter):
    """Drafts chains of the given depths."""

    def __init__(self, *depths: int) -> None:
        self.target: Any = None
        self.config, self.depths, self.steps = SimpleNamespace(), list(depths), []

    def start(self, session: Session) -> None:
        self.session = session

    def propose(self, budget: int) -> Draft:
        depth = self.depths.pop(0)
        tokens_BN = torch.zeros(len(self.session.rows), depth + 1, dtype=torch.long)
        return Draft(tokens_BN=tokens_BN, tree=chain(depth + 1))

    def observe(self, step: Step) -> None:
        self.steps.append(step)


def start_cascade(drafters: list[Any], **settings: Any) -> Drafter:
    drafter = Drafter(Config(parts=EXAMPLE.parts, **settings), None, [Part(one) for one in drafters])  # type: ignore
    start(drafter)
    return drafter


def start(drafter: Drafter, num_rows: int = 1) -> None:
    given: Any = {"target": tiny_target("llama"), "cache": None, "generator": None}
    drafter.start(Session(rows=[[3, 4]] * num_rows, sampling=Sampling(), **given))


def verified(draft: Draft, num_tokens: int, cost_ms: float) -> Step:
    paths = [list(range(num_tokens))] * len(draft.tokens_BN)
    given: Any = {"logits_BNV": None, "hidden": {}, "verdict": None}
    return Step(draft=draft, paths=paths, cost_ms=cost_ms, **given)


def test_fixed_order_uses_the_first_draft_that_is_deep_enough() -> None:
    first, second = Scripted(3, 2, 0, 4), Scripted(1, 0)
    drafter = start_cascade([first, second], adaptive=False, min_tokens=3)
    depths = []
    for _ in range(4):
        draft = drafter.propose(9)
        depths.append(draft.tree.depth)
        drafter.observe(verified(draft, 1, 1.0))
    assert depths == [3, 1, 0, 4], "the last part's draft is used even if it is empty"
    assert len(first.steps) == len(second.steps) == 4, "all parts observe every step"


def test_adaptive_order_prefers_the_fastest_choice_and_retries_the_others() -> None:
    drafter = start_cascade([Scripted(*[2] * 99), Scripted(*[5] * 99)])
    turns = []
    for _ in range(3 * Drafter.TRIAL_EVERY):
        draft = drafter.propose(9)
        turns.append(draft.tree.depth)
        # 3 tokens in 10 ms against 4 in 20, and 1 in 8.
        drafter.observe(verified(draft, *{2: (3, 10.0), 5: (4, 20.0), 0: (1, 8.0)}[draft.tree.depth]))
    assert turns[:4] == [2, 5, 0, 2], "all are tried first"
    assert turns.count(5) == turns.count(0) == 3 and turns.count(2) == len(turns) - 6
    start(drafter)
    assert drafter.propose(9).tree.depth == 2, "estimates hold for the next call"
    start(drafter, num_rows=8)
    observed = []
    for _ in range(2):
        draft = drafter.propose(9)
        observed.append(draft.tree.depth)
        drafter.observe(verified(draft, 1, 1.0))
    assert observed == [2, 5], "a call with another batch size has estimates of its own"


def test_empty_draft_passes_to_the_next_part_without_changing_estimates() -> None:
    first, second = Scripted(0, 3, 0), Scripted(2, 2)
    drafter = start_cascade([first, second])
    for tokens, ms, depth in ((2, 1.0, 2), (4, 1.0, 3), (1, 1.0, 0), (2, 1.0, 2)):
        draft = drafter.propose(9)
        assert draft.tree.depth == depth
        drafter.observe(verified(draft, tokens, ms))
    found = [round(one.tokens_per_ms(), 6) for one in drafter._estimates]
    assert found == [4.0, 2.0, 1.0]


def test_adaptive_order_prefers_plain_steps_where_they_are_faster() -> None:
    drafter = start_cascade([Scripted(*[2] * 99), Scripted(*[5] * 99)])
    turns = []
    for _ in range(Drafter.TRIAL_EVERY):
        draft = drafter.propose(9)
        turns.append(draft.tree.depth)
        drafter.observe(verified(draft, *{2: (1, 10.0), 5: (2, 20.0), 0: (1, 8.0)}[draft.tree.depth]))
    assert turns == [2, 5, *[0] * (len(turns) - 2)]


def test_estimate_is_a_mean_at_first_and_then_a_running_mean() -> None:
    estimate = Estimate()
    assert estimate.tokens_per_ms() == float("inf")
    for tokens, ms in ((1, 10), (3, 10), (2, 40)):
        estimate.add(tokens, ms)
    assert estimate.tokens_per_ms() == pytest.approx(2 / 20)
    for _ in range(200):
        estimate.add(6, 30)
    assert estimate.tokens_per_ms() == pytest.approx(6 / 30, rel=1e-3)


def test_sampled_drafts_are_used_whatever_their_depth() -> None:
    """Chains that stop early at unlikely tokens: rejecting short ones would favour tokens that the model is sure of."""
    target = distribution_target()
    model = tiny_config("llama", vocab_size=8, num_hidden_layers=1).to_dict()
    chains = built(lm, lm.Config(model=model, num_draft=3, length="confidence=0.2"), target)
    drafter = cascade_of([chains, built(medusa, HEADS, target)], adaptive=False, min_tokens=3)
    first, second = (part.drafter for part in drafter.parts)
    given: Any = {"max_new_tokens": 20, "eos_token_id": ()}
    draftsmith.generate(target, torch.tensor([PROMPT]), drafter, temperature=1.0, seed=0, **given)
    assert {len(draft[0]) - 1 for draft in first.drafts[:-2]} == {1, 2, 3}  # type: ignore[attr-defined]
    assert second.drafts == [], "short sampled drafts were rejected"  # type: ignore[attr-defined]
    draftsmith.generate(target, torch.tensor([PROMPT]), drafter, **given)
    assert second.drafts, "short greedy drafts may be rejected"  # type: ignore[attr-defined]


def test_early_exit_drafter_may_be_a_part() -> None:
    """Its keys and values are in the target's cache, where another part's draft overwrites them."""
    target = tiny_target("llama")
    exits = built(kangaroo, kangaroo.Config(exit_layer=2, num_draft=3, length="fixed"), target)
    looks = lookup.Drafter(lookup.Config(min_ngram=2), target)
    ids, mask = padded(prompts(5))
    for drafters in ([looks, exits], [exits, looks]):
        drafter = cascade_of(drafters, adaptive=False, min_tokens=4)
        out = draftsmith.generate(target, ids, Watched(drafter), attention_mask=mask, max_new_tokens=NUM_NEW)
        assert texts(out) == greedy_by_transformers("llama", 5, NUM_NEW)
        assert all(part.drafter.num_drafted > 0 for part in drafter.parts)  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize("family", names())
def test_every_family_may_be_a_part(family: str) -> None:
    target = tiny_target("llama")
    part = built(find(family), importlib.import_module(f"tests.drafters.test_{family}").EXAMPLE, target)
    if part.target is not target:
        pytest.skip("it fine-tunes its target")
    looks = lookup.Drafter(lookup.Config(min_ngram=2), target)
    ids, mask = padded(prompts(5))
    for drafters in ([looks, part], [part, looks]):
        drafter = cascade_of(drafters, adaptive=False, min_tokens=3)
        given = {"attention_mask": mask, "max_new_tokens": NUM_NEW}
        out = draftsmith.generate(target, ids, Watched(drafter), **given)
        assert texts(out) == greedy_by_transformers("llama", 5, NUM_NEW)
        draftsmith.generate(target, ids, Watched(drafter), temperature=1.0, seed=0, **given)


@pytest.mark.parametrize("architecture", SEQ2SEQ)
def test_encoder_decoder_decodes_greedily_as_the_target(architecture: str) -> None:
    target = tiny_target(architecture)
    model = tiny_config("llama", num_hidden_layers=1).to_dict()
    chains = built(lm, lm.Config(model=model, num_draft=3, length="fixed"), target)
    drafter = cascade_of([lookup.Drafter(lookup.Config(min_ngram=2), target), chains], adaptive=False)
    ids, mask = padded(prompts(5))
    out = draftsmith.generate(target, ids, Watched(drafter), attention_mask=mask, max_new_tokens=NUM_NEW)
    assert texts(out) == greedy_by_transformers(architecture, 5, NUM_NEW)


def test_config_rejects_invalid_settings() -> None:
    with pytest.raises(ValueError, match="min_tokens is 0"):
        Config(parts=EXAMPLE.parts, min_tokens=0)
    with pytest.raises(ValueError, match="there must be at least 2"):
        Config(parts=EXAMPLE.parts[:1])
