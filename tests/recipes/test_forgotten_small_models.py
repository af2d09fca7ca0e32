"""Tests of the comparison of baseline and distilled drafters on a causal and an encoder-decoder target."""

import json
from pathlib import Path

import matplotlib.image
import pytest

from eval.plots.pairs import pair_table, pairs_of
from recipes import forgotten_small_models
from recipes.forgotten_small_models import SmallModelsSettings, main
from tests.support.text import save_target

TABLE = """
all: {batch_size: 4, max_steps: 2, max_length: 96, held_out_share: 0.2}
drafters:
  lstm: {hidden_size: 16, rank: 8, loss: LOSS}
  ngram: {order: 2}
"""


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_recipe_trains_and_compares_both_ways(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = {}
    for way, loss in (("baseline", "ce"), ("distilled", "forward_kl")):
        tables[way] = tmp_path / f"{way}.yaml"
        tables[way].write_text(TABLE.replace("LOSS", loss))
    monkeypatch.setattr(forgotten_small_models, "LINE_UPS", tables)
    run = SmallModelsSettings(
        targets=(save_target(tmp_path / "target", architecture=architecture),),
        output=str(tmp_path / "out"),
        num_texts=16,
        text_tokens=8,
        num_prompts=2,
        max_new_tokens=4,
        rounds=1,
    )
    main(run)
    pairs = json.loads((tmp_path / "out" / "forgotten_small_models.json").read_text())
    found = [(pair["drafter"], pair["temperature"]) for pair in pairs]
    assert found == [("lstm", 0.0), ("ngram", 0.0), ("lstm", 1.0), ("ngram", 1.0)]
    assert all(0 <= pair[way]["acceptance"] <= 1 <= pair[way]["tau"] for pair in pairs for way in tables)
    folder = tmp_path / "out" / "target"
    manifests = {way: json.loads((folder / way / "lstm" / "draft_config.json").read_text()) for way in tables}
    assert manifests["baseline"]["settings"]["data"] == str(folder / "labels.jsonl")
    assert manifests["distilled"]["settings"]["data"] == str(folder / "pseudo-data")
    rows = [json.loads(line) for line in (folder / "labels.jsonl").read_text().splitlines()]
    assert len(rows) == 16 and all(
        set(row) == ({"text"} if architecture == "llama" else {"source", "target"}) for row in rows
    )
    assert matplotlib.image.imread(tmp_path / "out" / "forgotten_small_models.png").shape[0] > 400


def test_pairs_of_and_pair_table() -> None:
    def row(drafter: str, tau: float) -> dict:
        return {
            "drafter": drafter,
            "target": "pocket",
            "temperature": 0.0,
            "tau": tau,
            "speedup": tau / 2,
            "accepted_per_depth": [tau - 1] if tau > 1 else [],
        }

    ways = ("old", "new")
    pairs = pairs_of([row("plain", 1.0), row("old/a", 1.0), row("new/a", 1.5), row("old/b", 2.0)], ways)
    assert pairs == [
        {
            "target": "pocket",
            "drafter": "a",
            "temperature": 0.0,
            "old": {"acceptance": 0.0, "tau": 1.0, "speedup": 0.5},
            "new": {"acceptance": 0.5, "tau": 1.5, "speedup": 0.75},
        }
    ]
    cells = [cell.strip() for cell in pair_table(pairs, ways)[-1].split("|")[1:-1]]
    assert cells == ["a on pocket, T=0", "0.00", "0.50", "1.00", "1.50", "0.50", "0.75"]
