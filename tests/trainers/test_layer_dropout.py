"""Layer dropout and early-exit loss: rates and curricula by hand, skipped blocks, the loss, and the artifact.

Shape suffixes: B rows, T positions, D hidden width, V vocabulary.
"""

import copy
import json
from pathlib import Path

import pytest
import torch

import draftsmith
from data.batches import Batch
from data.teacher import complete
from draftsmith import Target
from draftsmith.drafters import early_exit
from draftsmith.parts.self_drafting.fine_tuned import linear_layers
from tests.support.family import check_family, texts
from tests.support.masked_batch import masked_batch
from tests.support.models import NUM_LAYERS, greedy_by_model, prompts, tiny_model, tiny_target
from tests.support.runs import SMALL, make_data, make_target, trainer_settings
from trainers import layer_dropout
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings

TARGET = tiny_target("llama")
SETTINGS = trainer_settings(layer_dropout, exit_layer=1, curriculum="all", max_dropout=0.0)


def batch(num_rows: int = 3) -> Batch:
    """Returns rows of unequal lengths whose loss masks begin at different positions and have a gap."""
    return complete(masked_batch(num_rows), TARGET)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_family(tmp_path: Path, rank: int) -> None:
    config = early_exit.Config(exit_layer=1, own_norm=False, tunes=True, rank=rank)
    settings = trainer_settings(layer_dropout, exit_layer=1, curriculum="all", max_dropout=0.0, rank=rank)
    architectures = ("llama", "gpt2") if rank else ("llama",)
    given = {"architectures": architectures, "trainer": layer_dropout, "settings": settings}
    check_family(early_exit, config, tmp_path, **given)


def test_dropout_rates_by_hand() -> None:
    """0.2 (2^(l / 4) - 1)."""
    expected = [0.0, 0.0378414, 0.0828427, 0.1363586, 0.2]
    assert layer_dropout.dropout_rates(5, 0.2) == pytest.approx(expected, abs=1e-6)
    assert layer_dropout.dropout_rates(1, 0.2) == [0.0]


@pytest.mark.parametrize(
    ("kind", "step", "on"),
    [
        ("rotational", 0, [0, 3, 4]),
        ("rotational", 1, [1, 4]),
        ("rotational", 2, [2, 4]),
        ("rotational", 3, [0, 3, 4]),
        ("gradual", 0, [4]),
        ("gradual", 9, [4]),
        ("gradual", 10, [3, 4]),
        ("gradual", 20, [2, 3, 4]),
        ("gradual", 39, [1, 2, 3, 4]),
        ("gradual", 50, [0, 1, 2, 3, 4]),
        ("all", 0, [0, 1, 2, 3, 4]),
    ],
)
def test_curricula_by_hand(kind: str, step: int, on: list[int]) -> None:
    """Five blocks, a rotation of three steps, a hundred steps in all."""
    is_on = layer_dropout.curriculum(kind, 5, step, 100, 3)
    assert [layer for layer, learns in enumerate(is_on) if learns] == on


def test_exit_weights_by_hand() -> None:
    """0.5 * 1, 0.5 * 6 and 10, of hidden layers 1, 3 and 4, divided by their sum."""
    found = layer_dropout.exit_weights([True, False, True, True], 0.5)
    assert found == pytest.approx({1: 0.5 / 13.5, 3: 3 / 13.5, 4: 10 / 13.5})


def test_rows_skip_blocks_at_their_dropout_rates() -> None:
    """Each row equals the target without some of its blocks, each skipped as often as its rate."""
    settings = trainer_settings(layer_dropout, exit_layer=1, max_dropout=0.6)
    drafter = layer_dropout.build(settings, TARGET).train()
    tokens_BT = torch.tensor([prompts(1)[0]] * 1000)
    with torch.no_grad():
        hidden = drafter.target.read(tokens_BT, tuple(range(NUM_LAYERS + 1)))
        rates = []
        for layer in range(NUM_LAYERS):
            is_out_B = (hidden[layer + 1] == hidden[layer]).all(2).all(1)
            rates.append(float(is_out_B.float().mean()))
            chosen = (hidden[layer + 1] == hidden[layer]).all(2)
            assert torch.equal(chosen.any(1), chosen.all(1)), "whole rows are left out"
        assert rates == pytest.approx([0.0, 0.6 * (2**0.5 - 1), 0.6], abs=0.06)
        for out in ((1,), (2,), (1, 2), ()):
            model = copy.deepcopy(TARGET.model)
            kept = [block for at, block in enumerate(model.model.layers) if at not in out]
            model.model.layers = torch.nn.ModuleList(kept)
            expected_V = model(tokens_BT[:1]).logits[0, -1]
            found_BV = drafter.target.logits(hidden[NUM_LAYERS])[:, -1]
            assert bool(((found_BV - expected_V).abs().max(1).values < 1e-4).any()), f"no row skipped {out}"
        drafter.eval()
        whole = drafter.target.read(tokens_BT[:1], (NUM_LAYERS,))[NUM_LAYERS]
        assert torch.allclose(whole, TARGET.read(tokens_BT[:1], (NUM_LAYERS,))[NUM_LAYERS], atol=1e-6)


@pytest.mark.parametrize("step", [0, 1])
def test_loss_and_gradients_equal_a_slow_reference(step: int) -> None:
    """The reference goes token by token, with the copy's own model."""
    settings = trainer_settings(layer_dropout, exit_layer=1, rotation=2, max_dropout=0.0, exit_scale=0.3)
    drafter, given = layer_dropout.build(settings, TARGET).train(), batch()
    layer_dropout.begin_step(drafter, settings, step, 10)
    # Of the exits after blocks 0, 1 and 2, step 0 trains the first and last, step 1 the second and last.
    raw = {1: 0.3 * 1, 3: 6.0} if step == 0 else {2: 0.3 * 3, 3: 6.0}
    slow = torch.zeros(())
    for row, length in enumerate(given.lengths_B.tolist()):
        ids = given.tokens_BT[row : row + 1, :length]
        states = drafter.target.model(ids, output_hidden_states=True).hidden_states
        for layer, weight in raw.items():
            # transformers applies the final norm to the last of its hidden states.
            normed = states[layer] if layer == NUM_LAYERS else drafter.target.norm(states[layer])
            logits_TV = drafter.target.model.lm_head(normed)[0].log_softmax(-1)
            for t in range(1, length):
                if given.loss_mask_BT[row, t]:
                    slow = slow - weight / sum(raw.values()) * logits_TV[t - 1, ids[0, t]]
    fast, metrics = layer_dropout.loss(drafter, given, settings, TARGET)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-4)
    parameters = list(drafter.parameters())
    assert len(parameters) == len(list(TARGET.model.parameters()))
    found, expected = torch.autograd.grad(fast, parameters), torch.autograd.grad(slow, parameters)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert metrics["target_loss"][1] == int(given.loss_mask_BT[:, 1:].sum())


def test_evaluate_equals_metrics_by_hand() -> None:
    """Exits are compared with the copy's last block, and its tokens with the text."""
    settings, given = trainer_settings(layer_dropout, exit_layer=2, max_dropout=0.5), batch()
    drafter = layer_dropout.build(settings, TARGET).eval()
    with torch.no_grad():
        for weight in drafter.weights:
            weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        accepted, agreed, right, count = 0.0, 0, 0, 0
        for row, length in enumerate(given.lengths_B.tolist()):
            ids = given.tokens_BT[row : row + 1, :length]
            out = drafter.target.model(ids, output_hidden_states=True)
            own_TV = drafter.target.logits(out.hidden_states[2])[0].softmax(-1)
            theirs_TV = out.logits[0].softmax(-1)
            for t in range(1, length):
                if given.loss_mask_BT[row, t]:
                    accepted += float(torch.minimum(own_TV[t - 1], theirs_TV[t - 1]).sum())
                    agreed += int(own_TV[t - 1].argmax() == theirs_TV[t - 1].argmax())
                    right += int(theirs_TV[t - 1].argmax() == ids[0, t])
                    count += 1
        metrics = layer_dropout.evaluate(drafter, given, settings, TARGET)
    assert float(metrics["acceptance"][0]) == pytest.approx(accepted, rel=1e-4)
    assert [int(metrics[name][0]) for name in ("greedy_agreement", "target_accuracy")] == [agreed, right]
    assert {number for _, number in metrics.values()} == {count} and 0 < agreed < count


def test_new_adapters_are_zero_and_apply_to_the_named_modules() -> None:
    torch.manual_seed(0)
    settings = trainer_settings(layer_dropout, exit_layer=1, rank=2, modules=("q_proj", "down_proj"))
    drafter, ids = layer_dropout.build(settings, TARGET).eval(), torch.tensor(prompts(1))
    assert len(drafter.adapters) == len(linear_layers(TARGET, settings.config.modules)) == 2 * NUM_LAYERS
    with torch.no_grad():
        assert torch.equal(drafter.target.model(ids).logits, TARGET.model(ids).logits)
        for adapter in drafter.adapters:
            adapter.up.weight.normal_()
        trained = drafter.target.model(ids).logits
        finished = layer_dropout.finish(drafter, settings, TARGET, [])
        torch.testing.assert_close(finished.target.model(ids).logits, trained, rtol=1e-4, atol=1e-4)
        assert not torch.equal(trained, TARGET.model(ids).logits)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_trained_drafter_drafts_for_its_copy_only(tmp_path: Path, rank: int) -> None:
    target = make_target(tmp_path / "target")
    data = make_data(target, tmp_path / "data")
    run = RunSettings(target=str(tmp_path / "target"), data=str(data), output=str(tmp_path / "out"), **SMALL)
    before = {name: weight.clone() for name, weight in target.model.named_parameters()}
    train(layer_dropout, trainer_settings(layer_dropout, rank=rank, num_draft=3), run)
    drafter = draftsmith.load(tmp_path / "out", target)
    manifest = json.loads((tmp_path / "out" / "draft_config.json").read_text())
    assert not any(name.startswith("acceptance_") for name in manifest["measured_acceptance"]), "one exit is evaluated"
    assert manifest["tunes_target"] and manifest["target"]["fingerprint"] == target.fingerprint
    assert drafter.config.tunes and drafter.target is not target
    ids = torch.tensor(prompts(1))
    with pytest.raises(ValueError, match=r"drafter\.target"):
        draftsmith.generate(target, ids, drafter, max_new_tokens=8)
    out = draftsmith.generate(drafter.target, ids, drafter, max_new_tokens=20)
    assert texts(out) == greedy_by_model(drafter.target.model, 1, 20)
    changed = [name for name, one in drafter.target.model.named_parameters() if not torch.equal(one, before[name])]
    assert len(changed) >= len(linear_layers(target))
    assert all(torch.equal(weight, before[name]) for name, weight in target.model.named_parameters())


def test_tree_drafts_for_the_copy_are_lossless() -> None:
    config = early_exit.Config(exit_layer=1, own_norm=False, tunes=True, width=2, num_nodes=5)
    drafter = early_exit.Drafter(config, Target(tiny_model("gemma2")))
    with torch.no_grad():
        for weight in drafter.weights:
            weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    drafter.on_weights_loaded()
    out = draftsmith.generate(drafter.target, torch.tensor(prompts(1)), drafter, max_new_tokens=20)
    assert texts(out) == greedy_by_model(drafter.target.model, 1, 20)


def test_invalid_settings_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {"exit_layer": -1, "max_dropout": 1.0, "dropout": -0.1, "exit_scale": 0.0, "rotation": 0, "alpha": 0.0}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name):
            trainer_settings(layer_dropout, **{name: value})
    with pytest.raises(ValueError, match="set tunes as well, or neither"):
        early_exit.Config(rank=4)
    monkeypatch.setattr(layer_dropout.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs peft, which is not installed"):
        layer_dropout.check(trainer_settings(layer_dropout, rank=4), None)
    layer_dropout.check(layer_dropout.Settings(), None)  # type: ignore[arg-type]
