"""Tests of compressing to several sizes: healing, comparison, predictions and plot."""

import json
from pathlib import Path

import pytest

from draftsmith.length import predicted_speedup
from eval.plots.tradeoff import Point, publish_tradeoff
from recipes.tradeoff import TradeoffSettings, main
from tests.support.runs import SMALL, trainer_settings
from tests.support.text import save_target, write_prompts
from trainers import distill
from trainers.training.run_settings import RunSettings


@pytest.mark.slow
def test_recipe_cuts_heals_and_compares_each_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = str(write_prompts(tmp_path / "prompts.jsonl", 40))
    sweep = TradeoffSettings(
        methods=("even", "width", "wanda"),
        sizes=(0.34,),
        calibration_batches=1,
        held_out=prompts,
        num_prompts=2,
        max_new_tokens=4,
        rounds=1,
    )
    run = RunSettings(
        target=save_target(tmp_path / "target"),
        data=prompts,
        output=str(tmp_path / "out"),
        **SMALL | {"max_steps": 4, "eval_steps": 2},
    )
    main(sweep, trainer_settings(distill, loss="forward_kl"), run)
    output = capsys.readouterr().out
    assert "width-0.34 is left out: keep 0.34 leaves 0.68 of the 2 query heads" in output
    rows = json.loads((tmp_path / "out" / "tradeoff.json").read_text())
    sizes = ("even-0.34", "wanda-0.34")
    names = [f"{name}, {kind}" for name in sizes for kind in ("cut", "healed")]
    assert [row["name"] for row in rows] == [name for name in names for _ in range(2)]
    assert [row["temperature"] for row in rows] == [0.0, 1.0] * len(names)
    compared = json.loads((tmp_path / "out" / "bakeoff.json").read_text())
    for row in rows:
        name, _, kind = row["name"].partition(", ")
        (same,) = (
            one for one in compared if (one["drafter"], one["temperature"]) == (f"{kind}/{name}", row["temperature"])
        )
        assert (same["tau"], same["speedup"]) == (row["tau"], row["speedup"])
        assert same["identical"] in (None, True)
    weights = {row["name"]: row["num_weights"] for row in rows}
    assert weights["even-0.34, cut"] == weights["even-0.34, healed"] < weights["wanda-0.34, cut"]
    assert weights["wanda-0.34, cut"] == weights["wanda-0.34, healed"]
    main(sweep, trainer_settings(distill, loss="forward_kl"), run)
    output = capsys.readouterr().out
    assert output.count("already made with these settings") == output.count("nothing to do") == len(sizes)


def test_publish_tradeoff(tmp_path: Path) -> None:
    facts = {"line": "x, cut", "temperature": 0.0, "tau": 2.0, "speedup": 1.5}
    points = [
        Point(name=f"x-{size}", num_weights=size, cost_ratio=0.01 * size, acceptance=0.5 + 0.004 * size, **facts)
        for size in (10, 50, 100)
    ]
    assert points[1].predicted == predicted_speedup.best(0.7, 0.5)[1]
    table = publish_tradeoff(points, tmp_path)
    assert table.splitlines()[2] == "| x-10 | 0.00 | 0.10 | 0 | 0.540 | 2.00 | 1.50 | 1.53 |"
    assert [row["name"] for row in json.loads((tmp_path / "tradeoff.json").read_text())] == ["x-10", "x-50", "x-100"]
    assert (tmp_path / "tradeoff.png").read_bytes().startswith(b"\x89PNG")
