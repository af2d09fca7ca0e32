"""Tests of the convolutional drafter and its trainer; see also tests/support/families/recurrent_checks.py."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

import draftsmith
from draftsmith.drafters import cnn
from draftsmith.drafters.cnn import Config, Drafter
from tests.support.families.recurrent_checks import (
    check_on_policy,
    check_recurrent,
    check_run_on_pairs,
    check_shortlist,
    source_of,
)
from tests.support.family import built, check_family, check_greedy
from tests.support.models import VOCAB_SIZE, padded, prompts, tiny_model, tiny_target
from tests.support.runs import trainer_settings
from trainers import cnn as trainer

SETTINGS = trainer_settings(trainer, num_channels=24, rank=16, loss="tvd", teacher_top_k=8, on_policy=0.5)
EXAMPLE = Config(num_channels=24, rank=8, num_draft=4, length="refit=0.1")


def with_config(**changes: Any) -> trainer.Settings:
    """Returns SETTINGS with changes of the drafter's configuration."""
    return dataclasses.replace(SETTINGS, config=dataclasses.replace(SETTINGS.config, **changes))


def test_family(tmp_path: Path) -> None:
    check_family(cnn, EXAMPLE, tmp_path, trainer=trainer, settings=SETTINGS)


@pytest.mark.slow
def test_shortlist(tmp_path: Path) -> None:
    check_shortlist(cnn, EXAMPLE, trainer, SETTINGS, tmp_path)


def test_repeated_on_policy_batches() -> None:
    check_on_policy(cnn, EXAMPLE)


@pytest.mark.slow
def test_training_run_on_encoder_decoder(tmp_path: Path) -> None:
    check_run_on_pairs(trainer, SETTINGS, tmp_path)


def test_greedy_output_of_an_encoder_decoder() -> None:
    check_greedy(built(cnn, dataclasses.replace(EXAMPLE, copy=True), tiny_target("t5")), "t5")


@pytest.mark.slow
@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("architecture", ["t5", "bart"])
def test_family_on_encoder_decoder(architecture: str, copy: bool, tmp_path: Path) -> None:
    config = dataclasses.replace(EXAMPLE, copy=copy)
    settings = with_config(copy=copy)
    check_family(cnn, config, tmp_path, architectures=(architecture,), trainer=trainer, settings=settings)
    check_recurrent(cnn, config, architecture)


@pytest.mark.parametrize(
    "config", [EXAMPLE, Config(num_channels=20, kernel_size=4, dilations=(3, 1), rank=32, num_draft=4)]
)
def test_drafts_follow_the_networks_distribution(config: Config) -> None:
    check_recurrent(cnn, config)


def test_layer_matches_values_by_hand() -> None:
    """x + (W * x + b) sigmoid(U * x + c) at each position, over the inputs `dilation` apart, zeros before the text."""
    config = Config(num_channels=6, kernel_size=3, dilations=(2,), rank=4)
    drafter, tokens_T = built(cnn, config, tiny_target("llama")), [5, 9, 4, 7, 7, 3]
    x_TC = drafter.input(drafter.tied_head.embed(torch.tensor(tokens_T)))
    weight_GKC, bias_G = drafter.layers[0].weight.unflatten(1, (3, 6)), drafter.layers[0].bias
    for position in range(len(tokens_T)):
        gates_G = bias_G.clone()
        for tap, back in enumerate((4, 2, 0)):
            if position >= back:
                gates_G = gates_G + weight_GKC[:, tap] @ x_TC[position - back]
        expected_C = x_TC[position] + gates_G[:6] * gates_G[6:].sigmoid()
        torch.testing.assert_close(drafter(torch.tensor([tokens_T]))[0, position], expected_C)


def test_receptive_field_matches_layers() -> None:
    config = Config(num_channels=12, kernel_size=3, dilations=(1, 2), rank=32)
    drafter, tokens_BT = built(cnn, config, tiny_target("llama")), torch.arange(3, 23)[None]
    other = tokens_BT.clone()
    other[:, 4] = 40
    differs_T = (drafter(other) - drafter(tokens_BT)).abs().amax(-1)[0] > 1e-6
    assert differs_T.nonzero().flatten().tolist() == list(range(4, 4 + 1 + 2 * 1 + 2 * 2))


def test_tied_matrices_are_neither_trained_nor_saved() -> None:
    target = tiny_target("llama")
    drafter = Drafter(EXAMPLE, target)
    assert {name.split(".")[0] for name in drafter.state_dict()} == {"tied_head", "input", "layers"}
    assert all(VOCAB_SIZE not in weight.shape[:1] or weight.ndim == 1 for weight in drafter.parameters())


def test_dropout_changes_features_only_when_given() -> None:
    torch.manual_seed(0)
    drafter, tokens_BT = built(cnn, EXAMPLE, tiny_target("llama")), torch.arange(3, 11)[None]
    assert not torch.equal(drafter(tokens_BT, dropout=0.5), drafter(tokens_BT))
    assert torch.equal(drafter(tokens_BT), drafter(tokens_BT))


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
        ("num_channels is 0", {"num_channels": 0}),
        ("kernel_size is 1", {"kernel_size": 1}),
        ("give one of at least 1 for each layer", {"dilations": ()}),
        ("dilations are \\[1, 0\\]", {"dilations": (1, 0)}),
        ("dropout is 1", {"dropout": 1.0}),
        ("choose a --loss besides ce", {"teacher_top_k": 4}),
        ("rank is 0", {"rank": 0}),
        ("num_draft is 0", {"num_draft": 0}),
    ]
    for message, changes in cases:
        with pytest.raises(ValueError, match=message):
            trainer_settings(trainer, **changes)
    for rejects in (trainer.check, trainer.build):
        with pytest.raises(ValueError, match="it has no source to copy from"):
            rejects(with_config(copy=True), tiny_target("llama"))
    with pytest.raises(ValueError, match="width is 2, for trees, and .* is an encoder-decoder: it verifies chains"):
        trainer.check(with_config(width=2), tiny_target("t5"))
