"""Exports served by vLLM: the text is the target's, and the acceptance rate is that of draftsmith's own loop.

Loaders ignore unknown tensors and initialise missing ones at random; the text stays correct then, and the mistake
shows in the acceptance rate only.

Shape suffixes: T tokens, D hidden width, E widths of fused layers, W draft vocabulary.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

import draftsmith
from data import POCKET
from draftsmith import Target
from draftsmith.drafters import eagle3, early_exit, lm, lookup, lstm, medusa, ngram
from draftsmith.export import export
from draftsmith.export.launch import read_launch
from draftsmith.export.models import reduced_model
from eval.doctor.checks import check_export
from eval.doctor.serving import ServingCounts, agrees, run_draftsmith, run_vllm
from recipes import doctor
from tests.support.drafters import overfitted_dflash
from trainers.corpora import kneser_ney

pytest.importorskip("vllm")
pytestmark = pytest.mark.serving

NUM_NEW, NUM_DRAFT = 32, 3
PROMPTS = (
    "def add(a, b):\n    return",
    "import os\n\n\ndef read(path):\n",
    "class Stack:\n    def __init__(self):\n        self.",
    "for name in names:\n    print(",
    "def is_even(number):\n    if number",
    "with open(path) as file:\n    for line in",
    "try:\n    value = int(text)\nexcept",
    "def mean(values):\n    total = 0\n    for",
)


@pytest.fixture(scope="module")
def target() -> Target:
    return Target.from_pretrained(str(POCKET), dtype="float32")


@pytest.fixture(scope="module")
def rows(target: Target) -> list[list[int]]:
    return [target.tokenizer.encode(prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def texts(target: Target, rows: list[list[int]]) -> list[list[int]]:
    """Returns the target's greedy continuations, prompts included."""
    found = []
    for row in rows:
        out = draftsmith.generate(target, torch.tensor([row]), max_new_tokens=NUM_NEW + NUM_DRAFT, eos_token_id=[])
        found.append(out.sequences[0].tolist())
    return found


# --- Drafters, trained for seconds on the texts of the test --------------------------------------------------------


def train_drafter(drafter: Any, loss: Callable[[Tensor], Tensor], texts: list[list[int]], num_steps: int) -> Any:
    """Returns the drafter after a few training steps on the texts, so that it predicts a part of them."""
    drafter.train().requires_grad_(True)
    optimiser = torch.optim.Adam(drafter.parameters(), lr=2e-3)
    for _ in range(num_steps):
        for text in texts:
            loss(torch.tensor([text])).backward()
        optimiser.step()
        optimiser.zero_grad()
    return drafter.eval().requires_grad_(False)


def reduced_target(target: Target, texts: list[list[int]], folder: Path) -> Any:
    """Returns the target without two of its blocks, as a draft model with its own cache."""
    small = reduced_model(target, (0, 1, 2, 4, 6, 7))
    drafter = lm.Drafter(lm.Config(model=small.config.to_dict(), num_draft=NUM_DRAFT, length="fixed"), target)
    drafter.model.load_state_dict(small.state_dict())
    return drafter


def first_blocks(target: Target, texts: list[list[int]], folder: Path) -> Any:
    config = early_exit.Config(exit_layer=6, own_norm=False, num_draft=NUM_DRAFT, length="fixed")
    return early_exit.Drafter(config, target).eval()


def earliest_lookup(target: Target, texts: list[list[int]], folder: Path) -> Any:
    return lookup.Drafter(lookup.Config(num_draft=NUM_DRAFT, max_ngram=2, earliest=True), target)


def ngram_model(target: Target, texts: list[list[int]], folder: Path) -> Any:
    config = ngram.Config(num_draft=NUM_DRAFT, length="fixed", order=3)
    known = [np.array(text) for text in texts[::2]]
    save_arrays(kneser_ney.count_ngrams(known, config.order, target.vocab_size), folder / "part.safetensors")
    files = [folder / "part.safetensors"]
    return ngram.Drafter(config, target, kneser_ney.build(files, config.order, target.vocab_size, folder / "store"))


def lstm_model(target: Target, texts: list[list[int]], folder: Path) -> Any:
    torch.manual_seed(0)
    drafter = lstm.Drafter(lstm.Config(hidden_size=64, rank=32, num_draft=NUM_DRAFT, length="fixed"), target)
    drafter.tied_head.init_principal_directions()

    def loss(tokens_1T: Tensor) -> Tensor:
        return functional.cross_entropy(drafter.head()(drafter(tokens_1T[:, :-1]))[0], tokens_1T[0, 1:])

    return train_drafter(drafter, loss, texts, 60)


def medusa_heads(target: Target, texts: list[list[int]], folder: Path) -> Any:
    torch.manual_seed(0)
    tree = tuple((0,) * depth for depth in range(1, NUM_DRAFT + 1))
    drafter = medusa.Drafter(medusa.Config(num_heads=NUM_DRAFT, tree=tree), target)

    def loss(tokens_1T: Tensor) -> Tensor:
        with torch.no_grad():
            normed_1TD = target.norm(target.read(tokens_1T, drafter.hidden_layers)[target.num_layers])
        losses = []
        for number, z_1TD in enumerate(drafter.heads(normed_1TD), start=2):
            logits_TV = drafter.head(number - 2, z_1TD)[0, :-number]
            losses.append(functional.cross_entropy(logits_TV, tokens_1T[0, number:]))
        return torch.stack(losses).sum()

    return train_drafter(drafter, loss, texts, 12)


def eagle3_head(target: Target, texts: list[list[int]], folder: Path) -> Any:
    torch.manual_seed(0)
    config = eagle3.Config(
        layers=(2, 4, 5),
        num_heads=4,
        num_kv_heads=2,
        head_width=64,
        inner_width=256,
        draft_vocab=1024,
        num_draft=NUM_DRAFT,
        width=0,
    )
    drafter = eagle3.Drafter(config, target)
    seen = {token for text in texts for token in text}
    unseen = [token for token in range(7, target.vocab_size, 3) if token not in seen]
    drafter.set_vocabulary(torch.tensor(sorted([*seen, *unseen[: config.draft_vocab - len(seen)]])))
    with torch.no_grad():
        drafter.head.weight.copy_(target.model.get_output_embeddings().weight[drafter.vocabulary()])
    draft_ids_V = torch.full((target.vocab_size,), -1)
    draft_ids_V[drafter.vocabulary()] = torch.arange(config.draft_vocab)

    def loss(tokens_1T: Tensor) -> Tensor:
        with torch.no_grad():
            joined_1TE = drafter.join(target.read(tokens_1T, drafter.hidden_layers))[:, :-2]
        positions_1T = torch.arange(joined_1TE.shape[1])[None]
        features_1TD, losses = drafter.fuse(joined_1TE), []
        # The first token is drafted from the target's features, the second from the head's own.
        for skipped in (0, 1):
            input_1T = tokens_1T[:, 1 + skipped : -1]
            positions = positions_1T[:, : input_1T.shape[1]]
            features_1TD, normed_1TD = drafter(
                input_1T, features_1TD, lambda x_1TE, at=positions: drafter.attention(x_1TE, at)
            )
            labels_T = draft_ids_V[tokens_1T[0, 2 + skipped :]]
            losses.append(functional.cross_entropy(drafter.head(normed_1TD)[0], labels_T))
            features_1TD = features_1TD[:, :-1]
        return torch.stack(losses).sum()

    return train_drafter(drafter, loss, texts, 24)


def dflash_blocks(target: Target, texts: list[list[int]], folder: Path) -> Any:
    """Returns layers trained on half of the texts."""
    shape = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_width": 64, "inner_width": 256}
    return overfitted_dflash(target, texts[::2], num_steps=40, layers=(2, 4, 6), block_size=NUM_DRAFT + 1, **shape)


MAKERS = {
    "draft_model": reduced_target,
    "first_blocks": first_blocks,
    "lookup": earliest_lookup,
    "ngram": ngram_model,
    "lstm": lstm_model,
    "medusa": medusa_heads,
    "head": eagle3_head,
    "block": dflash_blocks,
}


# --- vLLM beside draftsmith ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(target: Target, rows: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> ServingCounts:
    return run_vllm(sys.executable, target, rows, NUM_NEW, tmp_path_factory.mktemp("plain") / "run")


def test_plain_decoding_gives_the_same_text(
    plain: ServingCounts, rows: list[list[int]], texts: list[list[int]]
) -> None:
    assert plain.texts == [text[len(row) : len(row) + NUM_NEW] for row, text in zip(rows, texts, strict=True)]


@pytest.mark.parametrize(
    ("name", "to"), [*((name, "vllm") for name in MAKERS), ("head", "speculators"), ("block", "speculators")]
)
def test_vllm_and_draftsmith_accept_the_same_number_of_tokens(
    target: Target,
    rows: list[list[int]],
    texts: list[list[int]],
    plain: ServingCounts,
    tmp_path: Path,
    name: str,
    to: str,
) -> None:
    drafter = MAKERS[name](target, texts, tmp_path)
    expected = run_draftsmith(drafter, rows, NUM_NEW, NUM_DRAFT)
    draftsmith.save(drafter, tmp_path / "artifact", target)
    launch = read_launch(export(tmp_path / "artifact", to, tmp_path / "out"))
    found = run_vllm(sys.executable, target, rows, NUM_NEW, tmp_path / "run", launch)
    print(
        f"{name} {to}: vLLM {found.num_drafts} {found.accepted}, draftsmith {expected.num_drafts} {expected.accepted}"
    )
    assert found.texts == plain.texts
    if name == "lookup":  # vLLM counts no draft where nothing matches, and copies no further than the text's end
        found = dataclasses.replace(found, num_drafts=expected.num_drafts)
    else:
        assert found.num_drafted == NUM_DRAFT * found.num_drafts
    assert sum(expected.accepted) > 20 and expected.accepted[1] > 0, "too few accepted tokens for a comparison"
    assert expected.accepted[0] < expected.num_drafts, "everything is accepted: no comparison is possible"
    assert agrees(found, expected), (found, expected)


def test_doctor_checks_an_export_in_vllm(target: Target, texts: list[list[int]], tmp_path: Path) -> None:
    draftsmith.save(reduced_target(target, texts, tmp_path), tmp_path / "artifact", target)
    arguments = {"data": "python-source", "num_prompts": 3, "max_new_tokens": 24, "num_positions": 24, "depth": 4}
    run = doctor.DoctorSettings(
        draft=str(tmp_path / "artifact"), output=str(tmp_path / "out"), vllm_python=sys.executable, **arguments
    )
    doctor.main(run)
    report = json.loads((tmp_path / "out" / "doctor.json").read_text())
    assert next(one["verdict"] for one in report["findings"] if one["name"] == "export") == "ok"
    shares = report["accepted_per_depth"]
    assert shares["decoding, vLLM"] == pytest.approx(shares[f"decoding, {NUM_DRAFT} tokens"], abs=0.1)


def test_check_export_detects_a_missing_tensor(
    target: Target, rows: list[list[int]], texts: list[list[int]], plain: ServingCounts, tmp_path: Path
) -> None:
    """vLLM loads a head with a missing tensor without a warning: its text is correct, its acceptance rate differs."""
    drafter = eagle3_head(target, texts, tmp_path)
    draftsmith.save(drafter, tmp_path / "artifact", target)
    out = export(tmp_path / "artifact", "vllm", tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    del tensors["fc.weight"]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    found = run_vllm(sys.executable, target, rows, NUM_NEW, tmp_path / "run", read_launch(out))
    expected = run_draftsmith(drafter, rows, NUM_NEW, NUM_DRAFT)
    print(f"missing: vLLM {found.num_drafts} {found.accepted}, draftsmith {expected.num_drafts} {expected.accepted}")
    assert found.texts == plain.texts
    assert check_export(found, expected, is_tree=False).verdict == "fault", (found, expected)
