"""Tests of staged speculation: chains follow the draft model's distribution, whatever the small drafter proposes."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import draftsmith
from draftsmith import Target
from draftsmith.core.drafter import Session
from draftsmith.core.sampling import Sampling
from draftsmith.core.tree import Draft
from draftsmith.drafters import layerskip, lm, lookup, medusa, staged
from draftsmith.drafters.staged import Config, Drafter
from draftsmith.parts.composites import Part
from tests.support.distributions import (
    FALSE_ALARM,
    NUM_TOKENS,
    PROMPT,
    VOCAB_SIZE,
    cells,
    check_distribution,
    distribution_target,
    exact_distribution,
    p_value,
)
from tests.support.family import Watched, built, check_family, part_config, texts
from tests.support.models import SEQ2SEQ, greedy_by_transformers, padded, prompts, scramble, tiny_config, tiny_target

TARGET = tiny_target("llama")
NUM_NEW = 20
EOS = (10, 11, 12)


def model_of(target: Target, num_layers: int = 2) -> lm.Config:
    model = tiny_config("llama", vocab_size=target.vocab_size, num_hidden_layers=num_layers).to_dict()
    return lm.Config(model=model, num_draft=3, length="fixed")


def config(target: Target, small: str = "lookup", **settings: Any) -> Config:
    """Returns the configuration of a draft model of two blocks with this kind of small drafter."""
    kinds: dict[str, dict[str, Any]] = {
        "lookup": part_config("lookup", lookup.Config()),
        "lm": part_config("lm", model_of(target, 1)),
        "lm trees": part_config("lm", dataclasses.replace(model_of(target, 1), tree=((0,), (1,), (0, 0), (1, 0)))),
        "itself": part_config("layerskip", layerskip.Config(mlp=(1,), num_draft=3, length="fixed")),
        "early stop": part_config("lm", dataclasses.replace(model_of(target, 1), length="confidence=0.1")),
    }
    given = {"num_draft": 4, "length": "fixed"} | settings
    return Config(parts=(part_config("lm", model_of(target)), kinds[small]), **given)


EXAMPLE = config


def staged_drafter(target: Target, small: str = "lookup", *, near: bool = True, **settings: Any) -> Drafter:
    """Returns the drafter with random weights; with `near` the small model shares the larger one's weights."""
    drafter = Drafter(config(target, small, **settings), target)
    larger, little = (part.drafter for part in drafter.parts)
    scramble(larger, seed=1)  # type: ignore[arg-type]
    if isinstance(little, lm.Drafter):
        state = little.model.state_dict()
        if near:
            little.model.load_state_dict({key: larger.model.state_dict()[key] for key in state})  # type: ignore
        else:
            scramble(little, seed=2)
    return drafter


SMALL = ("lookup", "lm", "lm trees", "itself", "early stop")


def test_family(tmp_path: Path) -> None:
    check_family(staged, config, tmp_path)


class Compared(Watched):
    """Checks each draft against the draft model run on the whole text without a cache."""

    def __init__(self, inner: Drafter, sampling: Sampling, threshold: float) -> None:
        super().__init__(inner)
        self.sampling, self.threshold, self.num_compared = sampling, threshold, 0

    def propose(self, budget: int) -> Draft:
        draft = super().propose(budget)
        model = self.inner.parts[0].drafter.model
        for row, ids in enumerate(self._session.rows):
            drafted = draft.tokens_BN[row, 1:].tolist()
            used = draft.num_nodes[row] if draft.num_nodes else draft.tree.num_nodes
            logits_TV = model(torch.tensor([ids + drafted])).logits[0, len(ids) - 1 :]
            for at in range(used - 1):
                if draft.draft_probs_BNV is None:
                    assert drafted[at] == int(logits_TV[at].argmax())
                else:
                    assert torch.allclose(draft.draft_probs_BNV[row, at], self.sampling.probs(logits_TV[at]), atol=1e-4)
                confidence = float(logits_TV[at].softmax(-1)[drafted[at]])
                should_continue = at + 1 < used - 1
                assert not should_continue or confidence > self.threshold - 1e-4
                assert should_continue or used - 1 == self.most(budget) or confidence < self.threshold + 1e-4
                self.num_compared += 1
        return draft

    def most(self, budget: int) -> int:
        return min(budget, self.config.num_draft)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.7, top_k=9)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("small", SMALL)
def test_drafts_follow_the_draft_models_distribution(small: str, sampling: Sampling) -> None:
    """Ragged rows, rewound at almost every step, some of which end early, and chains that stop early."""
    for policy, threshold in (("fixed", 0.0), ("confidence=0.15", 0.15)):
        compared = Compared(staged_drafter(TARGET, small, length=policy), sampling, threshold)
        ids, mask = padded(prompts(5))
        settings = sampling.as_arguments() | {"max_new_tokens": 14, "eos_token_id": EOS, "seed": 1}
        draftsmith.generate(TARGET, ids, compared, attention_mask=mask, **settings)
        assert compared.num_compared > 20


@pytest.mark.parametrize("small", SMALL)
def test_greedy_output_equals_transformers(small: str) -> None:
    drafter = staged_drafter(TARGET, small, near=False, length="refit=0.1")
    for num_rows, side in ((1, "right"), (5, "left")):
        ids, mask = padded(prompts(num_rows), side=side)
        out = draftsmith.generate(TARGET, ids, Watched(drafter), attention_mask=mask, max_new_tokens=NUM_NEW)
        assert texts(out) == greedy_by_transformers("llama", num_rows, NUM_NEW)


def sampled_tokens(drafter: Drafter, num_rows: int, seed: int) -> Tensor:
    """Returns the first tokens of drafts after PROMPT at temperature 1, row by row."""
    generator = torch.Generator().manual_seed(seed)
    rows, cache = [list(PROMPT) for _ in range(num_rows)], drafter.target.new_cache(num_rows)
    sampling = Sampling(temperature=1.0)
    drafter.start(Session(target=drafter.target, rows=rows, cache=cache, sampling=sampling, generator=generator))
    return drafter.propose(NUM_TOKENS + 1).tokens_BN[:, 1 : NUM_TOKENS + 1]


@pytest.mark.parametrize(
    "small", ["lm", *(pytest.param(one, marks=pytest.mark.slow) for one in ("lookup", "lm trees", "itself"))]
)
@torch.no_grad()
def test_sampled_drafts_follow_the_draft_models_distribution(small: str) -> None:
    """Compares 4,000 samples of three tokens with the exact distribution; the small drafter is often wrong."""
    drafter = staged_drafter(distribution_target(), small, near=False)
    counts_C = torch.zeros(VOCAB_SIZE**NUM_TOKENS, dtype=torch.float64)
    for seed in range(4):
        counts_C += torch.bincount(cells(sampled_tokens(drafter, 1_000, seed)), minlength=len(counts_C))
    assert p_value(counts_C, exact_distribution(drafter.draft_model)) > FALSE_ALARM
    assert p_value(counts_C, exact_distribution(distribution_target())) < FALSE_ALARM, (
        "the draft model's distribution is not the target's"
    )


@pytest.mark.parametrize("length", [pytest.param("fixed", marks=pytest.mark.slow), "confidence=0.2"])
def test_sampled_text_follows_the_target_distribution(length: str) -> None:
    """With early stopping at tokens some of which were verified together with the next ones."""
    check_distribution(
        staged_drafter(distribution_target(), "lm", length=length), distribution_target(), num_samples=3_000
    )


@pytest.mark.parametrize("accepts", [True, False])
def test_perfect_small_drafter_saves_forwards_of_the_draft_model(accepts: bool) -> None:
    """A copy of the draft model: one forward of the pending token and three more gives a draft of four.

    If the target, of which the draft model is then a copy, accepts all of them, another forward reads the last one.
    """
    model = lm.Config(model=TARGET.model.config.to_dict(), num_draft=3, length="fixed")
    larger, copied = built(lm, model, TARGET), lm.Drafter(model, TARGET)
    if accepts:
        larger.model.load_state_dict(TARGET.model.state_dict())
    copied.model.load_state_dict(larger.model.state_dict())
    object.__setattr__(copied, "target", larger.draft_model)
    names = (part_config("lm", model), part_config("lm", model))
    drafter = Drafter(Config(parts=names, num_draft=4, length="fixed"), TARGET, [Part(larger), Part(copied.eval())])
    fed: list[int] = []
    whole = drafter.draft_model.forward

    def counted(tokens_BN: Tensor, *args: Any, **kwargs: Any) -> Any:
        fed.append(tokens_BN.shape[1])
        return whole(tokens_BN, *args, **kwargs)

    drafter.draft_model.forward = counted  # type: ignore[method-assign]
    out = draftsmith.generate(TARGET, torch.tensor(prompts(1)), drafter, max_new_tokens=NUM_NEW)
    assert texts(out) == greedy_by_transformers("llama", 1, NUM_NEW)
    # The last drafts are shorter, because fewer tokens are left to generate.
    assert fed == ([8, 4, *[1, 4] * 3] if accepts else [8, *[4] * 16, 3, 2, 1])
    assert out.stats.tau == (5 if accepts else 1)


@pytest.mark.parametrize("architecture", SEQ2SEQ)
def test_encoder_decoder_decodes_greedily_as_the_target(architecture: str) -> None:
    target = tiny_target(architecture)
    ids, mask = padded(prompts(5))
    out = draftsmith.generate(target, ids, Watched(staged_drafter(target)), attention_mask=mask, max_new_tokens=NUM_NEW)
    assert texts(out) == greedy_by_transformers(architecture, 5, NUM_NEW)


def test_config_and_drafter_reject_invalid_parts() -> None:
    names = config(TARGET).parts
    heads = part_config("medusa", medusa.Config(num_heads=2, tree=((0,), (0, 0))))
    with pytest.raises(ValueError, match="medusa has no draft model; the first part must be a drafter with"):
        Drafter(Config(parts=(heads, names[1])), TARGET)
    with pytest.raises(ValueError, match="medusa reads hidden layers; the small drafter must read the text alone"):
        Drafter(Config(parts=(names[0], heads)), TARGET)
    with pytest.raises(ValueError, match="3 parts given; there must be two"):
        Config(parts=(*names, heads))
    with pytest.raises(ValueError, match="num_draft is 0"):
        config(TARGET, num_draft=0)
    with pytest.raises(ValueError, match="unknown length policy 'long'"):
        config(TARGET, length="long")
