"""Distillation: on-policy training and evaluation, and the choice of the best checkpoint by predicted speed-up."""

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import draftsmith
from data.batches import Batch
from data.teacher import complete
from draftsmith.artifacts.artifact import read_manifest
from tests.support import runs
from tests.support.masked_batch import masked_batch
from tests.support.models import tiny_target
from tests.support.runs import SMALL, logged, make_data, make_target, trainer_settings, weights
from trainers import cnn, lstm, ngram
from trainers.parts import distillation
from trainers.parts.distillation import BEST_METRIC, run_acceptance, summarise
from trainers.training import checkpoints, evaluation
from trainers.training.evaluation import ON_DRAFT_TEXT
from trainers.training.loop import train

TARGET = tiny_target("llama")
SETTINGS = trainer_settings(lstm, hidden_size=24, rank=16, num_draft=3, loss="forward_kl", on_policy=0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny target in `target` and its text in `data`."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("distillation")
    make_data(make_target(root / "target"), root / "data")
    return root


run_settings = partial(runs.run_settings, **SMALL)


def batch() -> Batch:
    """Returns three rows, supervised with gaps, with the target's last hidden states."""
    return complete(masked_batch(), TARGET, (TARGET.num_layers,))


def test_run_acceptance_equals_windows_cut_by_hand() -> None:
    """No window crosses a gap or the end of a row."""
    given = batch()
    known = given.loss_mask_BT[:, 1:]
    accepted_N = torch.rand(int(known.sum()), generator=torch.Generator().manual_seed(0))
    values, runs = iter(accepted_N.tolist()), []
    for row in known.tolist():
        run: list[float] = []
        for is_known in [*row, False]:
            if is_known:
                run.append(next(values))
            elif run:
                runs, run = [*runs, run], []
    found = run_acceptance(accepted_N, given, 12)
    assert list(found) == [f"accepted_to_{depth}" for depth in range(2, 13)]
    for depth in range(2, 13):
        windows = [run[at : at + depth] for run in runs for at in range(len(run) - depth + 1)]
        total, count = found[f"accepted_to_{depth}"]
        assert count == len(windows)
        assert float(total) == pytest.approx(sum(math.prod(window) for window in windows), abs=1e-5)


def test_summarise_predicts_the_best_speed_up() -> None:
    """By hand: the best of one, two and three drafted tokens; consecutive acceptances beat scattered ones."""
    means = {"acceptance": 0.6, "accepted_to_2": 0.4, "accepted_to_3": 0.3}
    expected = max(1.6 / 1.2, 2.0 / 1.4, 2.3 / 1.6)
    assert summarise(means, {"cost_ratio": 0.2}) == pytest.approx({BEST_METRIC: expected, "cost_ratio": 0.2})
    assert summarise({"acceptance": 0.6}, {"cost_ratio": 2.0})[BEST_METRIC] == pytest.approx(1.6 / 3)
    scattered = means | {"accepted_to_2": 0.3, "accepted_to_3": 0.1}
    assert summarise(means, {"cost_ratio": 0.1})[BEST_METRIC] > summarise(scattered, {"cost_ratio": 0.1})[BEST_METRIC]
    unknown = evaluation.summarise(means | {"accepted_to_2": math.nan}, {"cost_ratio": 0.2}, distillation)  # type: ignore[arg-type]
    assert unknown[BEST_METRIC] == pytest.approx(1.6 / 1.2) and "accepted_to_2" not in unknown


def test_evaluate_measures_acceptance_on_draft_text() -> None:
    """It is sum_x min(p, q) of both models' own passes over the drafter's text."""
    torch.manual_seed(0)
    drafter, given, needs = lstm.build(SETTINGS, TARGET), batch(), lstm.needs(SETTINGS, TARGET)
    with torch.no_grad():
        metrics = evaluation.evaluate(drafter, given, lstm, SETTINGS, TARGET, needs)
        own = lstm.self_generated(drafter, given, SETTINGS, TARGET)
        student = drafter.head()(drafter(own.tokens_BT)).softmax(-1)
        theirs = TARGET.model(input_ids=own.tokens_BT).logits.softmax(-1)
    assert not torch.equal(own.tokens_BT[:, :9], given.tokens_BT[:, :9])
    mask_BT = own.loss_mask_BT[:, 1:]
    total, count = metrics[ON_DRAFT_TEXT]
    assert count == int(mask_BT.sum())
    torch.testing.assert_close(total, torch.minimum(student, theirs).sum(-1)[:, :-1][mask_BT].sum())
    on_text = lstm.evaluate(drafter, given, SETTINGS, TARGET)["acceptance"]
    torch.testing.assert_close(metrics["acceptance"][0], on_text[0])
    assert abs(total - on_text[0]) > 1e-2


def test_on_policy_training_uses_draft_text(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """With on_policy 1, every batch consists of prompts and the drafter's samples, with the target's hidden states."""
    seen = []

    def loss(drafter: Any, batch: Batch, settings: Any, target: Any) -> Any:
        texts = [row[:length].tolist() for row, length in zip(batch.tokens_BT, batch.lengths_B, strict=True)]
        seen.append((texts, batch.loss_mask_BT.clone()))
        torch.testing.assert_close(
            target.logits(batch.hidden[target.num_layers]), target.model(input_ids=batch.tokens_BT).logits
        )
        return real(drafter, batch, settings, target)

    real = lstm.loss
    monkeypatch.setattr(lstm, "loss", loss)
    on_policy = dataclasses.replace(SETTINGS, on_policy=1.0)
    train(lstm, on_policy, run_settings(folder, "own", max_steps=2, gradient_accumulation=2, batch_size=2))
    own, seen = seen, []
    train(lstm, dataclasses.replace(SETTINGS, on_policy=0.0), run_settings(folder, "theirs", max_steps=2))
    assert len(own) == 4 and len(seen) == 2
    ours = [(text, mask) for texts, masks in own for text, mask in zip(texts, masks, strict=True)]
    theirs = [(text, mask) for texts, masks in seen for text, mask in zip(texts, masks, strict=True)]
    for (text, mask), (given, _) in zip(ours, theirs, strict=True):
        first = mask.tolist().index(True)
        assert text[:first] == given[:first] and text[first:] != given[first:]


def test_best_checkpoint_has_the_largest_predicted_speed_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the negative prediction the worst checkpoint is kept; the metric is in the artifact and the log."""
    monkeypatch.setattr(lstm, "summarise", lambda means, costs: {BEST_METRIC: -means["acceptance"], **costs})
    output = train(lstm, SETTINGS, run_settings(folder, "turned", max_steps=12, learning_rate=3e-2))
    names = ("eval_acceptance", f"eval_{BEST_METRIC}", f"eval_{ON_DRAFT_TEXT}", "eval_accepted_to_3", "eval_cost_ratio")
    lines = [line for line in logged(output, *names) if "eval_acceptance" in line][:3]
    assert [line["step"] for line in lines] == [4, 8, 12] and all(len(line) == 6 for line in lines)
    acceptances = [line["eval_acceptance"] for line in lines]
    assert acceptances.index(min(acceptances)) < 2 and max(acceptances) - min(acceptances) > 1e-4
    measured = read_manifest(output)["measured_acceptance"]
    assert measured["acceptance"] == pytest.approx(min(acceptances))
    assert measured[BEST_METRIC] == pytest.approx(-min(acceptances))
    target = draftsmith.Target.from_pretrained(str(folder / "target"), dtype="float32")
    assert draftsmith.load(output, target).config == SETTINGS.config


def test_costs_are_measured_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run uses the costs of its first session."""
    mark_complete = checkpoints.mark_complete

    def stop(checkpoint: Path, facts: dict[str, Any]) -> None:
        mark_complete(checkpoint, facts)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "mark_complete", stop)
    with pytest.raises(KeyboardInterrupt):
        train(lstm, SETTINGS, run_settings(folder, "stopped"))
    monkeypatch.undo()
    monkeypatch.setattr(lstm, "measure_costs", lambda *_: pytest.fail("measured again"))
    output = train(lstm, SETTINGS, run_settings(folder, "stopped"))
    ratios = {line["eval_cost_ratio"] for line in logged(output, "eval_cost_ratio") if "eval_cost_ratio" in line}
    assert ratios == {read_manifest(output)["measured_acceptance"]["cost_ratio"]}


def test_start_from_loads_an_artifacts_weights(folder: Path) -> None:
    """Another family or shape, or a family without gradient, raises ValueError."""
    first = train(lstm, SETTINGS, run_settings(folder, "first"))
    second = dataclasses.replace(SETTINGS, loss="tvd", on_policy=0.0)
    still = run_settings(folder, "second", start_from=str(first), learning_rate=0.0)
    assert all(
        torch.equal(weights(first)[name], weight) for name, weight in weights(train(lstm, second, still)).items()
    )
    learnt = train(lstm, second, dataclasses.replace(still, output=str(folder / "third"), learning_rate=1e-2))
    assert not torch.equal(weights(learnt)["layers.weight_hh_l0"], weights(first)["layers.weight_hh_l0"])
    cases: list[tuple[str, Any, Any]] = [
        ("another family, lstm", cnn, cnn.Settings()),
        (
            "another shape, such as",
            lstm,
            dataclasses.replace(SETTINGS, config=dataclasses.replace(SETTINGS.config, hidden_size=16)),
        ),
        ("without gradient", ngram, ngram.Settings()),
    ]
    for number, (message, family, settings) in enumerate(cases):
        with pytest.raises(ValueError, match=message):
            train(family, settings, dataclasses.replace(still, output=str(folder / f"rejected-{number}")))


def test_invalid_settings_raise() -> None:
    cases = [
        ("on_policy needs a divergence", {"on_policy": 0.5}),
        ("it is a fraction", {"on_policy": 1.5, "loss": "tvd"}),
        ("on_policy_temperature is -1.0; it must be at least 0", {"on_policy_temperature": -1.0}),
    ]
    for message, changes in cases:
        with pytest.raises(ValueError, match=message):
            trainer_settings(lstm, **changes)
