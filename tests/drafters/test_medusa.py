"""Tests of the Medusa drafter: its heads, their positions, and the static tree."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

import draftsmith
from draftsmith.core.tree import Draft
from draftsmith.drafters import medusa
from draftsmith.drafters.medusa import Config, Drafter
from tests.support.family import Watched, built, check_family, texts
from tests.support.models import VOCAB_SIZE, WIDTH, greedy_by_transformers, padded, prompts, tiny_target
from tests.support.runs import trainer_settings
from trainers import medusa as trainer

TREE = ((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0))
EXAMPLE = Config(num_heads=3, tree=TREE)


@pytest.mark.parametrize(
    "options", [{}, *(pytest.param(one, marks=pytest.mark.slow) for one in ({"own_head": True}, {"shortlist": 7}))]
)
def test_family(tmp_path: Path, options: dict[str, Any]) -> None:
    config = Config(num_heads=3, tree=TREE, **options)
    settings = trainer_settings(trainer, num_heads=3, **options)
    # Gemma 2 caps its logits, which no shortlist can.
    architectures = {"architectures": ("llama",)} if config.shortlist else {}
    check_family(medusa, config, tmp_path, trainer=trainer, settings=settings, **architectures)
    if config.shortlist:
        with pytest.raises(ValueError, match="scales or caps its logits, so it supports no shortlist"):
            Drafter(config, tiny_target("gemma2"))


def test_heads_match_values_by_hand() -> None:
    """z = h + SiLU(W h + b) for each block, with separate weights."""
    target = tiny_target("llama")
    drafter = built(medusa, Config(num_heads=2, num_blocks=2, tree=((0,),)), target)
    normed_BTD = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(0))
    for k, features_BTD in enumerate(drafter.heads(normed_BTD)):
        z_BTD = normed_BTD
        for block in drafter.blocks[k]:
            z_BTD = z_BTD + functional.silu(z_BTD @ block.weight.T + block.bias)
        assert torch.allclose(features_BTD, z_BTD, atol=1e-6)
        assert torch.equal(drafter.head(k, features_BTD), target.head(features_BTD))
    weights = [parameter.data_ptr() for parameter in drafter.blocks.parameters()]
    assert len(set(weights)) == len(weights) == 8, "blocks share nothing"


@pytest.mark.parametrize("own_head", [False, True])
def test_new_heads_predict_the_targets_logits(own_head: bool) -> None:
    target = tiny_target("gemma2")
    drafter = Drafter(Config(num_heads=2, own_head=own_head, tree=((0,),)), target)
    normed_BTD = torch.randn(1, 4, WIDTH)
    for k, features_BTD in enumerate(drafter.heads(normed_BTD)):
        assert torch.equal(features_BTD, normed_BTD)
        # An LM head of its own has no soft-capping, which does not change the order of the tokens.
        assert torch.equal(drafter.head(k, features_BTD).argsort(), target.head(normed_BTD).argsort())


def solved_drafter(target: Any, text: list[int], num_heads: int) -> Drafter:
    """Returns heads solved so that head k predicts text[t + 2 + k] at every position t of `text` where that exists."""
    tree = tuple((0,) * depth for depth in range(1, num_heads + 1))
    drafter = Drafter(Config(num_heads=num_heads, own_head=True, tree=tree), target)
    with torch.no_grad():
        hidden_BTD = target.read(torch.tensor([text]), (target.num_layers,))[target.num_layers]
        normed_TD = target.norm(hidden_BTD)[0].double()
        for k, output in enumerate(drafter.outputs):
            labels = functional.one_hot(torch.tensor(text[2 + k :]), VOCAB_SIZE).double()
            solved = torch.linalg.lstsq(normed_TD[: len(labels)], labels, driver="gelsd").solution
            output.weight.copy_(solved.T)
    return drafter


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_head_k_at_position_t_predicts_token_t_plus_2_plus_k(architecture: str) -> None:
    """Heads fit one text exactly, 29 tokens in 32 dimensions: every draft is accepted, from the first on."""
    target = tiny_target(architecture)
    prompt = torch.tensor(prompts(1))
    text = greedy_by_transformers(architecture, 1, 20)[0]
    drafter = solved_drafter(target, text, num_heads=3)
    out = draftsmith.generate(target, prompt, drafter, max_new_tokens=20)
    assert texts(out) == [text]
    assert out.stats.accepted_per_depth == [1, 1, 1]
    assert out.stats.steps == 5 and out.stats.tau == 4
    rows = [text[:9], text[:14]]
    ids, mask = padded(rows)
    out = draftsmith.generate(target, ids, drafter, attention_mask=mask, max_new_tokens=12)
    assert texts(out) == [text[:21], text[:26]]
    assert out.stats.tau == 4


class CheckedDrafts(Watched):
    """Checks each draft against the heads evaluated on the whole text of each row."""

    num_compared = 0

    def propose(self, budget: int) -> Draft:
        draft = super().propose(budget)
        config, target = self.config, self.target
        paths = sorted((path for path in config.tree if len(path) <= budget), key=lambda path: (len(path), path))
        assert draft.tokens_BN.shape[1] == 1 + len(paths)
        assert not draft.tree.is_chain or len(paths) == draft.tree.depth
        for row, ids in enumerate(self._session.rows):
            if len(ids) < 2:
                continue
            normed_1TD = target.norm(target.read(torch.tensor([ids[:-1]]), (target.num_layers,))[target.num_layers])
            ranked = [
                self.inner.head(k, z_1TD)[0, -1].argsort(descending=True).tolist()
                for k, z_1TD in enumerate(self.inner.heads(normed_1TD))
            ]
            expected = [ranked[len(path) - 1][path[-1]] for path in paths]
            assert draft.tokens_BN[row, 1:].tolist() == expected, row
            self.num_compared += 1
        for node, path in enumerate(paths, start=1):
            parent = int(draft.tree.parents_RN[0, node])
            assert path[:-1] == ((), *paths)[parent]
        return draft


@pytest.mark.parametrize("own_head", [False, True])
@pytest.mark.parametrize("tree", [TREE, ((3,), (0,), (3, 1), (3, 0), (3, 1, 2), (0, 4))])
def test_tree_holds_each_heads_likeliest_tokens(tree: tuple[tuple[int, ...], ...], own_head: bool) -> None:
    target = tiny_target("mistral")
    drafter = CheckedDrafts(built(medusa, Config(num_heads=3, own_head=own_head, tree=tree), target))
    ids, mask = padded(prompts(5))
    draftsmith.generate(target, ids, drafter, attention_mask=mask, max_new_tokens=9, temperature=1.0, seed=0)
    assert drafter.num_compared > 20


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ((), "tree must list at least one node, and none twice"),
        (((0,), (1,), (0,)), "tree must list at least one node, and none twice"),
        (((0,), (1, 0)), r"tree node \[1, 0\] has no parent \[1\] in the tree"),
        (((0,), (0, 0), (0, 0, 0)), r"tree node \[0, 0, 0\] needs 1 to num_heads=2 ranks from 0 up"),
        (((0,), (-1,)), r"tree node \[-1\] needs 1 to num_heads=2 ranks"),
        (((),), r"tree node \[\] needs 1 to num_heads=2 ranks"),
    ],
)
def test_config_rejects_invalid_trees(tree: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(num_heads=2, tree=tree)


def test_drafter_rejects_ranks_beyond_the_vocabulary() -> None:
    with pytest.raises(ValueError, match="vocabulary"):
        Drafter(Config(num_heads=1, tree=((0,), (VOCAB_SIZE,))), tiny_target("llama"))


def test_target_is_no_submodule() -> None:
    drafter = Drafter(Config(num_heads=2, tree=((0,),)), tiny_target("llama"))
    assert {name.split(".")[0] for name, _ in drafter.named_parameters()} == {"blocks"}
    assert not any("target" in name for name, _ in drafter.named_modules())
    assert drafter.hidden_layers == (3,)


def test_row_without_hidden_state_gets_empty_draft() -> None:
    target = tiny_target("llama")
    drafter = built(medusa, Config(num_heads=2, tree=((0,), (0, 0))), target)
    watched = Watched(drafter)
    draftsmith.generate(target, torch.tensor([[4]]), watched, max_new_tokens=3)
    assert [len(tokens[0]) for tokens in watched.drafts] == [1, 2]
