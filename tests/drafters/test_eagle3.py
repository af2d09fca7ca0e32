"""Tests of the EAGLE-3 drafter: its layer, KV cache, drafts and draft vocabulary.

Shape suffixes: B rows, T positions, N nodes, M new nodes, D hidden width, E width of the layer's input, V vocabulary.
"""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import draftsmith
from draftsmith import Target
from draftsmith.core.drafter import Step
from draftsmith.core.sampling import Sampling
from draftsmith.core.tree import Draft, Tree
from draftsmith.drafters import eagle3
from draftsmith.drafters.eagle3 import Config, Drafter
from draftsmith.length.target_confidence import TargetConfidenceThreshold
from draftsmith.parts import feature_drafting
from draftsmith.parts.neural.shortlist import OUTSIDE
from tests.parts.neural.test_layers import naive_attention
from tests.support.distributions import check_distribution, distribution_target
from tests.support.family import Watched, built, check_family
from tests.support.models import VOCAB_SIZE, padded, prompts, tiny_target
from tests.support.runs import trainer_settings
from trainers import eagle3 as trainer

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "3.1": {"fusion_norm": "each", "norm_output": True},
    "as published": {"fusion_norm": "whole", "norm_residual": True, "own_embedding": True, "draft_vocab": 40},
}


def small(target: Target, **changes: Any) -> Config:
    """Returns the configuration of a small layer, with dynamic trees by default."""
    given: dict[str, Any] = {
        "layers": trainer.default_layers(target.num_layers),
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_width": 6,
        "inner_width": 24,
        "num_draft": 3,
        "width": 3,
        "num_nodes": 7,
    }
    return Config(**given | changes)


def chains(target: Target, **changes: Any) -> Config:
    return small(target, **{"width": 0} | changes)


EXAMPLE = small


def random_drafter(config: Config, target: Target) -> Drafter:
    """Returns a drafter with random weights, whose draft vocabulary, if it is a part, has gaps."""
    drafter = built(eagle3, config, target)
    num_tokens = len(drafter.d2t)
    drafter.set_vocabulary(torch.arange(num_tokens) * target.vocab_size // num_tokens)
    return drafter


def test_family(tmp_path: Path) -> None:
    settings = trainer_settings(
        trainer, num_kv_heads=2, num_steps=3, fusion_norm="each", norm_output=True, draft_vocab=40
    )
    check_family(eagle3, small, tmp_path, trainer=trainer, settings=settings)


def test_chains_from_draft_vocabulary_keep_the_distribution() -> None:
    target = distribution_target()
    check_distribution(random_drafter(chains(target, draft_vocab=5), target), target, top_k=6, num_samples=4_000)


# --- The network --------------------------------------------------------------------------------------------------


def naive_norm(norm: Any, value_TD: Tensor) -> Tensor:
    return value_TD / (value_TD.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight


def naive_input(drafter: Drafter, tokens: list[int], features_TD: Tensor) -> Tensor:
    """Returns the input of the layer's attention [T, E]."""
    embedding = drafter.target.model.get_input_embeddings() if drafter.embedding is None else drafter.embedding
    normed = naive_norm(drafter.token_norm, embedding.weight[tokens]), naive_norm(drafter.feature_norm, features_TD)
    return torch.cat(normed, dim=1)


def naive(drafter: Drafter, tokens: list[int], features_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (features [T, D], logits over the target's vocabulary [T, V]) with causal attention."""
    x_TE, weights = naive_input(drafter, tokens, features_TD), drafter.feed_forward
    residual_TD = x_TE.chunk(2, dim=1)[1] if drafter.config.norm_residual else features_TD
    h_TD = residual_TD + naive_attention(drafter.attention, x_TE)
    inner_TD = naive_norm(drafter.feed_forward_norm, h_TD)
    gate_TD = inner_TD @ weights.gate.weight.T
    output_TD = h_TD + (gate_TD / (1 + (-gate_TD).exp()) * (inner_TD @ weights.up.weight.T)) @ weights.down.weight.T
    normed_TD = naive_norm(drafter.norm, output_TD)
    logits_TV = torch.full((len(tokens), drafter.target.vocab_size), -torch.inf)
    for token, weight_D in enumerate(drafter.head.weight):
        logits_TV[:, token + int(drafter.d2t[token])] = normed_TD @ weight_D
    return (normed_TD if drafter.config.norm_output else output_TD), logits_TV


def naive_fusion(drafter: Drafter, text: list[int]) -> Tensor:
    """Returns the features [T, D] of a text by the target's plain forward."""
    parts = [drafter.target.read(torch.tensor([text]), (layer,))[layer][0] for layer in drafter.config.layers]
    if drafter.config.fusion_norm == "each":
        parts = [naive_norm(norm, part) for norm, part in zip(drafter.fusion_norms, parts, strict=True)]
    joined_TE = torch.cat(parts, dim=1)
    if drafter.config.fusion_norm == "whole":
        joined_TE = naive_norm(drafter.fusion_norms[0], joined_TE)
    return joined_TE @ drafter.fusion.weight.T


@cache
def naive_path(drafter: Drafter, text: tuple[int, ...], drafted: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Returns (the features of all positions and of the next token, its logits [V]) with `text` committed.

    Drafted tokens are processed one by one, each in a forward over the whole text without a cache.
    """
    if drafted:
        features_TD, _ = naive_path(drafter, text, drafted[:-1])
    else:
        features_TD = naive_fusion(drafter, list(text[:-1]))
    found_TD, logits_TV = naive(drafter, [*text[1:], *drafted], features_TD)
    return torch.cat([features_TD, found_TD[-1:]]), logits_TV[-1]


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_network_matches_naive_loop(variant: str) -> None:
    target, text = tiny_target("llama"), prompts(1)[0]
    drafter = random_drafter(small(target, **VARIANTS[variant]), target)
    features_BTD = drafter.fuse(drafter.join(target.read(torch.tensor([text]), drafter.hidden_layers)))[:, :-1]
    assert torch.allclose(features_BTD[0], naive_fusion(drafter, text)[:-1], atol=1e-5)
    order = torch.arange(len(text) - 1)[None]
    found = drafter(torch.tensor([text[1:]]), features_BTD, lambda x_BNE: drafter.attention(x_BNE, order))
    expected_TD, expected_TV = naive(drafter, text[1:], features_BTD[0])
    assert torch.allclose(found[0][0], expected_TD, atol=1e-5)
    torch.testing.assert_close(drafter.logits(found[1])[0], expected_TV, atol=1e-5, rtol=1e-5)


# --- Drafting ------------------------------------------------------------------------------------------------------


class CheckedDrafts(Watched):
    """Checks every node's logits, chains' distributions, and after each step the cache, against the naive network."""

    num_compared, num_checked = 0, 0

    def __init__(self, inner: Drafter, sampling: Sampling) -> None:
        super().__init__(inner)
        self.sampling = sampling
        self._logits, inner._logits = inner._logits, self._checked  # type: ignore[method-assign]

    def _checked(self, tokens_BN: Tensor, tree: Tree, first: int) -> Tensor:
        logits_BMW = self._logits(tokens_BN, tree, first)
        whole_BMV = self.inner._shortlist.spread(logits_BMW)
        found_BMV = whole_BMV.masked_fill(whole_BMV == OUTSIDE, -torch.inf)
        for row, ids in enumerate(self._session.rows):
            ancestors_NN = tree.ancestors_RNN[row % len(tree.ancestors_RNN)]
            for node in range(first, tree.num_nodes) if len(ids) > 1 else ():
                drafted = tokens_BN[row, 1:][ancestors_NN[node, 1:]].tolist()
                _, expected_V = naive_path(self.inner, tuple(ids), tuple(drafted))
                torch.testing.assert_close(found_BMV[row, node - first], expected_V, atol=1e-4, rtol=1e-4)
                self.num_compared += 1
        return logits_BMW

    def propose(self, budget: int) -> Draft:
        draft = super().propose(budget)
        assert draft.tree.depth <= min(budget, self.config.num_draft)
        for row, ids in enumerate(self._session.rows if draft.draft_probs_BNV is not None else ()):
            for node in range(draft.tree.num_nodes - 1 if len(ids) > 1 else 0):
                drafted = tuple(draft.tokens_BN[row, 1 : 1 + node].tolist())
                probs_V = self.sampling.probs(naive_path(self.inner, tuple(ids), drafted)[1])
                assert torch.allclose(draft.draft_probs_BNV[row, node], probs_V, atol=1e-4)  # type: ignore[index]
        return draft

    def observe(self, step: Step) -> None:
        super().observe(step)
        cache = self.inner._state.cache
        for row, (ids, path) in enumerate(zip(self._session.rows, step.paths, strict=True)):
            num_read = cache.lengths[row]
            assert num_read + len(self.inner._state.unread[row]) == len(ids) - 1 or not path
            if path and num_read:
                x_TE = naive_input(self.inner, ids[1 : num_read + 1], naive_fusion(self.inner, ids[:num_read]))
                fresh = self.inner.attention.project(x_TE[None], torch.arange(num_read)[None])[1:]
                for kept, expected in zip(cache._stores[0][:, row, :, :num_read], fresh, strict=True):
                    torch.testing.assert_close(kept, expected[0], atol=1e-4, rtol=1e-4)
                self.num_checked += 1


@pytest.mark.parametrize(
    ("variant", "shape", "threshold"),
    [("plain", small, 0.0), ("3.1", small, 0.2), ("plain", chains, 0.2), ("as published", chains, 0.0)],
)
def test_drafts_and_cache_match_naive_network(variant: str, shape: Any, threshold: float) -> None:
    """Ragged rows, rejected drafts, early ends, a row of one token; with a target threshold, plain steps too."""
    target, sampling = tiny_target("llama"), Sampling(temperature=0.7, top_k=9)
    compared = CheckedDrafts(random_drafter(shape(target, **VARIANTS[variant]), target), sampling)
    ids, mask = padded(prompts(3))
    settings = sampling.as_arguments() | {"max_new_tokens": 8, "eos_token_id": (10, 11, 12), "seed": 1}
    drafter: Any = TargetConfidenceThreshold(compared, threshold) if threshold else compared
    draftsmith.generate(target, ids, drafter, attention_mask=mask, **settings)
    assert compared.num_compared > 20 and compared.num_checked > 4


def test_prompt_in_chunks_gives_same_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    target = tiny_target("llama")
    drafter = random_drafter(chains(target), target)
    ids, mask = padded(prompts(5))
    runs = []
    for size in (512, 4):
        monkeypatch.setattr(feature_drafting, "PREFILL_CHUNK", size)
        watched = Watched(drafter)
        draftsmith.generate(target, ids, watched, attention_mask=mask, max_new_tokens=8)
        runs.append(watched.drafts)
    assert runs[0] == runs[1]


def test_rows_of_one_token_get_empty_draft_first() -> None:
    target = tiny_target("llama")
    watched = Watched(random_drafter(chains(target), target))
    draftsmith.generate(target, torch.tensor([[4], [9]]), watched, max_new_tokens=5)
    assert [len(tokens[0]) for tokens in watched.drafts][:2] == [1, 4]


# --- The draft vocabulary ------------------------------------------------------------------------------------------


def test_draft_vocabulary_maps_and_survives_round_trip(tmp_path: Path) -> None:
    """d2t holds offsets, t2d marks the draft vocabulary, and logits are at the target's ids."""
    target, ids_W = tiny_target("llama"), torch.tensor([0, 3, 4, 17, 63])
    drafter = built(eagle3, small(target, draft_vocab=5), target)
    drafter.set_vocabulary(ids_W)
    assert drafter.d2t.tolist() == [0, 2, 2, 14, 59]
    assert drafter.t2d.nonzero()[:, 0].tolist() == drafter.vocabulary().tolist() == ids_W.tolist()
    normed_BND = torch.randn(2, 3, target.hidden_size)
    logits_BNV = drafter.logits(normed_BND)
    assert torch.equal(logits_BNV[..., ids_W], drafter.head(normed_BND))
    assert logits_BNV.isinf().sum() == 2 * 3 * (VOCAB_SIZE - 5)
    draftsmith.save(drafter, tmp_path / "artifact", target=target)
    loaded = draftsmith.load(tmp_path / "artifact", target)
    assert torch.equal(loaded.vocabulary(), ids_W) and torch.equal(loaded.t2d, drafter.t2d)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": ()}, r"layers is \[\]"),
        ({"layers": (2, 1)}, r"layers is \[2, 1\]; list hidden layers from 0 up in ascending order"),
        ({"layers": (1, 4)}, "has hidden layers 0 to 3"),
        ({"fusion_norm": "some"}, "must be one of none, each, whole"),
        ({"draft_vocab": 2}, "draft_vocab is 2; it must lie between the width, 3, and 64"),
        ({"draft_vocab": 65}, "draft_vocab is 65; it must lie"),
        ({"stretch": (8.0,)}, r"stretch is \[8.0\]"),
        ({"num_draft": 0}, "num_draft is 0"),
        ({"length": "long"}, "unknown length policy 'long'"),
        ({"num_kv_heads": 3}, "4 heads of width 6 and 3 key-value heads"),
    ],
)
def test_invalid_settings_are_rejected(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Drafter(small(tiny_target("llama"), **changes), tiny_target("llama"))


def test_state_dict_holds_only_the_drafters_weights() -> None:
    target = tiny_target("llama")
    drafter = Drafter(small(target), target)
    assert not any("target" in name or "embedding" in name for name in drafter.state_dict())
    assert drafter.hidden_layers == (1, 2, 3)
