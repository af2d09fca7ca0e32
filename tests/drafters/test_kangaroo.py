"""Tests of the Kangaroo drafter: its adapter, both KV caches, and the blocks that verification runs.

Shape suffixes: B rows, T positions, D hidden width, V vocabulary.
"""

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import draftsmith
from draftsmith import Target
from draftsmith.core.cache import KVCache
from draftsmith.core.drafter import Session, Step
from draftsmith.core.sampling import Sampling
from draftsmith.core.tree import Draft
from draftsmith.drafters import kangaroo
from draftsmith.drafters.kangaroo import Config, Drafter
from tests.support.family import Watched, built, check_family, texts
from tests.support.models import NUM_LAYERS, WIDTH, greedy_by_transformers, padded, prompts, tiny_target
from tests.support.runs import trainer_settings
from trainers import kangaroo as trainer

NUM_NEW = 20
EXAMPLE = Config(exit_layer=2, num_draft=4, length="confidence=0.05")
CHAIN = dataclasses.replace(EXAMPLE, length="fixed")
DYNAMIC = Config(exit_layer=2, num_draft=3, width=3, num_nodes=7)
LATE = dataclasses.replace(CHAIN, exit_layer=NUM_LAYERS)
FULL = Config(exit_layer=NUM_LAYERS, num_draft=2, width=2, num_nodes=6)


@pytest.mark.parametrize("config", [EXAMPLE, pytest.param(DYNAMIC, marks=pytest.mark.slow)], ids=["chain", "dynamic"])
def test_family(tmp_path: Path, config: Config) -> None:
    check_family(
        kangaroo, config, tmp_path, trainer=trainer, settings=trainer_settings(trainer, exit_layer=config.exit_layer)
    )


def naive(drafter: Drafter, hidden_TD: Tensor) -> Tensor:
    """Returns the adapter's output over one text, computed head by head and pair by pair."""

    def norm(module: nn.Module, x_D: Tensor) -> Tensor:
        return x_D / (x_D.square().mean() + 1e-6).sqrt() * module.weight

    attention, width = drafter.attention, drafter.attention.head_width
    frequencies = attention.theta ** -(torch.arange(width // 2) / (width // 2))
    normed = [norm(drafter.attention_norm, h_D) for h_D in hidden_TD]

    def rotated(matrix: Tensor, t: int) -> Tensor:
        """Returns the projection at t as complex numbers, rotated by t times each frequency."""
        first, second = (matrix @ normed[t]).split(width // 2)
        return torch.complex(first, second) * torch.polar(torch.ones(width // 2), t * frequencies)

    rows = []
    for t, h_D in enumerate(hidden_TD):
        heads = []
        for head in range(attention.num_heads):
            part = slice(head * width, (head + 1) * width)
            query, values = rotated(attention.query.weight[part], t), []
            scores = []
            for s in range(t + 1):
                key = rotated(attention.key.weight[part], s)
                scores.append((query * key.conj()).real.sum() / width**0.5)
                values.append(attention.value.weight[part] @ normed[s])
            shares = torch.stack(scores).softmax(0)
            heads.append(sum(share * value for share, value in zip(shares, values, strict=True)))
        rows.append(norm(drafter.norm, h_D + attention.output.weight @ torch.cat(heads)))
    return torch.stack(rows)


@torch.no_grad()
def test_adapter_matches_naive_loop() -> None:
    drafter = built(kangaroo, EXAMPLE, tiny_target("llama"))
    hidden_BTD = torch.randn(2, 9, WIDTH, generator=torch.Generator().manual_seed(0))
    found_BTD = drafter(hidden_BTD, torch.arange(9)[None])
    for found_TD, hidden_TD in zip(found_BTD, hidden_BTD, strict=True):
        assert torch.allclose(found_TD, naive(drafter, hidden_TD), atol=1e-5)


class CheckedDrafts(Watched):
    """Checks every draft and both caches against uncached forwards over the texts of the running rows."""

    num_compared = num_accepted = num_whole = 0

    def start(self, session: Session) -> None:
        super().start(session)
        self.lengths = [len(ids) for ids in session.rows]
        self.is_running = [True] * len(session.rows)

    def propose(self, budget: int) -> Draft:
        draft = super().propose(budget)
        assert draft.resume_point is not None and draft.resume_point.layer == self.config.exit_layer
        for row, ids in enumerate(self._session.rows):
            if self.is_running[row]:
                self.check_caches(row, ids[:-1])
                self.check_nodes(draft, row, ids)
        return draft

    def check_caches(self, row: int, ids: list[int]) -> None:
        """Checks that the target's and the adapter's cache hold what a prefill of this row alone gives."""
        if not ids:
            return
        layer, fresh, own = self.config.exit_layer, self.target.new_cache(1), KVCache(num_layers=1, batch_size=1)
        hidden_1TD = self.target.prefill([ids], fresh, layers=(layer,))[layer]
        own.prepare(len(ids), hidden_1TD.device)
        self.inner(hidden_1TD, torch.arange(len(ids))[None], cache=own)
        own.commit([list(range(len(ids)))])
        check_rows(self._session.cache, fresh, row)
        check_rows(self.inner._cache.cache, own, row)

    def check_nodes(self, draft: Draft, row: int, ids: list[int]) -> None:
        """Checks each node's exit layer and its children's distribution against a forward over its whole path."""
        assert draft.resume_point is not None
        layer, parents = self.config.exit_layer, draft.tree.parents_RN[row % len(draft.tree.parents_RN)].tolist()
        likeliest = {}
        for node in range(draft.num_nodes[row] if draft.num_nodes else draft.tree.num_nodes):
            path = [node]
            while path[0]:
                path.insert(0, parents[path[0]])
            text_1T = torch.tensor([ids[:-1] + draft.tokens_BN[row, path].tolist()])
            hidden_1TD = self.target.read(text_1T, (layer,))[layer]
            assert torch.allclose(draft.resume_point.hidden_BND[row, node], hidden_1TD[0, -1], atol=1e-5)
            logits_V = self.target.head(self.inner(hidden_1TD, torch.arange(text_1T.shape[1])[None]))[0, -1]
            likeliest[node] = logits_V.topk(max(self.config.width, 1)).indices.tolist()
            if draft.draft_probs_BNV is None:
                assert not node or int(draft.tokens_BN[row, node]) in likeliest[parents[node]]
            elif node < draft.draft_probs_BNV.shape[1]:
                probs_V = self._session.sampling.probs(logits_V)
                assert torch.allclose(draft.draft_probs_BNV[row, node], probs_V, atol=1e-5)
            self.num_compared += 1

    def observe(self, step: Step) -> None:
        super().observe(step)
        for row, (ids, path) in enumerate(zip(self._session.rows, step.paths, strict=True)):
            # A row that finishes within its path has fewer tokens than were accepted.
            self.is_running[row] = 0 < len(path) == len(ids) - self.lengths[row]
            self.num_accepted += self.is_running[row] and len(path) > 1
            self.num_whole += self.is_running[row] and len(path) == step.draft.tree.depth + 1
            self.lengths[row] = len(ids)


def check_rows(cache: KVCache, fresh: KVCache, row: int) -> None:
    """Asserts that a row of a cache holds what a cache of that row alone holds."""
    length = fresh.lengths[0]
    assert cache.lengths[row] == length
    assert torch.allclose(cache._stores[0][:, row, :, :length], fresh._stores[0][:, 0, :, :length], atol=1e-5)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, top_k=9)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("num_rows", [1, 5])
@pytest.mark.parametrize("config", [LATE, EXAMPLE, DYNAMIC], ids=["late", "stopping", "dynamic"])
def test_both_caches_match_a_fresh_prefill(config: Config, num_rows: int, sampling: Sampling) -> None:
    """Includes rejected drafts, drafts accepted as a whole, and rows that finish before others."""
    compared = CheckedDrafts(pass_through(tiny_target("llama", dtype=torch.float64), config))
    ids, mask = padded(prompts(num_rows), side="left")
    ends = (10, 11) if num_rows > 1 else ()
    settings = sampling.as_arguments() | {"max_new_tokens": 14, "eos_token_id": ends, "seed": 1}
    draftsmith.generate(compared.target, ids, compared, attention_mask=mask, **settings)
    assert compared.num_compared > 10
    assert num_rows == 1 or compared.num_accepted > 3
    assert (num_rows, config) != (5, LATE) or compared.num_whole > 3


def pass_through(target: Target, config: Config) -> Drafter:
    """Returns an adapter that passes the exit layer to the target's final norm, plus noise from its attention."""
    torch.manual_seed(0)
    drafter = Drafter(config, target)
    nn.init.normal_(drafter.attention.output.weight, std=0.1)
    return drafter


@pytest.mark.parametrize("config", [LATE, FULL], ids=["chain", "dynamic"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen3"])
def test_exit_at_last_layer_is_always_accepted(architecture: str, config: Config) -> None:
    """Without attention the adapter is the target's own norm and head."""
    target = tiny_target(architecture)
    drafter = pass_through(target, config)
    nn.init.zeros_(drafter.attention.output.weight)
    ids, mask = padded(prompts(5))
    given = {"attention_mask": mask, "max_new_tokens": NUM_NEW}
    out = draftsmith.generate(target, ids, drafter, **given)
    assert texts(out) == greedy_by_transformers(architecture, 5, NUM_NEW)
    assert out.stats.accepted_per_depth == [1] * config.num_draft
    if not config.width:
        out = draftsmith.generate(target, ids, drafter, **given, temperature=1.0, seed=0)
        # Equal distributions always accept, except for rounding between forwards of one token and of five.
        assert min(out.stats.accepted_per_depth) > 0.9


class EveryOtherStep(Watched):
    """Proposes no draft in every other step, and none for every other row."""

    def propose(self, budget: int) -> Draft:
        self.num_steps = getattr(self, "num_steps", 0) + 1
        if self.num_steps % 2:
            return self._session.empty_draft()
        draft = super().propose(budget)
        num_nodes = [1 if row % 2 else draft.tree.num_nodes for row in range(len(self._session.rows))]
        return dataclasses.replace(draft, num_nodes=num_nodes)


@pytest.mark.parametrize("config", [CHAIN, DYNAMIC], ids=["chain", "dynamic"])
def test_adapter_reads_plain_steps(config: Config) -> None:
    compared = CheckedDrafts(pass_through(tiny_target("gpt2", dtype=torch.float64), config))
    ids, mask = padded(prompts(5))
    out = draftsmith.generate(
        compared.target, ids, EveryOtherStep(compared), attention_mask=mask, max_new_tokens=NUM_NEW
    )
    assert texts(out) == greedy_by_transformers("gpt2", 5, NUM_NEW, torch.float64)
    assert compared.num_compared > 0


def start_session(drafter: Drafter) -> Session:
    """Returns a session of one row after the prefill, started with the drafter."""
    target, rows = drafter.target, prompts(1)
    cache = target.new_cache(1)
    with torch.inference_mode():
        hidden = target.prefill([row[:-1] for row in rows], cache, layers=drafter.hidden_layers)
        generator = torch.Generator()
        session = Session(
            target=target, rows=rows, cache=cache, sampling=Sampling(), generator=generator, hidden=hidden
        )
        drafter.start(session)
    return session


@pytest.mark.parametrize("config", [CHAIN, DYNAMIC], ids=["chain", "dynamic"])
def test_verification_runs_only_blocks_after_the_exit(config: Config) -> None:
    """Each node of a chain runs through each block once, through those before the exit while it is drafted."""
    target, fed = tiny_target("llama"), Counter[int]()
    handles = [
        block.register_forward_hook(lambda _, given, __, at=at: fed.update({at: given[0].shape[1]}))  # type: ignore[misc]
        for at, block in enumerate(target.model.model.layers)
    ]
    try:
        drafter = Drafter(config, target)
        session = start_session(drafter)
        fed.clear()
        with torch.inference_mode():
            draft = drafter.propose(10)
        num_nodes = draft.tree.num_nodes
        # A dynamic tree's nodes except the first are run again, in the order in which they are verified.
        num_drafted = 1 + config.width * (config.num_draft - 1)
        num_fed = num_drafted + num_nodes - 1 if config.width else num_nodes
        assert fed == dict.fromkeys(range(config.exit_layer), num_fed)
        fed.clear()
        with torch.inference_mode():
            target.forward_draft(draft, session.cache, layers=drafter.hidden_layers)
        assert fed == dict.fromkeys(range(config.exit_layer, NUM_LAYERS), num_nodes)
    finally:
        for handle in handles:
            handle.remove()


def test_confidence_policy_stops_drafting() -> None:
    found = []
    for policy in ("fixed", "confidence=0.3", "confidence=0.999999"):
        watched = Watched(pass_through(tiny_target("llama"), dataclasses.replace(EXAMPLE, length=policy)))
        draftsmith.generate(watched.target, torch.tensor(prompts(1)), watched, max_new_tokens=NUM_NEW)
        found.append([len(draft[0]) - 1 for draft in watched.drafts])
    always, sometimes, never = found
    assert always[:-2] == [4] * (len(always) - 2)
    assert 1 < sum(sometimes) / len(sometimes) < 4
    assert set(never) == {1}


def test_invalid_settings_are_rejected() -> None:
    for message, settings in (
        ("exit_layer is 0", {"exit_layer": 0}),
        ("num_heads is 0", {"num_heads": 0}),
        ("num_draft is 0", {"num_draft": 0}),
        ("width is -1", {"width": -1}),
        ("unknown length policy 'long'", {"length": "long"}),
    ):
        with pytest.raises(ValueError, match=message):
            Config(**settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"exit_layer is 4; .* has {NUM_LAYERS} blocks"):
        Drafter(Config(exit_layer=4), tiny_target("llama"))
    with pytest.raises(ValueError, match="encoder-decoder"):
        Drafter(Config(), tiny_target("t5"))


def test_target_is_no_submodule() -> None:
    drafter = Drafter(EXAMPLE, tiny_target("llama"))
    assert {name.split(".")[0] for name in drafter.state_dict()} == {"attention_norm", "attention", "norm"}
    assert sum(parameter.numel() for parameter in drafter.parameters()) == 4 * WIDTH**2 + 2 * WIDTH
