"""trainers/sweeps/lineup.py and `recipes/bakeoff.py` without artifacts: a table of drafters, made and then compared."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from draftsmith.artifacts.artifact import read_manifest
from recipes.bakeoff import LINE_UP, RunSettings, main
from tests.support.text import save_target, write_prompts
from trainers.sweeps import lineup

TABLE = """
all: {batch_size: 4, max_steps: 4, held_out_share: 0.2}
drafters:
  lookup: {num_draft: 5}
  heads: {trainer: medusa, num_heads: 2}
  both: {trainer: cascade, parts: [lookup, heads]}
"""


@pytest.fixture
def tiny(tmp_path: Path) -> RunSettings:
    (tmp_path / "table.yaml").write_text(TABLE)
    return RunSettings(
        target=save_target(tmp_path / "target"),
        data=str(write_prompts(tmp_path / "prompts.jsonl", 40)),
        learn_from=str(tmp_path / "prompts.jsonl"),
        line_up=str(tmp_path / "table.yaml"),
        output=str(tmp_path / "out"),
        num_texts=24,
        text_tokens=16,
        num_prompts=2,
        max_new_tokens=4,
        rounds=1,
        batch_sizes="1",
        temperatures="0",
        forecast_sizes="",
    )


def test_all_are_made_compared_and_made_once(tiny: RunSettings, capsys: pytest.CaptureFixture[str]) -> None:
    main(tiny)
    output, names = Path(tiny.output), ["lookup", "heads", "both"]
    told = capsys.readouterr().out
    assert [f"{at} of 3  {name}" in told for at, name in enumerate(names, start=1)] == [True] * 3
    assert "trained in" not in told and "trained in" in (output / "logs" / "heads.log").read_text()
    rows = json.loads((output / "bakeoff.json").read_text())
    assert [row["drafter"] for row in rows] == ["plain", "transformers", *names]
    manifests = {name: read_manifest(output / name) for name in names}
    assert [manifests[name]["family"] for name in names] == ["lookup", "medusa", "cascade"]
    assert {manifest["data_fingerprint"] for manifest in manifests.values()} == {manifests["heads"]["data_fingerprint"]}
    assert {manifest["settings"]["max_steps"] for manifest in manifests.values()} == {4}
    made = {name: (output / name / "draft_config.json").read_bytes() for name in names}
    main(tiny)
    assert {name: (output / name / "draft_config.json").read_bytes() for name in names} == made
    assert capsys.readouterr().out.count("was there, held-out acceptance") == 3
    main(replace(tiny, train_steps=2, output=f"{output}-2"))
    assert read_manifest(Path(f"{output}-2") / "heads")["settings"]["max_steps"] == 2


def test_what_cannot_be_made_is_left_out_and_what_is_made_of_it(
    tiny: RunSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    table = TABLE.replace("num_heads: 2}", "num_heads: 2, held_out_share: 0.999999}")
    Path(tiny.line_up).write_text(table)
    main(tiny)
    told = capsys.readouterr().out
    assert "heads               left out: " in told and "of 24 rows none is left to train on" in told
    assert "both                left out: it is made of heads, which was left out" in told
    rows = json.loads((Path(tiny.output) / "bakeoff.json").read_text())
    assert [row["drafter"] for row in rows] == ["plain", "transformers", "lookup"]


def test_the_shipped_table_is_in_order(tmp_path: Path) -> None:
    line_up = lineup.read(LINE_UP)
    assert len(line_up) > 20
    for entry in line_up:
        family, run = lineup._settings(entry, tmp_path, {"data": "runs/mine"})
        assert type(family).__module__ == f"trainers.{entry.trainer}"
        assert (run.output, run.max_steps, run.data) == (str(tmp_path / entry.name), 120, "runs/mine")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("all:", "every:", "must hold `drafters`"),
        ("trainer: medusa", "trainer: medussa", "did you mean 'medusa'"),
        ("trainer: medusa", "trainer: settings", "which there is none of"),
        ("num_draft: 5", "max_steps: 5", "lookup has a max_steps of its own"),
        ("[lookup, heads]", "[lookup, head]", "both is made of 'head', which is no drafter further up"),
        ("num_draft: 5}", "num_draft: 5", "is no YAML"),
    ],
)
def test_a_faulty_table_is_refused(tiny: RunSettings, old: str, new: str, message: str) -> None:
    Path(tiny.line_up).write_text(TABLE.replace(old, new))
    with pytest.raises(ValueError, match=message):
        main(tiny)
    assert not Path(tiny.output).exists()


def test_a_faulty_setting_stops_all_before_anything_is_made(
    tiny: RunSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="no such file"):
        lineup.read(Path(tiny.line_up).with_name("nowhere.yaml"))
    Path(tiny.line_up).write_text(TABLE.replace("num_heads: 2", "num_head: 2"))
    with pytest.raises(SystemExit):
        main(tiny)
    assert "unknown setting 'num_head'" in capsys.readouterr().err
    assert not Path(tiny.output).exists()
