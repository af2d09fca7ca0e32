"""Tests of composite drafters' parts: their hidden layers, their artifacts, and drafts that they did not propose."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import draftsmith
from draftsmith.artifacts.families import find
from draftsmith.core.drafter import Drafter, Session, Step
from draftsmith.core.tree import Draft
from draftsmith.drafters import (
    dflash,
    eagle3,
    early_exit,
    hydra,
    kangaroo,
    layerskip,
    lm,
    lookup,
    medusa,
    medusa2,
    mtp,
    pard,
    prophet,
)
from draftsmith.length.controller import LengthControlled
from draftsmith.length.policies import ExpectedGain
from draftsmith.parts import composites
from draftsmith.parts.composites import Part
from tests.support.drafters import Scripted
from tests.support.family import Watched, built, texts
from tests.support.models import greedy_by_transformers, padded, prompts, tiny_config, tiny_target

TARGET = tiny_target("llama")
NUM_NEW = 24
SMALL = tiny_config("llama", num_hidden_layers=1).to_dict()
HEAD = {"layers": (1, 2), "num_heads": 4, "num_kv_heads": 2, "head_width": 8, "inner_width": 48, "num_draft": 3}
BLOCK = {"layers": (1, 2), "mask_token": 63, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2, "head_width": 8}
BLOCK |= {"inner_width": 48, "block_size": 4}
DRAFTERS: dict[str, tuple[Any, Any]] = {
    "lm chains": (lm, lm.Config(model=SMALL, num_draft=4, length="fixed")),
    "lm fixed tree": (lm, lm.Config(model=SMALL, tree=((0,), (1,), (0, 0), (1, 0)))),
    "lm dynamic trees": (lm, lm.Config(model=SMALL, num_draft=3, width=2, num_nodes=6)),
    "medusa": (medusa, medusa.Config(num_heads=3, tree=((0,), (1,), (0, 0)))),
    "hydra": (hydra, hydra.Config(prefix_heads=4, prefix_width=48)),
    "eagle3 chains": (eagle3, eagle3.Config(**HEAD, width=0)),
    "eagle3 trees": (eagle3, eagle3.Config(**HEAD, width=2, num_nodes=5)),
    "dflash": (dflash, dflash.Config(**BLOCK)),
    "mtp": (mtp, mtp.Config(model=SMALL)),
    "pard": (pard, pard.Config(model=SMALL, mask_token=63, num_draft=4)),
    "dflash trees": (dflash, dflash.Config(**BLOCK, num_nodes=6)),
    "kangaroo": (kangaroo, kangaroo.Config(exit_layer=2, num_draft=4, length="fixed")),
    "kangaroo trees": (kangaroo, kangaroo.Config(exit_layer=2, num_draft=3, width=2, num_nodes=6)),
    "early exit": (early_exit, early_exit.Config(exit_layer=1, num_blocks=2, num_draft=4, length="fixed")),
    "layerskip": (layerskip, layerskip.Config(attention=(1,), mlp=(0,), num_draft=4, length="fixed")),
    "lookup": (lookup, lookup.Config()),
    "prophet": (prophet, prophet.Config(num_layers=1, num_draft=4, length="fixed")),
}


class Interrupted(Drafter):
    """Lets its drafter propose in two of three steps, and returns another draft in two of three.

    Asserts that its drafter proposes what a newly started drafter proposes for the same text.
    """

    def __init__(self, name: str, expected: list[list[int]], *, trees: bool) -> None:
        family, config = DRAFTERS[name]
        self.part, self.fresh = (Watched(built(family, config, TARGET)) for _ in range(2))
        self.other = Scripted(TARGET, expected, trees=trees, wrong_every=5)
        self.config, self.target = None, TARGET
        self.hidden_layers = tuple(sorted({*self.part.hidden_layers, *self.other.hidden_layers}))
        self.num_steps = self.num_compared = 0

    def start(self, session: Session) -> None:
        self.session = session
        self.other.start(session)
        self.part.start(dataclasses.replace(session, hidden=own(self.part, session.hidden)))

    def propose(self, budget: int) -> Draft:
        self.num_steps += 1
        if self.num_steps % 3 == 0:
            return self.other.propose(budget)
        draft, running = self.part.propose(budget), [len(row) for row in self.session.rows]
        expected = self.draft_from_start(budget)
        for row in range(len(running)):
            # Drafts of finished rows are not specified; these rows all end at the same step.
            assert nodes(draft, row) == nodes(expected, row), (self.num_steps, row)
        self.num_compared += 1
        return draft if self.num_steps % 3 == 1 else self.other.propose(budget)

    def observe(self, step: Step) -> None:
        self.part.observe(dataclasses.replace(step, hidden=own(self.part, step.hidden)))

    def draft_from_start(self, budget: int) -> Draft:
        rows = [list(row) for row in self.session.rows]
        cache = TARGET.new_cache(len(rows))
        hidden = TARGET.prefill([row[:-1] for row in rows], cache, layers=self.fresh.hidden_layers)
        self.fresh.start(dataclasses.replace(self.session, rows=rows, cache=cache, hidden=hidden))
        return self.fresh.propose(budget)


def own(drafter: Any, hidden: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    return {layer: states for layer, states in hidden.items() if layer in drafter.hidden_layers}


def nodes(draft: Draft, row: int) -> list[tuple[int, int]]:
    """Returns each node's token and parent."""
    used = draft.num_nodes[row] if draft.num_nodes else draft.tree.num_nodes
    parents = draft.tree.parents_RN[row % len(draft.tree.parents_RN)].tolist()
    return list(zip(draft.tokens_BN[row].tolist(), parents, strict=True))[:used]


@pytest.mark.parametrize("name", DRAFTERS)
def test_drafts_after_other_drafts_equal_those_of_a_new_drafter(name: str) -> None:
    """Rows have at least two tokens: a prompt of one token has no hidden states."""
    rows = [row for row in prompts(5) if len(row) > 1]
    ids, mask = padded(rows)
    whole = greedy_by_transformers("llama", 5, NUM_NEW)
    expected = [text for text, row in zip(whole, prompts(5), strict=True) if len(row) > 1]
    for trees in (False, True):
        drafter = Interrupted(name, expected, trees=trees)
        out = draftsmith.generate(TARGET, ids, drafter, attention_mask=mask, max_new_tokens=NUM_NEW)
        assert texts(out) == expected
        assert drafter.num_compared > 3


def test_drafts_after_rewind_equal_those_of_a_new_drafter() -> None:
    rows = [list(range(3, 12)), [5, 6, 7, 5, 6]]
    family, config = DRAFTERS["lm chains"]
    ours, fresh = built(family, config, TARGET), built(family, config, TARGET)
    given: Any = {"target": TARGET, "cache": None, "generator": torch.Generator()}
    given["sampling"] = draftsmith.core.sampling.Sampling()
    ours.start(Session(rows=rows, **given))
    ours.propose(4)
    for row, ids in zip(rows, ([20, 21], [22, 23, 24]), strict=True):
        del row[3:]
        row += ids
    ours.rewind([3, 3])
    fresh.start(Session(rows=rows, **given))
    assert torch.equal(ours.propose(4).tokens_BN, fresh.propose(4).tokens_BN)


def test_policy_learns_from_its_own_drafts_only() -> None:
    """It also learns the cost of plain steps, but nothing from another drafter's draft."""
    policy, learnt = ExpectedGain(), []
    policy.learn = lambda outcomes, depth, cost_ms: learnt.append((len(outcomes), depth))  # type: ignore
    drafter = LengthControlled(built(medusa, DRAFTERS["medusa"][1], TARGET), policy, supports_early_stop=False)
    other = Scripted(TARGET, greedy_by_transformers("llama", 1, NUM_NEW), trees=False)
    turns = Turns([drafter, other])
    draftsmith.generate(TARGET, torch.tensor(prompts(1)), turns, max_new_tokens=NUM_NEW)
    own_steps = [turn for turn in turns.verified if turn == 0]
    assert len(learnt) == len(own_steps) < len(turns.verified)


class Turns(Drafter):
    """Drafters whose drafts are used in turn; all of them observe every step."""

    config = None

    def __init__(self, drafters: list[Any]) -> None:
        self.drafters, self.target = drafters, TARGET
        self.hidden_layers = tuple(sorted({layer for one in drafters for layer in one.hidden_layers}))
        self.verified: list[int] = []
        self.num_steps = 0

    def start(self, session: Session) -> None:
        for one in self.drafters:
            one.start(dataclasses.replace(session, hidden=own(one, session.hidden)))

    def propose(self, budget: int) -> Draft:
        self.num_steps += 1
        drafts = [one.propose(budget) for one in self.drafters]
        self.turn = self.num_steps % len(drafts)
        return drafts[self.turn]

    def observe(self, step: Step) -> None:
        if step.draft.tree.depth > 0:
            self.verified.append(self.turn)
        for one in self.drafters:
            one.observe(dataclasses.replace(step, hidden=own(one, step.hidden)))


def two(**changes: Any) -> tuple[dict[str, Any], ...]:
    """Returns the part configurations of a look-up and of Medusa heads."""
    heads = medusa.Config(num_heads=3, tree=((0,), (1,), (0, 0)))
    given = [("lookup", lookup.Config()), ("medusa", dataclasses.replace(heads, **changes))]
    return tuple({"family": name, "config": json.loads(json.dumps(dataclasses.asdict(one)))} for name, one in given)


def test_make_part_and_part_config_are_inverse() -> None:
    for name in two():
        part = composites.make_part(name, TARGET)
        assert part.name == name["family"] and composites.part_config(part.drafter) == name
    with pytest.raises(ValueError, match=r"part medusa: unknown setting 'num_hads'; did you mean 'num_heads'\?"):
        composites.make_part({"family": "medusa", "config": {"num_hads": 2}}, TARGET)
    with pytest.raises(ValueError, match="unknown drafter family 'medus'"):
        composites.make_part({"family": "medus", "config": {}}, TARGET)


def test_make_part_rejects_a_drafter_that_fine_tunes_its_target() -> None:
    name = {"family": "medusa2", "config": json.loads(json.dumps(dataclasses.asdict(medusa2.Config(rank=2))))}
    with pytest.raises(
        ValueError, match="medusa2 fine-tunes its target, but all parts of a composite must draft for the same"
    ):
        composites.make_part(name, TARGET)


@pytest.mark.parametrize("family", ["cascade", "merge", "staged"])
def test_artifact_of_a_composite_keeps_and_checks_its_parts(family: str, tmp_path: Path) -> None:
    """Each part keeps the provenance of its manifest and is checked like any artifact."""
    module = find(family)
    heads = built(medusa, DRAFTERS["medusa"][1], TARGET)
    model = built(lm, DRAFTERS["lm chains"][1], TARGET)
    first = model if family == "staged" else heads
    draftsmith.save(first, tmp_path / "first", TARGET, record={"train_s": 12.5, "command": "as it was made"})
    small = lookup.Drafter(lookup.Config(), model.draft_model if family == "staged" else TARGET)
    loaded = composites.load_artifact(tmp_path / "first", TARGET)
    second = Part(lookup.Drafter(lookup.Config(), loaded.drafter.draft_model) if family == "staged" else small)
    config = module.Config(parts=(composites.part_config(first), composites.part_config(small)))
    path = tmp_path / "whole"
    draftsmith.save(module.Drafter(config, TARGET, [loaded, second]), path, TARGET)
    kept = json.loads((path / "drafters" / "0" / "draft_config.json").read_text())
    assert (kept["train_s"], kept["command"]) == (12.5, "as it was made")
    assert not (path / "model.safetensors").exists(), "weights are saved once, with their part"
    again = draftsmith.load(path, TARGET)
    assert sum(one.numel() for one in again.parameters()) == sum(one.numel() for one in first.parameters())
    weights = path / "drafters" / "0" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="drafters/0/model.safetensors is truncated"):
        draftsmith.load(path, TARGET)
    weights.write_bytes(whole)
    manifest = path / "drafters" / "1" / "draft_config.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"max_ngram": 3', '"max_ngram": 2'))
    with pytest.raises(
        ValueError, match="drafters/1 holds another drafter than .* lists; the artifact must be made again"
    ):
        draftsmith.load(path, TARGET)
    found = json.loads(text)
    found["target"]["fingerprint"] = "0" * 32
    manifest.write_text(json.dumps(found))
    with pytest.raises(ValueError, match="drafters/1 was made for target"):
        draftsmith.load(path, TARGET)


def test_check_parts_rejects_invalid_lists() -> None:
    with pytest.raises(ValueError, match=r"1 part\(s\) given; there must be at least 2"):
        composites.check_parts(two()[:1])
    with pytest.raises(ValueError, match="part 1 is {'family': 'lookup'}; it must be"):
        composites.check_parts((two()[0], {"family": "lookup"}))
