"""Tests of the layer-skipping drafter: its drafts, its use of the target's cache, and the online search.

Shape suffixes: B rows, T tokens, D hidden width.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

import draftsmith
from draftsmith import Target
from draftsmith.core.tree import Draft, chain
from draftsmith.drafters import layerskip
from draftsmith.drafters.layerskip import Config, Drafter
from draftsmith.length.policies import Adaptive, Outcome
from draftsmith.parts.self_drafting.sublayers import Sublayers, draft_hidden, sublayers
from tests.support.distributions import check_distribution, distribution_target
from tests.support.family import Watched, check_family, texts
from tests.support.models import NUM_LAYERS, VOCAB_SIZE, greedy_by_transformers, padded, prompts, tiny_target

NUM_NEW = 20
EXAMPLE = Config(attention=(1,), mlp=(0,), num_draft=4, length="fixed")


@pytest.mark.parametrize(
    "changes",
    [
        {"length": "adaptive=0.1"},
        *(
            pytest.param(changes, marks=pytest.mark.slow)
            for changes in ({}, {"width": 2, "num_nodes": 5}, {"online": True, "window": 2})
        ),
    ],
)
def test_family(tmp_path: Path, changes: dict[str, Any]) -> None:
    architectures = ("gemma2",) if changes else ("llama",)
    check_family(layerskip, Config(**{**vars(EXAMPLE), **changes}), tmp_path, architectures=architectures)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "opt"])
def test_without_skipped_sublayers_every_draft_is_accepted(architecture: str) -> None:
    target = tiny_target(architecture)
    drafter = Drafter(Config(num_draft=4, length="fixed"), target)
    ids, mask = padded(prompts(5))
    out = draftsmith.generate(target, ids, drafter, attention_mask=mask, max_new_tokens=NUM_NEW)
    assert texts(out) == greedy_by_transformers(architecture, 5, NUM_NEW)
    assert out.stats.accepted_per_depth == [1, 1, 1, 1] and out.stats.tau == 5


def test_with_all_sublayers_skipped_drafts_depend_on_last_token_only() -> None:
    """Embedding, norm and LM head remain: a token is always followed by the same token."""
    target = tiny_target("llama")
    blocks = tuple(range(NUM_LAYERS))
    watched = Watched(Drafter(Config(attention=blocks, mlp=blocks, num_draft=3, length="fixed"), target))
    ids, mask = padded(prompts(5))
    out = draftsmith.generate(target, ids, watched, attention_mask=mask, max_new_tokens=NUM_NEW)
    assert texts(out) == greedy_by_transformers("llama", 5, NUM_NEW)
    with torch.inference_mode():
        embedded = target.model.get_input_embeddings()(torch.arange(VOCAB_SIZE)[None])
        following = target.logits(embedded)[0].argmax(-1).tolist()
    for draft in watched.drafts:
        for row in draft:
            assert [following[token] for token in row[:-1]] == row[1:]


class CheckedDrafts(Watched):
    """Checks each draft against transformers' own model with the sublayers disabled by hooks.

    The whole model reads each row's text for the keys and values before the draft; the model without the sublayers then
    reads the draft token by token, with transformers' own cache.
    """

    num_compared = 0

    def propose(self, budget: int) -> Draft:
        draft = super().propose(budget)
        for row, ids in enumerate(self._session.rows):
            if self._session.cache.lengths[row] != len(ids) - 1:
                continue  # the row finished within its accepted path
            used = draft.num_nodes[row] if draft.num_nodes else draft.tree.num_nodes
            drafted = draft.tokens_BN[row, 1:used].tolist()
            assert drafted == slow_draft(self.target, ids, self.inner.skipped, len(drafted))
            self.num_compared += len(drafted)
        return draft


@torch.no_grad()
def slow_draft(target: Target, ids: list[int], skipped: Sublayers, num_tokens: int) -> list[int]:
    """Returns the tokens drafted after `ids` by a Llama, with hooks that zero sublayers of the user's own model."""
    cache = target.model(torch.tensor([ids[:-1]]), use_cache=True).past_key_values if ids[1:] else None
    hooks = [
        (layer.self_attn if kind == "attention" else layer.mlp).register_forward_hook(zero_output)
        for kind, block in skipped
        for layer in [target.model.model.layers[block]]
    ]
    tokens = ids[-1:]
    for _ in range(num_tokens):
        out = target.model(torch.tensor([tokens[-1:]]), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        tokens.append(int(out.logits[0, -1].argmax()))
    for hook in hooks:
        hook.remove()
    return tokens[1:]


def zero_output(module: torch.nn.Module, given: Any, output: Any) -> Any:
    return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)


@pytest.mark.parametrize("length", ["fixed", "confidence=0.2"])
@pytest.mark.parametrize(("attention", "mlp"), [((1,), ()), ((), (2,)), ((0, 2), (1, 2))])
def test_drafts_match_model_without_the_sublayers(
    attention: tuple[int, ...], mlp: tuple[int, ...], length: str
) -> None:
    target = tiny_target("llama")
    compared = CheckedDrafts(Drafter(Config(attention=attention, mlp=mlp, num_draft=4, length=length), target))
    ids, mask = padded(prompts(5))
    out = draftsmith.generate(target, ids, compared, attention_mask=mask, max_new_tokens=12, eos_token_id=(10, 11))
    assert compared.num_compared > 20
    assert 0 < sum(out.stats.accepted) < sum(out.stats.drafted)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen3", "gpt2"])
@pytest.mark.parametrize("block", [1, 4, 30])
@torch.inference_mode()
def test_draft_hidden_matches_drafting_token_by_token(architecture: str, block: int) -> None:
    """Ragged rows; drafts of the text's own tokens, each of `block` tokens after the whole model's exact cache."""
    target, skipped = tiny_target(architecture), sublayers((1,), (0, 2))
    rows = [greedy_by_transformers(architecture, 2, NUM_NEW)[row][:17] for row in range(2)]
    tokens_BT = torch.tensor(rows)
    cache = target.new_cache(2)
    target.prefill([[7] * 5, [9] * 2], cache)
    lengths = list(cache.lengths)
    target.forward(tokens_BT, chain(17), cache)
    found_BTD = draft_hidden(target, tokens_BT, cache, skipped, block)
    again_BTD = draft_hidden(target, tokens_BT, cache, skipped, block)
    assert torch.equal(found_BTD, again_BTD) and cache.lengths == lengths, "the cache must not change"
    for begin in range(1, 17, block):
        target.forward(tokens_BT[:, :begin], chain(begin), cache)
        cache.commit([list(range(begin))] * 2)
        size = min(block, 17 - begin)
        for first in range(size):
            token_B1 = tokens_BT[:, begin + first, None]
            slow = target.forward(token_B1, chain(first + 1), cache, skipped=skipped, first=first)
            torch.testing.assert_close(found_BTD[:, begin + first - 1], slow.hidden_BND[:, 0], rtol=1e-4, atol=1e-5)
        cache.lengths = list(lengths)


def test_adaptive_threshold_follows_the_paper_and_is_kept_between_calls() -> None:
    """eta after each round, by hand: rates 0.25, 0.625, 0.8125, then 0.90625 with a whole draft, then a short one."""
    target = tiny_target("llama")
    drafter = Drafter(Config(num_draft=4), target)
    policy = drafter.policy
    assert isinstance(policy, Adaptive) and policy.stop.threshold == 0.6
    policy.start(1, 4)
    found = []
    for matched, drafted in ((2, 4), (4, 4), (2, 2), (4, 4), (3, 3)):
        policy.learn([Outcome(row=0, num_drafted=drafted, num_accepted=matched)], drafted, 1.0)
        found.append(policy.stop.threshold)
    assert found == pytest.approx([0.601, 0.602, 0.603, 0.603, 0.602])
    draftsmith.generate(target, torch.tensor(prompts(1)), drafter, max_new_tokens=9)
    after = policy.stop.threshold
    assert after != found[-1], "generate must use this policy"
    draftsmith.generate(target, torch.tensor(prompts(1)), drafter, max_new_tokens=9)
    assert drafter.policy is policy and policy.stop.threshold != after


def test_online_search_finds_better_sublayers() -> None:
    """Replaces a choice that skips the first block by one with a larger share of correct predictions."""
    target = tiny_target("llama", None)
    config = Config(mlp=(0,), num_draft=3, length="fixed", online=True, window=6, guided_every=2, good_enough=1.0)
    drafter = Drafter(config, target)
    ids, mask = padded(prompts(5))
    out = draftsmith.generate(target, ids, drafter, attention_mask=mask, max_new_tokens=40)
    assert texts(out) == greedy_by_transformers("llama", 5, 40)
    trials = drafter._online_search
    assert trials is not None and len(trials._scores) > 3
    assert trials.best_score == max(trials._scores) and drafter.skipped == trials.best
    tried = [frozenset(bit for bit, one in zip(trials._bits, mask, strict=True) if one) for mask in trials._masks]
    assert all(len(one) == 1 for one in tried[1:])
    assert {block for one in tried[1:] for _, block in one} == {1}, "it must skip neither the first block nor the last"


@torch.inference_mode()
def test_online_search_score_matches_value_by_hand() -> None:
    """The score is the share of the last tokens that drafts of three tokens would have predicted."""
    target = tiny_target("llama")
    rows = [text[:25] for text in greedy_by_transformers("llama", 2, NUM_NEW)]
    config = Config(mlp=(1,), num_draft=3, online=True, window=7)
    trials = layerskip._OnlineSearch(target, rows, config, sublayers((), (1,)))
    right = []
    for row in rows:
        begin = len(row) - 8
        for start in range(begin, len(row) - 1, 3):
            text = row[: start + 1]
            for position in range(start, min(start + 3, len(row) - 1)):
                # Each token is drafted after the text's own tokens, whether they were predicted or not.
                predicted = slow_prediction(target, text, row[start + 1 : position + 1], sublayers((), (1,)))
                right.append(predicted == row[position + 1])
    assert len(right) == 14 and sum(right) > 0
    assert trials.best_score == pytest.approx(sum(right) / 14)


def slow_prediction(target: Target, text: list[int], drafted: list[int], skipped: Sublayers) -> int:
    """Returns the next token of a draft after `text` whose tokens so far are `drafted`."""
    cache = target.new_cache(1)
    target.prefill([text[:-1]], cache)
    tokens = torch.tensor([[text[-1], *drafted]])
    out = target.forward(tokens, chain(len(drafted) + 1), cache, skipped=skipped)
    return int(target.logits(out.hidden_BND)[0, -1].argmax())


def test_adaptive_policy_keeps_the_distribution() -> None:
    config = Config(attention=(0,), mlp=(1,), num_draft=3, length="adaptive=0.3")
    check_distribution(Drafter(config, distribution_target()), distribution_target(), num_samples=4_000, seed=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": (1, 1)}, r"attention is \[1, 1\]; it must list blocks from 0 up, none twice"),
        ({"mlp": (-1,)}, r"mlp is \[-1\]"),
        ({"num_draft": 0}, "num_draft is 0"),
        ({"length": "long"}, "unknown length policy"),
        ({"window": 0}, "window is 0; it must be at least 1"),
        ({"good_enough": 0.0}, "good_enough is 0.0"),
    ],
)
def test_config_rejects_invalid_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**changes)


def test_drafter_rejects_unsuitable_targets() -> None:
    with pytest.raises(
        ValueError, match=f"block {NUM_LAYERS} is to be skipped, and .* has blocks 0 to {NUM_LAYERS - 1}"
    ):
        Drafter(Config(attention=(NUM_LAYERS,)), tiny_target("llama"))
    with pytest.raises(ValueError, match="is an encoder-decoder"):
        Drafter(Config(attention=(1,)), tiny_target("t5"))
