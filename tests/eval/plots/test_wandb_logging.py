"""Tests of logging a comparison to wandb: table, plots and metrics."""

import json
from pathlib import Path

import pytest
from PIL import Image

from eval.plots.wandb_logging import to_wandb
from tests.eval.plots.wandb_files import read_wandb

ROWS = [
    {"drafter": name, "target": "pocket", "temperature": temperature, "batch_size": 1, "accepted_per_depth": accepted}
    | {"tau": tau, "tokens_per_s": 100 * tau, "speedup": tau / 2, "identical": identical}
    for name, accepted, tau in (("plain", [], 1.0), ("heads", [0.5, 0.25], 1.5))
    for temperature, identical in ((0.0, True), (1.0, None))
]


def test_to_wandb_logs_table_plots_and_metrics_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "bakeoff.png")
    to_wandb(ROWS, tmp_path, "draftsmith")
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    (logged, *_), config = read_wandb(file)
    assert logged["heads/tau_t0_b1"] == 1.5 and logged["heads/speedup_t1_b1"] == 0.75
    assert logged["plain/tokens_per_s_t0_b1"] == 100.0
    assert config["target"] == "pocket" and "drafter" not in config
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/*.json")
    table_data = json.loads(table.read_text())
    assert table_data["columns"] == list(ROWS[0]) and len(table_data["data"]) == 4
    assert table_data["data"][2] == ["heads", "pocket", 0.0, 1, "[0.5, 0.25]", 1.5, 150.0, 0.75, True]
    (picture,) = tmp_path.glob("wandb/offline-run-*/files/media/images/*.png")
    assert picture.read_bytes() == (tmp_path / "bakeoff.png").read_bytes()
