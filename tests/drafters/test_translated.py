"""Tests of drafters with another vocabulary: lossless output, an exact reference for tiny vocabularies, artifacts."""

import itertools
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import draftsmith
from draftsmith import Target
from draftsmith.core.tree import Draft
from draftsmith.drafters import translated
from draftsmith.drafters.translated import Config, Drafter
from draftsmith.loading.model_info import tokenizer_hash
from tests.support.distributions import PROMPT, check_distribution, distribution_target
from tests.support.families.vocabularies import EXACT, TOKENIZERS, shared_target, tokenizer
from tests.support.family import Watched, check_family, texts
from tests.support.models import SEQ2SEQ, greedy_by_transformers, padded, prompts, scramble, tiny_config, tiny_target

NUM_NEW = 20


def without_text(target: Target, **changes: Any) -> Config:
    """Returns the configuration of a small model with some of the target's tokens in another order, by ids."""
    order = torch.randperm(target.vocab_size, generator=torch.Generator().manual_seed(0)).tolist()
    counterparts = (*(-1 if token % 5 == 3 else token for token in order), -1, -1)
    model = tiny_config("llama", vocab_size=len(counterparts), num_hidden_layers=1).to_dict()
    return Config(**{"model": model, "counterparts": counterparts, "num_draft": 4, "confidence": 0.1} | changes)


EXAMPLE = without_text


def test_family(tmp_path: Path) -> None:
    check_family(translated, without_text, tmp_path)


def config_for(own: Any, **changes: Any) -> Config:
    special = {"bos_token_id": own.bos_token_id, "eos_token_id": own.eos_token_id}
    sizes = {"vocab_size": len(own), "num_hidden_layers": 1, "max_position_embeddings": 256}
    model = tiny_config("llama", **sizes, **special).to_dict()
    hashed = {"model": model, "tokenizer_hash": tokenizer_hash(own), "num_draft": 6, "confidence": 0.0}
    return Config(**hashed | changes)


def drafter_for(target: Target, own: Any, **changes: Any) -> Drafter:
    drafter = Drafter(config_for(own, **changes), target, own)
    scramble(drafter, seed=1)
    return drafter.eval()


# --- Drafts -------------------------------------------------------------------------------------------------------


class Compared(Watched):
    """Checks that the draft model processed each row's text, and its distributions against forwards without a cache."""

    def propose(self, budget: int) -> Draft:
        draft = super().propose(budget)
        drafter, way = self.inner, self.inner.translation
        for number, row in enumerate(self._session.rows):
            own = drafter._draft_ids[number]
            assert way.draft.text(own).endswith(way.target.text(row))
            num_read = drafter._cache.lengths[number]
            assert drafter._processed[number][:num_read][: len(own)] == own[:num_read]
            if draft.draft_probs_BNV is not None:
                self._check_row(draft.draft_probs_BNV[number], own, draft, number)
        return draft

    def _check_row(self, probs_NV: Tensor, own: list[int], draft: Draft, number: int) -> None:
        drafter = self.inner
        ids = draft.tokens_BN[number, 1:].tolist()
        counterparts = drafter.counterparts_U.tolist()
        fed = own + [counterparts.index(token) for token in ids]
        logits_TU = drafter.model(torch.tensor([fed])).logits[0, len(own) - 1 :]
        used = draft.num_nodes[number] if draft.num_nodes else draft.tree.num_nodes
        for at in range(used - 1):
            logits_V = torch.full((drafter.target.vocab_size,), float("-inf"))
            for token, counterpart in enumerate(counterparts):
                if counterpart >= 0:
                    logits_V[counterpart] = logits_TU[at, token]
            assert torch.allclose(probs_NV[at], self._session.sampling.probs(logits_V), atol=1e-4)


def text_rows(target: Target) -> list[list[int]]:
    some_text = ["def f(self):\n    ", "#", "x = '語😀'\nnaïve", "    return [a for a in", "é"]
    return [target.tokenizer(text)["input_ids"] for text in some_text]


@cache
def greedy_texts() -> list[list[int]]:
    """Returns the greedy output of transformers' `generate` for the rows of text."""
    target = shared_target()
    rows = [torch.tensor([row]) for row in text_rows(target)]
    return [target.model.generate(row, do_sample=False, max_new_tokens=NUM_NEW)[0].tolist() for row in rows]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_greedy_output_equals_transformers(name: str) -> None:
    """The tiny target generates random bytes: incomplete characters and whole words."""
    target = shared_target()
    own = tokenizer(name)
    ids, mask = padded(text_rows(target), side="left")
    watched = (Compared if name in EXACT else Watched)(drafter_for(target, own))
    out = draftsmith.generate(target, ids, watched, attention_mask=mask, max_new_tokens=NUM_NEW)
    assert texts(out) == greedy_texts()
    assert watched.num_drafted > 0


@pytest.mark.parametrize("sampling", [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 9, "top_p": 0.9}])
def test_sampled_drafts_follow_the_distribution_over_shared_tokens(sampling: dict[str, Any]) -> None:
    target = shared_target()
    ids, mask = padded(text_rows(target))
    watched = Compared(drafter_for(target, tokenizer("marked"), confidence=0.02))
    given_settings = {"attention_mask": mask, "max_new_tokens": 12, "eos_token_id": (5, 6), "seed": 0}
    draftsmith.generate(target, ids, watched, **given_settings, **sampling)
    assert watched.num_drafted > 20


def test_copy_of_the_target_is_always_accepted() -> None:
    target = tiny_target("llama")
    counterparts = tuple(range(target.vocab_size))
    config = Config(model=target.model.config.to_dict(), counterparts=counterparts, num_draft=4, confidence=0.0)
    drafter = Drafter(config, target)
    drafter.model.load_state_dict(target.model.state_dict())
    ids, mask = padded(prompts(5))
    out = draftsmith.generate(target, ids, drafter, attention_mask=mask, max_new_tokens=NUM_NEW)
    assert out.stats.tau == 5
    out = draftsmith.generate(
        target, ids, drafter, attention_mask=mask, max_new_tokens=NUM_NEW, temperature=1.0, seed=0
    )
    assert min(out.stats.accepted_per_depth) > 0.9


def test_text_longer_than_the_draft_models_context_is_not_drafted() -> None:
    target = shared_target()
    own = tokenizer("bytes-259")
    config = config_for(own)
    config = Config(
        model=config.model | {"max_position_embeddings": 24}, tokenizer_hash=config.tokenizer_hash, confidence=0.0
    )
    watched = Watched(Drafter(config, target, own))
    ids = torch.tensor([text_rows(target)[0]])
    out = draftsmith.generate(target, ids, watched, max_new_tokens=40)
    expected = target.model.generate(ids, do_sample=False, max_new_tokens=40)
    assert texts(out) == expected.tolist()
    assert watched.num_drafted > 0 and len(watched.drafts[-1][0]) == 1


@pytest.mark.parametrize("architecture", SEQ2SEQ)
def test_encoder_decoder_decodes_greedily_as_the_target(architecture: str) -> None:
    target = tiny_target(architecture)
    drafter = Drafter(without_text(target), target)
    scramble(drafter, seed=1)
    watched = Watched(drafter)
    ids, mask = padded(prompts(5))
    out = draftsmith.generate(target, ids, watched, attention_mask=mask, max_new_tokens=NUM_NEW)
    assert texts(out) == greedy_by_transformers(architecture, 5, NUM_NEW)
    assert watched.num_drafted > 0


# --- Distributions ------------------------------------------------------------------------------------------------


def letters(tokens: list[str], merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    return PreTrainedTokenizerFast(tokenizer_object=made)


def tiny_pair(**changes: Any) -> tuple[Target, Drafter]:
    """Returns a target with a tokenizer of eight tokens, and a drafter with one of six, five of which are shared."""
    theirs = letters(["a", "b", "c", "d", "ab", "cd", "ba", "e"], [("a", "b"), ("c", "d"), ("b", "a")])
    own = letters(["c", "ab", "b", "a", "d", "bc"], [("a", "b"), ("b", "c")])
    target = Target(distribution_target().model, theirs)
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    model = tiny_config("llama", vocab_size=len(own), num_hidden_layers=1, **special).to_dict()
    config = Config(
        **{"model": model, "tokenizer_hash": tokenizer_hash(own), "num_draft": 3, "confidence": 0.1} | changes
    )
    drafter = Drafter(config, target, own)
    scramble(drafter, seed=1, sharpness=1.0)
    return target, drafter.eval()


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.0},
        pytest.param({"temperature": 0.8, "top_k": 4}, marks=pytest.mark.slow),
        pytest.param({"top_p": 0.8}, marks=pytest.mark.slow),
    ],
)
def test_sampled_text_follows_the_target_distribution(sampling: dict[str, Any]) -> None:
    target, drafter = tiny_pair()
    assert drafter.counterparts_U.tolist() == [2, 4, 1, 0, 3, -1]
    check_distribution(drafter, target, num_samples=4_000, **sampling)


def string_probs(drafter: Drafter, row: list[int], num_draft: int) -> Tensor:
    """Returns the distribution [V + 1] of the first target token of drafts translated by text, the last entry for none.

    This is psi of string-level rejection sampling (2502.05202): the probabilities of all U ** num_draft drafts, summed
    by the target token that each begins with; for tiny vocabularies only.
    """
    way, size = drafter.translation, len(drafter.counterparts_U)
    own = way.to_draft_ids(row)
    psi_V = torch.zeros(drafter.target.vocab_size + 1, dtype=torch.float64)
    for drafted in itertools.product(range(size), repeat=num_draft):
        logits_TU = drafter.model(torch.tensor([own + list(drafted)])).logits[0, len(own) - 1 : -1].double()
        probability = logits_TU.softmax(-1).gather(1, torch.tensor(drafted)[:, None]).prod()
        new = way.new_target_ids(row, own, list(drafted))
        psi_V[new[0] if new else -1] += probability
    return psi_V


def string_level(target_probs_V: Tensor, psi_V: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the output distribution of string-level rejection sampling, and the acceptance probability.

    A drafted token t ~ psi is accepted with min(1, target / psi); otherwise a token of the residual is drawn.
    """
    kept_V = torch.minimum(target_probs_V, psi_V[:-1])
    residual_V = target_probs_V - kept_V
    accepted = kept_V.sum()
    return kept_V + (1 - accepted) * residual_V / residual_V.sum().clamp(min=1e-300), accepted


@torch.no_grad()
def test_string_level_distributions_are_an_exact_reference() -> None:
    """They preserve the target's distribution, accept no less than greedy matching by text, and equal the drafter's
    distribution if each of its tokens is one of the target's."""
    target, drafter = tiny_pair()
    row = PROMPT[:5]
    target_V = target.model(torch.tensor([row])).logits[0, -1].double().softmax(-1)
    for num_draft in (1, 2, 3):
        psi_V = string_probs(drafter, row, num_draft)
        assert psi_V.sum() == pytest.approx(1, abs=1e-6)
        out_V, accepted = string_level(target_V, psi_V)
        assert torch.allclose(out_V, target_V, atol=1e-12)
        assert accepted >= (target_V * psi_V[:-1]).sum()
    same = letters(["b", "a", "e", "c", "d"], [])
    pair = Target(distribution_target().model, letters(["a", "b", "c", "d", "e", "x", "y", "z"], []))
    model = drafter.config.model | {"vocab_size": 5}
    other = Drafter(Config(model=model, tokenizer_hash=tokenizer_hash(same), num_draft=1, confidence=0.0), pair, same)
    scramble(other, seed=2)
    watched, row = Watched(other), [0, 3, 1, 4]
    sampled_from: list[Tensor] = []
    propose = other.propose
    other.propose = lambda budget: sampled_from.append((draft := propose(budget)).draft_probs_BNV) or draft  # type: ignore
    draftsmith.generate(pair, torch.tensor([row]), watched, max_new_tokens=2, temperature=1.0, seed=0)
    assert torch.allclose(sampled_from[0][0, 0].double(), string_probs(other, row, 1)[:-1], atol=1e-6)


# --- Artifacts ----------------------------------------------------------------------------------------------------


def test_artifact_holds_the_tokenizer_the_counterparts_and_both_hashes(tmp_path: Path) -> None:
    target, folder = shared_target(), tmp_path / "artifact"
    drafter = drafter_for(target, tokenizer("marked"))
    draftsmith.save(drafter, folder, target=target)
    manifest = json.loads((folder / "draft_config.json").read_text())
    assert manifest["tokenizer_hash"] == target.tokenizer_hash
    assert manifest["config"]["tokenizer_hash"] == tokenizer_hash(tokenizer("marked")) != target.tokenizer_hash
    loaded = draftsmith.load(folder, target)
    assert json.dumps(vars(loaded.config)) == json.dumps(vars(drafter.config)) and not loaded.training
    assert torch.equal(loaded.counterparts_U, drafter.counterparts_U)
    assert loaded.translation.draft.keys == drafter.translation.draft.keys
    ids, mask = padded(text_rows(target))
    drafts = []
    for one in (drafter, loaded):
        for temperature in (0.0, 1.0):
            watched = Watched(one)
            settings = {"temperature": temperature, "seed": 1}
            draftsmith.generate(target, ids, watched, attention_mask=mask, max_new_tokens=NUM_NEW, **settings)
            drafts.append(watched.drafts)
    assert drafts[:2] == drafts[2:]


def test_load_rejects_another_tokenizer_on_either_side(tmp_path: Path) -> None:
    target, folder = shared_target(), tmp_path / "artifact"
    draftsmith.save(drafter_for(target, tokenizer("bytes-300")), folder, target=target)
    whole = (folder / "tokenizer.json").read_bytes()
    tokenizer("bytes-259").backend_tokenizer.save(str(folder / "tokenizer.json"))
    check_rejected(folder, target, "tokenizer.json is not the tokenizer that the draft model was made with")
    for text in (whole[:-9], b"", b"{}"):
        (folder / "tokenizer.json").write_bytes(text)
        check_rejected(folder, target, "tokenizer.json is missing or not a tokenizer")
    (folder / "tokenizer.json").unlink()
    check_rejected(folder, target, "tokenizer.json is missing")
    (folder / "tokenizer.json").write_bytes(whole)
    draftsmith.load(folder, target)
    check_rejected(
        folder, Target(target.model, tokenizer("bytes-300")), "was made with another tokenizer than that of target"
    )
    check_rejected(folder, Target(target.model), "has no tokenizer, which is needed to compare")
    (folder / "model.safetensors").unlink()
    check_rejected(folder, target, "model.safetensors is missing")


def check_rejected(folder: Path, target: Target, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        draftsmith.load(folder, target)
    assert "\n" not in str(error.value)


def test_config_and_drafter_reject_invalid_settings() -> None:
    model = {"model_type": "llama", "vocab_size": 3}
    for given_settings, message in (
        ({"model": {"vocab_size": 3}}, "must have model_type and vocab_size"),
        ({"num_draft": 0}, "num_draft is 0; it must be at least 1"),
        ({"confidence": 1.0}, "confidence is 1.0"),
        ({"tokenizer_hash": "x"}, "give either tokenizer_hash or counterparts"),
        ({"counterparts": (1, 1, 2)}, "each at most once"),
        ({"counterparts": (1, -2, 2)}, "must be -1 or ids"),
        ({"counterparts": (1, 2)}, "there are 2 counterparts and 3 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            Config(**{"model": model, "counterparts": (0, 1, 2)} | given_settings)
    target = tiny_target("llama")
    with pytest.raises(ValueError, match="counterpart 64 is outside"):
        Drafter(Config(model=model, counterparts=(0, 1, 64)), target)
    with pytest.raises(ValueError, match="have no token in common"):
        Drafter(Config(model=model, counterparts=(-1, -1, -1)), target)
