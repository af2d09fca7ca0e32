"""Sweeps without a server: the repository's sweep files, running trials, interruption, failures and invalid files."""

import importlib
import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb.wandb_agent
import yaml

from draftsmith.artifacts.artifact import read_manifest
from tests.support.runs import ROOT, environment, make_data, make_target
from tests.support.warm import ForkedRun
from trainers.sweeps.sweep import Sweep, command, read_sweep, run_sweep, table
from trainers.training.run_settings import RunSettings
from trainers.training.settings import flat, parse_settings

SHIPPED = sorted((ROOT / "recipes" / "sweeps").glob("*.yaml"))
TINY = {"max_steps": 2, "eval_steps": 2, "save_steps": 2, "log_steps": 1, "batch_size": 4, "warmup_steps": 1}
PROGRAM = """
import json, pathlib, sys, time
given = dict(word[2:].split("=", 1) for word in sys.argv[1:])
output, x = pathlib.Path(given["output"]), float(given["x"])
output.mkdir(parents=True, exist_ok=True)
with (output / "starts").open("a") as starts:
    starts.write("start\\n")
if x > float(given["fails_above"]):
    sys.exit(f"{x} is too much")
while not pathlib.Path(given["gate"]).exists() and output.name == "trial-002":
    time.sleep(0.01)
lines = [{"step": 1, "eval_score": 0.0}, {"step": 2, "eval_score": -((x - 3) ** 2), "seconds": 7.0}]
(output / "log.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
"""


def write_sweep(folder: Path, **changes: Any) -> Path:
    """Writes a sweep of a program that logs a parabola; keys whose value is None are left out."""
    (folder / "parabola.py").write_text(PROGRAM)
    config = {
        "program": str(folder / "parabola.py"),
        "method": "random",
        "metric": {"name": "eval/score", "goal": "maximize"},
        "parameters": {"x": {"min": 0.0, "max": 10.0}, "fails_above": {"value": 99}, "gate": {"value": str(folder)}},
    } | changes
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
    return path


def run_parabola(folder: Path, output: str, num_trials: int, **changes: Any) -> tuple[Sweep, list[dict[str, Any]]]:
    sweep = read_sweep(write_sweep(folder, **changes), {})
    return sweep, run_sweep(sweep, folder / output, num_trials=num_trials, seed=5)


def results(trials: list[dict[str, Any]]) -> list[Any]:
    return [(one["parameters"], one["value"]) for one in trials]


# --- The repository's sweep files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_recipes_accept_parameters_drawn_from_repository_sweeps(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = read_sweep(path, {})
    family = importlib.import_module(f"trainers.{Path(sweep.config['program']).stem}")
    seen = set()
    for seed in range(8):
        parameters = sweep.draw([], seed=seed)
        assert parameters is not None
        words = command(sweep, parameters)
        assert words[:3] == ["/usr/bin/env", "python", str(ROOT / sweep.config["program"])]
        settings, run = parse_settings(family.Settings, RunSettings, description=None, argv=words[3:])
        assert parameters.items() <= (flat(settings) | flat(run)).items()
        seen.add(tuple(words))
    assert len(seen) > 1 or sweep.config["method"] == "grid"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_command_equals_that_of_the_wandb_agent(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    class RecordedProcess:
        def __init__(self, *, command: list[str], **_: Any) -> None:
            started.append(command)

    monkeypatch.setattr(wandb.wandb_agent, "AgentProcess", RecordedProcess)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_RUN_ID", "restored afterwards")
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", "restored afterwards")
    sweep, parameters = read_sweep(path, {}), {"learning_rate": 0.003, "own_head": True, "length": "adaptive=0.6"}
    (tmp_path / "wandb" / "sweep-None").mkdir(parents=True)
    agent = wandb.wandb_agent.Agent(api=None, queue=None)
    agent._sweep_command = sweep.config["command"]
    args = {name: {"value": value} for name, value in parameters.items()}
    agent._command_run({"type": "run", "run_id": "r1", "program": sweep.config["program"], "args": args})
    words = command(sweep, parameters)
    assert started == [[word.removeprefix(f"{ROOT}/") for word in words]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("sweeps")
    make_data(make_target(root / "target"), root / "data")
    return root


def fixed(folder: Path, path: Path) -> dict[str, Any]:
    """Returns fixed parameters that make trials of a repository sweep small."""
    more = {"hidden_size": 16, "num_heads": 2} if path.stem == "distill" else {}
    return {"target": str(folder / "target"), "data": str(folder / "data"), **TINY, **more}


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.slow] * (path.stem != "layerskip"), id=path.stem) for path in SHIPPED],
)
def test_run_sweep_of_a_repository_file_logs_to_wandb_offline(
    folder: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs one trial by the file's own command, with $WANDB_MODE unset."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    sweep, output = read_sweep(path, fixed(folder, path)), folder / path.stem
    (trial,) = run_sweep(sweep, output, num_trials=1, seed=0)
    assert trial["value"] is not None and sweep.best([trial]) is trial
    assert list(output.glob("trial-001/wandb/offline-run-*/*.wandb"))
    settings = read_manifest(output / "trial-001")["settings"]
    assert all(settings[name] == value for name, value in trial["parameters"].items())


@pytest.mark.slow
def test_trials_of_the_wandb_agent_have_separate_folders(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb's agent class starts the recipe with commands as a server would send them."""
    path = ROOT / "recipes" / "sweeps" / "medusa.yaml"
    sweep = read_sweep(path, fixed(folder, path))
    for name, value in (environment() | {"WANDB_DIR": str(folder), "WANDB_SWEEP_ID": "s1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_RUN_ID", "restored afterwards")
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", "restored afterwards")
    monkeypatch.chdir(ROOT)
    agent = wandb.wandb_agent.Agent(api=None, queue=None)
    agent._sweep_command = sweep.config["command"]
    given = {name: one["value"] for name, one in sweep.config["parameters"].items() if "value" in one}
    args = {name: {"value": value} for name, value in (given | {"output": str(folder / "agent")}).items()}
    for trial in ("r1", "r2"):
        args["learning_rate"] = {"value": 0.001 if trial == "r1" else 0.002}
        agent._command_run({"type": "run", "run_id": trial, "program": sweep.config["program"], "args": args})
        assert agent._run_processes[trial].wait() == 0
    rates = [read_manifest(folder / "agent" / trial)["settings"]["learning_rate"] for trial in ("r1", "r2")]
    assert rates == [0.001, 0.002]


# --- Running trials ------------------------------------------------------------------------------------------------


def test_run_sweep_records_trials_and_the_best(tmp_path: Path) -> None:
    sweep, trials = run_parabola(tmp_path, "out", 4)
    values = [one["value"] for one in trials]
    assert values == [pytest.approx(-((one["parameters"]["x"] - 3) ** 2)) for one in trials]
    assert len(set(values)) == 4 and all(one["seconds"] == 7.0 for one in trials)
    best = sweep.best(trials)
    assert best is not None and best["value"] == max(values)
    lines = table(sweep, trials)
    assert lines[0] == "| trial | x | eval/score | seconds |  |" and sum("best" in line for line in lines) == 1
    assert (tmp_path / "out" / "sweep.md").read_text().splitlines() == lines
    lowest = read_sweep(write_sweep(tmp_path, metric={"name": "eval/score", "goal": "minimize"}), {}).best(trials)
    assert lowest is not None and lowest["value"] == min(values)


@pytest.mark.parametrize("method", ["random", "grid", "bayes"])
def test_more_trials_equal_those_of_a_longer_sweep(tmp_path: Path, method: str) -> None:
    parameters = {"y": {"values": ["a", "b"]}, "x": {"min": 1, "max": 4}}  # whole numbers, so that a grid can list them
    parameters |= {"fails_above": {"value": 99}, "gate": {"value": str(tmp_path)}}
    _, whole = run_parabola(tmp_path, "whole", 4, method=method, parameters=parameters)
    _, first = run_parabola(tmp_path, "parts", 2, method=method, parameters=parameters)
    _, parts = run_parabola(tmp_path, "parts", 4, method=method, parameters=parameters)
    assert results(parts) == results(whole) and results(first) == results(whole)[:2]
    if method == "grid":
        _, longer = run_parabola(tmp_path, "parts", 99, method=method, parameters=parameters)
        assert len(longer) == 8 == len({json.dumps(one["parameters"]) for one in longer})


def test_killed_sweep_continues_after_its_running_trial_ends(tmp_path: Path) -> None:
    """The sweep is killed with SIGKILL during trial 2, which keeps running; until it ends no other trial may start."""
    _, whole = run_parabola(tmp_path, "whole", 3)
    gate = tmp_path / "gate"
    path = write_sweep(tmp_path)
    words = [str(ROOT / "recipes" / "sweep.py"), str(path), "--trials", "3", "--seed", "5"]
    words += ["--output", str(tmp_path / "out"), "--fixed", json.dumps({"gate": str(gate)})]
    broken = ForkedRun(words, ROOT, environment())
    started = tmp_path / "out" / "trial-002" / "starts"
    wait_until(started.exists)
    broken.process.kill()
    assert broken.wait(timeout_s=60).returncode == -signal.SIGKILL
    with (tmp_path / "out" / "trials.jsonl").open("a") as file:
        file.write('{"trial": 2, "para')
    sweep = read_sweep(path, {"gate": str(gate)})
    with pytest.raises(ValueError, match="out is in use by another run .*; wait until it ends, stop it"):
        run_sweep(sweep, tmp_path / "out", num_trials=3, seed=5)
    gate.touch()
    wait_until((tmp_path / "out" / "trial-002" / "log.jsonl").exists)
    time.sleep(0.2)
    run_sweep(sweep, tmp_path / "out", num_trials=3, seed=5)
    lines = [json.loads(line) for line in (tmp_path / "out" / "trials.jsonl").read_text().splitlines()]
    assert [one["trial"] for one in lines] == [1, 2, 3]
    assert [(one["parameters"]["x"], one["value"]) for one in lines] == [
        (one["parameters"]["x"], one["value"]) for one in whole
    ]
    assert started.read_text() == "start\n" * 2


def wait_until(condition: Any) -> None:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < 120
        time.sleep(0.02)


def test_failed_trial_is_recorded_and_the_sweep_continues(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"x": {"values": [1, 8, 2]}, "fails_above": {"value": 5}, "gate": {"value": str(tmp_path)}}
    sweep, trials = run_parabola(tmp_path, "out", 3, method="grid", parameters=given)
    assert [one["value"] for one in trials] == [-4.0, None, -1.0]
    log = tmp_path / "out" / "trial-002.log"
    assert f"trial 2 failed (exit status 1); its output is in {log}" in capsys.readouterr().err
    assert log.read_text() == "8.0 is too much\n" and "| 2 | 8 | failed |" in table(sweep, trials)[3]
    given["fails_above"] = {"value": 0}
    with pytest.raises(
        ValueError, match=r"3 trials in succession failed; last line of .*trial-003.log: 2.0 is too much"
    ):
        run_parabola(tmp_path, "none", 9, method="grid", parameters=given)


def test_trial_without_the_metric_has_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep, trials = run_parabola(tmp_path, "out", 1, metric={"name": "eval/scroe", "goal": "maximize"})
    assert trials[0]["value"] is None and sweep.best(trials) is None
    assert "no eval/scroe in " in capsys.readouterr().err


def test_corrected_sweep_starts_over_if_every_trial_failed(tmp_path: Path) -> None:
    """Trials of recipes that are rejected leave no folders, unlike those of this program."""
    given = {"x": {"values": [1, 2]}, "fails_above": {"value": 0}, "gate": {"value": str(tmp_path)}}
    run_parabola(tmp_path, "out", 2, method="grid", parameters=given)
    for number in (1, 2):
        shutil.rmtree(tmp_path / "out" / f"trial-{number:03d}")
    _, trials = run_parabola(tmp_path, "out", 2, method="grid", parameters=given | {"fails_above": {"value": 5}})
    assert [one["value"] for one in trials] == [-4.0, -1.0]
    assert len((tmp_path / "out" / "trials.jsonl").read_text().splitlines()) == 2


def test_changed_sweep_does_not_continue_an_existing_one(tmp_path: Path) -> None:
    run_parabola(tmp_path, "out", 1)
    with pytest.raises(ValueError, match="was made with other settings"):
        run_parabola(tmp_path, "out", 1, method="bayes")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "custom"}, "method is 'custom'; without a server it is one of random, grid, bayes"),
        ({"early_terminate": {"type": "hyperband", "min_iter": 3}}, "early_terminate needs wandb's server"),
        ({"run_cap": 3}, "run_cap needs wandb's server; remove it"),
        ({"metod": "grid"}, "unknown key 'metod'; did you mean method?"),
        ({"metric": None}, "metric has no name"),
        ({"metric": {"name": "eval/score", "target": 1}}, "metric has 'target', which needs wandb's server"),
        ({"metric": {"name": "eval/score", "goal": "best"}}, "metric has the goal 'best'; it must be minimize or"),
        ({"parameters": None}, "has no parameters"),
        ({"parameters": {"output": {"value": "x"}}}, "parameter output is set for each trial; remove it"),
        ({"program": "recipes/nothing.py"}, "program recipes/nothing.py does not exist"),
        ({"parameters": {"x": {"min": 3, "max": 1}}}, "parameter x has min 3 and max 1; min must be less than max"),
        ({"method": "grid", "parameters": {"x": {"min": 0.5, "max": 1.0}}}, "x is continuous; method grid needs"),
    ],
)
def test_read_sweep_rejects_invalid_files_in_one_sentence(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = write_sweep(tmp_path, **changes)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_sweep(path, {})
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_read_sweep_reports_all_faults_at_once(tmp_path: Path) -> None:
    nested = {"optimizer": {"parameters": {"learning_rate": {"values": [0.1]}}}, "x": {"distribution": "nromal"}}
    path = write_sweep(tmp_path, method="hyperband", parameters=nested)
    with pytest.raises(ValueError, match=r"method is 'hyperband'.*; parameter optimizer has nested .*; parameter x"):
        read_sweep(path, {})


def test_read_sweep_rejects_files_without_parameters(tmp_path: Path) -> None:
    for content in ("a: [", "7", ""):
        (tmp_path / "x.yaml").write_text(content)
        with pytest.raises(ValueError, match=r"sweep .*x.yaml"):
            read_sweep(tmp_path / "x.yaml", {})
    with pytest.raises(ValueError, match="cannot be read"):
        read_sweep(tmp_path / "nowhere.yaml", {})


@pytest.mark.slow
def test_launch_sh_sweep_prints_the_table_and_the_best_trial(tmp_path: Path) -> None:
    path = write_sweep(tmp_path)
    words = [str(ROOT / "launch.sh"), "sweep", str(path), "--trials", "2", "--output", str(tmp_path / "out")]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *shown, _, last = done.stdout.splitlines()
    assert shown == (tmp_path / "out" / "sweep.md").read_text().splitlines()
    assert last.startswith("best: trial ") and "eval/score" in last and f"; in {tmp_path / 'out'}/trial-00" in last


def test_run_sweep_ignores_the_environment_of_a_wandb_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep started within an agent's run does not pass on the agent's sweep and run ids."""
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    monkeypatch.setenv("WANDB_RUN_ID", "r1")
    (tmp_path / "program.py").write_text(PROGRAM + "import os\nassert 'WANDB_SWEEP_ID' not in os.environ\n")
    _, trials = run_parabola(tmp_path, "out", 1, program=str(tmp_path / "program.py"))
    assert trials[0]["value"] is not None
