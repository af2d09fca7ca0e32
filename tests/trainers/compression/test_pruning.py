"""trainers/compression/pruning.py: pruned models equal models with the rest zeroed, and the choice of what is kept."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from draftsmith.core.tree import chain
from draftsmith.core.views import blocks_of
from draftsmith.parts.self_drafting.sublayers import sublayers
from tests.support.models import VOCAB_SIZE, tiny_model, tiny_target
from trainers.compression import pruning

GATED = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"]
TOKENS_1T = torch.randint(3, VOCAB_SIZE, (1, 17), generator=torch.Generator().manual_seed(0))


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=TOKENS_1T).logits


@pytest.mark.parametrize("architecture", [*GATED, "phi3", "gpt2", "gpt_neox", "opt"])
def test_keep_layers_equals_the_target_that_skips_the_others(architecture: str) -> None:
    target = tiny_target(architecture)
    before = {name: weight.clone() for name, weight in target.model.state_dict().items()}
    smaller = pruning.keep_layers(target.model, [0, 2])
    with torch.inference_mode():
        given = (TOKENS_1T, chain(TOKENS_1T.shape[1]), target.new_cache(1))
        out = target.forward(*given, skipped=sublayers((1,), (1,)))
        torch.testing.assert_close(logits(smaller), target.logits(out.hidden_BND), rtol=1e-4, atol=1e-5)
    assert smaller.config.get_text_config().num_hidden_layers == 2 and len(blocks_of(smaller)) == 2
    assert all(torch.equal(weight, before[name]) for name, weight in target.model.state_dict().items())


@pytest.mark.parametrize("architecture", GATED)
def test_narrow_equals_the_model_with_the_rest_zeroed(architecture: str) -> None:
    """Heads have 8 values; each key-value head has two query heads."""
    model = tiny_model(architecture)
    kept = {"heads": [[0, 3], [1, 2], [1, 3]], "neurons": [[*range(layer, 48, 3)] for layer in range(3)]}
    smaller = pruning.narrow(model, **kept)
    silenced = copy.deepcopy(model)
    for layer, block in enumerate(blocks_of(silenced)):
        values = [head * 8 + offset for head in kept["heads"][layer] for offset in range(8)]
        block.self_attn.o_proj.register_forward_pre_hook(only(values))
        block.mlp.down_proj.register_forward_pre_hook(only(kept["neurons"][layer]))
    torch.testing.assert_close(logits(smaller), logits(silenced), rtol=1e-4, atol=1e-5)
    assert (smaller.config.num_attention_heads, smaller.config.num_key_value_heads) == (2, 2)
    assert smaller.config.intermediate_size == 16 and smaller.config.head_dim == 8


@pytest.mark.parametrize("architecture", GATED)
def test_narrow_removes_query_heads_with_their_key_value_head(architecture: str) -> None:
    model = tiny_model(architecture)
    kv_heads = [[1], [0], [1]]
    heads = [[2, 3], [0, 1], [2, 3]]
    smaller = pruning.narrow(model, heads=heads, kv_heads=kv_heads)
    silenced = copy.deepcopy(model)
    for block, its_heads in zip(blocks_of(silenced), heads, strict=True):
        block.self_attn.o_proj.register_forward_pre_hook(
            only([h * 8 + offset for h in its_heads for offset in range(8)])
        )
    torch.testing.assert_close(logits(smaller), logits(silenced), rtol=1e-4, atol=1e-5)
    assert smaller.config.num_key_value_heads == 1
    assert blocks_of(smaller)[0].self_attn.k_proj.weight.shape == (8, 32)


def only(indices: list[int]) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """Returns a hook that zeroes a module's inputs except at these indices."""

    def hook(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        kept = torch.zeros(given[0].shape[-1])
        kept[indices] = 1
        return (given[0] * kept,)

    return hook


@pytest.mark.parametrize("architecture", ["gpt2", "phi3", "gpt_neox", "opt"])
def test_narrow_raises_for_other_architectures(architecture: str) -> None:
    model = tiny_model(architecture)
    with pytest.raises(ValueError, match=rf"^{type(model).__name__} cannot be narrowed: its \w+ has no \w+"):
        pruning.narrow(model, neurons=[[0]] * 3)


def test_choice_of_kept_layers_and_heads() -> None:
    assert pruning.drop_least_influential([0.9, 0.1, 0.5, 0.3, 0.0], 3) == [0, 2, 4]
    assert pruning.drop_least_influential([0.1, 0.2, 0.9], 1) == [0]
    assert pruning.drop_span([0.0, 0.4, 0.2, 0.3, 0.1], 4, 6) == [0, 1, 4, 5]
    assert pruning.drop_span([0.0, 0.4], 1, 2) == [0]
    assert pruning.evenly_spaced(3, 7) == [0, 3, 6] and pruning.evenly_spaced(1, 4) == [0]
    scores = torch.tensor([0.1, 0.3, 0.2, 0.9, 0.8, 0.7])
    assert pruning.top_indices_in_groups(scores, 2, 2) == [1, 2, 3, 4]
    assert pruning.top_indices_in_groups(scores, 2, 1) == [3, 4]


def test_num_kept_raises_for_none_and_all() -> None:
    assert pruning.num_kept(0.5, 8, "layers") == 4
    assert pruning.num_kept(1 / 3, 3, "layers", is_exact=True) == 1
    with pytest.raises(ValueError, match=r"keep 0.01 leaves 0 of the 8 layers"):
        pruning.num_kept(0.01, 8, "layers")
    with pytest.raises(ValueError, match=r"keep 0.99 leaves 8 of the 8 layers"):
        pruning.num_kept(0.99, 8, "layers")
    with pytest.raises(ValueError, match=r"keep 0.3 leaves 0.60 of the 2 heads; it must be a whole number"):
        pruning.num_kept(0.3, 2, "heads", is_exact=True)
