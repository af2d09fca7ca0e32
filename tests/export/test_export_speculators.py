"""Exports for the speculators library, checked with that library: settings, tensors and logits.

Run by ./launch.sh serving-test, which installs the library.

Shape suffixes: N positions, D hidden width, E widths of the fused layers together, W draft vocabulary.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import draftsmith
from data.batches import collate, example
from draftsmith import Target
from draftsmith.drafters import dflash, eagle3
from draftsmith.export import export
from eval.doctor.checks import check_verifier
from tests.export.test_export_dflash import drafter_of
from tests.support.models import VOCAB_SIZE, WIDTH, scramble, tiny_model
from trainers import dflash as dflash_trainer

speculators = pytest.importorskip("speculators")

NUM_LAYERS = 8
LAYERS = {
    "usual": {},
    "full": {"draft_vocab": 0, "fusion_norm": "each", "norm_output": True, "stretch": (8.0, 1.0, 4.0, 16.0)},
    "own": {"fusion_norm": "whole", "norm_residual": True, "own_embedding": True, "layers": (1, 3, 4, 7)},
}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    path = tmp_path_factory.mktemp("speculators") / "target"
    model = tiny_model("llama", num_hidden_layers=NUM_LAYERS)
    model.save_pretrained(path)
    return Target.from_pretrained(str(path), dtype="float32")


@pytest.fixture(params=LAYERS)
def pair(request: pytest.FixtureRequest, target: Target, tmp_path: Path) -> tuple[eagle3.Drafter, Path]:
    """Returns a head with random weights and its export."""
    shape: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "head_width": 8, "inner_width": 24, "theta": 5e3}
    settings = {"layers": (2, 4, 5), "draft_vocab": 40} | shape | LAYERS[request.param]
    drafter = eagle3.Drafter(eagle3.Config(**settings), target)
    scramble(drafter, seed=1)
    drafter.set_vocabulary(torch.arange(len(drafter.d2t)) * VOCAB_SIZE // len(drafter.d2t))
    draftsmith.save(drafter.eval(), tmp_path / "artifact", target)
    return drafter, export(tmp_path / "artifact", "speculators", tmp_path / "out")


def test_speculators_reads_the_configuration(pair: tuple[eagle3.Drafter, Path], target: Target) -> None:
    """Every setting has the written value, and every written key is read."""
    drafter, out = pair
    ours = drafter.config
    read = speculators.SpeculatorModelConfig.from_pretrained(out)
    assert type(read).__name__ == "Eagle3SpeculatorConfig"
    assert read.eagle_aux_hidden_state_layer_ids == list(ours.layers)
    assert read.draft_vocab_size == len(drafter.d2t) and read.target_vocab_size == VOCAB_SIZE
    assert read.norm_before_residual == ours.norm_residual and read.norm_output == ours.norm_output
    assert (read.norm_before_fc, read.fc_norm) == (ours.fusion_norm == "whole", ours.fusion_norm == "each")
    assert read.speculators_config.verifier.name_or_path == os.path.relpath(target.name, out)
    assert read.speculators_config.proposal_methods[0].speculative_tokens == ours.num_draft
    inner = read.transformer_layer_config
    assert inner.rope_parameters["rope_theta"] == 5e3 and inner.rms_norm_eps == ours.eps
    written = json.loads((out / "config.json").read_text())
    assert not written.keys() - read.to_dict().keys()
    assert not written["transformer_layer_config"].keys() - inner.to_dict().keys()


def test_speculators_model_has_the_same_tensors(pair: tuple[eagle3.Drafter, Path]) -> None:
    _, out = pair
    config = speculators.SpeculatorModelConfig.from_pretrained(out)
    config.speculators_config.verifier.name_or_path = None
    kind = speculators.SpeculatorModel.registered_model_class_from_config(config)
    with safe_open(out / "model.safetensors", framework="pt") as file:
        written = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    expected = {name: tuple(tensor.shape) for name, tensor in kind(config).state_dict().items()}
    assert written == {name: shape for name, shape in expected.items() if name not in kind._keys_to_ignore_on_save}


@torch.no_grad()
def test_speculators_model_has_the_same_logits(
    pair: tuple[eagle3.Drafter, Path], target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loaded with its verifier, from the folder that its relative name begins at, it gives the drafter's logits."""
    drafter, out = pair
    assert check_verifier(out).verdict == "ok"
    monkeypatch.chdir(out)
    config = speculators.SpeculatorModelConfig.from_pretrained(out)
    config.transformer_layer_config._attn_implementation = "eager"
    model = speculators.SpeculatorModel.from_pretrained(out, config=config).eval()
    outputs: list[Tensor] = []
    model.lm_head.register_forward_hook(lambda _, __, logits: outputs.append(logits))
    generator = torch.Generator().manual_seed(0)
    num_positions = 12
    joined_1NE = torch.randn(1, num_positions, WIDTH * len(drafter.config.layers), generator=generator)
    tokens_1N = torch.randint(VOCAB_SIZE, (1, num_positions), generator=generator)
    model(joined_1NE, tokens_1N, torch.zeros(1, num_positions, dtype=torch.long), ttt_steps=1)
    positions_1N = torch.arange(num_positions)[None]
    features_1ND = drafter.fuse(joined_1NE)
    _, normed_1ND = drafter(tokens_1N, features_1ND, lambda x_1NE: drafter.attention(x_1NE, positions_1N))
    logits_1NW = drafter.head(normed_1ND)
    assert (outputs[0] - logits_1NW).abs().max() < 1e-4 * logits_1NW.abs().max()


# --- DFlash --------------------------------------------------------------------------------------------------------


@pytest.fixture(
    params=[
        {},
        {"shortlist": 40, "stretch": (8.0, 1.0, 4.0, 16.0)},
        {"markov_rank": 3},
        {"markov_rank": 3, "confidence": True, "shortlist": 40},
    ],
    ids=["usual", "shortlist", "bias", "both heads"],
)
def block_pair(request: pytest.FixtureRequest, target: Target, tmp_path: Path) -> tuple[dflash.Drafter, Path]:
    """Returns a DFlash drafter with random weights and its export."""
    drafter = drafter_of(target, **request.param)
    draftsmith.save(drafter, tmp_path / "artifact", target)
    return drafter, export(tmp_path / "artifact", "speculators", tmp_path / "out")


def test_speculators_reads_a_dflash_configuration(block_pair: tuple[dflash.Drafter, Path]) -> None:
    drafter, out = block_pair
    read = speculators.SpeculatorModelConfig.from_pretrained(out)
    if rank := drafter.config.markov_rank:
        assert type(read).__name__ == "DSparkSpeculatorConfig" and read.markov_head_type == "vanilla"
        assert read.markov_rank == rank
        assert read.enable_confidence_head == read.confidence_head_with_markov == drafter.config.confidence
    else:
        assert type(read).__name__ == "DFlashSpeculatorConfig"
    assert read.aux_hidden_state_layer_ids == list(drafter.config.layers)
    assert (read.block_size, read.mask_token_id) == (drafter.config.block_size, drafter.config.mask_token)
    assert read.draft_vocab_size == len(drafter.shared_head.shortlist) and not read.sample_from_anchor
    assert read.speculators_config.proposal_methods[0].speculative_tokens == drafter.config.num_draft
    written = json.loads((out / "config.json").read_text())
    assert not written.keys() - read.to_dict().keys()
    assert not written["transformer_layer_config"].keys() - read.transformer_layer_config.to_dict().keys()


@torch.no_grad()
def test_speculators_dflash_model_has_the_same_logits(
    block_pair: tuple[dflash.Drafter, Path], target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loaded with its verifier, without a missing tensor, its blocks have the drafter's logits at random anchors."""
    drafter, out = block_pair
    assert check_verifier(out).verdict == "ok"
    monkeypatch.chdir(out)
    config = speculators.SpeculatorModelConfig.from_pretrained(out)
    config.transformer_layer_config._attn_implementation = "eager"
    model = speculators.SpeculatorModel.from_pretrained(out, config=config).eval()
    num_positions, num_anchors = 24, 3
    generator = torch.Generator().manual_seed(0)
    tokens_1N = torch.randint(VOCAB_SIZE, (1, num_positions), generator=generator)
    hidden = target.read(tokens_1N, (*drafter.hidden_layers, target.num_layers))
    hidden_1QD, logits_1QW, _, _, indices_Q = model._backbone_forward(
        drafter.join(hidden),
        tokens_1N,
        torch.ones(1, num_positions),
        hidden[target.num_layers],
        torch.zeros(1, num_positions, dtype=torch.long),
        max_anchors=num_anchors,
    )
    anchors_1M = indices_Q[:: drafter.config.block_size][None]
    batch = dataclasses.replace(collate([example(tokens_1N[0].tolist(), None, "row")]), hidden=hidden)
    states_1TD = drafter.fuse(drafter.join(hidden))
    normed_1MLD = dflash_trainer.run_blocks(drafter, batch, anchors_1M, states_1TD)
    expected_1QW = drafter.shared_head.listed(normed_1MLD.flatten(1, 2))
    assert (logits_1QW - expected_1QW).abs().max() < 1e-4 * expected_1QW.abs().max()
    if not drafter.config.markov_rank:
        return
    previous_1Q = tokens_1N[:, (indices_Q - 1).clamp(min=0)]
    theirs_1QW = logits_1QW + model.markov_head.block_bias(prev_token_ids=previous_1Q, hidden_states=hidden_1QD)
    ours_1QW = drafter.logits(normed_1MLD.flatten(1, 2), previous_1Q)
    assert (theirs_1QW - ours_1QW).abs().max() < 1e-4 * ours_1QW.abs().max()
    if drafter.config.confidence:
        embedded_1QR = model.markov_head.prev_embeddings(previous_1Q)
        theirs_1Q = model.confidence_head(torch.cat([hidden_1QD, embedded_1QR], dim=-1))
        ours_1Q = drafter.confidence_logits(normed_1MLD.flatten(1, 2), previous_1Q)
        assert (theirs_1Q - ours_1Q).abs().max() < 1e-4 * ours_1Q.abs().max()
