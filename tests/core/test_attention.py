"""Attention over stacked queries: against transformers' own function, and in whole targets."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from draftsmith import Target
from draftsmith.core.attention import NAME, StackedMasks, stacked_attention
from draftsmith.core.tree import Tree, chain
from draftsmith.core.views import ATTENTIONS
from tests.support.models import CAUSAL, VOCAB_SIZE, prompts, tiny_model, tiny_target

TREE = Tree.from_parents([[-1, 0, 0, 1, 3, 2, 5]])
ROUNDING = 1e-5
"""Kernels sum in another order for other numbers of rows; outputs are about 1, logits at most 10."""


def attentions(target: Target) -> list[Any]:
    """Returns the attention modules that the target's views run."""
    blocks = next(child for child in target._stack.children() if isinstance(child, nn.ModuleList))
    return [next(child for name, child in block.named_children() if name in ATTENTIONS) for block in blocks]


def without_stacking(model: Any, monkeypatch: pytest.MonkeyPatch) -> Target:
    with monkeypatch.context() as patch:
        patch.setattr("draftsmith.core.target.with_stacked_attention", lambda stack, *_: stack)
        return Target(model)


@pytest.mark.parametrize("shape", [(3, 40, 1), (1, 40, 16), (2, 700, 5)])
@pytest.mark.parametrize("shared_mask", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stacked_attention_equals_transformers(
    shape: tuple[int, int, int], shared_mask: bool, dtype: torch.dtype
) -> None:
    (batch_size, num_slots, num_new), generator = shape, torch.Generator().manual_seed(0)
    query = torch.randn(batch_size, num_new, 6, 16, generator=generator).transpose(1, 2).to(dtype)
    # As in a cache: slices of a larger tensor, whose heads are far apart.
    keys, values = torch.randn(2, batch_size, 2, num_slots + 9, 16, generator=generator)[..., :num_slots, :].to(dtype)
    mask = torch.rand(1 if shared_mask else batch_size, 1, num_new, num_slots, generator=generator) < 0.5
    mask[..., 0] = True
    module = SimpleNamespace(num_key_value_groups=3, is_causal=True, stacked_masks=StackedMasks())
    for given in (mask, torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -1e4)):
        found, weights = stacked_attention(module, query, keys, values, given, scaling=0.3)
        expected, _ = sdpa_attention_forward(module, query, keys, values, given, scaling=0.3)
        assert weights is None and found.shape == expected.shape and found.is_contiguous()
        assert (found - expected).abs().max() <= (ROUNDING if dtype == torch.float32 else 0.01)


@pytest.mark.parametrize("num_key_heads", [2, 6])
@pytest.mark.parametrize("num_new", [1, 4])
def test_rows_of_different_lengths_attend_to_their_own_slots(
    num_key_heads: int, num_new: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys of slots past a row's end are not read: there they are not numbers."""
    generator, ends, num_slots = torch.Generator().manual_seed(0), [40, 7, 23], 40
    query = torch.randn(3, 6, num_new, 16, generator=generator)
    keys, values = torch.randn(2, 3, num_key_heads, num_slots, 16, generator=generator)
    order_S = torch.arange(num_slots)
    last_BN = torch.tensor(ends)[:, None] - num_new + torch.arange(num_new)
    mask = (order_S <= last_BN[..., None])[:, None]
    expected, _ = sdpa_attention_forward(
        SimpleNamespace(num_key_value_groups=6 // num_key_heads, is_causal=True), query, keys, values, mask, scaling=0.3
    )
    for row, end in enumerate(ends):
        keys[row, :, end:], values[row, :, end:] = torch.nan, torch.nan
    masks = StackedMasks()
    masks.begin(ends=ends)
    module = SimpleNamespace(num_key_value_groups=6 // num_key_heads, is_causal=True, stacked_masks=masks)
    assert stacked_attention(module, query, keys, values, mask, scaling=0.3)[0].isnan().any(), "too little to save"
    monkeypatch.setattr("draftsmith.core.attention.SAVED_ELEMENTS", 0)
    found, _ = stacked_attention(module, query, keys, values, mask, scaling=0.3)
    assert (found - expected).abs().max() <= ROUNDING


@pytest.mark.parametrize("num_key_heads", [2, 6])
@pytest.mark.parametrize("num_new", [1, 5])
def test_padded_rows_change_rounding_alone(num_key_heads: int, num_new: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, num_new, 16, generator=generator)
    keys, values = torch.randn(2, 2, num_key_heads, 40, 16, generator=generator)
    mask = torch.rand(2, 1, num_new, 40, generator=generator) < 0.5
    mask[..., 0] = True
    module = SimpleNamespace(num_key_value_groups=6 // num_key_heads, is_causal=True, stacked_masks=StackedMasks())
    expected, _ = stacked_attention(module, query, keys, values, mask)
    module.stacked_masks.begin(row_multiple=4)
    assert module.stacked_masks.num_dummies(5) == 3
    found, _ = stacked_attention(module, query, keys, values, mask)
    assert found.shape == expected.shape and (found - expected).abs().max() <= ROUNDING


def test_stacked_attention_hands_on_what_it_does_not_serve() -> None:
    query, keys = torch.randn(2, 6, 3, 16), torch.randn(2, 2, 3, 16)
    module = SimpleNamespace(num_key_value_groups=3, is_causal=True)  # no masks to look in
    expected, _ = sdpa_attention_forward(module, query, keys, keys, None)
    assert torch.equal(stacked_attention(module, query, keys, keys, None)[0], expected), "causal without a mask"
    by_head = torch.rand(2, 6, 3, 3) < 0.9
    by_head[..., 0] = True
    expected, _ = sdpa_attention_forward(module, query, keys, keys, by_head)
    assert torch.equal(stacked_attention(module, query, keys, keys, by_head)[0], expected), "a mask for each head"
    with pytest.raises(ValueError, match="does not support `softcap`"):
        stacked_attention(module, query, keys, keys, by_head[:, :1], softcap=30.0)


def test_masks_are_made_once_for_each_forward() -> None:
    masks, mask = StackedMasks(), torch.tensor([[[[True, False], [True, True]]]])
    made = masks.get(mask, 2, torch.float32)
    inf = float("inf")
    assert made.tolist() == [[[[0.0, -inf], [0.0, 0.0], [0.0, -inf], [0.0, 0.0]]]]
    assert masks.get(mask, 2, torch.float32) is made and masks.get(mask.clone(), 2, torch.float32) is not made
    assert masks.get(mask, 3, torch.float32).shape[2] == 6 and masks.get(mask, 2, torch.bfloat16) is not made
    masks.begin()
    assert masks._made == []


@torch.no_grad()
@pytest.mark.parametrize("architecture", CAUSAL)
def test_targets_return_the_same_logits_as_without_stacking(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill, trees on ragged rows and chains; sdpa alone is replaced."""
    target = tiny_target(architecture)
    plain, rows = without_stacking(target.model, monkeypatch), prompts(5)
    is_stacked = target.pads_queries
    assert is_stacked == (target.model.config._attn_implementation == "sdpa")
    found = {module.config._attn_implementation == NAME for module in attentions(target)}
    assert found == {is_stacked} and {module.config._attn_implementation for module in attentions(plain)} != {NAME}
    tokens_BN = torch.randint(0, VOCAB_SIZE, (5, 7), generator=torch.Generator().manual_seed(1))
    for texts in (rows, [row[:1] for row in rows]):
        logits = []
        for each in (target, plain):
            cache = each.new_cache(5)
            hidden = each.prefill(texts, cache, layers=(3,))[3]
            tree = each.forward(tokens_BN, TREE, cache).hidden_BND
            line = each.forward(tokens_BN[:, :1], chain(1), cache).hidden_BND
            logits.append([each.logits(states) for states in (hidden, tree, line)])
        for mine, theirs in zip(*logits, strict=True):
            assert (mine - theirs).abs().max() < 10 * ROUNDING
    assert target._stacked_masks._made == []


def test_most_architectures_are_stacked() -> None:
    stacked = [name for name in CAUSAL if attentions(tiny_target(name))[0].config._attn_implementation == NAME]
    assert {"llama", "mistral", "qwen2", "qwen3", "phi3", "gpt2", "gpt_neox", "opt"} <= set(stacked)
    eager = tiny_target("llama", "eager")
    assert {module.config._attn_implementation for module in attentions(eager)} == {"eager"}


@torch.no_grad()
def test_modules_replaced_later_are_seen() -> None:
    """A quantised projection, say, put into the model's attention after the target was made."""
    model = tiny_model("llama")
    target, ids = Target(model), torch.tensor(prompts(1))
    before = target.read(ids, (3,))[3]
    projection = copy.deepcopy(model.model.layers[1].self_attn.v_proj)
    projection.weight *= 2
    model.model.layers[1].self_attn.v_proj = projection
    after = target.read(ids, (3,))[3]
    assert not torch.allclose(before, after)
    assert torch.equal(after, Target(model).read(ids, (3,))[3])


@torch.no_grad()
@pytest.mark.parametrize("replaced", ["block", "attention"])
def test_a_forward_replaced_on_an_instance_still_runs(replaced: str) -> None:
    model = tiny_model("llama")
    block = model.model.layers[1]
    module = block if replaced == "block" else block.self_attn
    calls, original = [], module.forward
    module.forward = lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    target = Target(model)
    kinds = [attention.config._attn_implementation for attention in attentions(target)]
    assert kinds == [NAME, "sdpa", NAME] and calls
