"""Tests of n-gram drafts: the mixture of model and text against its formula, the drafts, and the trainer."""

from collections import Counter
from functools import partial
from math import log
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from safetensors.numpy import save_file

import draftsmith
from data import POCKET
from data.batches import collate, example
from data.prompts import load_prompts
from draftsmith import Target
from draftsmith.artifacts.artifact import read_manifest
from draftsmith.core.drafter import Session
from draftsmith.core.sampling import Sampling
from draftsmith.drafters.ngram import Config, Drafter
from draftsmith.drafters.ngram.kneser_ney import KneserNey
from tests.support import runs
from tests.support.distributions import PROMPT
from tests.support.family import Watched, check_family, check_greedy, texts
from tests.support.models import SEQ2SEQ, greedy_by_transformers, padded, prompts, tiny_target
from tests.support.runs import make_data, make_target, trainer_settings
from trainers import ngram
from trainers.corpora.kneser_ney import build, count_ngrams
from trainers.ngram import evaluate
from trainers.training.loop import train

EXAMPLE = Config(num_draft=4, length="fixed")
VOCAB_SIZE = 5
TOKENS = some.lists(some.integers(0, VOCAB_SIZE - 1), max_size=25)


def build_model(learnt: list[list[int]], order: int, vocab_size: int, folder: Path, **budget: float) -> KneserNey:
    """Returns the model of some texts, with its files in `folder`."""
    folder.mkdir(exist_ok=True)
    part = count_ngrams([np.array(text, dtype=np.int64) for text in learnt], order, vocab_size)
    save_file(part, folder / "part.safetensors")
    return build([folder / "part.safetensors"], order, vocab_size, folder / "store", **budget)


def family_with(learnt: list[list[int]], folder: Path) -> Any:
    """Returns a family for `check_family` whose drafters' models are built from these texts."""

    def make(config: Config, target: Target) -> Drafter:
        kept = [[token for token in text if token < target.vocab_size] for text in learnt]
        return Drafter(config, target, build_model(kept, config.order, target.vocab_size, folder))

    return SimpleNamespace(Drafter=make)


@pytest.mark.parametrize("sampled", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_family(tmp_path: Path, sampled: bool) -> None:
    own = [text for name in ("llama", "gemma2", "gpt2") for text in greedy_by_transformers(name, 5, 20)]
    config = Config(order=3, num_draft=4, sampled=sampled, length="confidence=0.1")
    check_family(family_with([*own, PROMPT, PROMPT[::-1]], tmp_path), config, tmp_path)


def tokens_only(vocab_size: int) -> Any:
    """Returns a placeholder for a target that runs no model."""
    return SimpleNamespace(vocab_size=vocab_size, device=torch.device("cpu"))


def start_drafter(
    drafter: Drafter, rows: list[list[int]], sources: list[list[int]] | None = None, **changes: Any
) -> Drafter:
    """Returns the drafter in a session with these rows."""
    source = None
    if sources is not None:
        source = SimpleNamespace(tokens_BT=torch.tensor(sources), mask_BT=torch.ones(len(sources), len(sources[0])))
    given = {
        "sampling": Sampling(),
        "should_continue": lambda row, probability: True,
        "generator": torch.Generator().manual_seed(0),
    }
    settings: Any = {"rows": rows, "source": source, "target": drafter.target, "cache": None, **given, **changes}
    drafter.start(Session(**settings))
    return drafter


def slow_probs(model: KneserNey, config: Config, text: list[int], recent: list[int]) -> np.ndarray:
    """Returns the last of P_0, P_1, ..., for the longest run of last tokens that something follows in the text."""
    probs_V = model.probs(model.path(recent))
    for size in range(1, min(max(config.order - 1, 1), len(recent)) + 1):
        followed = Counter(
            text[end] for end in range(size, len(text)) if text[end - size : end] == recent[len(recent) - size :]
        )
        if not followed:
            break
        share_V = np.array([followed[token] for token in range(model.vocab_size)]) / followed.total()
        probs_V = (1 - config.cache) * probs_V + config.cache * share_V
    return probs_V


@settings(max_examples=40, deadline=None)
@given(TOKENS, TOKENS, TOKENS.filter(len), some.integers(1, 5), some.sampled_from([0, 0.2, 0.9]))
def test_mixture_equals_its_formula(
    tmp_path_factory: pytest.TempPathFactory,
    learnt: list[int],
    source: list[int],
    row: list[int],
    order: int,
    cache: float,
) -> None:
    model = build_model([learnt], order, VOCAB_SIZE, tmp_path_factory.getbasetemp() / "store")
    config = Config(order=order, cache=cache, num_draft=3, length="fixed")
    drafter = start_drafter(Drafter(config, tokens_only(VOCAB_SIZE), model), [row], [source])
    chain = drafter.propose(3).tokens_BN[0].tolist()[1:]
    for position, token in enumerate(chain):
        recent = row[-order:] + chain[:position]
        expected_V = slow_probs(model, config, source + row, recent)
        assert drafter._probs(0, recent) == pytest.approx(expected_V, abs=1e-12)
        assert expected_V[token] >= expected_V.max() - 1e-12, "greedy drafts are the likeliest tokens"
        best, probability = drafter._best(0, recent)
        assert best == token and probability <= expected_V[token] * 1.001
        if probability < expected_V[token] * 0.999:
            assert probability > np.delete(expected_V, token).max(), "the bound proves that no token is likelier"


@pytest.mark.parametrize("sampling", [Sampling(temperature=1), Sampling(temperature=0.7, top_k=4, top_p=0.9)])
def test_draft_probs_are_the_sampled_distributions(tmp_path: Path, sampling: Sampling) -> None:
    """Each row of `draft_probs` is the mixture after temperature, top-k and top-p."""
    rows = [[3, 1, 2, 3, 1], [0], [2, 2, 2, 4]]
    model = build_model([[0, 1, 2, 3, 1, 4, 2, 2, 0] * 3], 3, VOCAB_SIZE, tmp_path)
    config = Config(order=3, num_draft=4, length="fixed")
    drafter = start_drafter(Drafter(config, tokens_only(VOCAB_SIZE), model), rows, sampling=sampling)
    drafts = [drafter.propose(4) for _ in range(20)]
    assert len({str(draft.tokens_BN.tolist()) for draft in drafts}) > 1
    for draft in drafts:
        assert draft.sampling_scheme == "independent" and draft.draft_probs_BNV is not None
        for row, (ids, probs_NV) in enumerate(zip(rows, draft.draft_probs_BNV, strict=True)):
            drafted = draft.tokens_BN[row, 1:].tolist()
            for position, token in enumerate(drafted):
                probs_V = torch.from_numpy(slow_probs(model, config, ids, ids[-3:] + drafted[:position]))
                assert torch.allclose(probs_NV[position].double(), sampling.probs(probs_V.log()), atol=1e-7)
                assert probs_NV[position, token] > 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_stop_when_the_policy_returns_false(tmp_path: Path, temperature: float) -> None:
    """The first row always continues, the second never; the policy gets the token's probability."""
    model, seen = build_model([[0, 1, 2, 3] * 8], 3, VOCAB_SIZE, tmp_path), []

    def should_continue(row: int, probability: float) -> bool:
        seen.append((row, probability))
        return row == 0

    drafter = Drafter(Config(order=3, num_draft=4), tokens_only(VOCAB_SIZE), model)
    start_drafter(drafter, [[0, 1], [2]], should_continue=should_continue, sampling=Sampling(temperature=temperature))
    draft = drafter.propose(3)
    assert draft.num_nodes == [4, 2] and draft.tree.is_chain and draft.tree.depth == 3
    assert sorted(row for row, _ in seen) == [0, 0, 0, 1]
    if temperature == 0:
        assert draft.tokens_BN[0].tolist() == [1, 2, 3, 0] and draft.tokens_BN[1, :2].tolist() == [2, 3]
        assert seen[0][1] == pytest.approx(slow_probs(model, drafter.config, [0, 1], [0, 1])[2], rel=1e-3)


@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize("architecture", SEQ2SEQ)
def test_source_of_an_encoder_decoder_is_mixed_in(architecture: str, sampled: bool, tmp_path: Path) -> None:
    """Without a model, drafts are copied from the source."""
    target = tiny_target(architecture)
    learnt = build_model(greedy_by_transformers(architecture, 5, 20), 4, target.vocab_size, tmp_path)
    check_greedy(Drafter(Config(order=4, num_draft=4), target, learnt), architecture)
    drafter = start_drafter(Drafter(Config(order=3, num_draft=3), target), [[0, 7, 8]], [[6, 7, 8, 9, 10, 11]])
    assert drafter.propose(3).tokens_BN[0].tolist() == [8, 9, 10, 11]
    ids, mask = padded(prompts(5), side="left")
    watched = Watched(Drafter(Config(num_draft=3, sampled=sampled), target, learnt))
    draftsmith.generate(target, ids, watched, attention_mask=mask, max_new_tokens=20, temperature=1.0, seed=0)
    assert watched.num_drafted > 0


def test_text_of_the_model_is_drafted_completely(tmp_path: Path) -> None:
    target = tiny_target("llama")
    rows = greedy_by_transformers("llama", 5, 20)
    model = build_model(rows, 5, target.vocab_size, tmp_path)
    ids, mask = padded(prompts(5))
    plain = draftsmith.generate(target, ids, attention_mask=mask, max_new_tokens=20)
    for cache in (0.0, 0.3):
        drafter = Drafter(Config(cache=cache, num_draft=4, length="fixed"), target, model)
        out = draftsmith.generate(target, ids, drafter, attention_mask=mask, max_new_tokens=20)
        assert texts(out) == texts(plain) == rows
        assert out.stats.steps <= 0.5 * plain.stats.steps


# --- The trainer -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny target in `target` and its text in `data`."""
    root = tmp_path_factory.mktemp("ngram")
    make_data(make_target(root / "target"), root / "data")
    return root


run_settings = partial(runs.run_settings, batch_size=4)


def test_resumed_build_gives_the_same_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngram, "ROWS_PER_CHUNK", 10)
    settings = trainer_settings(ngram, order=3, budget_mb=0.004)
    whole = train(ngram, settings, run_settings(folder, "whole"))
    broken, calls = run_settings(folder, "broken"), []

    def interrupted_count(*given: Any) -> dict[str, np.ndarray]:
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return count_ngrams(*given)

    monkeypatch.setattr(ngram, "count_ngrams", interrupted_count)
    with pytest.raises(KeyboardInterrupt):
        train(ngram, settings, broken)
    assert len([*(folder / "broken" / "parts").glob("*.safetensors")]) == 2
    train(ngram, settings, broken)
    assert len(calls) < 3 + 4, "finished parts are not counted again"
    files = {file.name: file.read_bytes() for file in whole.glob("*.npy")}
    assert len(files) == 9
    assert {file.name: file.read_bytes() for file in (folder / "broken").glob("*.npy")} == files
    assert not (whole / "parts").exists()
    assert sum(np.load(whole / name).nbytes for name in files) <= 4_000
    measured = read_manifest(whole)["measured_acceptance"]
    assert measured["acceptance"] >= 0 and 0 < measured["nats"] < log(64)
    drafter = draftsmith.load(whole, Target.from_pretrained(str(folder / "target"), dtype="float32"))
    assert drafter.config == settings.config and len(drafter.model.keys_C) > 1


def test_load_rejects_a_damaged_model(tmp_path: Path) -> None:
    target = tiny_target("llama")
    draftsmith.save(Drafter(Config(), target), tmp_path / "artifact", target=target)
    file = tmp_path / "artifact" / "keys_C.npy"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"keys_C\.npy is missing or truncated .* must be made again"):
        draftsmith.load(tmp_path / "artifact", target)


def test_evaluate_returns_the_models_nats(tmp_path: Path) -> None:
    """Two rows, the second with unsupervised first tokens."""
    target = tiny_target("llama")
    rows = [[5, 6, 7, 5, 6, 7], [9, 8, 5, 6]]
    model = build_model(rows, 3, target.vocab_size, tmp_path)
    batch = collate([example(rows[0], None, "a"), example(rows[1], [False, False, False, True], "b")])
    metrics = evaluate(Drafter(Config(order=3), target, model), batch, trainer_settings(ngram, order=3), target)
    supervised = [(rows[0][:end], rows[0][end]) for end in range(1, 6)] + [(rows[1][:3], 6)]
    expected = -sum(log(model.probs(model.path(text))[token]) for text, token in supervised)
    assert metrics["nats"][1] == 6 and float(metrics["nats"][0]) == pytest.approx(expected, rel=1e-5)
    assert metrics["acceptance"][1] > 0


@pytest.mark.slow
def test_kneser_ney_is_far_better_than_add_one_smoothing(tmp_path: Path) -> None:
    """Nats per held-out token of Python source, by the pocket target's tokenizer, against add-one of every order."""
    tokenizer = Target.from_pretrained(str(POCKET)).tokenizer
    found = load_prompts("python-source", tokenizer, max_prompts=600, max_prompt_tokens=256, long_prompts="cut")
    kept, held_out = [prompt.ids for prompt in found[60:]], [prompt.ids for prompt in found[:60]]
    model = build_model(kept, 5, len(tokenizer), tmp_path)
    held_out_pairs = [(text[max(0, end - 4) : end], text[end]) for text in held_out for end in range(1, len(text))]
    ours = -sum(log(model.token_probs(model.path(text), np.array([token]))[0]) for text, token in held_out_pairs) / len(
        held_out_pairs
    )
    theirs = []
    for size in range(3):
        met = Counter(tuple(text[end - size : end + 1]) for text in kept for end in range(size, len(text)))
        before = Counter(tuple(text[end - size : end]) for text in kept for end in range(size, len(text)))
        shares = [
            (met[*text[len(text) - size :], token] + 1) / (before[tuple(text[len(text) - size :])] + len(tokenizer))
            for text, token in held_out_pairs
        ]
        theirs.append(-sum(map(log, shares)) / len(held_out_pairs))
    assert ours < min(theirs) - 0.7, (ours, theirs)


def test_trainer_rejects_invalid_settings(tmp_path: Path) -> None:
    for setting, message in {
        ("order", 6): "order is 6; it must be 1 to 5",
        ("num_draft", 0): "num_draft is 0; it must be at least 1",
        ("cache", 1.0): "cache is 1.0; it must be at least 0 and below 1",
        ("length", "long"): "unknown length policy 'long'",
        ("budget_mb", -1.0): "budget_mb is -1.0; it must be at least 0",
    }.items():
        with pytest.raises(ValueError, match=message):
            trainer_settings(ngram, **dict([setting]))
    with pytest.raises(ValueError, match="too small for the 3 single tokens alone; give a larger one"):
        build_model([[1, 2, 3]], 2, 9, tmp_path, budget_mb=1e-6)
