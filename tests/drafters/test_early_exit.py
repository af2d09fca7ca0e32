"""Tests of the early-exit drafter: its layers, the shared target cache, and the cache of extra blocks.

Shape suffixes: B rows, T positions, N nodes, P length of the longest accepted path, D hidden width, V vocabulary.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import draftsmith
from draftsmith import Target
from draftsmith.core.drafter import Step
from draftsmith.core.sampling import Sampling
from draftsmith.core.tree import Draft
from draftsmith.drafters import early_exit
from draftsmith.drafters.early_exit import Config, Drafter
from tests.parts.neural.test_layers import naive_attention
from tests.support.family import Watched, built, check_family, texts
from tests.support.models import NUM_LAYERS, WIDTH, greedy_by_transformers, padded, prompts, tiny_model, tiny_target
from tests.support.runs import trainer_settings
from trainers import early_exit as trainer

NUM_NEW, GREEDY = 20, Sampling()
EXAMPLE = Config(exit_layer=1, num_blocks=2, recycling=True, num_draft=4, length="fixed")
PLAIN = {"own_norm": False, "length": "fixed", "num_draft": 4}
VARIANTS: dict[str, dict[str, Any]] = {
    "target's own": {"own_norm": False},
    "own norm and head": {"own_head": True},
    "extra blocks": {"num_blocks": 2},
    "recycling": {"recycling": True},
    "all": {"num_blocks": 1, "own_head": True, "recycling": True},
}
TREE = {"width": 3, "num_nodes": 8, "length": "fixed"}


def test_family(tmp_path: Path) -> None:
    changes = {"exit_layer": 1, "num_blocks": 1, "recycling": True}
    check_family(
        early_exit, Config(**changes), tmp_path, trainer=trainer, settings=trainer_settings(trainer, **changes)
    )


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"own_norm": False}, {"own_head": True}])
def test_family_without_blocks(tmp_path: Path, changes: dict[str, Any]) -> None:
    check_family(early_exit, Config(exit_layer=1, **changes), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"own_norm": False}, {"num_blocks": 1, "recycling": True}])
def test_family_with_trees(tmp_path: Path, changes: dict[str, Any]) -> None:
    check_family(early_exit, Config(exit_layer=2, **changes, **TREE), tmp_path)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_network_matches_naive_loop() -> None:
    """head(norm(blocks(h + R norm(r)))), position by position."""
    target = tiny_target("llama")
    drafter = built(early_exit, Config(exit_layer=1, num_blocks=2, recycling=True, own_head=True), target)
    hidden_TD, recycled_TD = random(7, WIDTH), 3 * random(8, WIDTH)[1:]

    def normed(x_D: Tensor, weight_D: Tensor) -> Tensor:
        return x_D / (x_D.pow(2).mean() + 1e-6).sqrt() * weight_D

    x_TD = torch.stack(
        [h + drafter.recycle.weight @ target.norm(r) for h, r in zip(hidden_TD, recycled_TD, strict=True)]
    )
    for block in drafter.blocks:
        attended = naive_attention(block.attention, torch.stack([normed(x, block.attention_norm.weight) for x in x_TD]))
        x_TD = x_TD + attended
        for t, x_D in enumerate(x_TD.clone()):
            y_D = normed(x_D, block.feed_forward_norm.weight)
            gate, up, down = (getattr(block.feed_forward, name).weight for name in ("gate", "up", "down"))
            x_TD[t] = x_D + down @ ((gate @ y_D) * torch.sigmoid(gate @ y_D) * (up @ y_D))
    expected = torch.stack([drafter.output.weight @ normed(x, drafter.norm.weight) for x in x_TD])
    found = drafter.head(drafter(drafter.block_input(hidden_TD[None], recycled_TD[None])))[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("own_head", [False, True])
def test_new_exit_predicts_like_the_targets_norm_and_head(architecture: str, own_head: bool) -> None:
    target = tiny_target(architecture)
    drafter, hidden_BTD = Drafter(Config(own_head=own_head, recycling=True), target), random(1, 4, WIDTH)
    logits_BTV = drafter.head(drafter(drafter.block_input(hidden_BTD, random(1, 4, WIDTH))))
    # An LM head of its own has no soft-capping, which does not change the order of the tokens.
    assert torch.equal(logits_BTV.argsort(), target.logits(hidden_BTD).argsort())
    assert drafter.norm is not target.norm and not {id(one) for one in drafter.parameters()} & {
        id(one) for one in target.model.parameters()
    }


class CheckedDrafts(Watched):
    """Checks each draft and the target's cache against uncached forwards over each row's whole text."""

    def __init__(self, inner: Drafter, sampling: Sampling = GREEDY) -> None:
        super().__init__(inner)
        self.sampling, self.num_compared = sampling, 0

    def start(self, session: Any) -> None:
        super().start(session)
        # The position of the recycled hidden state of each token: in prompts the one before.
        self.sources = [list(range(-1, len(row) - 2)) for row in session.rows]
        self.is_running = [True] * len(session.rows)

    def fresh(self, ids: list[int], sources: list[int]) -> tuple[Tensor, Tensor]:
        """Returns the exit layer [T, D] and the drafter's logits [T, V] over a text."""
        layer, last, recycled_1TD = self.config.exit_layer, self.target.num_layers, None
        hidden = self.target.read(torch.tensor([ids]), (layer, last))
        if self.config.recycling:
            states = [hidden[last][0, t] if t >= 0 else torch.zeros(WIDTH) for t in sources]
            recycled_1TD = torch.stack(states)[None]
        drafter = self.inner
        return hidden[layer][0], drafter.head(drafter(drafter.block_input(hidden[layer], recycled_1TD)))[0]

    def propose(self, budget: int) -> Draft:
        draft = super().propose(budget)
        assert draft.resume_point is not None and draft.resume_point.layer == self.config.exit_layer
        for row, ids in enumerate(self._session.rows):
            if not self.is_running[row]:
                continue
            parents = draft.tree.parents_RN.expand_as(draft.tokens_BN)[row].tolist()
            paths: list[list[int]] = []
            for node, parent in enumerate(parents):
                paths.append([*(paths[parent] if node else []), node])
                text = ids + draft.tokens_BN[row, paths[node][1:]].tolist()
                sources = self.sources[row] + [len(ids) - 2] * len(paths[node])
                hidden_TD, logits_TV = self.fresh(text, sources)
                torch.testing.assert_close(
                    draft.resume_point.hidden_BND[row, node], hidden_TD[-1], rtol=1e-4, atol=1e-5
                )
                if node == 0:
                    continue
                token, probs_V = text[-1], logits_TV[-2].softmax(-1)
                if draft.draft_probs_BNV is not None:
                    expected_V = self.sampling.probs(logits_TV[-2])
                    torch.testing.assert_close(draft.draft_probs_BNV[row, parent], expected_V, rtol=1e-4, atol=1e-5)
                else:
                    assert probs_V[token] >= probs_V.topk(max(self.config.width, 1)).values[-1] - 1e-5
                self.num_compared += 1
        return draft

    def observe(self, step: Step) -> None:
        super().observe(step)
        for row, (ids, path) in enumerate(zip(self._session.rows, step.paths, strict=True)):
            before = len(self.sources[row])
            self.sources[row] += [before - 1] * len(path)
            # A row may finish within its path.
            self.is_running[row] &= before + len(path) == len(ids) - 1 and len(path) > 0
            if self.is_running[row]:
                fresh = self.target.new_cache(1)
                self.target.prefill([ids[:-1]], fresh)
                found = self._session.cache._stores[0][:, row, :, : len(ids) - 1]
                torch.testing.assert_close(found, fresh._stores[0][:, 0, :, : len(ids) - 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", ["chain", "tree", "sampled"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_drafts_and_caches_match_uncached_forwards(variant: str, shape: str) -> None:
    """Ragged rows, one of a single token, and rows that finish before others."""
    sampling = Sampling(temperature=0.8, top_k=20) if shape == "sampled" else GREEDY
    config = Config(**{"exit_layer": 2, "num_draft": 3} | VARIANTS[variant] | (TREE if shape == "tree" else {}))
    compared = CheckedDrafts(built(early_exit, config, tiny_target("llama")), sampling)
    ids, mask = padded(prompts(5))
    settings = sampling.as_arguments() | {"max_new_tokens": 10, "eos_token_id": (10, 11, 12), "seed": 1}
    draftsmith.generate(compared.target, ids, compared, attention_mask=mask, **settings)
    assert compared.num_compared > 25


@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_blocks_read_whole_drafts_and_plain_steps(shape: str) -> None:
    """An exit after the last block, with extra blocks of little effect, is sometimes accepted as a whole."""
    config = Config(
        exit_layer=NUM_LAYERS, num_blocks=1, num_draft=2, **(TREE | {"num_nodes": 3} if shape == "tree" else {})
    )
    drafter = Drafter(config, tiny_target("llama"))
    for block in drafter.blocks:
        block.attention.output.weight.data *= 0.3
    compared = CheckedDrafts(drafter)
    ids, mask = padded(prompts(5))
    # The second policy begins with trials, one of which is a plain step.
    for policy in ("fixed", "expected_gain"):
        given = {"attention_mask": mask, "max_new_tokens": 12, "length": policy}
        out = draftsmith.generate(drafter.target, ids, compared, **given)
        assert texts(out) == [row[:-8] for row in greedy_by_transformers("llama", 5, NUM_NEW)]
        assert out.stats.accepted[1] > 3, "some drafts are accepted whole"
    assert out.stats.drafted[0] < out.stats.steps, "some steps are plain"


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_exit_after_last_block_is_always_accepted(architecture: str, shape: str) -> None:
    target = tiny_target(architecture)
    drafter = Drafter(Config(exit_layer=NUM_LAYERS, **PLAIN | (TREE if shape == "tree" else {})), target)
    ids, mask = padded(prompts(5))
    given = {"attention_mask": mask, "max_new_tokens": NUM_NEW}
    out = draftsmith.generate(target, ids, drafter, **given)
    assert texts(out) == greedy_by_transformers(architecture, 5, NUM_NEW)
    # A dynamic tree keeps its likeliest nodes, not its deepest.
    assert out.stats.accepted_per_depth[0] == 1
    if shape == "chain":
        assert out.stats.accepted_per_depth == [1, 1, 1, 1] and out.stats.tau == 5
        out = draftsmith.generate(target, ids, drafter, **given, temperature=1.0, seed=0)
        # Equal distributions always accept, except for rounding between forwards of one token and of five.
        assert min(out.stats.accepted_per_depth) > 0.9


@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_verification_runs_only_blocks_after_the_exit(shape: str) -> None:
    """Counts the tokens through each block: in a round of a chain every node runs through every block once."""
    target = Target(tiny_model("llama"))
    num_run = [[] for _ in range(NUM_LAYERS)]  # type: list[list[int]]
    for block, counts in zip(target.model.model.layers, num_run, strict=True):
        block.register_forward_hook(lambda _, given, __, counts=counts: counts.append(given[0].shape[1]))
    drafter = Watched(Drafter(Config(exit_layer=2, **PLAIN | (TREE if shape == "tree" else {})), target))
    out = draftsmith.generate(target, torch.tensor(prompts(1)), drafter, max_new_tokens=NUM_NEW)
    sizes = [len(draft[0]) for draft in drafter.drafts]
    is_plain = [1] * (out.stats.steps - len(sizes))
    assert num_run[2] == [len(prompts(1)[0]) - 1, *sizes, *is_plain]
    assert num_run[0] == num_run[1]
    if shape == "chain":
        assert num_run[0] == [num_run[2][0]] + [1] * (sum(sizes) + len(is_plain))


def test_prompt_of_one_token_gets_a_draft() -> None:
    target = tiny_target("llama")
    drafter = Watched(built(early_exit, Config(exit_layer=1, num_blocks=1, **TREE), target))
    draftsmith.generate(target, torch.tensor([[4]]), drafter, max_new_tokens=3)
    assert [len(tokens[0]) for tokens in drafter.drafts] == [9, 4]


def test_invalid_settings_are_rejected() -> None:
    for name, least in (("exit_layer", 1), ("num_heads", 1), ("num_blocks", 0), ("inner_width", 0), ("num_draft", 1)):
        with pytest.raises(ValueError, match=f"{name} is {least - 1}"):
            Config(**{name: least - 1})
    with pytest.raises(ValueError, match="unknown length policy 'long'"):
        Config(length="long")
    with pytest.raises(ValueError, match="exit_layer is 4; .* has 3 blocks"):
        Drafter(Config(exit_layer=4), tiny_target("llama"))
    with pytest.raises(ValueError, match="is an encoder-decoder"):
        Drafter(Config(), tiny_target("t5"))
