"""Packed weights: the model's logits up to rounding, through every change of a weight that torch counts."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import draftsmith
from draftsmith import Target
from draftsmith.artifacts import artifact
from draftsmith.artifacts.families import find
from draftsmith.core.fixed_shapes.forwards import Shapes
from draftsmith.core.tree import chain
from draftsmith.inputs.invariance import cancelling
from draftsmith.inputs.invariance.self_test import find_shapes
from draftsmith.loading.placement import packed_weights
from draftsmith.loading.placement.packed_weights import PackedLinear, pack_layers
from draftsmith.parts.neural.shortlist import ShortlistHead
from tests.support.models import greedy_by_model, prompts, tiny_model

pytestmark = pytest.mark.skipif(not packed_weights._is_supported(), reason="weights are packed on x86 processors only")
ROUNDING = 1e-4


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A frozen tiny Llama, all of whose matrices are packed."""
    monkeypatch.setattr(packed_weights, "FEWEST_ELEMENTS", 1)
    return tiny_model("llama").requires_grad_(False)


def packed_in(target: Target) -> Iterator[PackedLinear]:
    for module in (*target._stack.modules(), target._linear_head):
        if isinstance(module, PackedLinear):
            yield module


def num_used(target: Target) -> int:
    """Returns how many layers have multiplied by a packed weight."""
    made = [layer._packed_weight.made for layer in packed_in(target)]
    return sum(one is not None and one[2] is not None for one in made)


@torch.inference_mode()
def logits(target: Target, shapes: Shapes | None = None) -> Tensor:
    tokens_1N = torch.tensor(prompts(1, seed=3))
    cache = target.new_cache(1, shapes=shapes)
    return target.logits(target.forward(tokens_1N, chain(tokens_1N.shape[1]), cache).hidden_BND, shapes)


@torch.no_grad()
def expected(model: Any) -> Tensor:
    return model(torch.tensor(prompts(1, seed=3))).logits


def assert_follows(target: Target) -> None:
    torch.testing.assert_close(logits(target), expected(target.model), rtol=0, atol=ROUNDING)


def test_every_layer_is_packed_and_gives_the_models_logits(model: Any) -> None:
    kinds = [type(module) for module in model.modules()]
    target = Target(model)
    assert_follows(target)
    num_layers = sum(type(module) is nn.Linear for module in model.modules())
    assert num_used(target) == len(list(packed_in(target))) == num_layers
    assert [type(module) for module in model.modules()] == kinds, "the user's model was changed"
    ours = draftsmith.generate(target, prompts(3), max_new_tokens=12, temperature=0, eos_token_id=())
    rows = [row_T[:length].tolist() for row_T, length in zip(ours.sequences, ours.lengths, strict=True)]
    assert rows == greedy_by_model(model, 3, 12)


def test_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    if not packed_weights._has_bfloat16():
        pytest.skip("this processor has no products in bfloat16")
    monkeypatch.setattr(packed_weights, "FEWEST_ELEMENTS", 1)
    target = Target(tiny_model("llama").to(torch.bfloat16).requires_grad_(False))
    plain = Target(target.model, pack_weights=False)
    torch.testing.assert_close(logits(target), logits(plain), rtol=0.05, atol=0.1)
    assert num_used(target) and not num_used(plain)


def test_changes_of_weights_are_followed(model: Any) -> None:
    target = Target(model)
    before = logits(target)
    projection, head = model.model.layers[0].mlp.up_proj, model.lm_head
    with torch.no_grad():
        projection.weight.mul_(1.5)
    assert_follows(target)
    assert (logits(target) - before).abs().max() > 100 * ROUNDING
    projection.weight = nn.Parameter(projection.weight.flip(0), requires_grad=False)
    assert_follows(target)
    head.load_state_dict({"weight": head.weight * 0.5})
    assert_follows(target)
    projection.weight.data = projection.weight.data + 0.01
    assert_follows(target)
    assert num_used(target) == len(list(packed_in(target)))


def test_another_layer_in_the_place_of_one_is_run(model: Any) -> None:
    target = Target(model)
    mlp = model.model.layers[0].mlp
    mlp.up_proj = nn.Linear(mlp.up_proj.in_features, mlp.up_proj.out_features, bias=False)
    assert_follows(target)


def test_hooks_of_layers_are_called(model: Any) -> None:
    target, seen = Target(model), []
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
    logits(target)
    assert seen == [1]


def test_the_models_own_weights_are_used_outside_inference_mode(model: Any) -> None:
    """Trainers may write weights through `data`, which torch does not count, and evaluate in between."""
    target, last = Target(model), model.config.num_hidden_layers
    tokens_1N = torch.tensor(prompts(1, seed=3))
    model.lm_head.weight.data.mul_(2)
    with torch.no_grad():
        found = target.logits(target.read(tokens_1N, (last,))[last])
    torch.testing.assert_close(found, expected(model), rtol=0, atol=ROUNDING)


def test_gradients_pass_through_the_models_own_weights(model: Any) -> None:
    target = Target(model)
    hidden = torch.randn(1, 4, target.hidden_size, generator=torch.Generator().manual_seed(0), requires_grad=True)
    target.head(hidden).square().sum().backward()
    found, hidden.grad = hidden.grad, None
    model.lm_head(hidden).square().sum().backward()
    assert found is not None and found.equal(hidden.grad)


def test_batch_invariant_decoding_packs_where_rows_keep_their_bits(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    target, plain = Target(model), Target(model, pack_weights=False)
    own = Shapes(packs_weights=False)
    assert logits(target, own).equal(logits(plain, own))
    assert target._packing.is_on, "the switch was not put back"
    assert find_shapes(target).packs_weights
    rows = prompts(2, seed=1)
    text = draftsmith.generate(target, rows, max_new_tokens=12, temperature=0, batch_invariant=True).sequences
    drafter = find("lookup").Drafter(find("lookup").Config(), target)
    drafted = draftsmith.generate(target, rows, drafter, max_new_tokens=12, temperature=0, batch_invariant=True)
    assert drafted.sequences.equal(text)
    assert not find_shapes(Target(model.requires_grad_(True))).packs_weights, "weights in training are not packed"
    model.requires_grad_(False)
    # A packed product whose rows' bits depend on their number: the model's own weights are taken.
    monkeypatch.setattr(cancelling, "packed_linear", lambda rows, *_: torch.full(rows.shape, float(rows.shape[1])))
    assert not find_shapes(target).packs_weights


def test_copies_pack_their_own_weights(model: Any) -> None:
    target = Target(model)
    logits(target)
    copied = copy.deepcopy(target)
    assert num_used(copied) == 0
    with torch.no_grad():
        copied.model.lm_head.weight.mul_(2)
    assert_follows(copied)
    assert_follows(target)


def test_adapters_are_not_packed_and_their_merges_are_seen(model: Any) -> None:
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    target = Target(adapted)
    assert num_used(target) and not any("q_proj" in name for name, module in named_packed(target))
    before = logits(target)
    adapted.merge_adapter()
    torch.testing.assert_close(logits(target), before, rtol=0, atol=ROUNDING)
    adapted.unmerge_adapter()
    with adapted.disable_adapter():
        assert (logits(target) - before).abs().max() > 100 * ROUNDING


def named_packed(target: Target) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in target._stack.named_modules() if isinstance(module, PackedLinear)]


def test_autocast_and_compiled_layers_use_the_models_own_weights(model: Any) -> None:
    target = Target(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert logits(target).dtype == torch.bfloat16
    model.model.layers[0].mlp.compile(backend="eager")
    assert not any("layers.0.mlp" in name for name, _ in named_packed(Target(model)))


def test_large_models_are_packed_on_request_only(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_weights, "MOST_BYTES", 1)
    assert not list(packed_in(Target(model)))
    assert list(packed_in(Target(model, pack_weights=True)))


def test_weights_in_training_are_not_packed(model: Any) -> None:
    """Fused optimisers do not count what they write."""
    target = Target(model)
    optimizer = torch.optim.AdamW([model.lm_head.weight], lr=0.1, fused=True)
    for _ in range(2):
        assert_follows(target)
        assert num_used(target) == len(list(packed_in(target)))
        model.lm_head.requires_grad_(True)
        target.head(torch.ones(1, 1, target.hidden_size)).sum().backward()
        optimizer.step()
        assert_follows(target)
        assert num_used(target) == len(list(packed_in(target))) - 1
        model.lm_head.requires_grad_(False)


def hydra(target: Target, folder: Path) -> Any:
    """Returns a loaded drafter whose heads have random weights."""
    module = find("hydra")
    torch.manual_seed(0)
    drafter = module.Drafter(module.Config(num_heads=2, tree=((0,), (0, 0)), shortlist=30), target)
    for parameter in drafter.parameters():
        nn.init.normal_(parameter, std=0.1)
    artifact.save(drafter, folder, target)
    return artifact.load(folder, target)


def test_loaded_drafters_multiply_by_packed_weights(model: Any, tmp_path: Path) -> None:
    target, plain = Target(model), Target(model, pack_weights=False)
    packed, stored = hydra(target, tmp_path / "a"), hydra(plain, tmp_path / "b")
    layers = [layer for layer in packed.modules() if isinstance(layer, nn.Linear)]
    assert layers and all(isinstance(layer, PackedLinear) for layer in layers)
    assert not any(isinstance(layer, PackedLinear) for layer in stored.modules())
    assert packed.state_dict().keys() == stored.state_dict().keys()
    results = [
        draftsmith.generate(one.target, prompts(2), drafter=one, max_new_tokens=16, temperature=0, eos_token_id=())
        for one in (packed, stored)
    ]
    assert all(layer._packed_weight.made is not None for layer in layers)
    assert torch.equal(results[0].sequences, results[1].sequences)
    state_BMD, tokens_BMI = torch.randn(3, 1, target.hidden_size), torch.tensor([[[3]], [[5]], [[7]]])
    with torch.inference_mode():
        logits_BMV = [one.head(0, one.features(state_BMD, tokens_BMI)) for one in (packed, stored)]
    torch.testing.assert_close(*logits_BMV, rtol=0, atol=ROUNDING)


def test_loaded_drafters_can_be_copied_and_trained(model: Any, tmp_path: Path) -> None:
    drafter = hydra(Target(model), tmp_path)
    state_BMD, tokens_BMI = torch.randn(3, 1, drafter.target.hidden_size), torch.tensor([[[3]], [[5]], [[7]]])

    def features(one: Any) -> Tensor:
        with torch.inference_mode():
            return one.features(state_BMD, tokens_BMI)

    before_BMD, copied = features(drafter), copy.deepcopy(drafter)
    drafter.requires_grad_()
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=0.1, fused=True)
    drafter.features(state_BMD, tokens_BMI).sum().backward()
    optimizer.step()
    after_BMD = drafter.features(state_BMD, tokens_BMI).detach()
    assert (after_BMD - before_BMD).abs().max() > 0.1
    torch.testing.assert_close(features(drafter), after_BMD, rtol=0, atol=ROUNDING)
    drafter.requires_grad_(False)
    torch.testing.assert_close(features(drafter), after_BMD, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(features(copied), before_BMD, rtol=0, atol=ROUNDING)


def test_shortlist_head_follows_its_weight(model: Any) -> None:
    whole = nn.Linear(16, 50)
    head = ShortlistHead(whole, 20).eval()
    features_BH = torch.randn(3, 16)
    for _ in range(2):
        with torch.inference_mode():
            listed_BW = head.listed(features_BH)
        torch.testing.assert_close(listed_BW, whole(features_BH)[:, :20].detach(), rtol=0, atol=ROUNDING)
        with torch.no_grad():
            whole.weight.add_(1.0)


def test_model_inside_a_drafter_is_left_to_its_target(model: Any) -> None:
    holder = nn.ModuleDict({"lm": model, "own": nn.Linear(8, 8).requires_grad_(False)})
    pack_layers(holder, request=None)
    assert isinstance(holder.own, PackedLinear)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


def test_small_matrices_are_left_as_they_are() -> None:
    assert not list(packed_in(Target(tiny_model("llama").requires_grad_(False))))
