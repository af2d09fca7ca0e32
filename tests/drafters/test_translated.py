"""Drafters with another vocabulary: greedy output, laws, an exact reference for tiny vocabularies, and artifacts."""

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
from draftsmith.core.model_info import tokenizer_hash
from draftsmith.core.tree import Draft
from draftsmith.drafters import translated
from draftsmith.drafters.translated import Config, Drafter
from tests.support.distributions import PROMPT, check_distribution, distribution_target
from tests.support.family import Watched, check_family, texts
from tests.support.models import SEQ2SEQ, greedy_by_transformers, padded, prompts, scramble, tiny_config, tiny_target
from tests.support.vocabularies import EXACT, TOKENIZERS, shared_target, tokenizer

NUM_NEW = 20


def without_text(target: Target, **changes: Any) -> Config:
    """Returns the configuration of a small model whose vocabulary, in another order, lacks some of the target's."""
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
    """Checks that the draft model has read each row's text, and its laws against the model run afresh."""

    def propose(self, budget: int) -> Draft:
        draft = super().propose(budget)
        drafter, way = self.inner, self.inner.translation
        for number, row in enumerate(self._session.rows):
            own = drafter._own[number]
            assert way.own.text(own).endswith(way.theirs.text(row))
            num_read = drafter._cache.lengths[number]
            assert drafter._read[number][:num_read][: len(own)] == own[:num_read]
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
    """Returns what transformers' own `generate` makes of the rows of text."""
    target = shared_target()
    rows = [torch.tensor([row]) for row in text_rows(target)]
    return [target.model.generate(row, do_sample=False, max_new_tokens=NUM_NEW)[0].tolist() for row in rows]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_greedy_output_is_the_targets(name: str) -> None:
    """The tiny target writes bytes at random: halves of characters, and whole words."""
    target = shared_target()
    own = tokenizer(name)
    ids, mask = padded(text_rows(target), side="left")
    watched = (Compared if name in EXACT else Watched)(drafter_for(target, own))
    out = draftsmith.generate(target, ids, watched, attention_mask=mask, max_new_tokens=NUM_NEW)
    assert texts(out) == greedy_texts()
    assert watched.num_drafted > 0


@pytest.mark.parametrize("sampling", [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 9, "top_p": 0.9}])
def test_drafts_follow_the_law_over_what_both_vocabularies_have(sampling: dict[str, Any]) -> None:
    target = shared_target()
    ids, mask = padded(text_rows(target))
    watched = Compared(drafter_for(target, tokenizer("marked"), confidence=0.02))
    given_settings = {"attention_mask": mask, "max_new_tokens": 12, "eos_token_id": (5, 6), "seed": 0}
    draftsmith.generate(target, ids, watched, **given_settings, **sampling)
    assert watched.num_drafted > 20


def test_a_copy_of_the_target_is_always_accepted() -> None:
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


def test_a_text_longer_than_the_draft_models_context_is_left_to_the_target() -> None:
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
def test_it_drafts_for_encoder_decoders(architecture: str) -> None:
    target = tiny_target(architecture)
    drafter = Drafter(without_text(target), target)
    scramble(drafter, seed=1)
    watched = Watched(drafter)
    ids, mask = padded(prompts(5))
    out = draftsmith.generate(target, ids, watched, attention_mask=mask, max_new_tokens=NUM_NEW)
    assert texts(out) == greedy_by_transformers(architecture, 5, NUM_NEW)
    assert watched.num_drafted > 0


# --- Laws ---------------------------------------------------------------------------------------------------------


def letters(tokens: list[str], merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    return PreTrainedTokenizerFast(tokenizer_object=made)


def law_pair(**changes: Any) -> tuple[Target, Drafter]:
    """Returns the law's target with a tokenizer of eight tokens, and a drafter with one of six, of which five fit."""
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
def test_sampled_text_follows_the_targets_law(sampling: dict[str, Any]) -> None:
    target, drafter = law_pair()
    assert drafter.counterparts_U.tolist() == [2, 4, 1, 0, 3, -1]
    check_distribution(drafter, target, num_samples=4_000, **sampling)


def string_law(drafter: Drafter, row: list[int], num_draft: int) -> Tensor:
    """Returns the law [V + 1] of the first target token of what is drafted by text, the last entry for none.

    String-level rejection sampling's psi (2502.05202): the probabilities of all texts of `num_draft` tokens, added up
    by the target's token that each begins with. U ** num_draft of them: for tiny vocabularies.
    """
    way, size = drafter.translation, len(drafter.counterparts_U)
    own = way.begin(row)
    psi_V = torch.zeros(drafter.target.vocab_size + 1, dtype=torch.float64)
    for drafted in itertools.product(range(size), repeat=num_draft):
        logits_TU = drafter.model(torch.tensor([own + list(drafted)])).logits[0, len(own) - 1 : -1].double()
        chance = logits_TU.softmax(-1).gather(1, torch.tensor(drafted)[:, None]).prod()
        ahead = way.ahead(row, own, list(drafted))
        psi_V[ahead[0] if ahead else -1] += chance
    return psi_V


def string_level(target_probs_V: Tensor, psi_V: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the law of the token put out by string-level rejection sampling, and how likely the draft is accepted.

    A drafted token t ~ psi is kept with min(1, target / psi); else, or if there is none, one of the residual comes.
    """
    kept_V = torch.minimum(target_probs_V, psi_V[:-1])
    residual_V = target_probs_V - kept_V
    accepted = kept_V.sum()
    return kept_V + (1 - accepted) * residual_V / residual_V.sum().clamp(min=1e-300), accepted


@torch.no_grad()
def test_laws_of_strings_are_an_exact_reference() -> None:
    """They keep the target's law, accept no less than guesses by text do, and are the drafter's own law where every
    token of one vocabulary is one of the other."""
    target, drafter = law_pair()
    row = PROMPT[:5]
    target_V = target.model(torch.tensor([row])).logits[0, -1].double().softmax(-1)
    for num_draft in (1, 2, 3):
        psi_V = string_law(drafter, row, num_draft)
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
    laws: list[Tensor] = []
    propose = other.propose
    other.propose = lambda budget: laws.append((draft := propose(budget)).draft_probs_BNV) or draft  # type: ignore
    draftsmith.generate(pair, torch.tensor([row]), watched, max_new_tokens=2, temperature=1.0, seed=0)
    assert torch.allclose(laws[0][0, 0].double(), string_law(other, row, 1)[:-1], atol=1e-6)


# --- Artifacts ----------------------------------------------------------------------------------------------------


def test_the_artifact_holds_the_tokenizer_the_map_and_both_hashes(tmp_path: Path) -> None:
    target, folder = shared_target(), tmp_path / "artifact"
    drafter = drafter_for(target, tokenizer("marked"))
    draftsmith.save(drafter, folder, target=target)
    manifest = json.loads((folder / "draft_config.json").read_text())
    assert manifest["tokenizer_hash"] == target.tokenizer_hash
    assert manifest["config"]["tokenizer_hash"] == tokenizer_hash(tokenizer("marked")) != target.tokenizer_hash
    loaded = draftsmith.load(folder, target)
    assert json.dumps(vars(loaded.config)) == json.dumps(vars(drafter.config)) and not loaded.training
    assert torch.equal(loaded.counterparts_U, drafter.counterparts_U)
    assert loaded.translation.own.keys == drafter.translation.own.keys
    ids, mask = padded(text_rows(target))
    drafts = []
    for one in (drafter, loaded):
        for temperature in (0.0, 1.0):
            watched = Watched(one)
            law = {"temperature": temperature, "seed": 1}
            draftsmith.generate(target, ids, watched, attention_mask=mask, max_new_tokens=NUM_NEW, **law)
            drafts.append(watched.drafts)
    assert drafts[:2] == drafts[2:]


def test_another_tokenizer_on_either_side_is_refused(tmp_path: Path) -> None:
    target, folder = shared_target(), tmp_path / "artifact"
    draftsmith.save(drafter_for(target, tokenizer("bytes-300")), folder, target=target)
    whole = (folder / "tokenizer.json").read_bytes()
    tokenizer("bytes-259").backend_tokenizer.save(str(folder / "tokenizer.json"))
    refused(folder, target, "tokenizer.json is not the tokenizer that the draft model was made with")
    for text in (whole[:-9], b"", b"{}"):
        (folder / "tokenizer.json").write_bytes(text)
        refused(folder, target, "tokenizer.json is missing or no tokenizer")
    (folder / "tokenizer.json").unlink()
    refused(folder, target, "tokenizer.json is missing or no tokenizer")
    (folder / "tokenizer.json").write_bytes(whole)
    draftsmith.load(folder, target)
    refused(folder, Target(target.model, tokenizer("bytes-300")), "was made with another tokenizer than that of target")
    refused(folder, Target(target.model), "has no tokenizer, which its vocabulary is compared by")
    (folder / "model.safetensors").unlink()
    refused(folder, target, "model.safetensors is missing")


def refused(folder: Path, target: Target, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        draftsmith.load(folder, target)
    assert "\n" not in str(error.value)


def test_what_cannot_be_is_refused() -> None:
    model = {"model_type": "llama", "vocab_size": 3}
    for given_settings, message in (
        ({"model": {"vocab_size": 3}}, "names no model_type"),
        ({"num_draft": 0}, "num_draft 0 and lookback 10 must be at least 1"),
        ({"confidence": 1.0}, "confidence is 1.0"),
        ({"tokenizer_hash": "x"}, "one of tokenizer_hash and counterparts"),
        ({"counterparts": (1, 1, 2)}, "none of them twice"),
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
