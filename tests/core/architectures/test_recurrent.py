"""Tests of recurrent state: what a rejected draft leaves behind, rows of a batch, and draft models with such state.

Every expected value is the model's own forward over the text without a cache.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

import draftsmith
from draftsmith import Target
from draftsmith.core.architectures.recurrent import MAX_FED_AGAIN, RecurrentModule
from draftsmith.core.cache import KVCache
from draftsmith.core.tree import Tree, chain
from draftsmith.drafters import lm
from eval.architectures.check import prompts
from eval.architectures.models import Variant, tiny_model

# One of each kind of state: the gated delta rule with a convolution, a convolution alone, and a state space whose
# forward of several tokens ignores the state.
KINDS = ("qwen3_next", "lfm2_moe", "mamba")


def target_of(model_type: str) -> Target:
    return Target(tiny_model(Variant(model_type=model_type, is_seq2seq=False)))


@pytest.fixture(scope="module", params=KINDS)
def target(request: Any) -> Target:
    return target_of(request.param)


def own_logits(target: Target, ids: list[int]) -> Tensor:
    with torch.inference_mode():
        return target.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def fed(target: Target, cache: KVCache, rows: list[list[int]], first: int = 0) -> Tensor:
    """Feeds rows of one length as nodes of a chain from `first` on; returns their logits."""
    with torch.inference_mode():
        tree = chain(first + len(rows[0]))
        return target.logits(target.forward(torch.tensor(rows), tree, cache, first=first).hidden_BND)


def assert_same(found: Tensor, expected: Tensor) -> None:
    # Rounding of float32, where chunked and recurrent kernels sum in another order.
    assert (found - expected).abs().max() < 1e-4 * max(1.0, float(expected.abs().max()))


def test_rows_that_accept_different_numbers_keep_the_state_of_their_own_text(target: Target) -> None:
    rows = prompts((9, 4, 6), target.vocab_size)
    texts = [list(row) for row in rows]
    cache = target.new_cache(3)
    with torch.inference_mode():
        target.prefill(rows, cache)
    drafts = [[20, 21, 22, 23], [30, 31, 32, 33], [40, 41, 42, 43]]
    for numbers in ((1, 4, 2), (3, 1, 4), (2, 2, 2)):
        fed(target, cache, drafts)
        cache.commit([list(range(number)) for number in numbers])
        for text, draft, number in zip(texts, drafts, numbers, strict=True):
            text += draft[:number]
    found = fed(target, cache, [[50, 51]] * 3)
    for row, text in enumerate(texts):
        assert_same(found[row], own_logits(target, [*text, 50, 51])[len(text) :])


def test_tokens_that_are_fed_again_for_many_drafts_become_a_state(target: Target) -> None:
    """Five drafts in a row are accepted in part, which is more tokens than are fed again."""
    text, cache = prompts((9,), target.vocab_size)[0], target.new_cache(1)
    with torch.inference_mode():
        target.prefill([text], cache)
    for number in range(5):
        draft = [20 + 6 * number + node for node in range(6)]
        found = fed(target, cache, [draft])
        assert_same(found[0], own_logits(target, [*text, *draft])[len(text) :])
        cache.commit([[0, 1, 2, 3]])
        text = [*text, *draft[:4]]
    assert MAX_FED_AGAIN < 5 * 4


def test_a_row_that_keeps_nothing_has_the_state_from_before(target: Target) -> None:
    cache = target.new_cache(2)
    with torch.inference_mode():
        target.prefill([[5, 6, 7], [8, 9]], cache)
    fed(target, cache, [[20, 21, 22], [30, 31, 32]])
    cache.commit([[], [0]])
    found = fed(target, cache, [[50], [51]])
    assert_same(found[0], own_logits(target, [5, 6, 7, 50])[3:])
    assert_same(found[1], own_logits(target, [8, 9, 30, 51])[3:])


def test_tokens_fed_before_a_commit_go_on_after_it(target: Target) -> None:
    """A draft model reads unread tokens and the pending one, commits the former, and drafts after the latter."""
    cache = target.new_cache(2)
    with torch.inference_mode():
        target.prefill([[5, 6], [8, 9]], cache)
    fed(target, cache, [[10, 11, 12], [20, 21, 0]])  # pending: 12 and 21; 0 is padding
    cache.commit([[0, 1], [0]])
    fed(target, cache, [[13], [22]], first=1)
    found = fed(target, cache, [[14], [23]], first=2)
    first, second = [5, 6, 10, 11, 12, 13, 14], [8, 9, 20, 21, 22, 23]
    assert_same(found[0], own_logits(target, first)[-1:])
    assert_same(found[1], own_logits(target, second)[-1:])
    cache.commit([[0, 1], [0]])
    found = fed(target, cache, [[30, 31], [40, 41]])
    assert_same(found[0], own_logits(target, [*first[:-1], 30, 31])[-2:])
    assert_same(found[1], own_logits(target, [*second[:4], 40, 41])[-2:])


def test_rows_come_and_go(target: Target) -> None:
    cache, added = target.new_cache(3), target.new_cache(1)
    with torch.inference_mode():
        target.prefill([[5, 6, 7], [8, 9], [10, 11, 12, 13]], cache)
        target.prefill([[20, 21, 22, 23, 24]], added)
    fed(target, cache, [[30, 31], [32, 33], [34, 35]])
    cache.commit([[0], [0, 1], [0]])
    with torch.inference_mode():
        target.change_rows(cache, [None, 1], added)
    found = fed(target, cache, [[50], [51]])
    assert_same(found[0], own_logits(target, [20, 21, 22, 23, 24, 50])[-1:])
    assert_same(found[1], own_logits(target, [8, 9, 32, 33, 51])[-1:])


def test_prompts_in_several_chunks(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("draftsmith.core.target.PREFILL_CHUNK", 5)
    rows = prompts((12, 3, 7), target.vocab_size)
    cache = target.new_cache(3)
    with torch.inference_mode():
        target.prefill(rows, cache)
    found = fed(target, cache, [[50]] * 3)
    for row, ids in enumerate(rows):
        assert_same(found[row], own_logits(target, [*ids, 50])[-1:])


def test_only_modules_whose_forward_ignores_the_state_are_run_token_by_token(target: Target) -> None:
    modules = [module for module in target._stack.modules() if isinstance(module, RecurrentModule)]
    ignored = target.model.config.model_type == "mamba"
    assert modules and all(module._ignores_state is ignored for module in modules)


def test_trees_and_rewinding_are_rejected() -> None:
    target = target_of("lfm2_moe")
    cache = target.new_cache(1)
    with torch.inference_mode():
        target.prefill([[5, 6, 7]], cache)
        with pytest.raises(ValueError, match="Lfm2MoeForCausalLM has recurrent layers: it verifies chains, not trees"):
            target.forward(torch.tensor([[8, 9, 10]]), Tree.from_parents([[-1, 0, 0]]), cache)
        cache.lengths = [2]
        with pytest.raises(ValueError, match=r"state is of \[3\] tokens; it cannot be set back to \[2\]"):
            target.forward(torch.tensor([[8]]), chain(1), cache)


@pytest.mark.parametrize("model_type", ["mamba2", "lfm2"])
def test_draft_models_with_recurrent_state_draft_losslessly(model_type: str) -> None:
    target = target_of("llama")
    settings = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": target.vocab_size}
    own = {
        "mamba2": {"num_heads": 4, "head_dim": 8, "n_groups": 1, "state_size": 4, "chunk_size": 8},
        "lfm2": {
            "intermediate_size": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "layer_types": ["conv", "full_attention"],
        },
    }[model_type]
    torch.manual_seed(0)
    config = lm.Config(model={"model_type": model_type} | settings | own, num_draft=3, length="fixed")
    drafter = lm.Drafter(config, target)
    rows = prompts((12, 5), target.vocab_size)
    plain = draftsmith.generate(target, rows, max_new_tokens=12, eos_token_id=())
    drafted = draftsmith.generate(target, rows, drafter, max_new_tokens=12, eos_token_id=())
    assert drafted.sequences.equal(plain.sequences)
    assert not drafter.rewind([3, 3])
    with pytest.raises(ValueError, match="has recurrent layers: it verifies chains, so leave out tree and width"):
        lm.Drafter(lm.Config(model=config.model, width=2), target)
