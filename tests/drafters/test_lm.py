"""Tests of the draft-LM drafter: its KV cache, its distributions, tied heads, and draft-length control."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import draftsmith
from draftsmith import Target
from draftsmith.core.drafter import Session, Step
from draftsmith.core.sampling import Sampling
from draftsmith.core.tree import Draft
from draftsmith.drafters import lm
from draftsmith.drafters.lm import Config, Drafter
from draftsmith.parts.neural import tied_heads
from tests.support.family import Watched, built, check_family, texts
from tests.support.models import CAUSAL, VOCAB_SIZE, greedy_by_transformers, padded, prompts, tiny_config, tiny_target
from tests.support.runs import trainer_settings
from trainers import distill

NUM_NEW = 20


def small(target: Target, architecture: str = "llama", **settings: Any) -> Config:
    """Returns the configuration of a small model with the target's vocabulary."""
    model = tiny_config(architecture, vocab_size=target.vocab_size, num_hidden_layers=1).to_dict()
    return Config(**{"model": model, "num_draft": 4, "length": "refit=0.1"} | settings)


EXAMPLE = small


def copy_of(target: Target, **settings: Any) -> Drafter:
    """Returns a draft model that is a copy of the target."""
    drafter = Drafter(Config(**{"model": target.model.config.to_dict(), "num_draft": 4} | settings), target)
    drafter.model.load_state_dict(target.model.state_dict())
    return drafter.eval()


def test_family(tmp_path: Path) -> None:
    settings = trainer_settings(distill, num_layers=1, num_heads=4)
    check_family(lm, small, tmp_path, trainer=distill, settings=settings)


def of_settings(settings: distill.Settings, target: Target) -> Config:
    """Returns the configuration that the trainer builds, with the draft length of `small`."""
    return dataclasses.replace(distill.build(settings, target).config, num_draft=4, length="refit=0.1")


def test_family_tied_to_the_target(tmp_path: Path) -> None:
    settings = trainer_settings(distill, rank=8, shortlist=7, hidden_size=24)
    given = {"architectures": ("llama",), "trainer": distill, "settings": settings}
    check_family(lm, lambda target: of_settings(settings, target), tmp_path, **given)


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("t5", {"hidden_size": 16, "num_heads": 2, "rank": 8}),
        pytest.param("bart", {"encoder_layers": 1}, marks=pytest.mark.slow),
        pytest.param("bart", {"hidden_size": 16, "num_heads": 2, "shortlist": 6}, marks=pytest.mark.slow),
        pytest.param("t5", {"encoder_layers": 2, "rank": 8, "shortlist": 6}, marks=pytest.mark.slow),
        pytest.param("t5", {"start": "layers", "num_layers": 2}, marks=pytest.mark.slow),
    ],
)
def test_family_on_encoder_decoder(architecture: str, changes: dict[str, Any], tmp_path: Path) -> None:
    settings = trainer_settings(distill, **changes)
    given = {"architectures": (architecture,), "trainer": distill, "settings": settings}
    check_family(lm, lambda target: of_settings(settings, target), tmp_path, **given)


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "gemma2", "gpt_neox"])
def test_draft_model_of_another_architecture(architecture: str) -> None:
    target = tiny_target("llama")
    layers = {"gpt2": "n_layer", "gemma2": "layer_types"}.get(architecture)
    changes = {layers: ["full_attention"] if layers == "layer_types" else 1} if layers else {}
    model = tiny_config(architecture, **{"num_hidden_layers": 1} | changes).to_dict()
    drafter = Watched(built(lm, Config(model=model, num_draft=3, length="fixed"), target))
    ids, mask = padded(prompts(5), side="left")
    out = draftsmith.generate(target, ids, drafter, attention_mask=mask, max_new_tokens=NUM_NEW)
    assert texts(out) == greedy_by_transformers("llama", 5, NUM_NEW)


@pytest.mark.parametrize("architecture", CAUSAL)
def test_copy_of_target_is_always_accepted(architecture: str) -> None:
    """After a whole draft is accepted, its cache must catch up by one token or two."""
    target = tiny_target(architecture)
    ids, mask = padded(prompts(5))
    drafter, given = copy_of(target, length="fixed"), {"attention_mask": mask, "max_new_tokens": NUM_NEW}
    out = draftsmith.generate(target, ids, drafter, **given)
    assert texts(out) == greedy_by_transformers(architecture, 5, NUM_NEW)
    assert out.stats.accepted_per_depth == [1, 1, 1, 1] and out.stats.tau == 5
    out = draftsmith.generate(target, ids, drafter, **given, temperature=1.0, seed=0)
    # Equal distributions always accept, except for rounding between forwards of one token and of five.
    assert min(out.stats.accepted_per_depth) > 0.9


def uncached_logits(drafter: Drafter, session: Session, row: int, ids: list[int]) -> Tensor:
    """Returns the logits [T, V] of a row's text by transformers' own forward of the whole draft model."""
    if session.source is None:
        return drafter.model(torch.tensor([ids])).logits[0]
    mask_T = session.source.mask_BT[row].bool()
    source_1T = session.source.tokens_BT[row : row + 1, mask_T]
    return drafter.model(
        input_ids=source_1T, attention_mask=mask_T[mask_T][None].long(), decoder_input_ids=torch.tensor([ids])
    ).logits[0]


class CheckedDrafts(Watched):
    """Checks each draft's distributions against the draft model without a cache on the whole text."""

    def __init__(self, inner: Drafter, sampling: Sampling, threshold: float) -> None:
        super().__init__(inner)
        self.sampling, self.threshold, self.num_compared = sampling, threshold, 0

    def start(self, session: Session) -> None:
        super().start(session)
        self.is_running = [True] * len(session.rows)

    def observe(self, step: Step) -> None:
        super().observe(step)
        self.is_running = [len(path) > 0 for path in step.paths]

    def propose(self, budget: int) -> Draft:
        draft = super().propose(budget)
        assert draft.tree.is_chain and draft.tree.depth <= self.config.num_draft
        for row, ids in enumerate(self._session.rows):
            drafted = draft.tokens_BN[row, 1:].tolist()
            logits_TV = uncached_logits(self.inner, self._session, row, ids + drafted)[len(ids) - 1 :]
            used = draft.num_nodes[row] if draft.num_nodes else draft.tree.num_nodes
            for i in range(used - 1):
                if draft.draft_probs_BNV is None:
                    assert drafted[i] == int(logits_TV[i].argmax())
                else:
                    probs_V = self.sampling.probs(logits_TV[i])
                    assert torch.allclose(draft.draft_probs_BNV[row, i], probs_V, atol=1e-4)
                if not self.is_running[row]:
                    continue
                # A row continues after a token only if its probability was above the threshold.
                confidence = float(logits_TV[i].softmax(-1)[drafted[i]])
                should_continue = i + 1 < used - 1
                assert not should_continue or confidence > self.threshold - 1e-4
                assert should_continue or used - 1 == draft.tree.depth or confidence < self.threshold + 1e-4
                self.num_compared += 1
        return draft


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0), Sampling(temperature=0.7, top_k=9)])
@pytest.mark.parametrize("accepts", [True, False])
def test_drafts_follow_the_draft_models_distribution(sampling: Sampling, accepts: bool) -> None:
    """Ragged rows with many rejections, and rows that finish before others."""
    target = tiny_target("llama")
    given = {"length": "confidence=0.25"}
    drafter = copy_of(target, **given) if accepts else built(lm, small(target, **given), target)
    compared = CheckedDrafts(drafter, sampling, 0.25)
    ids, mask = padded(prompts(5))
    settings = sampling.as_arguments() | {"max_new_tokens": 14, "eos_token_id": (10, 11, 12), "seed": 1}
    draftsmith.generate(target, ids, compared, attention_mask=mask, **settings)
    assert compared.num_compared > 30


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {"rank": 8, "shortlist": 20}),
        ("llama", {"rank": 32, "hidden_size": 16, "num_heads": 2}),
        ("llama", {"shortlist": 20}),
        ("t5", {"rank": 8, "hidden_size": 16, "num_heads": 2}),
        ("t5", {"encoder_layers": 1}),
        ("bart", {"start": "layers", "num_layers": 2}),
    ],
)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0)])
def test_tied_drafts_follow_the_draft_models_distribution(
    architecture: str, changes: dict[str, Any], sampling: Sampling
) -> None:
    target = tiny_target(architecture)
    config = of_settings(trainer_settings(distill, **changes), target)
    compared = CheckedDrafts(built(lm, dataclasses.replace(config, length="confidence=0.1"), target), sampling, 0.1)
    ids, mask = padded(prompts(5))
    settings = sampling.as_arguments() | {"max_new_tokens": 14, "eos_token_id": (10, 11, 12), "seed": 1}
    draftsmith.generate(target, ids, compared, attention_mask=mask, **settings)
    assert compared.num_compared > 20


@pytest.mark.parametrize("rank", [0, 8])
def test_tokens_outside_shortlist_are_never_drafted(rank: int) -> None:
    target = tiny_target("llama")
    drafter = built(lm, dataclasses.replace(small(target, length="fixed"), rank=rank, shortlist=20), target)
    listed = torch.arange(1, 64, 3)[:20]
    drafter.shortlist.set_tokens(listed)
    ids, mask = padded(prompts(5))
    for temperature in (0.0, 1.0):
        watched = Watched(drafter)
        out = draftsmith.generate(
            target, ids, watched, attention_mask=mask, max_new_tokens=NUM_NEW, temperature=temperature, seed=0
        )
        drafted = torch.cat([torch.tensor(draft)[:, 1:].flatten() for draft in watched.drafts])
        assert len(drafted) > 100 and torch.isin(drafted, listed).all()
        assert temperature or texts(out) == greedy_by_transformers("llama", 5, NUM_NEW)


@pytest.mark.parametrize(("rank", "shortlist"), [(8, 0), (8, 20), (99, 0), (99, 20)])
def test_folded_head_matches_trained_head(rank: int, shortlist: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folded for drafting, not folded because too large, and as trained."""
    target = tiny_target("llama")
    drafter = built(lm, dataclasses.replace(small(target), rank=rank, shortlist=shortlist), target)
    head, features_BTH = drafter.model.get_output_embeddings(), torch.randn(2, 3, 32)
    trained = head(features_BTH)
    with torch.no_grad():
        torch.testing.assert_close(head(features_BTH), trained)
        monkeypatch.setattr(tied_heads, "MAX_TABLE", 0)
        head.bias += 1.0
        torch.testing.assert_close(head(features_BTH)[trained > -100], trained[trained > -100] + 1.0)


def test_confidence_policy_stops_drafting() -> None:
    target = tiny_target("llama")
    ids = torch.tensor(prompts(1))
    found = []
    for policy in ("fixed", "confidence=0.5", "confidence=0.999999"):
        watched = Watched(copy_of(target, length=policy))
        draftsmith.generate(target, ids, watched, max_new_tokens=NUM_NEW)
        found.append([len(draft[0]) - 1 for draft in watched.drafts])
    always, sometimes, never = found
    assert always[:-1] == [4] * (len(always) - 1)
    assert 1 < sum(sometimes) / len(sometimes) < 4
    assert set(never) == {1}


def test_unsuitable_draft_models_are_rejected() -> None:
    target = tiny_target("llama")
    model = tiny_config("llama", vocab_size=VOCAB_SIZE - 1).to_dict()
    with pytest.raises(ValueError, match=f"vocabulary has {VOCAB_SIZE - 1} tokens and the target's {VOCAB_SIZE}"):
        Drafter(Config(model=model), target)
    with pytest.raises(ValueError, match="names no model_type"):
        Drafter(Config(model={"vocab_size": VOCAB_SIZE}), target)
    with pytest.raises(ValueError, match="num_draft is 0"):
        Config(model={}, num_draft=0)
    with pytest.raises(ValueError, match="unknown length policy 'long'"):
        Config(model={}, length="long")
    with pytest.raises(ValueError, match="rank is -1"):
        Config(model={}, rank=-1)
    with pytest.raises(ValueError, match="shortlist is 65; it must lie between"):
        Drafter(small(target, shortlist=65), target)
    capped = tiny_config("gemma2", num_hidden_layers=1, layer_types=["full_attention"]).to_dict()
    with pytest.raises(ValueError, match="scales or caps its logits"):
        Drafter(Config(model=capped, shortlist=20), target)
    with pytest.raises(ValueError, match="draft model is an encoder-decoder and target .* is not"):
        Drafter(small(target, "t5"), target)
    with pytest.raises(ValueError, match="verifies chains, not trees"):
        Drafter(small(tiny_target("t5"), width=2), tiny_target("t5"))


def test_state_dict_holds_only_the_draft_model() -> None:
    drafter = Drafter(small(tiny_target("llama")), tiny_target("llama"))
    assert {name.split(".")[0] for name in drafter.state_dict()} == {"model"}
    assert sum(p.numel() for p in drafter.parameters()) == sum(p.numel() for p in drafter.model.parameters())
