"""Tests of the PARD drafter: its drafts against one forward over the whole text, and its model.

Shape suffixes: T positions, K drafted tokens, V vocabulary.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

import draftsmith
from draftsmith import Target
from draftsmith.drafters import cascade, lookup, merge, pard, staged
from draftsmith.drafters.pard import Config, Drafter
from tests.drafters.test_every_family import Changing
from tests.support.family import Watched, built, check_family, check_greedy, part_config
from tests.support.models import VOCAB_SIZE, prompts, tiny_config, tiny_target
from tests.support.runs import trainer_settings
from trainers import pard as trainer


def small(target: Target, architecture: str = "llama", **settings: Any) -> Config:
    """Returns the configuration of a small model with the target's vocabulary."""
    model = tiny_config(architecture, vocab_size=target.vocab_size, num_hidden_layers=1).to_dict()
    return Config(**{"model": model, "mask_token": target.vocab_size - 1, "num_draft": 4} | settings)


EXAMPLE = small


def test_family(tmp_path: Path) -> None:
    check_family(pard, small, tmp_path, trainer=trainer, settings=trainer_settings(trainer, num_draft=4))


SHAPES: list[dict[str, Any]] = [
    {"features": (0, 2)},
    {"num_nodes": 9},
    {"rank": 8, "shortlist": 7},
    {"rank": 8, "features": (1,), "num_nodes": 5},
]


@pytest.mark.slow
@pytest.mark.parametrize("changes", SHAPES, ids=["features", "tree", "tied", "all"])
def test_family_in_other_shapes(changes: dict[str, Any], tmp_path: Path) -> None:
    check_family(pard, lambda target: small(target, **changes), tmp_path)


@pytest.mark.slow
def test_family_with_features(tmp_path: Path) -> None:
    settings = trainer_settings(trainer, num_draft=4, features=(0, 2), loss="pard2")
    check_family(pard, lambda target: small(target, features=(0, 2)), tmp_path, trainer=trainer, settings=settings)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text", "qwen3"])
def test_features_are_added_to_the_next_token_and_repeated_for_masks(architecture: str) -> None:
    """In a ragged batch, after several rounds: the drafts of one forward over the embeddings with features, uncached.

    One of the prompts is a single token, of which the target has no hidden state yet.
    """
    target = tiny_target("llama", dtype=torch.float64)
    model = tiny_config(architecture, vocab_size=target.vocab_size).to_dict()
    drafter = built(pard, Config(model=model, mask_token=63, num_draft=4, features=(0, 1, 2)), target)
    embed = drafter.model.get_input_embeddings()
    compared = changed = 0

    class Compared(Watched):
        def propose(self, budget: int) -> Any:
            nonlocal compared, changed
            draft = super().propose(budget)
            for row, ids in enumerate(self._session.rows):
                states = target.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
                hidden_TE = torch.cat(states[:3], -1)[0]
                added_TD = 0.02 * hidden_TE @ drafter.projection.weight.T
                added_TD = torch.cat([torch.zeros_like(added_TD[:1]), added_TD[:-1]])
                read = torch.tensor([[*ids, 63, 63, 63]])
                added_TD = torch.cat([added_TD, added_TD[-1:].expand(3, -1)])
                logits_KV = drafter.model(inputs_embeds=embed(read) + added_TD).logits[0, -4:]
                drafted = draft.tokens_BN[row, 1:].tolist()
                assert drafted == logits_KV.argmax(-1)[: len(drafted)].tolist()
                alone_KV = drafter.model(input_ids=read).logits[0, -4:]
                compared += 1
                changed += drafted != alone_KV.argmax(-1)[: len(drafted)].tolist()
            return draft

    rows = [[5], *prompts(3)]
    draftsmith.generate(target, rows, Compared(drafter), max_new_tokens=8)
    assert compared >= 2 * len(rows) and changed > 0


def test_long_prompts_are_read_in_parts_with_their_features(monkeypatch: pytest.MonkeyPatch) -> None:
    target = tiny_target("llama", dtype=torch.float64)
    drafter = built(pard, small(target, features=(1, 2)), target)
    drafts = []
    for size in (512, 3):
        monkeypatch.setattr(pard, "PREFILL_CHUNK", size)
        watched = Watched(drafter)
        draftsmith.generate(target, prompts(4), watched, max_new_tokens=6)
        drafts.append(watched.drafts)
    assert drafts[0] == drafts[1]


def test_rows_that_come_and_go_keep_their_features() -> None:
    """The drafts are those of a drafter that starts again with each change."""
    target, found = tiny_target("llama", dtype=torch.float64), []
    for restarts in (False, True):
        changing = Changing(built(pard, small(target, features=(0, 2)), target), restarts=restarts)
        settings: dict[str, Any] = {"batch_size": 3, "max_new_tokens": 20, "eos_token_id": tuple(range(3, 64, 9))}
        stream = draftsmith.generate_stream(target, prompts(9), changing, length="fixed", **settings)
        written = {text.index: text.new_ids for text in stream}
        plain = draftsmith.generate_stream(target, prompts(9), **settings)
        assert written == {text.index: text.new_ids for text in plain}
        assert len(changing.followed) > 4 and all(changing.followed) != restarts
        found.append(changing.drafts)
    assert found[0] == found[1]


@pytest.mark.parametrize("family", [cascade, merge, staged])
def test_parts_of_composites_get_their_features(family: Any) -> None:
    """A staged drafter decodes with the model alone, so without features, and is lossless as well."""
    target = tiny_target("llama")
    parts = (
        part_config("pard", small(target, features=(0, 2))),
        part_config("lookup", lookup.Config(max_ngram=2)),
    )
    drafter = built(family, family.Config(parts=parts), target)
    check_greedy(drafter, "llama")


def test_a_small_drafter_of_a_staged_one_may_not_read_features() -> None:
    target = tiny_target("llama")
    parts = (part_config("pard", small(target)), part_config("pard", small(target, features=(1,))))
    with pytest.raises(ValueError, match="pard reads hidden layers; the small drafter must read the text alone"):
        staged.Drafter(staged.Config(parts=parts), target)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_drafts_are_those_of_a_forward_over_text_and_masks(architecture: str) -> None:
    """In a ragged batch, after several rounds, without a cache: the likeliest tokens after the text and each mask."""
    target = tiny_target("llama", dtype=torch.float64)
    changes = {} if architecture == "llama" else {"num_hidden_layers": 3}
    model = tiny_config(
        architecture, **({"num_hidden_layers": 1} if architecture == "llama" else {}) | changes
    ).to_dict()
    drafter = built(pard, Config(model=model, mask_token=63, num_draft=4), target)
    compared = 0

    class Compared(Watched):
        def propose(self, budget: int) -> Any:
            nonlocal compared
            draft = super().propose(budget)
            for row, ids in enumerate(self._session.rows):
                read = torch.tensor([[*ids, 63, 63, 63]])
                logits_KV = drafter.model(input_ids=read).logits[0, -4:]
                drafted = draft.tokens_BN[row, 1:].tolist()
                assert drafted == logits_KV.argmax(-1)[: len(drafted)].tolist()
                compared += 1
            return draft

    rows = prompts(4)
    draftsmith.generate(target, rows, Compared(drafter), max_new_tokens=8)
    assert compared >= 2 * len(rows)


def test_one_forward_drafts_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    target = tiny_target("llama")
    drafter = built(pard, small(target), target)
    widths: list[int] = []
    forward = drafter.draft_model.forward
    monkeypatch.setattr(
        drafter.draft_model,
        "forward",
        lambda tokens_BN, *given, **options: widths.append(tokens_BN.shape[1]) or forward(tokens_BN, *given, **options),
    )
    watched = Watched(drafter)
    draftsmith.generate(target, [[5, 6, 7]], watched, max_new_tokens=12)
    # The prompt without its last token; then, in each round, the unread tokens and three masks.
    assert len(widths) == 1 + len(watched.drafts) and widths[:2] == [2, 4]


def test_wrong_shapes_are_rejected() -> None:
    target = tiny_target("llama")
    for changes, message in (
        ({"mask_token": VOCAB_SIZE}, f"mask_token is {VOCAB_SIZE}; .* so it must be less"),
        ({"num_draft": 0}, "num_draft is 0; it must be at least 1"),
        ({"features": (1, 9)}, r"features is \[1, 9\]; .* has hidden layers 0 to 3"),
        ({"features": (2, 1)}, "list hidden layers from 0 up in ascending order, none twice"),
        ({"model": {"model_type": "llama", "vocab_size": 65}}, "has 65 tokens and the target's 64"),
        ({"model": {"vocab_size": 64}}, "names no model_type"),
    ):
        with pytest.raises(ValueError, match=message):
            Drafter(small(target, **changes), target)
    with pytest.raises(ValueError, match="is an encoder-decoder; PARD needs a causal target"):
        Drafter(small(target), tiny_target("t5"))
