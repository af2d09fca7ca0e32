"""Tests of the LSTM drafter and its trainer; see also tests/support/families/recurrent_checks.py."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import draftsmith
from draftsmith.drafters import lstm
from draftsmith.drafters.lstm import Config, Drafter, dropped
from draftsmith.parts.neural import tied_heads
from tests.support.families.recurrent_checks import (
    check_on_policy,
    check_recurrent,
    check_run_on_pairs,
    check_shortlist,
    check_steps,
    source_of,
)
from tests.support.family import built, check_family
from tests.support.models import VOCAB_SIZE, padded, prompts, tiny_model, tiny_target
from tests.support.runs import trainer_settings
from trainers import lstm as trainer

SETTINGS = trainer_settings(trainer, hidden_size=24, num_layers=2, rank=16, loss="lk_hybrid")
EXAMPLE = Config(hidden_size=24, num_layers=2, rank=8, num_draft=4, length="refit=0.1")


def with_config(**changes: Any) -> trainer.Settings:
    """Returns SETTINGS with changes of the drafter's configuration."""
    return dataclasses.replace(SETTINGS, config=dataclasses.replace(SETTINGS.config, **changes))


def test_family(tmp_path: Path) -> None:
    check_family(lstm, EXAMPLE, tmp_path, trainer=trainer, settings=SETTINGS)


def test_shortlist(tmp_path: Path) -> None:
    check_shortlist(lstm, EXAMPLE, trainer, SETTINGS, tmp_path)


def test_repeated_on_policy_batches() -> None:
    check_on_policy(lstm, EXAMPLE)


def test_training_run_on_encoder_decoder(tmp_path: Path) -> None:
    check_run_on_pairs(trainer, SETTINGS, tmp_path)


@pytest.mark.parametrize(
    ("architecture", "copy"),
    [
        ("t5", True),
        pytest.param("bart", False, marks=pytest.mark.slow),
        pytest.param("t5", False, marks=pytest.mark.slow),
        pytest.param("bart", True, marks=pytest.mark.slow),
    ],
)
def test_family_on_encoder_decoder(architecture: str, copy: bool, tmp_path: Path) -> None:
    config = dataclasses.replace(EXAMPLE, copy=copy)
    settings = with_config(copy=copy)
    check_family(lstm, config, tmp_path, architectures=(architecture,), trainer=trainer, settings=settings)
    check_recurrent(lstm, config, architecture)


@pytest.mark.parametrize("config", [EXAMPLE, Config(hidden_size=20, num_layers=1, rank=32, num_draft=4)])
def test_drafts_follow_the_networks_distribution(config: Config) -> None:
    check_recurrent(lstm, config)


def test_large_vocabularies_use_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tied_heads, "MAX_TABLE", 0)
    with torch.inference_mode():
        check_steps(built(lstm, EXAMPLE, tiny_target("llama")))


def test_cell_matches_torch() -> None:
    torch.manual_seed(0)
    gates_BG, c_BH = torch.randn(3, 32), torch.randn(3, 8)
    ours = lstm.cell(gates_BG, c_BH)
    theirs = nn.LSTMCell(32, 8)
    # The cell's gates are its input: input, forget, candidate, output.
    with torch.no_grad():
        theirs.weight_ih.copy_(torch.eye(32)[[*range(16), *range(24, 32), *range(16, 24)]])
        theirs.weight_hh.zero_(), theirs.bias_ih.zero_(), theirs.bias_hh.zero_()
        torch.testing.assert_close(ours, theirs(gates_BG, (torch.zeros(3, 8), c_BH)))


def test_tied_matrices_are_neither_trained_nor_saved() -> None:
    target = draftsmith.Target(tiny_model("llama"))  # not shared: other tests leave gradients behind
    drafter = Drafter(EXAMPLE, target)
    assert {name.split(".")[0] for name in drafter.state_dict()} == {"tied_head", "layers"}
    assert all(VOCAB_SIZE not in weight.shape[:1] or weight.ndim == 1 for weight in drafter.parameters())
    drafter(torch.tensor([[5, 6]])).sum().backward()
    assert target.model.get_input_embeddings().weight.grad is None


def test_dropout_and_drop_connect() -> None:
    """Dropout zeroes the same entries at all positions; drop-connect changes all positions but the first."""
    torch.manual_seed(0)
    kept = dropped(torch.ones(2, 5, 400), 0.25)
    assert torch.equal(kept, kept[:, :1].expand_as(kept))
    assert kept.unique().tolist() == pytest.approx([0, 4 / 3]) and kept.mean().item() == pytest.approx(1, abs=0.05)
    drafter, tokens_BT = built(lstm, Config(hidden_size=24, rank=32), tiny_target("llama")), torch.arange(3, 11)[None]
    whole, less = drafter(tokens_BT), drafter(tokens_BT, drop_connect=0.5)
    torch.testing.assert_close(less[:, 0], whole[:, 0])
    assert (less[:, 1:] - whole[:, 1:]).abs().amax(-1).min() > 1e-3
    assert torch.equal(drafter(tokens_BT), whole)
    less.sum().backward()
    assert drafter.layers.weight_hh_l0.grad.abs().max() > 0


def test_float32_drafter_with_bfloat16_target() -> None:
    """The dtypes of mixed-precision training."""
    for architecture, copy in (("llama", False), ("t5", True)):
        target = draftsmith.Target(tiny_model(architecture).bfloat16())
        drafter = trainer.build(with_config(copy=copy), target)
        source = source_of(target, 2)
        with torch.autocast("cpu", torch.bfloat16):
            logits_BTV = drafter.head(source)(drafter(torch.tensor([[5, 6, 7], [7, 6, 5]]), source))
            functional.cross_entropy(logits_BTV.flatten(0, 1).float(), torch.tensor([6, 7, 8, 6, 5, 4])).backward()
        assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in drafter.parameters())
        # It is saved in the target's dtype.
        again = drafter.to(torch.bfloat16).eval()
        ids, mask = padded(prompts(5))
        out = draftsmith.generate(target, ids, again, attention_mask=mask, max_new_tokens=4, temperature=1.0, seed=0)
        assert out.stats.new_tokens == 20


def test_invalid_settings_are_rejected() -> None:
    cases = [
        ("hidden_size is 0", {"hidden_size": 0}),
        ("num_layers is 0", {"num_layers": 0}),
        ("rank is 0", {"rank": 0}),
        ("num_draft is 0", {"num_draft": 0}),
        ("dropout is 1", {"dropout": 1.0}),
        ("drop_connect is -0.1", {"drop_connect": -0.1}),
        ("choose a --loss besides ce", {"teacher_top_k": 4}),
        ("unknown length policy", {"length": "long"}),
    ]
    for message, changes in cases:
        with pytest.raises(ValueError, match=message):
            trainer_settings(trainer, **changes)
    for rejects in (trainer.check, trainer.build):
        with pytest.raises(ValueError, match="it has no source to copy from"):
            rejects(with_config(copy=True), tiny_target("llama"))
    with pytest.raises(ValueError, match="width is 2, for trees, and .* is an encoder-decoder: it verifies chains"):
        trainer.check(with_config(width=2), tiny_target("t5"))
