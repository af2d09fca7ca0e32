"""Tests of the quickstart: text, drafters, table and plot from one command, and nothing trained twice."""

import json
from datetime import datetime
from pathlib import Path

import pytest

from data import POCKET
from draftsmith.artifacts.artifact import read_manifest
from recipes import quickstart
from recipes.quickstart import QuickstartSettings, main
from tests.support.runs import command, run
from tests.support.text import save_target, write_prompts

TRAINED = {
    "medusa": "num_heads: 2\nbatch_size: 4\nmax_steps: 4\nheld_out_share: 0.2",
    "distill": "start: layers\nbatch_size: 4\nmax_steps: 4\nheld_out_share: 0.2",
}


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> QuickstartSettings:
    presets = tmp_path / "configs"
    presets.mkdir()
    for name, text in (TRAINED | {"lookup": "num_draft: 5"}).items():
        (presets / f"quickstart-{name}.yaml").write_text(text)
    monkeypatch.setattr(quickstart, "PRESETS", presets)
    return QuickstartSettings(
        target=save_target(tmp_path / "target"),
        data=str(write_prompts(tmp_path / "prompts.jsonl", 40)),
        output=str(tmp_path / "out"),
        num_texts=24,
        text_tokens=16,
        num_prompts=8,
        max_new_tokens=4,
        rounds=1,
    )


def test_quickstart_and_its_continuation(tiny: QuickstartSettings, capsys: pytest.CaptureFixture[str]) -> None:
    main(tiny)
    output = Path(tiny.output)
    text = capsys.readouterr().out
    rows = json.loads((output / "bakeoff.json").read_text())
    found = [(row["temperature"], row["batch_size"], row["drafter"]) for row in rows]
    names = ("plain", "transformers", "distill", "lookup", "medusa")
    assert found == [(temperature, size, name) for temperature in (0.0, 1.0) for size in (1, 8) for name in names]
    assert all(row["identical"] for row in rows if row["temperature"] == 0)
    assert "temperature 1, batch 8" in text
    assert f"The report is {output}/bakeoff.html" in text
    assert read_manifest(output / "lookup")["config"]["num_draft"] == 5
    made = {name: (output / name / "draft_config.json").read_bytes() for name in (*TRAINED, "lookup")}

    main(tiny)
    text = capsys.readouterr().out
    assert text.count("nothing to do") == len(made)
    assert {name: (output / name / "draft_config.json").read_bytes() for name in made} == made


def test_held_out_prompts_are_not_in_the_training_data(tiny: QuickstartSettings) -> None:
    training, held_out = quickstart._prompts(tiny, datetime(2030, 1, 1))
    assert (len(training), len(held_out)) == (24, 8)
    assert not {prompt.key for prompt in training} & {prompt.key for prompt in held_out}


def test_output_folder_with_other_files_raises_at_once(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    done = run(command("quickstart", output=tmp_path), tmp_path)
    assert done.returncode != 0
    assert "contains other files" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_quickstart_on_the_pocket_target(tmp_path: Path) -> None:
    small = {"num_texts": 40, "text_tokens": 24, "max_steps": 4, "max_new_tokens": 8, "rounds": 1}
    done = run(command("quickstart", target=POCKET, **small), tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "runs" / "quickstart" / "bakeoff.json").read_text())
    assert {row["drafter"] for row in rows} >= {"plain", "transformers", "medusa", "distill", "lookup"}
    assert all(row["identical"] for row in rows if row["temperature"] == 0)
