"""The prophet's trainer: windows and losses against a slow reference, four golden steps, and metrics by hand.

Shape suffixes: B rows, T positions, V vocabulary.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from data.batches import Batch, collate, example
from data.teacher import complete
from draftsmith import Target
from tests.drafters.test_prophet import naive_logits
from tests.support.family import check_training
from tests.support.models import VOCAB_SIZE, tiny_model, tiny_target
from tests.support.runs import SMALL, make_data, make_target, trainer_settings, weights
from trainers import prophet
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings

NUM_DRAFT = 3
SETTINGS = trainer_settings(prophet, num_layers=1, num_draft=NUM_DRAFT, windows=99)


def batch(target: Target) -> Batch:
    """Returns rows of 7, 9 and 11 tokens whose loss masks begin at different positions and have a gap."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for row in range(3):
        length = 7 + 2 * row
        mask = [position >= row and position != 5 for position in range(length)]
        rows.append(example(torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist(), mask, str(row)))
    return complete(collate(rows), target, (target.num_layers,))


def perturbed_drafter(settings: prophet.Settings, target: Target) -> prophet.Drafter:
    """Returns a prophet with perturbed maps and norms."""
    torch.manual_seed(0)
    drafter = prophet.build(settings, target)
    for weight in drafter.parameters():
        weight.data += 0.1 * torch.randn(weight.shape)
    return drafter


def windows(given: Batch) -> Iterator[tuple[int, int]]:
    """Yields (row, pending position) of every window."""
    for row, length in enumerate(given.lengths_B.tolist()):
        yield from ((row, t) for t in range(length - 1) if given.loss_mask_BT[row, t + 1])


def predictions(drafter: prophet.Drafter, given: Batch) -> Iterator[tuple[int, int, int, Tensor]]:
    """Yields (row, pending position, label's position, logits [V]) of every prediction, one naive window at a time."""
    for row, t in windows(given):
        ids = given.tokens_BT[row].tolist()
        for label in range(t + 1, min(t + 1 + NUM_DRAFT, int(given.lengths_B[row]))):
            if given.loss_mask_BT[row, label]:
                yield row, t, label, naive_logits(drafter, ids[: t + 1], ids[t + 1 : label])


@pytest.mark.parametrize("kind", ["ce", "forward_kl"])
def test_loss_and_gradients_equal_a_slow_reference(kind: str) -> None:
    """The reference goes prediction by prediction, in float64."""
    target = Target(tiny_model("llama").double())
    settings = trainer_settings(prophet, num_layers=1, num_draft=NUM_DRAFT, windows=99, num_states=3, loss=kind)
    given, drafter = batch(target), perturbed_drafter(settings, target).double()
    slow = torch.zeros((), dtype=torch.float64)
    for row, _, label, logits_V in predictions(drafter, given):
        ours_V = logits_V.log_softmax(-1)
        if kind == "ce":
            slow = slow - ours_V[given.tokens_BT[row, label]] / NUM_DRAFT
        else:
            theirs_V = target.model(given.tokens_BT[row, None, :label]).logits[0, -1].log_softmax(-1).detach()
            slow = slow + (theirs_V.exp() * (theirs_V - ours_V)).sum() / NUM_DRAFT
    fast, _ = prophet.loss(drafter, given, settings, target)
    torch.testing.assert_close(fast, slow, rtol=1e-6, atol=1e-6)
    parameters = list(drafter.parameters())
    expected = torch.autograd.grad(slow, parameters)
    torch.testing.assert_close(torch.autograd.grad(fast, parameters), expected, rtol=1e-4, atol=1e-5)


def test_window_labels_by_hand() -> None:
    """The window with its pending token at t predicts the supervised tokens at t + 1 to t + P."""
    target = tiny_target("llama")
    given, drafter = batch(target), prophet.build(SETTINGS, target)
    chosen = prophet.select_windows(drafter, given, given.hidden[target.num_layers], 99, 0.0)
    found = list(zip(chosen.rows_W.tolist(), chosen.pending_W.tolist(), strict=True))
    assert found == list(windows(given)) and chosen.weight == 1
    # Row 0 has seven tokens, and its token 5 is not supervised.
    assert [t for row, t in found if row == 0] == [0, 1, 2, 3, 5]
    ids = given.tokens_BT[0].tolist()
    assert chosen.labels_WP[1].tolist() == ids[2:5] and chosen.mask_WP[1].tolist() == [True, True, True]
    assert chosen.labels_WP[3].tolist() == ids[4:7] and chosen.mask_WP[3].tolist() == [True, False, True]
    assert int(chosen.labels_WP[4, 0]) == ids[6] and chosen.mask_WP[4].tolist() == [True, False, False]


def test_windows_are_evenly_spaced() -> None:
    """Of some 20 windows 3 per row are selected, shifted by the phase and weighted by their number."""
    target = tiny_target("llama")
    given, drafter = batch(target), prophet.build(SETTINGS, target)
    every = list(windows(given))
    found = []
    for phase in (0.0, 0.99):
        chosen = prophet.select_windows(drafter, given, given.hidden[target.num_layers], 3, phase)
        assert chosen.weight == len(every) / 9
        positions = zip(chosen.rows_W.tolist(), chosen.pending_W.tolist(), strict=True)
        found.append([every.index(position) for position in positions])
    assert found[0] == [at * len(every) // 9 for at in range(9)]
    assert found[1] == sorted(set(found[1])) and found[1][-1] == len(every) - 1


@torch.no_grad()
def test_evaluate_equals_metrics_by_hand() -> None:
    """Acceptance counts correct tokens before the first wrong one, in fully supervised windows."""
    target = tiny_target("llama")
    given, drafter = batch(target), perturbed_drafter(SETTINGS, target)
    # The prophet's own tokens are written into the rows, so that some are correct.
    for row, _, label, logits_V in predictions(drafter, given):
        if label % 3:
            given.tokens_BT[row, label] = logits_V.argmax()
    given = complete(dataclasses.replace(given, hidden={}), target, (target.num_layers,))
    hits: dict[tuple[int, int], list[bool]] = {}
    accepted = 0.0
    for row, t, label, logits_V in predictions(drafter, given):
        hits.setdefault((row, t), []).append(int(logits_V.argmax()) == int(given.tokens_BT[row, label]))
        if label == t + 1:
            theirs_V = target.model(given.tokens_BT[row, None, : t + 1]).logits[0, -1].softmax(-1)
            accepted += float(torch.minimum(theirs_V, logits_V.softmax(-1)).sum())
    whole = [right for right in hits.values() if len(right) == NUM_DRAFT]
    run = sum(next((k for k in range(NUM_DRAFT) if not right[k]), NUM_DRAFT) for right in whole)
    metrics = prophet.evaluate(drafter, given, SETTINGS, target)
    assert [int(part) for part in metrics["acceptance"]] == [run, len(whole)]
    assert [int(part) for part in metrics["first_accuracy"]] == [sum(right[0] for right in hits.values()), len(hits)]
    assert float(metrics["first_acceptance"][0]) == pytest.approx(accepted, rel=1e-4)
    assert metrics["first_acceptance"][1] == len(hits)
    assert run > 0


def test_four_steps_have_golden_losses() -> None:
    """Losses of four AdamW steps equal recorded values to 1e-4, for float32 on other machines."""
    target = tiny_target("llama")
    torch.manual_seed(0)
    given, drafter = batch(target), prophet.build(SETTINGS, target)
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss, _ = prophet.loss(drafter, given, SETTINGS, target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx([92.084282, 33.278282, 13.625697, 7.000509], rel=1e-4)


def test_joint_training_adds_the_loss_of_the_copy() -> None:
    """The copy starts as the target, so that losses add up; detached, it gets the gradient of its own loss."""
    target = Target(tiny_model("llama"))
    given = batch(target)
    values = {"num_layers": 1, "num_draft": NUM_DRAFT, "windows": 99, "own_head": True}
    alone = trainer_settings(prophet, **values)
    joint, detached = (trainer_settings(prophet, **values, joint=True, detach=detach) for detach in (False, True))
    torch.manual_seed(0)
    frozen = prophet.build(alone, target)
    expected, _ = prophet.loss(frozen, given, alone, target)
    logits_BTV, mask_BT = target.model(given.tokens_BT).logits[:, :-1], given.loss_mask_BT[:, 1:]
    main = cross_entropy(logits_BTV[mask_BT], given.tokens_BT[:, 1:][mask_BT], reduction="sum")
    parameters = list(target.model.parameters())
    main_gradient = torch.autograd.grad(main, parameters)
    reaches = []
    for settings in (joint, detached):
        torch.manual_seed(0)
        drafter = prophet.build(settings, target)
        assert drafter.target is not target and drafter.base is target
        found, metrics = prophet.loss(drafter, dataclasses.replace(given, hidden={}), settings, target)
        torch.testing.assert_close(found, main + expected)
        torch.testing.assert_close(metrics["main_loss"][0], main.detach())
        metrics = prophet.evaluate(drafter, given, settings, target)
        assert metrics["main_loss"][0].item() == pytest.approx(main.item(), rel=1e-5)
        gradient = torch.autograd.grad(found, list(drafter.weights))
        pairs = zip(gradient, main_gradient, strict=True)
        reaches.append(not all(torch.allclose(one, other, rtol=1e-4, atol=1e-4) for one, other in pairs))
    assert reaches == [True, False]


def test_joint_training_does_not_change_the_target() -> None:
    for kind in ("ce", "forward_kl"):
        check_training(trainer=prophet, settings=trainer_settings(prophet, num_layers=1, joint=True, loss=kind))


def test_an_interrupted_run_continues_with_the_same_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows are shifted at random; a run stopped after its checkpoint ends with the unbroken run's weights."""
    data = make_data(make_target(tmp_path / "target"), tmp_path / "data")
    given = {"target": str(tmp_path / "target"), "data": str(data)} | SMALL
    settings = trainer_settings(prophet, num_layers=1, num_draft=NUM_DRAFT, windows=3)
    train(prophet, settings, RunSettings(output=str(tmp_path / "whole"), **given))

    stopped, number, inner = RunSettings(output=str(tmp_path / "stopped"), **given), 0, prophet.loss

    def fails_at_the_sixth(*arguments: Any) -> Any:
        nonlocal number
        number += 1
        if number == 6:
            raise InterruptedError
        return inner(*arguments)

    monkeypatch.setattr(prophet, "loss", fails_at_the_sixth)
    with pytest.raises(InterruptedError):
        train(prophet, settings, stopped)
    train(prophet, settings, stopped)
    assert number == 6 + 4
    found = weights(tmp_path / "stopped")
    for name, weight in weights(tmp_path / "whole").items():
        assert torch.equal(found[name], weight), name


def test_invalid_settings_raise() -> None:
    for changes in ({"windows": 0}, {"num_draft": 0}, {"num_layers": 0}, {"detach": True}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            trainer_settings(prophet, **changes)
