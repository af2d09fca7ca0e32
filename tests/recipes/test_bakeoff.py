"""Tests of the bake-off recipe with existing artifacts: invalid input, and results of the command line."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from draftsmith import Target
from recipes.bakeoff import BakeoffRunSettings, main
from tests.eval.test_compare import make_artifacts
from tests.support.models import prompts
from tests.support.runs import command, make_target, run


def test_recipe_invalid_input_raises_before_loading_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = make_target(tmp_path / "target")
    artifact = make_artifacts(target, tmp_path)[1]
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "w3 w4 w5"}\n{"prompt": "w6 w7"}\n')
    (tmp_path / "empty.jsonl").touch()
    good = BakeoffRunSettings(
        target=str(tmp_path / "target"),
        data=str(tmp_path / "prompts.jsonl"),
        drafts=(str(artifact),),
        output=str(tmp_path / "out"),
        batch_sizes="1",
        max_new_tokens=4,
    )
    manifest = json.loads((artifact / "draft_config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    (other / "draft_config.json").write_text(json.dumps(manifest | {"vocab_size": 99}))
    faults = {
        "no such folder": {"drafts": (str(tmp_path / "nowhere"),)},
        "is not a draftsmith artifact": {"drafts": (str(tmp_path),)},
        "was made for a vocabulary of 99": {"drafts": (str(other),)},
        "is empty": {"data": str(tmp_path / "empty.jsonl")},
        "contains other files": {"output": str(tmp_path)},
        "expected numbers separated by commas": {"temperatures": "cold"},
        "needs as many prompts": {"batch_sizes": "8"},
    }
    with monkeypatch.context() as patched:
        patched.setattr(Target, "from_pretrained", lambda *_, **__: pytest.fail("the weights were loaded"))
        for message, change in faults.items():
            with pytest.raises(ValueError, match=message):
                main(replace(good, **change))
    make_target(tmp_path / "target", seed=5)
    with pytest.raises(ValueError, match="train a drafter for this target"):
        main(good)
    assert not (tmp_path / "out").exists()


def test_recipe_from_the_command_line(tmp_path: Path) -> None:
    target = make_target(tmp_path / "target")
    artifact = make_artifacts(target, tmp_path)[1]
    rows = [{"prompt": " ".join(f"w{token}" for token in ids)} for ids in prompts(6)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "target": "target",
        "data": "prompts.jsonl",
        "max_new_tokens": 4,
        "rounds": 1,
        "batch_sizes": "1,2",
        "forecast_sizes": 1,
    }
    done = run(command("bakeoff", **settings, drafts=artifact, temperatures="0,0.5", max_steps=2), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "temperature 0.5, batch 2" in done.stdout
    rows = json.loads((tmp_path / "runs" / "bakeoff" / "bakeoff.json").read_text())
    assert len(rows) == 2 * (4 + 3), "transformers' prompt look-up takes one prompt at a time"
    assert {row["num_prompts"] for row in rows} == {4}
    assert all(row["identical"] is not False for row in rows)
