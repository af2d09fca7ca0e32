"""Kangaroo's trainer: its loss against a slow reference, four golden steps, metrics, and the choice of exit layer.

Shape suffixes: B rows, T positions, D hidden width, V vocabulary.
"""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from data.batches import Batch
from data.teacher import complete
from draftsmith.drafters.kangaroo import Drafter
from tests.support.masked_batch import masked_batch
from tests.support.models import NUM_LAYERS, tiny_model, tiny_target
from tests.support.runs import trainer_settings
from trainers import kangaroo
from trainers.parts import exits
from trainers.parts.losses import DIVERGENCES

TARGET = tiny_target("llama")
SETTINGS = trainer_settings(kangaroo, num_draft=3)
SWEEP = trainer_settings(kangaroo, exit_layer=0, num_draft=3)


def batch(settings: kangaroo.Settings = SETTINGS, target: kangaroo.Target = TARGET) -> Batch:
    """Returns rows of 9, 12 and 15 tokens whose loss masks begin at different positions and have a gap."""
    needs = kangaroo.needs(settings, target)
    return complete(masked_batch(), target, needs.layers, needs.top_k)


def new_drafters(settings: kangaroo.Settings = SETTINGS, target: kangaroo.Target = TARGET) -> nn.ModuleList:
    torch.manual_seed(0)
    return kangaroo.build(settings, target)


def slow_logits(drafter: Drafter, tokens_T: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the adapter's and the model's logits [T, V] over one row without padding."""
    layer = drafter.config.exit_layer
    hidden_1TD = drafter.target.read(tokens_T[None], (layer,))[layer]
    h_TD, positions_1T = hidden_1TD[0], torch.arange(len(tokens_T))[None]
    mixed_TD = h_TD + drafter.attention(drafter.attention_norm(h_TD)[None], positions_1T)[0]
    own_TV = drafter.norm(mixed_TD) @ drafter.target.model.lm_head.weight.T
    return own_TV, drafter.target.model(tokens_T[None]).logits[0]


def slow_loss(drafter: Drafter, given: Batch) -> Tensor:
    """Returns the sum of KL(p | q) over positions whose next token is supervised."""
    total = torch.zeros(())
    for tokens_T, mask_T, size in zip(given.tokens_BT, given.loss_mask_BT, given.lengths_B.tolist(), strict=True):
        own_TV, theirs_TV = slow_logits(drafter, tokens_T[:size])
        for t in range(size - 1):
            if mask_T[t + 1]:
                p_V, q_V = theirs_TV[t].detach().softmax(-1), own_TV[t].softmax(-1)
                total = total + (p_V * (p_V / q_V).log()).sum()
    return total


@pytest.mark.parametrize("settings", [SETTINGS, dataclasses.replace(SETTINGS, exit_layer=1, num_heads=2)])
def test_loss_and_gradients_equal_a_slow_reference(settings: kangaroo.Settings) -> None:
    """Values agree to float32's rounding; the attention, which has its own tests, is the drafter's."""
    drafters, given = new_drafters(settings), batch(settings)
    slow = slow_loss(drafters[0], given)
    fast, metrics = kangaroo.loss(drafters, given, settings, TARGET)
    torch.testing.assert_close(fast, slow)
    parameters = list(drafters.parameters())
    expected = torch.autograd.grad(slow, parameters)
    torch.testing.assert_close(torch.autograd.grad(fast, parameters), expected, rtol=1e-4, atol=1e-5)
    assert not metrics


def test_four_steps_have_golden_losses() -> None:
    """Losses of four AdamW steps equal recorded values to 1e-4, for float32 on other machines."""
    drafters, given = new_drafters(), batch()
    optimizer = torch.optim.AdamW(drafters.parameters(), lr=3e-2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss, _ = kangaroo.loss(drafters, given, SETTINGS, TARGET)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx([14.84558, 10.95319, 8.28347, 6.73375], rel=1e-4)


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_training_reduces_each_divergence(name: str) -> None:
    settings = dataclasses.replace(SETTINGS, loss=name)
    drafters, given = new_drafters(settings), batch(settings)
    optimizer = torch.optim.AdamW(drafters.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss, _ = kangaroo.loss(drafters, given, settings, TARGET)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]


def test_evaluate_equals_metrics_by_hand() -> None:
    drafters, given = new_drafters(), batch()
    acceptances, agreements = [], []
    with torch.no_grad():
        for tokens_T, mask_T, size in zip(given.tokens_BT, given.loss_mask_BT, given.lengths_B.tolist(), strict=True):
            own_TV, theirs_TV = slow_logits(drafters[0], tokens_T[:size])
            for t in range(size - 1):
                if mask_T[t + 1]:
                    acceptances.append(float(torch.minimum(own_TV[t].softmax(-1), theirs_TV[t].softmax(-1)).sum()))
                    agreements.append(int(own_TV[t].argmax()) == int(theirs_TV[t].argmax()))
        for evaluated in (drafters, drafters[0]):
            metrics = kangaroo.evaluate(evaluated, given, SETTINGS, TARGET)
            assert set(metrics) == {"acceptance", "greedy_agreement"}
            assert [count for _, count in metrics.values()] == [len(acceptances)] * 2
            assert float(metrics["acceptance"][0]) == pytest.approx(sum(acceptances), abs=1e-4)
            assert float(metrics["greedy_agreement"][0]) == sum(agreements)


# --- Choice of the exit layer ------------------------------------------------------------------------------------


DEEP = kangaroo.Target(tiny_model("llama", seed=14, num_hidden_layers=6))


def test_candidate_layers_reach_half_of_the_target() -> None:
    assert exits.candidate_layers(1) == (1,)
    assert exits.candidate_layers(8) == (1, 2, 3, 4)
    assert exits.candidate_layers(32) == (1, 2, 3, 4, 6, 8, 12, 16)
    assert kangaroo.needs(SWEEP, DEEP).layers == (1, 2, 3, 6)
    assert kangaroo.needs(SETTINGS, DEEP).layers == (2, 6)
    assert kangaroo.needs(dataclasses.replace(SETTINGS, exit_layer=6), DEEP).layers == (6,)


def test_adapters_trained_together_have_the_gradients_of_adapters_trained_alone() -> None:
    drafters, given = new_drafters(SWEEP, DEEP), batch(SWEEP, DEEP)
    assert [drafter.config.exit_layer for drafter in drafters] == [1, 2, 3]
    total, metrics = kangaroo.loss(drafters, given, SWEEP, DEEP)
    alone = [slow_loss(drafter, given) for drafter in drafters]
    torch.testing.assert_close(total, sum(alone))
    for drafter, one in zip(drafters, alone, strict=True):
        torch.testing.assert_close(metrics[f"loss_{drafter.config.exit_layer}"][0], one.detach())
        parameters = list(drafter.parameters())
        found = torch.autograd.grad(total, parameters, retain_graph=True)
        torch.testing.assert_close(found, torch.autograd.grad(one, parameters), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        metrics = kangaroo.evaluate(drafters, given, SWEEP, DEEP)
    each = [float(metrics[f"acceptance_{layer}"][0]) for layer in (1, 2, 3)]
    assert float(metrics["acceptance"][0]) == pytest.approx(sum(each))
    assert metrics["acceptance"][1] == 3 * metrics["acceptance_1"][1]


@pytest.mark.parametrize("width", [0, 2])
def test_finish_keeps_the_layer_with_most_predicted_tokens_per_second(
    monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    """Costs decide between equally poor adapters; a perfect one may cost more."""
    settings = trainer_settings(kangaroo, exit_layer=0, num_draft=3, width=width)
    drafters, given = new_drafters(settings, DEEP), batch(settings, DEEP)
    assert [len(exits.round_costs_ms(drafters[0], 2))] == [3]
    base = {1: 3.0, 2: 1.0, 3: 2.0}

    def costs(drafter: Drafter, num_draft: int) -> list[float]:
        assert num_draft == 3 and not drafter.config.width
        return [base[drafter.config.exit_layer] * (1 + number) for number in range(num_draft + 1)]

    monkeypatch.setattr(exits, "round_costs_ms", costs)
    finished = kangaroo.finish(drafters, settings, DEEP, [given])
    assert finished is drafters[1] and finished.config.width == width
    outcomes = iter([certain(True), certain(False), certain(False)])
    monkeypatch.setattr(exits, "row_outcomes", lambda *_: next(outcomes))
    base[1] = 1.1
    assert kangaroo.finish(drafters, settings, DEEP, [given]) is drafters[0]


def certain(is_right: bool) -> list[tuple[list[bool], list[float]]]:
    """Returns outcomes of ten tokens drafted with probability 1, all correct or all wrong."""
    return [([is_right] * 10, [1.0] * 10)]


def test_row_outcomes_and_tokens_per_ms_by_hand() -> None:
    drafters, given = new_drafters(), batch()
    with torch.no_grad():
        outcomes = exits.row_outcomes(TARGET.head, [kangaroo._adapted(drafters[0], given)], [given], TARGET)
        for row, (right, confidences) in enumerate(outcomes):
            own_TV, theirs_TV = slow_logits(drafters[0], given.tokens_BT[row, : int(given.lengths_B[row])])
            positions = [t - 1 for t in range(1, len(own_TV)) if given.loss_mask_BT[row, t]]
            assert right == [int(own_TV[t].argmax()) == int(theirs_TV[t].argmax()) for t in positions]
            assert confidences == pytest.approx([float(own_TV[t].softmax(-1).max()) for t in positions], abs=1e-5)
    assert len(outcomes) == 3
    assert exits.tokens_per_ms([(3, 3), (3, 0), (0, 0)], [1.0, 2.0, 4.0, 8.0]) == (4 + 1 + 1) / (8 + 8 + 1)


def test_round_costs_are_non_decreasing() -> None:
    """They are measured with the drafter's own rounds."""
    drafter = new_drafters(dataclasses.replace(SETTINGS, exit_layer=NUM_LAYERS))[0].eval()
    costs_ms = exits.round_costs_ms(drafter, 4)
    assert len(costs_ms) == 5 and costs_ms == sorted(costs_ms) and costs_ms[0] > 0


def test_finish_keeps_a_single_drafter() -> None:
    drafters = new_drafters()
    assert kangaroo.finish(drafters, SETTINGS, TARGET, [batch()]) is drafters[0]
    assert drafters[0].config.num_heads == 4
    assert new_drafters(dataclasses.replace(SETTINGS, num_heads=2))[0].config.num_heads == 2


def test_an_adapter_without_attention_equals_the_target_at_its_last_layer() -> None:
    """The norm is initialised from the target's, so that the loss is 0."""
    settings = dataclasses.replace(SETTINGS, exit_layer=NUM_LAYERS)
    drafters, given = new_drafters(settings), batch(settings)
    nn.init.zeros_(drafters[0].attention.output.weight)
    with torch.no_grad():
        total, _ = kangaroo.loss(drafters, given, settings, TARGET)
        metrics = kangaroo.evaluate(drafters, given, settings, TARGET)
    assert float(total) == pytest.approx(0.0, abs=1e-4)
    for value, count in metrics.values():
        assert float(value) / count == pytest.approx(1.0, abs=1e-5)


def test_invalid_settings_raise() -> None:
    for message, changes in (
        ("exit_layer is -1", {"exit_layer": -1}),
        ("num_heads is -1", {"num_heads": -1}),
        ("num_draft is 0", {"num_draft": 0}),
        ("unknown length policy 'long'", {"length": "long"}),
        ("width is -1", {"width": -1}),
    ):
        with pytest.raises(ValueError, match=message):
            trainer_settings(kangaroo, **changes)
    with pytest.raises(ValueError, match=f"has {NUM_LAYERS} blocks"):
        kangaroo.build(trainer_settings(kangaroo, exit_layer=NUM_LAYERS + 1), TARGET)
