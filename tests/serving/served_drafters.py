"""Drafters that serving tests export: trained for seconds on greedy texts of the pocket target.

Shape suffixes: T tokens, D hidden width, E widths of fused layers, W draft vocabulary.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file as save_arrays
from torch import Tensor
from torch.nn import functional

import draftsmith
from data.batches import collate, example
from data.teacher import complete
from draftsmith import Target
from draftsmith.drafters import eagle3, early_exit, lm, lookup, lstm, medusa, ngram, pard
from draftsmith.export.models import reduced_model
from eval.doctor.serving import ServingCounts
from tests.support.drafters import overfitted_dflash
from tests.support.families.mtp_targets import write_target
from trainers import import_mtp, mtp
from trainers.corpora import kneser_ney
from trainers.training.run_settings import RunSettings

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


def greedy_texts(target: Target, rows: list[list[int]]) -> list[list[int]]:
    """Returns the target's greedy continuations, prompts included."""
    found = []
    for row in rows:
        out = draftsmith.generate(target, torch.tensor([row]), max_new_tokens=NUM_NEW + NUM_DRAFT, eos_token_id=[])
        found.append(out.sequences[0].tolist())
    return found


def new_tokens(rows: list[list[int]], texts: list[list[int]]) -> list[list[int]]:
    """Returns the first new tokens of each text."""
    return [text[len(row) : len(row) + NUM_NEW] for row, text in zip(rows, texts, strict=True)]


def show(name: str, found: ServingCounts, expected: ServingCounts) -> None:
    """Prints the rounds, and the drafts accepted at each position, in an engine and in draftsmith."""
    print(f"{name}: {found.num_drafts} {found.accepted}, expected {expected.num_drafts} {expected.accepted}")


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


def eagle3_tree(target: Target, texts: list[list[int]], folder: Path) -> Any:
    """Returns the same head, which drafts dynamic trees."""
    chains = eagle3_head(target, texts, folder)
    drafter = eagle3.Drafter(replace(chains.config, width=4, num_nodes=10), target)
    drafter.load_state_dict(chains.state_dict())
    return drafter.eval()


def parallel_model(target: Target, texts: list[list[int]], folder: Path) -> Any:
    """Returns the reduced target as a draft model that drafts in parallel, for which it is not trained."""
    small = reduced_target(target, texts, folder)
    config = pard.Config(model=small.config.model, mask_token=target.vocab_size - 1, num_draft=NUM_DRAFT)
    drafter = pard.Drafter(config, target)
    drafter.model.load_state_dict(small.model.state_dict())
    return drafter.eval()


def dflash_blocks(target: Target, texts: list[list[int]], folder: Path) -> Any:
    """Returns layers trained on the texts."""
    shape = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_width": 64, "inner_width": 256}
    return overfitted_dflash(target, texts, num_steps=300, layers=(2, 4, 6), block_size=NUM_DRAFT + 1, **shape)


def well_trained_block(target: Target, texts: list[list[int]], folder: Path) -> Any:
    """Returns DFlash layers that predict more than the first token of some blocks."""
    shape = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_width": 64, "inner_width": 256}
    return overfitted_dflash(target, texts, num_steps=160, layers=(2, 4, 6), block_size=NUM_DRAFT + 1, **shape)


def biased_block(target: Target, texts: list[list[int]], folder: Path) -> Any:
    """Returns such layers with DSpark's heads: a bias by the token before, and a confidence."""
    shape = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_width": 64, "inner_width": 256}
    heads = {"markov_rank": 16, "confidence": True}
    return overfitted_dflash(target, texts, num_steps=160, layers=(2, 4, 6), block_size=NUM_DRAFT + 1, **shape, **heads)


def mtp_head(folder: Path) -> tuple[Any, list[list[int]]]:
    """Writes a tiny target of MiMo-7B's form; returns its head, trained a little on its texts, and the prompts."""
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}
    write_target(folder, "mimo", **sizes)
    target = Target.from_pretrained(str(folder), dtype="float32")
    drafter = import_mtp.fit(import_mtp.Settings(num_draft=NUM_DRAFT), target, [], RunSettings(), folder)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, target.vocab_size, (12,), generator=generator).tolist() for _ in range(8)]
    examples = [
        example(text, [position >= 12 for position in range(len(text))], str(row))
        for row, text in enumerate(greedy_texts(target, rows))
    ]
    batch, settings = complete(collate(examples), target, (target.num_layers,)), mtp.Settings()
    optimiser = torch.optim.Adam([one for one in drafter.parameters() if one.requires_grad], lr=5e-3)
    for _ in range(14):
        mtp.loss(drafter, batch, settings, target)[0].backward()
        optimiser.step()
        optimiser.zero_grad()
    return drafter.requires_grad_(False), rows


MAKERS = {
    "draft_model": reduced_target,
    "first_blocks": first_blocks,
    "lookup": earliest_lookup,
    "ngram": ngram_model,
    "lstm": lstm_model,
    "medusa": medusa_heads,
    "head": eagle3_head,
    "block": dflash_blocks,
    "well_trained_block": well_trained_block,
    "biased_block": biased_block,
    "tree": eagle3_tree,
    "parallel": parallel_model,
}
