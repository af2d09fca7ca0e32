"""Tests of the comparison of prophet and early exit, and of learning curves."""

import json
from pathlib import Path

import pytest

from eval.plots.curves import Panel, publish_curves, read_curve
from recipes.prophet_vs_early_exit import ComparisonSettings, main
from tests.support.runs import SMALL
from tests.support.text import save_target, write_prompts
from trainers.training.run_settings import RunSettings


@pytest.mark.slow
def test_recipe_trains_and_compares_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = str(write_prompts(tmp_path / "prompts.jsonl", 40))
    comparison = ComparisonSettings(
        text=prompts, text_steps=4, held_out=prompts, num_prompts=2, max_new_tokens=4, rounds=1
    )
    small = SMALL | {"max_steps": 4, "eval_steps": 2}
    run = RunSettings(target=save_target(tmp_path / "target"), data=prompts, output=str(tmp_path / "out"), **small)
    main(comparison, run)
    output = tmp_path / "out"
    points = [json.loads(line) for line in (output / "curves.jsonl").read_text().splitlines()]
    steps = {name: [point["step"] for point in points if point["run"] == name] for name in {p["run"] for p in points}}
    assert set(steps) == {"prophet", "early_exit", "text and prophet", "text alone"}
    assert all(found == [2, 4] for found in steps.values())
    # Both copies start as the target, and only one of them gets a prophet's gradient.
    losses = {point["run"]: point["value"] for point in points if "nats" in point["panel"]}
    assert losses["text and prophet"] != losses["text alone"]
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
    rows = json.loads((output / "bakeoff.json").read_text())
    assert {row["drafter"] for row in rows} == {"plain", "transformers", "prophet", "early_exit"}
    assert all(row["identical"] for row in rows if row["temperature"] == 0)
    output_text = capsys.readouterr().out
    main(comparison, run)
    assert "The target's own loss" in output_text and "nothing to do" in capsys.readouterr().out


def test_read_and_publish_curves(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(
        '{"step": 1, "loss": 2.5}\n{"step": 2, "eval_x": 0.5}\n{"step": 4, "eval_x": 1}\n'
        '{"step": 4, "eval_x": 0.5, "seconds": 9}\n'
    )
    points = read_curve(tmp_path, "eval_x")
    assert points == [(2, 0.5), (4, 1)]
    with pytest.raises(ValueError, match="does not contain the metric eval_y"):
        read_curve(tmp_path, "eval_y")
    publish_curves([Panel(title="x", lines={"one": points})], tmp_path)
    line, _ = (tmp_path / "curves.jsonl").read_text().splitlines()
    assert json.loads(line) == {"panel": "x", "run": "one", "step": 2, "value": 0.5}
    assert (tmp_path / "curves.png").stat().st_size > 1_000
