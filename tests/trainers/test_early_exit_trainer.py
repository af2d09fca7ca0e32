"""The early exit's trainer: losses against slow references, random rounds, metrics, and the choice of exit layer.

Shape suffixes: B rows, T positions, D hidden width, V vocabulary.
"""

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

import draftsmith
from data.batches import Batch
from data.teacher import complete
from draftsmith.drafters.early_exit import Drafter
from tests.support.masked_batch import masked_batch
from tests.support.models import NUM_LAYERS, VOCAB_SIZE, scramble, tiny_target
from tests.support.runs import SMALL, make_data, make_target, trainer_settings
from trainers import early_exit
from trainers.parts import exits
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings

TARGET = tiny_target("llama")
SETTINGS = trainer_settings(early_exit, exit_layer=1, num_blocks=1, own_head=True)


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes layers 1 to 3 the candidates, of which the last is the whole target."""
    monkeypatch.setattr(exits, "candidate_layers", lambda num_layers: (1, 2, 3))


def batch(layers: tuple[int, ...] = (1, 2, 3)) -> Batch:
    """Returns rows of 9, 12 and 15 tokens whose loss masks begin at different positions and have a gap."""
    return complete(masked_batch(), TARGET, layers)


def perturbed_drafters(settings: early_exit.Settings) -> torch.nn.ModuleList:
    drafters = early_exit.build(settings, TARGET)
    scramble(drafters, seed=2)
    return drafters


def supervised_positions(given: Batch) -> list[tuple[int, int]]:
    """Returns (row, t) of all supervised tokens."""
    rows, length = given.tokens_BT.shape
    return [(b, t) for b in range(rows) for t in range(1, length) if given.loss_mask_BT[b, t]]


def slow_logits(drafter: Drafter, given: Batch, recycled_BTD: Tensor | None) -> Tensor:
    """Returns the exit's logits [B, T, V], row by row without padding."""
    logits_BTV = torch.zeros(*given.tokens_BT.shape, VOCAB_SIZE)
    for row, length in enumerate(given.lengths_B.tolist()):
        hidden_1TD = given.hidden[drafter.config.exit_layer][row : row + 1, :length]
        recycled_1TD = None if recycled_BTD is None else recycled_BTD[row : row + 1, :length]
        logits_BTV[row, :length] = drafter.head(drafter(drafter.block_input(hidden_1TD, recycled_1TD)))[0]
    return logits_BTV


@pytest.mark.parametrize("kind", ["ce", "forward_kl", "tvd"])
@pytest.mark.parametrize(("exit_layer", "recycling"), [(2, True), (0, False)])
def test_loss_and_gradients_equal_a_slow_reference(kind: str, exit_layer: int, recycling: bool, sweep: None) -> None:
    """The reference goes token by token; position t - 1 learns the target's distribution of token t."""
    settings = trainer_settings(
        early_exit, exit_layer=exit_layer, num_blocks=1, own_head=True, recycling=recycling, loss=kind
    )
    needs = early_exit.needs(settings, TARGET)
    drafters, given = perturbed_drafters(settings), batch(needs.layers)
    torch.manual_seed(3)
    recycled_BTD = early_exit.crop(given.hidden[NUM_LAYERS], settings.config.num_draft + 1) if recycling else None
    slow = torch.zeros(())
    for drafter in drafters:
        logits_BTV = slow_logits(drafter, given, recycled_BTD)
        for b, t in supervised_positions(given):
            own_V = logits_BTV[b, t - 1].log_softmax(-1)
            if kind == "ce":
                slow = slow - own_V[given.tokens_BT[b, t]]
                continue
            theirs_V = TARGET.logits(given.hidden[NUM_LAYERS][b : b + 1, t - 1 : t])[0, 0].softmax(-1)
            each_V = theirs_V * (theirs_V.log() - own_V) if kind == "forward_kl" else (theirs_V - own_V.exp()).abs() / 2
            slow = slow + each_V.sum()
    torch.manual_seed(3)
    fast, metrics = early_exit.loss(drafters, given, settings, TARGET)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-4)
    parameters = list(drafters.parameters())
    found, expected = torch.autograd.grad(fast, parameters), torch.autograd.grad(slow, parameters)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert [count for _, count in metrics.values()] == [len(supervised_positions(given))] * (
        0 if exit_layer else len(drafters)
    )


def test_crop_returns_the_state_before_a_random_round() -> None:
    """All rounds of a row have the same length."""
    hidden_BTD = torch.arange(1.0, 31.0).repeat(200, 1)[..., None]
    found_BT = early_exit.crop(hidden_BTD, 4, torch.Generator().manual_seed(0))[..., 0]
    ages = set()
    for row in found_BT.tolist():
        # The state of position s is s + 1; age 1 is the position before.
        age = [position + 1 - int(state) for position, state in enumerate(row)]
        first = next(at for at, state in enumerate(row) if state)
        length = max(age[first:])
        pairs = itertools.pairwise(age[first:])
        assert all(late == early + 1 or (late, early) == (1, length) for early, late in pairs)
        assert first <= length and row[:first] == [0.0] * first
        ages.add(length)
    assert ages == {1, 2, 3, 4}


def test_evaluate_equals_metrics_by_hand(sweep: None) -> None:
    settings = trainer_settings(early_exit, exit_layer=0, own_head=True)
    given = batch()
    drafters = perturbed_drafters(settings)
    metrics = early_exit.evaluate(drafters, given, settings, TARGET)
    each = []
    for drafter in drafters:
        logits_BTV = slow_logits(drafter, given, None)
        accepted, agreed = 0.0, 0
        for b, t in supervised_positions(given):
            theirs_V = TARGET.logits(given.hidden[NUM_LAYERS][b : b + 1, t - 1 : t])[0, 0].softmax(-1)
            own_V = logits_BTV[b, t - 1].softmax(-1)
            accepted += float(torch.minimum(own_V, theirs_V).sum())
            agreed += int(own_V.argmax() == theirs_V.argmax())
        found = early_exit.evaluate(drafter, given, settings, TARGET)
        assert float(found["acceptance"][0]) == pytest.approx(accepted, rel=1e-4)
        assert (int(found["greedy_agreement"][0]), found["greedy_agreement"][1]) == (
            agreed,
            len(supervised_positions(given)),
        )
        each.append(accepted)
    names = [name for name in metrics if name.startswith("acceptance_")]
    assert [float(metrics[name][0]) for name in names] == pytest.approx(each, rel=1e-4)
    assert float(metrics["acceptance"][0]) == pytest.approx(sum(each), rel=1e-4)
    assert metrics["acceptance"][1] == len(each) * len(supervised_positions(given))


def test_an_exit_after_the_last_block_agrees_with_the_target() -> None:
    settings = trainer_settings(early_exit, exit_layer=NUM_LAYERS, own_norm=False)
    (drafter,) = early_exit.build(settings, TARGET)
    metrics = early_exit.evaluate(drafter, batch(), settings, TARGET)
    assert float(metrics["greedy_agreement"][0]) == metrics["greedy_agreement"][1]
    assert float(metrics["acceptance"][0]) == pytest.approx(metrics["acceptance"][1], rel=1e-5)


def test_finish_keeps_the_exit_with_most_predicted_tokens_per_second(
    monkeypatch: pytest.MonkeyPatch, sweep: None
) -> None:
    """The third exit is the target itself: it wins if all rounds cost the same, and not if its tokens are expensive."""
    settings = trainer_settings(early_exit, own_norm=False, length="fixed")
    drafters = early_exit.build(settings, TARGET)
    for cost_ms, wins in ((0.0, True), (100.0, False)):
        layer_ms = {1: 0.0, 2: 0.0, 3: cost_ms}

        def round_costs_ms(drafter: Drafter, num_draft: int, layer_ms: dict[int, float] = layer_ms) -> list[float]:
            return [1 + layer_ms[drafter.config.exit_layer] * number for number in range(num_draft + 1)]

        monkeypatch.setattr(exits, "round_costs_ms", round_costs_ms)
        assert (early_exit.finish(drafters, settings, TARGET, [batch()]) is drafters[2]) == wins


def test_an_exit_without_weights_is_saved_without_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = make_target(tmp_path / "target")
    data = make_data(target, tmp_path / "data")
    run = RunSettings(target=str(tmp_path / "target"), data=str(data), output=str(tmp_path / "out"), **SMALL)
    train(early_exit, trainer_settings(early_exit, own_norm=False, num_draft=2), run)
    assert "no parameters to train" in capsys.readouterr().out
    drafter = draftsmith.load(tmp_path / "out", target)
    assert not list(drafter.parameters()) and drafter.config.exit_layer == 1
    ids = torch.tensor([[5, 6, 7]])
    out = draftsmith.generate(target, ids, drafter, max_new_tokens=8)
    assert torch.equal(out.sequences, draftsmith.generate(target, ids, max_new_tokens=8).sequences)


def test_invalid_settings_raise() -> None:
    for name, value in (("exit_layer", -1), ("num_heads", -1), ("num_blocks", -1), ("inner_width", -1)):
        with pytest.raises(ValueError, match=f"{name} is -1; it must be at least 0"):
            trainer_settings(early_exit, **{name: value})
    with pytest.raises(ValueError, match="unknown length policy 'long'"):
        trainer_settings(early_exit, length="long")
