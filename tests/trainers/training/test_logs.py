"""Logs: metric names in log.jsonl and wandb for every family, and the last line after an interruption."""

import json
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import wandb
from transformers.integrations.integration_utils import rewrite_logs

from tests.eval.plots.wandb_files import read_wandb
from tests.support import runs
from tests.support.runs import SMALL, make_data, make_target, trainer_settings
from trainers import layerskip, lookup, medusa
from trainers.training import checkpoints, logs
from trainers.training.jsonl import wandb_name
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings

FAMILIES = [
    (medusa, trainer_settings(medusa, num_heads=2)),
    (layerskip, trainer_settings(layerskip, objective="acceptance", skip_ratio=0.5, num_texts=2)),
    (lookup, lookup.Settings()),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("logs")
    make_data(make_target(root / "target"), root / "data")
    return root


run_settings = partial(runs.run_settings, **SMALL | {"max_steps": 2})


def lines(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("family", "settings"), FAMILIES)
def test_last_line_has_acceptance_and_training_time(folder: Path, family: ModuleType, settings: Any) -> None:
    output = train(family, settings, run_settings(folder, family.__name__))
    manifest = json.loads((output / "draft_config.json").read_text())
    *earlier, last = lines(output)
    held_out = {f"eval_{name}": value for name, value in manifest["measured_acceptance"].items()}
    assert last == {"step": 2, **held_out, "seconds": manifest["train_s"]} and "eval_acceptance" in last
    if family is medusa:
        for line in (line for line in earlier if "loss" in line):
            assert {"step", "loss", "tokens_per_s", "seconds", "learning_rate"} <= line.keys()
            assert 0 < line["supervised_tokens_per_s"] < line["tokens_per_s"] and 0 < line["teacher_share"] < 1
            assert 0 < line["seconds"] <= last["seconds"] + 0.1
    if family is layerskip:
        assert [line["step"] for line in earlier] == [1, 2] and all("score" in line for line in earlier)


def test_wandb_offline_gets_the_same_metrics_and_all_settings(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks a family with gradient and one without."""
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    for family, settings in FAMILIES[:2]:
        output = train(family, settings, run_settings(folder, f"{family.__name__}-wandb", report_to="wandb"))
        wandb.finish()
        (file,) = output.glob("wandb/offline-run-*/*.wandb")
        logged, config = read_wandb(file)
        assert config["num_texts" if family is layerskip else "num_heads"] == 2 and config["max_steps"] == 2
        for line in lines(output):
            expected = {wandb_name(name): value for name, value in line.items() if name != "step"}
            assert any(expected.items() <= one.items() for one in logged), line


def test_continued_run_keeps_its_wandb_id(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sessions of an interrupted run are offline folders of one wandb run; another run has an id of its own."""
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    run = run_settings(folder, "continued", report_to="wandb")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "publish", stop)
    with pytest.raises(KeyboardInterrupt):
        train(*FAMILIES[0], run)
    wandb.finish()
    monkeypatch.undo()
    train(*FAMILIES[0], run)
    wandb.finish()
    # The files are named after the run's id; the folders add "-1" to the second of two sessions within one second.
    files = list((folder / "continued").glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2
    ids = {file.stem.removeprefix("run-") for file in files}
    assert ids == {(folder / "continued" / "wandb" / "run-id").read_text()}
    train(*FAMILIES[0], run_settings(folder, "separate", report_to="wandb"))
    wandb.finish()
    assert (folder / "separate" / "wandb" / "run-id").read_text() not in ids


def test_wandb_names_equal_those_of_transformers() -> None:
    line = {"loss": 1.0, "eval_acceptance": 0.5, "tokens_per_s": 3.0}
    assert {wandb_name(name): value for name, value in line.items()} == rewrite_logs(line)


def test_log_artifact_replaces_the_line_of_a_killed_run(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0, "seconds": 1.0}\n{"step": 2, "eval_acceptance": 0.')
    run = RunSettings(max_steps=2)
    for seconds in (3.0, 4.0):
        logs.log_artifact(run, {"acceptance": 0.5}, seconds, tmp_path)
    assert lines(tmp_path) == [
        {"step": 1, "loss": 2.0, "seconds": 1.0},
        {"step": 2, "eval_acceptance": 0.5, "seconds": 4.0},
    ]


def test_run_folder_of_a_wandb_sweep_is_named_after_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_SWEEP_ID", raising=False)
    monkeypatch.setenv("WANDB_RUN_ID", "r1")
    assert RunSettings().folder("x") == Path("runs/x")
    assert RunSettings(output="mine").folder("x") == Path("mine")
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    assert RunSettings().folder("x") == Path("runs/sweeps/s1/r1")
    assert RunSettings(output="mine").folder("x") == Path("mine/r1")
    monkeypatch.setenv("WANDB_RUN_ID", "../r1")
    with pytest.raises(ValueError, match="the environment names the file '../r1'"):
        RunSettings().folder("x")
