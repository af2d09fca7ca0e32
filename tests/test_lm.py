"""The draft LM: its cache follows the target's text, its laws are those it drew from, and it stops when in doubt."""

from pathlib import Path
from typing import Any

import pytest
import torch

import draftsmith
from draftsmith import Target
from draftsmith.drafters import lm
from draftsmith.drafters.lm import Config, Drafter
from draftsmith.sampling import Sampling
from draftsmith.tree import Draft
from tests.family import Watched, built, check_family, texts
from tests.models import CAUSAL, VOCAB_SIZE, greedy_by_transformers, padded, prompts, tiny_config, tiny_target
from trainers import distill

NUM_NEW = 20


def small(target: Target, architecture: str = "llama", **settings: Any) -> Config:
    """Returns the configuration of a small model with the target's vocabulary."""
    model = tiny_config(architecture, vocab_size=target.vocab_size, num_hidden_layers=1).to_dict()
    return Config(**{"model": model, "num_draft": 4, "length": "refit=0.1"} | settings)


EXAMPLE = small


def copy_of(target: Target, **settings: Any) -> Drafter:
    """Returns a draft model that is the target's own copy."""
    drafter = Drafter(Config(**{"model": target.model.config.to_dict(), "num_draft": 4} | settings), target)
    drafter.model.load_state_dict(target.model.state_dict())
    return drafter.eval()


def test_family(tmp_path: Path) -> None:
    settings = distill.Settings(num_layers=1, num_heads=4)
    check_family(lm, small, tmp_path, trainer=distill, settings=settings)


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "gemma2", "gpt_neox"])
def test_the_draft_model_may_be_of_another_architecture(architecture: str) -> None:
    target = tiny_target("llama")
    layers = {"gpt2": "n_layer", "gemma2": "layer_types"}.get(architecture)
    changes = {layers: ["full_attention"] if layers == "layer_types" else 1} if layers else {}
    model = tiny_config(architecture, **{"num_hidden_layers": 1} | changes).to_dict()
    drafter = Watched(built(lm, Config(model=model, num_draft=3, length="fixed"), target))
    ids, mask = padded(prompts(5), side="left")
    out = draftsmith.generate(target, ids, drafter, attention_mask=mask, max_new_tokens=NUM_NEW)
    assert texts(out) == greedy_by_transformers("llama", 5, NUM_NEW)


@pytest.mark.parametrize("architecture", CAUSAL)
def test_a_copy_of_the_target_is_always_accepted(architecture: str) -> None:
    """The loop feeds it what it lacks after each acceptance of all, one token or two."""
    target = tiny_target(architecture)
    ids, mask = padded(prompts(5))
    drafter, given = copy_of(target, length="fixed"), {"attention_mask": mask, "max_new_tokens": NUM_NEW}
    out = draftsmith.generate(target, ids, drafter, **given)
    assert texts(out) == greedy_by_transformers(architecture, 5, NUM_NEW)
    assert out.stats.accepted_per_depth == [1, 1, 1, 1] and out.stats.tau == 5
    out = draftsmith.generate(target, ids, drafter, **given, temperature=1.0, seed=0)
    # Equal laws accept always, but for the rounding between a forward of one token and of five.
    assert min(out.stats.accepted_per_depth) > 0.9


class Compared(Watched):
    """Checks each draft's law against the draft model run afresh on the whole text, without a cache."""

    def __init__(self, inner: Drafter, sampling: Sampling, threshold: float) -> None:
        super().__init__(inner)
        self.sampling, self.threshold, self.num_compared = sampling, threshold, 0

    def propose(self, budget: int) -> Draft:
        draft = super().propose(budget)
        assert draft.tree.is_chain and draft.tree.depth <= self.config.num_draft
        for row, ids in enumerate(self._session.rows):
            drafted = draft.tokens_BN[row, 1:].tolist()
            logits_TV = self.inner.model(torch.tensor([ids + drafted])).logits[0, len(ids) - 1 :]
            used = draft.num_nodes[row] if draft.num_nodes else draft.tree.num_nodes
            for at in range(used - 1):
                if draft.draft_probs_BNV is None:
                    assert drafted[at] == int(logits_TV[at].argmax())
                else:
                    law_V = self.sampling.law(logits_TV[at])
                    assert torch.allclose(draft.draft_probs_BNV[row, at], law_V, atol=1e-4)
                # A row goes on after a token only if it was likely enough.
                confidence = float(logits_TV[at].softmax(-1)[drafted[at]])
                goes_on = at + 1 < used - 1
                assert not goes_on or confidence > self.threshold - 1e-4
                assert goes_on or used - 1 == draft.tree.depth or confidence < self.threshold + 1e-4
                self.num_compared += 1
        return draft


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0), Sampling(temperature=0.7, top_k=9)])
@pytest.mark.parametrize("accepts", [True, False])
def test_drafts_follow_the_draft_models_own_law(sampling: Sampling, accepts: bool) -> None:
    """Ragged rows that are often cut back, and rows that finish before others."""
    target = tiny_target("llama")
    given = {"length": "confidence=0.25"}
    drafter = copy_of(target, **given) if accepts else built(lm, small(target, **given), target)
    compared = Compared(drafter, sampling, 0.25)
    ids, mask = padded(prompts(5))
    settings = vars(sampling) | {"max_new_tokens": 14, "eos_token_id": (10, 11, 12), "seed": 1}
    draftsmith.generate(target, ids, compared, attention_mask=mask, **settings)
    assert compared.num_compared > 30


def test_it_drafts_until_a_token_it_doubts() -> None:
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


def test_a_model_that_does_not_fit_is_refused() -> None:
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


def test_only_the_draft_model_is_in_its_state() -> None:
    drafter = Drafter(small(tiny_target("llama")), tiny_target("llama"))
    assert {name.split(".")[0] for name in drafter.state_dict()} == {"model"}
    assert sum(p.numel() for p in drafter.parameters()) == sum(p.numel() for p in drafter.model.parameters())
