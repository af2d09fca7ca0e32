"""A comparison told to wandb: its table, its pictures, every figure."""

import json
from pathlib import Path

import pytest
from PIL import Image

from eval.plots.track import to_wandb
from tests.support.wandb_files import read_wandb

ROWS = [
    {"drafter": name, "target": "pocket", "temperature": temperature, "batch_size": 1, "accepted_per_depth": accepted}
    | {"tau": tau, "tokens_per_s": 100 * tau, "speedup": tau / 2, "identical": identical}
    for name, accepted, tau in (("plain", [], 1.0), ("heads", [0.5, 0.25], 1.5))
    for temperature, identical in ((0.0, True), (1.0, None))
]


def test_table_pictures_and_figures_reach_wandb_without_an_account(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "bakeoff.png")
    to_wandb(ROWS, tmp_path, "draftsmith")
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    (told, *_), config = read_wandb(file)
    assert told["heads/tau_t0_b1"] == 1.5 and told["heads/speedup_t1_b1"] == 0.75
    assert told["plain/tokens_per_s_t0_b1"] == 100.0
    assert config["target"] == "pocket" and "drafter" not in config
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/*.json")
    shown = json.loads(table.read_text())
    assert shown["columns"] == list(ROWS[0]) and len(shown["data"]) == 4
    assert shown["data"][2] == ["heads", "pocket", 0.0, 1, "[0.5, 0.25]", 1.5, 150.0, 0.75, True]
    (picture,) = tmp_path.glob("wandb/offline-run-*/files/media/images/*.png")
    assert picture.read_bytes() == (tmp_path / "bakeoff.png").read_bytes()
