"""Tests of the Medusa-2 drafter: its fine-tuned target, its heads, and its artifact."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

import draftsmith
from draftsmith import Target
from draftsmith.artifacts.artifact import read_manifest
from draftsmith.drafters import medusa2
from draftsmith.drafters.medusa2 import Config, Drafter
from draftsmith.parts.self_drafting.fine_tuned import linear_layers
from tests.support.family import Watched, built, check_family, texts
from tests.support.models import CAUSAL, VOCAB_SIZE, WIDTH, greedy_by_model, padded, prompts, tiny_model, tiny_target
from tests.support.runs import environment, make_target, trainer_settings
from trainers import medusa2 as trainer

TREE = ((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0))
SMALL = {"num_heads": 3, "rank": 4, "alpha": 1.0}
"""Changes small enough that the fine-tuned target still generates different tokens."""
EXAMPLE = Config(num_heads=3, rank=4, alpha=1.0, tree=TREE)


@pytest.mark.parametrize("own_head", [pytest.param(False, marks=pytest.mark.slow), True])
def test_family(tmp_path: Path, own_head: bool) -> None:
    config = Config(**SMALL, own_head=own_head, tree=TREE)
    settings = trainer_settings(trainer, **SMALL, own_head=own_head, method="two_stage", head_steps=0)
    check_family(medusa2, config, tmp_path, trainer=trainer, settings=settings)


def test_heads_match_values_by_hand() -> None:
    """z = h + SiLU(W h + b) for each block, then the LM head of the fine-tuned target."""
    drafter = built(medusa2, Config(num_heads=2, num_blocks=2, tree=((0,),), rank=2), tiny_target("llama"))
    normed_BTD = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(0))
    head = drafter.merged_weights()["lm_head.weight"]
    for k, features_BTD in enumerate(drafter.heads(normed_BTD)):
        z_BTD = normed_BTD
        for block in drafter.blocks[k]:
            z_BTD = z_BTD + functional.silu(z_BTD @ block.weight.T + block.bias)
        torch.testing.assert_close(features_BTD, z_BTD, atol=1e-6, rtol=0)
        torch.testing.assert_close(drafter.head(k, features_BTD), z_BTD @ head.T, atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", CAUSAL)
def test_merged_weights_match_values_by_hand(architecture: str) -> None:
    """W + alpha / rank times a sum of outer products; other weights and the user's model are unchanged."""
    target = Target(tiny_model(architecture))
    before = {name: weight.clone() for name, weight in target.model.state_dict().items()}
    drafter = built(medusa2, Config(num_heads=1, tree=((0,),), rank=3, alpha=2.0), target)
    names = list(linear_layers(target))
    assert len(names) == len(drafter.adapters) > 3
    for name, adapter in zip(names, drafter.adapters, strict=True):
        change_IO = sum(
            torch.outer(down_I, up_O)
            for down_I, up_O in zip(adapter.down.weight.detach(), adapter.up.weight.detach().T, strict=True)
        )
        is_conv = type(target.model.get_submodule(name)).__name__ == "Conv1D"
        expected = before[f"{name}.weight"] + 2.0 / 3 * (change_IO if is_conv else change_IO.T)
        torch.testing.assert_close(drafter.target.model.get_parameter(f"{name}.weight"), expected, rtol=0, atol=1e-6)
    changed = {f"{name}.weight" for name in names}
    own = dict(drafter.target.model.named_parameters())
    for name, weight in target.model.named_parameters():
        assert (own[name] is weight) == (name not in changed)
        assert torch.equal(weight, before[name])
    ids = torch.tensor(prompts(1))
    assert (drafter.target.model(ids).logits - target.model(ids).logits).abs().max() > 0.01


def test_modules_select_layers_by_last_part_of_name() -> None:
    target = tiny_target("llama")
    last = {name.rpartition(".")[2] for name in linear_layers(target)}
    assert last == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}
    assert list(linear_layers(target, ["v_proj"])) == [f"model.layers.{layer}.self_attn.v_proj" for layer in range(3)]
    assert "lm_head" not in linear_layers(Target(tiny_model("llama", tie_word_embeddings=True)))
    with pytest.raises(ValueError, match=r"no linear layer called c_attn; there are down_proj, gate_proj, k_proj"):
        Drafter(Config(modules=("c_attn",)), target)


def test_new_drafter_leaves_target_unchanged() -> None:
    target = tiny_target("llama")
    drafter = Drafter(Config(num_heads=2, tree=((0,), (0, 0))), target)
    assert drafter.target is target
    drafter.on_weights_loaded()
    ids = torch.tensor(prompts(1))
    assert torch.equal(drafter.target.model(ids).logits, target.model(ids).logits)


def test_generate_requires_fine_tuned_target_and_artifact_the_original(tmp_path: Path) -> None:
    target = tiny_target("llama")
    drafter = built(medusa2, Config(**SMALL, tree=TREE), target)
    with pytest.raises(ValueError, match="pass drafter.target if the drafter fine-tunes its target"):
        draftsmith.generate(target, torch.tensor(prompts(1)), drafter, max_new_tokens=4)
    # The artifact belongs to the user's target, whichever target `save` is given.
    for number, given in enumerate((target, drafter.target)):
        draftsmith.save(drafter, tmp_path / str(number), target=given)
        manifest = read_manifest(tmp_path / str(number))
        assert manifest["target"]["fingerprint"] == target.fingerprint != drafter.target.fingerprint
        assert manifest["tunes_target"] is True


@pytest.mark.parametrize("own_head", [False, True])
def test_tree_holds_each_heads_likeliest_tokens(own_head: bool) -> None:
    """Each draft is compared with the heads on the fine-tuned target's states of each row's whole text."""
    drafter = built(medusa2, Config(**SMALL, own_head=own_head, tree=TREE), tiny_target("mistral"))
    watched, num_compared = Watched(drafter), 0
    propose = watched.propose

    def compared(budget: int) -> Any:
        nonlocal num_compared
        draft = propose(budget)
        paths = sorted((path for path in TREE if len(path) <= budget), key=lambda path: (len(path), path))
        for row, ids in enumerate(watched._session.rows):
            if len(ids) < 2:
                continue
            hidden = drafter.target.model.model(torch.tensor([ids[:-1]])).last_hidden_state
            ranked = [
                drafter.head(k, z_1TD)[0, -1].argsort(descending=True).tolist()
                for k, z_1TD in enumerate(drafter.heads(hidden))
            ]
            assert draft.tokens_BN[row, 1:].tolist() == [ranked[len(path) - 1][path[-1]] for path in paths]
            num_compared += 1
        return draft

    watched.propose = compared  # type: ignore[method-assign]
    ids, mask = padded(prompts(5))
    draftsmith.generate(drafter.target, ids, watched, attention_mask=mask, max_new_tokens=9, temperature=1.0, seed=0)
    assert num_compared > 20


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_head_k_at_position_t_predicts_token_t_plus_2_plus_k(architecture: str) -> None:
    """Heads fit the fine-tuned target's text exactly, 29 tokens in 32 dimensions: every draft is accepted."""
    config = Config(**SMALL, own_head=True, tree=((0,), (0, 0), (0, 0, 0)))
    drafter = built(medusa2, config, tiny_target(architecture))
    text = greedy_by_model(drafter.target.model, 1, 20)[0]
    assert text != greedy_by_model(drafter.base.model, 1, 20)[0]
    with torch.no_grad():
        for weight in drafter.blocks.parameters():
            weight.zero_()
        last = drafter.target.num_layers
        normed_TD = drafter.target.norm(drafter.target.read(torch.tensor([text]), (last,))[last])[0].double()
        for k, output in enumerate(drafter.outputs):
            labels = functional.one_hot(torch.tensor(text[2 + k :]), VOCAB_SIZE).double()
            output.weight.copy_(torch.linalg.lstsq(normed_TD[: len(labels)], labels, driver="gelsd").solution.T)
    out = draftsmith.generate(drafter.target, torch.tensor(prompts(1)), drafter, max_new_tokens=20)
    assert texts(out) == [text]
    assert out.stats.accepted_per_depth == [1, 1, 1]
    assert out.stats.steps == 5 and out.stats.tau == 4


def test_config_rejects_invalid_settings() -> None:
    for changes in ({"rank": 0}, {"alpha": 0.0}):
        with pytest.raises(ValueError, match="it must be (at least 1|positive)"):
            Config(**changes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tree must list at least one node"):
        Config(tree=())


def test_artifact_loads_without_peft(tmp_path: Path) -> None:
    target = make_target(tmp_path / "target")
    drafter = built(medusa2, Config(**SMALL, tree=TREE), target)
    draftsmith.save(drafter, tmp_path / "artifact", target=target)
    code = """
import sys
sys.modules["peft"] = None  # an import of it fails
import draftsmith, torch
target = draftsmith.Target.from_pretrained("target", dtype="float32")
drafter = draftsmith.load("artifact", target)
out = draftsmith.generate(drafter.target, torch.tensor([[5, 6, 7, 8]]), drafter, max_new_tokens=8)
print(out.sequences.tolist())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    plain = draftsmith.generate(drafter.target, torch.tensor([[5, 6, 7, 8]]), max_new_tokens=8)
    assert done.stdout.strip() == str(plain.sequences.tolist())
