"""The vLLM proposer without vLLM: called as vLLM calls it, it drafts as the same drafter does in `generate`.

Shape suffixes: B slots, T tokens, V vocabulary.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import draftsmith
from draftsmith import Target
from draftsmith.artifacts.families import find
from draftsmith.core.drafter import Drafter, Session, Step
from draftsmith.core.tree import Draft
from draftsmith.drafters import cnn, lstm, medusa, ngram, recycling, rest, suffix, trigram
from draftsmith.export.launch import ARTIFACT_VARIABLE, PROPOSER
from draftsmith.serving.tokens import TokenTarget
from draftsmith.serving.vllm import Proposer
from tests.support.family import built
from tests.support.models import VOCAB_SIZE, prompts, tiny_model, tiny_tokenizer
from tests.support.runs import make_target
from trainers.corpora import kneser_ney
from trainers.corpora.suffix_arrays import build

NUM_NEW, NUM_DRAFT, MAX_LENGTH = 24, 4, 64
SMALL: dict[str, Any] = {"num_draft": NUM_DRAFT, "rank": 8}
CONFIGS: dict[str, Any] = {
    "ngram": ngram.Config(num_draft=NUM_DRAFT, length="fixed"),
    "ngram-confidence": ngram.Config(num_draft=NUM_DRAFT, length="confidence=0.5"),
    "lstm": lstm.Config(hidden_size=24, num_layers=2, length="fixed", **SMALL),
    "lstm-refit": lstm.Config(hidden_size=24, length="refit=0.3", **SMALL),
    "cnn": cnn.Config(num_channels=24, length="heuristic", **SMALL),
    "rest": rest.Config(num_draft=NUM_DRAFT, max_matches=1),
    "suffix": suffix.Config(num_draft=NUM_DRAFT, branches=False, recent_tokens=0),
    "trigram": trigram.Config(maker="greedy", depth=3, bump=0.5),
}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return make_target(tmp_path_factory.mktemp("serving") / "target", seed=14)


@pytest.fixture(scope="module")
def texts(target: Target) -> list[list[int]]:
    """Returns the target's greedy texts for eight prompts, with more tokens than are served."""
    found = []
    for row in prompts(8):
        out = draftsmith.generate(target, torch.tensor([row]), max_new_tokens=NUM_NEW + NUM_DRAFT + 2)
        found.append(out.sequences[0].tolist())
    return found


def config_of(path: str, *, num_draft: int = NUM_DRAFT, max_length: int = MAX_LENGTH) -> Any:
    """Returns the parts of vLLM's configuration that a proposer reads."""
    return SimpleNamespace(
        model_config=SimpleNamespace(model=path, max_model_len=max_length, dtype=torch.float32),
        speculative_config=SimpleNamespace(num_speculative_tokens=num_draft),
        device_config=SimpleNamespace(device=torch.device("cpu")),
    )


@pytest.fixture
def serve(target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns a function that saves a drafter and makes a proposer of it."""

    def make_proposer(drafter: Any, **changes: int) -> Proposer:
        draftsmith.save(drafter, tmp_path / "artifact", target)
        monkeypatch.setenv(ARTIFACT_VARIABLE, str(tmp_path / "artifact"))
        return Proposer(config_of(target.name, **changes))

    return make_proposer


def drafter_of(name: str, target: Target, texts: list[list[int]], folder: Path) -> Any:
    """Returns a drafter built from or trained on the texts; `folder` is for its n-gram model."""
    family, config = find(name.partition("-")[0]), CONFIGS[name]
    arrays = [np.array(text) for text in texts[::2]]
    if name in ("rest", "suffix"):
        return family.Drafter(config, target, (build(arrays, VOCAB_SIZE),))
    if family is ngram:
        save_file(kneser_ney.count_ngrams(arrays, config.order, VOCAB_SIZE), folder / "part.safetensors")
        model = kneser_ney.build([folder / "part.safetensors"], config.order, VOCAB_SIZE, folder / "store")
        return ngram.Drafter(config, target, model)
    drafter = built(family, config, target)
    if isinstance(drafter, torch.nn.Module):
        train(drafter, texts)
    return drafter


def train(drafter: Any, texts: list[list[int]]) -> None:
    """Trains a network on the texts for a few steps, so that it predicts a part of them."""
    optimiser = torch.optim.Adam(drafter.parameters(), lr=0.02)
    for _ in range(40):
        for text in texts:
            tokens_1T = torch.tensor([text])
            logits_TV = drafter.head()(drafter(tokens_1T[:, :-1]))[0]
            torch.nn.functional.cross_entropy(logits_TV, tokens_1T[0, 1:]).backward()
        optimiser.step()
        optimiser.zero_grad()


@dataclass(eq=False)
class Request:
    """One request of the engine below, with the target's text, which is known in advance."""

    text: list[int]
    num_prompt: int
    num_seen: int = 0
    drafted: list[int] = field(default_factory=list)
    drafts: list[list[int]] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    def advance(self) -> list[int]:
        """Returns the tokens of a step: the accepted prefix of the draft and one more."""
        if self.num_seen < self.num_prompt:
            self.num_seen = self.num_prompt
            new = 1
        else:
            expected = self.text[self.num_seen :]
            new = 1
            while new <= len(self.drafted) and self.drafted[new - 1] == expected[new - 1]:
                new += 1
            self.drafts.append(self.drafted)
            self.accepted.append(new - 1)
        self.num_seen += new
        return self.text[self.num_seen - new : self.num_seen]

    @property
    def is_done(self) -> bool:
        return self.num_seen >= self.num_prompt + NUM_NEW


def run_engine(proposer: Proposer, requests: list[Request], num_slots: int, seed: int = 0) -> None:
    """Serves requests as vLLM batches them: with preemption, and moving the last one to a slot that becomes free."""
    rng = random.Random(seed)
    waiting, slots, preempted = list(requests), [], []
    token_ids_BT = np.random.default_rng(seed).integers(0, VOCAB_SIZE, (num_slots, MAX_LENGTH), dtype=np.int32)
    while waiting or slots or preempted:
        if preempted and len(slots) < num_slots:
            slots.append(preempted.pop())
        while waiting and len(slots) < num_slots:
            slots.append(waiting.pop(0))
        # A prompt that is prefilled in chunks has no sampled token before the last.
        sampled = [[] if one.num_seen == 0 and rng.random() < 0.3 else one.advance() for one in slots]
        num_tokens_B = np.zeros(num_slots, dtype=np.int32)
        for slot, one in enumerate(slots):
            num_tokens_B[slot] = one.num_seen or one.num_prompt
            token_ids_BT[slot, : num_tokens_B[slot]] = one.text[: num_tokens_B[slot]]
        drafts = proposer.propose(sampled, num_tokens_B[: len(slots)], token_ids_BT, slot_mappings=None)
        assert len(drafts) == len(slots)
        for one, tokens, draft in zip(slots, sampled, drafts, strict=True):
            assert tokens or not draft
            one.drafted = draft
        for slot in reversed(range(len(slots))):
            is_preempted = len(slots) > 1 and rng.random() < 0.05 and slots[slot].num_seen > 0
            if slots[slot].is_done or is_preempted:
                if not slots[slot].is_done:
                    preempted.append(slots[slot])
                last = slots.pop()
                if slot < len(slots):
                    slots[slot] = last


class DraftRecorder(Drafter):
    """A drafter that records its drafts, chains of one row."""

    def __init__(self, drafter: Any) -> None:
        self._drafter, self.drafts = drafter, []
        self.config, self.target, self.hidden_layers = drafter.config, drafter.target, drafter.hidden_layers

    def start(self, session: Session) -> None:
        self._drafter.start(session)

    def observe(self, step: Step) -> None:
        self._drafter.observe(step)

    def propose(self, budget: int) -> Draft:
        draft = self._drafter.propose(budget)
        assert draft.tree.is_chain
        used = draft.num_nodes[0] if draft.num_nodes is not None else draft.tree.num_nodes
        self.drafts.append(draft.tokens_BN[0, 1:used].tolist())
        return draft


class StepSizes:
    """A streamer that records the number of tokens of each step."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def put(self, tokens: torch.Tensor) -> None:
        self.sizes.append(len(tokens))

    def end(self) -> None:
        """Does nothing."""


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("num_slots", [1, 3])
def test_proposer_drafts_and_accepts_as_generate_does(
    target: Target, texts: list[list[int]], serve: Any, name: str, num_slots: int, tmp_path: Path
) -> None:
    """Each request has the same drafts and accepted lengths as in `generate` on its text alone."""
    drafter = drafter_of(name, target, texts, tmp_path)
    proposer = serve(drafter)
    requests = [Request(text, len(row)) for text, row in zip(texts, prompts(8), strict=True)]
    run_engine(proposer, requests, num_slots)
    for one in requests:
        # vLLM drafts after it has sampled the first token.
        recorder, steps = DraftRecorder(drafter), StepSizes()
        prompt = torch.tensor([one.text[: one.num_prompt + 1]])
        room = len(one.text) - one.num_prompt - 1
        draftsmith.generate(
            target, prompt, recorder, max_new_tokens=room, streamer=steps, length=drafter_length(drafter)
        )
        assert one.accepted == [size - 1 for size in steps.sizes[1 : len(one.accepted) + 1]]
        assert one.drafts == recorder.drafts[: len(one.drafts)]
    # Trigrams learnt from two dozen tokens only are rarely accepted.
    minimum = 1 if name == "trigram" else 20
    assert sum(sum(one.accepted) for one in requests) > minimum, "too few accepted tokens"


def drafter_length(drafter: Any) -> str:
    return drafter.config.length if getattr(drafter.config, "supports_early_stop", False) else "fixed"


def test_propose_respects_draft_length_and_context_length(target: Target, texts: list[list[int]], serve: Any) -> None:
    proposer = serve(built(ngram, CONFIGS["ngram"], target), num_draft=3, max_length=20)
    text_BT = np.array([texts[0][:21]], dtype=np.int32)
    lengths = {}
    for number in (14, 16, 17, 18, 19, 20):
        (draft,) = proposer.propose([[1]], np.array([number]), text_BT)
        lengths[number] = len(draft)
    assert lengths == {14: 3, 16: 3, 17: 2, 18: 1, 19: 0, 20: 0}


def test_propose_returns_the_most_likely_path_of_a_tree(target: Target, texts: list[list[int]], serve: Any) -> None:
    """Of three texts with the same beginning the most frequent is drafted, not the first."""
    store = build([np.array([9, 10, 11, 30, 31]), *[np.array([9, 10, 11, 40, 41])] * 2], VOCAB_SIZE)
    text_BT, number_B = np.array([[5, 9, 10, 11]]), np.array([4])
    for family in (rest, suffix):
        drafter = family.Drafter(family.Config(), target, (store,))
        assert serve(drafter).propose([[11]], number_B, text_BT)[0][:2] == [40, 41]


def test_recycling_drafts_from_an_unchanged_successor_matrix(target: Target, serve: Any) -> None:
    """vLLM passes no logits to update it from."""
    tree = ((0,), (1,), (0, 0), (0, 0, 0))
    drafter = recycling.Drafter(recycling.Config(num_successors=2, tree=tree), target)
    drafter.successors[:VOCAB_SIZE] = torch.arange(1, VOCAB_SIZE + 1)[:, None] % VOCAB_SIZE
    proposer = serve(drafter)
    text_BT = np.array([[7, 8, 9, 10, 20]])
    assert proposer.propose([[7]], np.array([1]), text_BT) == [[8, 9, 10]]
    assert proposer.propose([[8, 9, 10, 20]], np.array([5]), text_BT) == [[21, 22, 23]]


def test_suffix_drafter_remembers_finished_requests(target: Target, texts: list[list[int]], serve: Any) -> None:
    config = suffix.Config(num_draft=NUM_DRAFT)
    proposer = serve(suffix.Drafter(config, target))
    num_accepted = []
    for _ in range(2):
        requests = [Request(text, len(row)) for text, row in zip(texts, prompts(8), strict=True)]
        run_engine(proposer, requests, 2)
        num_accepted.append(sum(sum(one.accepted) for one in requests))
    assert num_accepted[1] > 1.3 * num_accepted[0]


@pytest.mark.parametrize("shape", ["whole", "tied", "parts"])
def test_token_target_reads_embedding_and_head_only(tmp_path: Path, shape: str) -> None:
    model = tiny_model("llama", tie_word_embeddings=shape == "tied")
    model.save_pretrained(tmp_path, max_shard_size="10KB" if shape == "parts" else "5GB")
    tiny_tokenizer().save_pretrained(tmp_path)
    found = TokenTarget(str(tmp_path), torch.float32, torch.device("cpu")).model
    assert torch.equal(found.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert torch.equal(found.get_output_embeddings().weight, model.get_output_embeddings().weight)
    first, last = found.get_input_embeddings().weight, found.get_output_embeddings().weight
    assert (first.data_ptr() == last.data_ptr()) == (shape == "tied")


def test_token_target_names_missing_weights(tmp_path: Path) -> None:
    tiny_model("llama").config.save_pretrained(tmp_path)
    target = TokenTarget(str(tmp_path), torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"tensor 'model.embed_tokens.weight', which this drafter needs"):
        assert target.model


def test_proposer_rejects_unsupported_artifacts(
    target: Target, tmp_path: Path, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="read hidden states"):
        serve(built(medusa, medusa.Config(num_heads=2, tree=((0,), (0, 0))), target))
    monkeypatch.delenv(ARTIFACT_VARIABLE)
    with pytest.raises(ValueError, match=f"{ARTIFACT_VARIABLE} is not set"):
        Proposer(config_of(target.name))
    monkeypatch.setenv(ARTIFACT_VARIABLE, str(tmp_path / "none"))
    with pytest.raises(ValueError, match="no such folder"):
        Proposer(config_of(target.name))
    tiny_model("t5").save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="is an encoder-decoder"):
        Proposer(config_of(str(tmp_path / "t5")))


def test_export_names_the_proposer_class() -> None:
    assert f"{Proposer.__module__}.{Proposer.__name__}" == PROPOSER
