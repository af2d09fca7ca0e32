"""Tests of the PARD drafter: its drafts against one forward over the whole text, and its model.

Shape suffixes: T positions, K drafted tokens, V vocabulary.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

import draftsmith
from draftsmith import Target
from draftsmith.drafters import pard
from draftsmith.drafters.pard import Config, Drafter
from tests.support.family import Watched, built, check_family
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


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"num_nodes": 9}, {"rank": 8, "shortlist": 7}], ids=["tree", "tied"])
def test_family_in_other_shapes(changes: dict[str, int], tmp_path: Path) -> None:
    check_family(pard, lambda target: small(target, **changes), tmp_path)


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
        ({"model": {"model_type": "llama", "vocab_size": 65}}, "has 65 tokens and the target's 64"),
        ({"model": {"vocab_size": 64}}, "names no model_type"),
    ):
        with pytest.raises(ValueError, match=message):
            Drafter(small(target, **changes), target)
    with pytest.raises(ValueError, match="is an encoder-decoder; PARD needs a causal target"):
        Drafter(small(target), tiny_target("t5"))
