"""Checks of every family: decoding, artifacts, sampled distributions and training.

A family's own test only needs

    def test_family(tmp_path: Path) -> None:
        check_family(lookup, lookup.Config(), tmp_path)

Shape suffixes: B rows, N nodes, V vocabulary.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import draftsmith
from data.batches import Batch, collate, example
from data.teacher import complete
from draftsmith import Target
from draftsmith.core.drafter import Drafter, Session, Step
from draftsmith.core.tree import Draft
from draftsmith.drafters import lookup
from tests.support.distributions import PROMPT, check_distribution, distribution_target
from tests.support.models import (
    greedy_by_model,
    greedy_by_transformers,
    padded,
    prompts,
    scramble,
    tiny_model,
    tiny_target,
)

NUM_NEW = 20
ConfigOf = Any | Callable[[Target], Any]


def check_family(
    family: ModuleType,
    config: ConfigOf,
    folder: Path,
    *,
    architectures: tuple[str, ...] = ("llama",),
    trainer: ModuleType | None = None,
    settings: Any = None,
) -> None:
    """Asserts that a family's drafter with random weights works; `config` may be a function of the target.

    For a family whose drafters have state besides weights, the function returns the drafter itself. With `trainer` (a
    module of `trainers/`) and its `settings`, training is checked as well. tests/drafters/test_every_family.py runs the
    other architectures. Sampled text is counted for drafters that sample: that of deterministic drafts, whatever they
    are, is what their verifier samples from the target (tests/verify). The slow suite counts it for all.
    """
    for architecture in architectures:
        drafter = built(family, config, tiny_target(architecture))
        check_greedy(drafter, architecture)
        if architecture == architectures[0]:
            check_coupled(drafter)
    target = tiny_target(architectures[0])
    check_round_trip(built(family, config, target), target, folder / "artifact")
    check_forget(built(family, config, target))
    drafter = built(family, config, distribution_target("t5" if target.is_encoder_decoder else "llama"))
    if samples(drafter):
        check_distribution(drafter, drafter.target, top_p=0.9, num_samples=4_000)
    if trainer is not None:
        check_training(trainer, settings, architectures[0])


def built(family: ModuleType, config: ConfigOf, target: Target) -> Any:
    """Returns the family's drafter for the target, with random weights if it has any."""
    made = config(target) if callable(config) else config
    drafter = made if isinstance(made, Drafter) else family.Drafter(made, target)
    if isinstance(drafter, nn.Module):
        scramble(drafter, seed=1)
        drafter.eval()
        drafter.on_weights_loaded()
    return drafter


def samples(drafter: Any) -> bool:
    """Returns whether drafts at temperature 1 are sampled from probabilities of the drafter."""
    watched = Watched(drafter)
    draftsmith.generate(drafter.target, [PROMPT] * 3, watched, max_new_tokens=NUM_NEW, temperature=1.0, seed=0)
    return watched.is_sampled


def part_config(family: str, config: Any) -> dict[str, Any]:
    """Returns an entry of a composite's `parts`."""
    return {"family": family, "config": json.loads(json.dumps(dataclasses.asdict(config)))}


def check_greedy(drafter: Any, architecture: str) -> None:
    """Asserts that greedy output equals transformers', for one row and for five ragged ones, padded left and right."""
    is_tiny = drafter.target is tiny_target(architecture)
    for num_rows, side in ((1, "right"), (5, "left"), (5, "right")):
        ids, mask = padded(prompts(num_rows), side=side)
        watched = Watched(drafter)
        out = draftsmith.generate(drafter.target, ids, watched, attention_mask=mask, max_new_tokens=NUM_NEW)
        expected = (
            greedy_by_transformers(architecture, num_rows, NUM_NEW)
            if is_tiny
            else greedy_by_model(drafter.target.model, num_rows, NUM_NEW)
        )
        assert texts(out) == expected, f"{architecture}, {num_rows} rows"
        assert out.stats.new_tokens == NUM_NEW * num_rows
        assert watched.num_drafted > 0, "nothing was drafted"


def check_coupled(drafter: Any) -> None:
    """Asserts that text sampled by the verifier "coupled" is that of plain decoding, for one row and for three."""
    for num_rows in (1, 3):
        ids, mask = padded(prompts(num_rows))
        settings = {"attention_mask": mask, "max_new_tokens": NUM_NEW, "verifier": "coupled"}
        plain, drafted = (
            draftsmith.generate(drafter.target, ids, used, temperature=1.0, seed=7, **settings)
            for used in (None, Watched(drafter))
        )
        assert texts(drafted) == texts(plain), f"{num_rows} rows"


def check_round_trip(drafter: Any, target: Target, folder: Path) -> None:
    """Asserts that a saved drafter loads as the same one, and only for the same target."""
    draftsmith.save(drafter, folder, target=target)
    loaded = draftsmith.load(folder, target)
    assert type(loaded) is type(drafter)
    assert json.dumps(dataclasses.asdict(loaded.config)) == json.dumps(dataclasses.asdict(drafter.config))
    if isinstance(drafter, nn.Module):
        state = loaded.state_dict()
        assert state.keys() == drafter.state_dict().keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in drafter.state_dict().items())
        own = {tensor.data_ptr() for tensor in state.values()}
        theirs = {weight.data_ptr() for weight in target.model.parameters()}
        assert own.isdisjoint(theirs), "the target's weights are in its state"
    ids, mask = padded(prompts(5))
    runs = []
    for one in (drafter, loaded):
        watched = Watched(one)
        sampling = {"temperature": 1.0, "seed": 3}
        draftsmith.generate(one.target, ids, watched, attention_mask=mask, max_new_tokens=NUM_NEW, **sampling)
        runs.append(watched.drafts)
    assert runs[0] == runs[1]
    with pytest.raises(ValueError, match="was made for target"):
        draftsmith.load(folder, Target(tiny_model("llama", seed=77)))


def check_forget(drafter: Any) -> None:
    """Asserts that after `forget` it drafts as in the first calls."""
    ids, mask = padded(prompts(5))
    runs = []
    for _ in range(2):
        drafter.forget()
        watched = Watched(drafter)
        for row in range(len(ids)):
            kept = mask[row : row + 1].bool()
            draftsmith.generate(drafter.target, ids[row : row + 1][kept][None], watched, max_new_tokens=8)
        runs.append(watched.drafts)
    assert runs[0] == runs[1]


def check_training(trainer: ModuleType, settings: Any, architecture: str = "llama") -> None:
    """Asserts that the loss falls on a batch, every weight gets a gradient, and the target stays unchanged."""
    target = Target(tiny_model(architecture))
    target.model.requires_grad_(False)  # as the training loop does
    before = {name: weight.detach().clone() for name, weight in target.model.named_parameters()}
    drafter = trainer.build(settings, target).train()
    needs = trainer.needs(settings, target)
    batch = complete(_batch(target), target, layers=needs.layers, top_k=needs.top_k)
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=3e-3)
    losses, learning = [], set()
    for step in range(8):
        if hasattr(trainer, "begin_step"):
            trainer.begin_step(drafter, settings, step, 8)
        optimizer.zero_grad()
        loss, metrics = trainer.loss(drafter, batch, settings, target)
        loss.backward()
        assert all(torch.as_tensor(count).sum() > 0 for _, count in metrics.values())
        for name, weight in drafter.named_parameters():
            assert weight.grad is not None, f"{name} has no gradient"
            learning |= {name} if weight.grad.abs().max() > 0 else set()
        optimizer.step()
        losses.append(loss.item())
    assert learning == {name for name, _ in drafter.named_parameters()}
    assert losses[-1] < losses[0] - 0.02 * abs(losses[0]), losses
    for name, weight in target.model.named_parameters():
        assert weight.grad is None and not weight.requires_grad, name
        assert torch.equal(weight, before[name]), f"the target's {name} was changed"


def texts(out: Any) -> list[list[int]]:
    """Returns each row's ids, prompt included, without padding."""
    return [ids[:length].tolist() for ids, length in zip(out.sequences, out.lengths, strict=True)]


class Watched(Drafter):
    """Wraps a drafter and checks in every call the properties that the loop and the verifiers rely on."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.config, self.target, self.hidden_layers = inner.config, inner.target, inner.hidden_layers
        self.drafts: list[list[list[int]]] = []
        self.num_drafted, self.is_sampled = 0, False

    def start(self, session: Session) -> None:
        self._session = session
        self.inner.start(session)

    def propose(self, budget: int) -> Draft:
        draft = self.inner.propose(budget)
        num_rows, num_nodes = len(self._session.rows), draft.tree.num_nodes
        assert draft.tokens_BN.shape == (num_rows, num_nodes)
        assert draft.tokens_BN.dtype == torch.long
        assert int(draft.tokens_BN.min()) >= 0 and int(draft.tokens_BN.max()) < self.target.vocab_size
        assert draft.tokens_BN[:, 0].tolist() == [row[-1] for row in self._session.rows], "node 0 is the pending token"
        assert draft.tree.depth <= budget
        assert draft.tree.parents_RN.shape[0] in (1, num_rows)
        assert draft.num_nodes is None or all(1 <= used <= num_nodes for used in draft.num_nodes)
        assert (draft.draft_probs_BNV is None) == (draft.sampling_scheme == "deterministic")
        if draft.draft_probs_BNV is not None:
            self._check_distribution(draft, draft.draft_probs_BNV)
        if draft.confidences is not None:
            used = draft.num_nodes or [num_nodes] * num_rows
            confidences = draft.confidences()
            assert all(len(one) >= number - 1 for one, number in zip(confidences, used, strict=True))
            assert all(0 <= confidence <= 1 for one in confidences for confidence in one)
        self.has_confidences = draft.confidences is not None
        self.is_sampled |= draft.draft_probs_BNV is not None
        self.drafts.append(draft.tokens_BN.tolist())
        self.num_drafted += sum(draft.num_nodes or [num_nodes] * num_rows) - num_rows
        return draft

    def observe(self, step: Step) -> None:
        for row, path in zip(self._session.rows, step.paths, strict=True):
            assert not path or path[0] == 0
            assert len(path) <= step.draft.tree.depth + 1 <= len(row) + step.draft.tree.depth
        assert set(step.hidden) == set(self.hidden_layers)
        self.inner.observe(step)

    def _check_distribution(self, draft: Draft, probs_BNV: Tensor) -> None:
        assert probs_BNV.shape[0] == len(draft.tokens_BN) and probs_BNV.shape[2] == self.target.vocab_size
        assert (probs_BNV.sum(-1) - 1).abs().max() < 1e-5
        valid_BN = draft.valid_BN()
        parents_BN = draft.tree.parents_RN.expand_as(draft.tokens_BN)[:, 1:]
        rows_B1 = torch.arange(len(parents_BN))[:, None]
        drafted_probs_BN = probs_BNV[rows_B1, parents_BN, draft.tokens_BN[:, 1:]]
        is_used = valid_BN[:, 1:] if valid_BN is not None else ...
        assert (drafted_probs_BN > 0)[is_used].all(), "drafted a token of probability 0"


class Alternating(Drafter):
    """Proposes a lookup's drafts at every second step; the watched drafter observes all steps."""

    def __init__(self, inner: Watched) -> None:
        self.inner = inner
        self.config, self.target, self.hidden_layers = inner.config, inner.target, inner.hidden_layers

    def start(self, session: Session) -> None:
        self.inner.start(session)
        self.other, self.number = lookup.Drafter(lookup.Config(), self.target), 0
        self.other.start(session)

    def propose(self, budget: int) -> Draft:
        self.number += 1
        return self.other.propose(budget) if self.number % 2 else self.inner.propose(budget)

    def observe(self, step: Step) -> None:
        self.inner.observe(step)


def _batch(target: Target) -> Batch:
    rows, examples = prompts(4, seed=9), []
    for row, ids in enumerate(rows):
        text = ids + ids[::-1] + ids
        examples.append(example(text, None, key=str(row), source=ids if target.is_encoder_decoder else None))
    return collate(examples)
