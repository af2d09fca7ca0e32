"""Line-ups of drafters, and recipes/bakeoff.py without artifacts, which trains a line-up and then compares it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from draftsmith.artifacts.artifact import read_manifest
from eval.bakeoff.contenders import PROMPT_LOOKUP
from recipes.bakeoff import LINE_UP, BakeoffRunSettings, main
from tests.support.text import save_target, write_prompts
from trainers import distill
from trainers.sweeps import lineup
from trainers.training.settings import parse_settings

TABLE = """
all: {batch_size: 4, max_steps: 4, held_out_share: 0.2}
drafters:
  lookup: {num_draft: 5}
  heads: {trainer: medusa, num_heads: 2}
  both: {trainer: cascade, parts: [lookup, heads]}
"""


@pytest.fixture
def tiny(tmp_path: Path) -> BakeoffRunSettings:
    (tmp_path / "table.yaml").write_text(TABLE)
    return BakeoffRunSettings(
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


def test_bakeoff_trains_all_drafters_once_and_compares_them(
    tiny: BakeoffRunSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    main(tiny)
    output, names = Path(tiny.output), ["lookup", "heads", "both"]
    printed = capsys.readouterr().out
    assert [f"{number} of 3  {name}" in printed for number, name in enumerate(names, start=1)] == [True] * 3
    assert "trained in" not in printed and "trained in" in (output / "logs" / "heads.log").read_text()
    rows = json.loads((output / "bakeoff.json").read_text())
    assert [row["drafter"] for row in rows] == ["plain", "transformers", PROMPT_LOOKUP, *names]
    assert rows[0]["left_out"]["distill"] == "not in the line-up"
    manifests = {name: read_manifest(output / name) for name in names}
    assert [manifests[name]["family"] for name in names] == ["lookup", "medusa", "cascade"]
    assert {manifest["data_fingerprint"] for manifest in manifests.values()} == {manifests["heads"]["data_fingerprint"]}
    assert {manifest["settings"]["max_steps"] for manifest in manifests.values()} == {4}
    manifest_bytes = {name: (output / name / "draft_config.json").read_bytes() for name in names}
    main(tiny)
    assert {name: (output / name / "draft_config.json").read_bytes() for name in names} == manifest_bytes
    assert capsys.readouterr().out.count("already trained, held-out acceptance") == 3
    main(replace(tiny, train_steps=2, output=f"{output}-2"))
    assert read_manifest(Path(f"{output}-2") / "heads")["settings"]["max_steps"] == 2


def test_bakeoff_skips_untrainable_drafters_and_those_composed_of_them(
    tiny: BakeoffRunSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    table = TABLE.replace("num_heads: 2}", "num_heads: 2, held_out_share: 0.999999}")
    Path(tiny.line_up).write_text(table)
    main(tiny)
    printed = capsys.readouterr().out
    assert "heads               skipped: " in printed and "leaves none of the 24 rows for training" in printed
    assert "both                skipped: its part heads was skipped" in printed
    rows = json.loads((Path(tiny.output) / "bakeoff.json").read_text())
    assert [row["drafter"] for row in rows] == ["plain", "transformers", PROMPT_LOOKUP, "lookup"]
    assert "its part heads was skipped" in rows[0]["left_out"]["both"]


@pytest.mark.parametrize("path", [LINE_UP, LINE_UP.with_name("bakeoff-smollm2-drafters.yaml")])
def test_settings_of_the_line_ups_are_valid_and_no_trainer_is_left_out(tmp_path: Path, path: Path) -> None:
    line_up = lineup.read(path)
    for spec in line_up:
        family, run = lineup._settings(spec, tmp_path, {"data": "runs/mine", "max_steps": 7})
        assert type(family).__module__ == f"trainers.{spec.trainer}"
        assert (run.output, run.max_steps, run.data) == (str(tmp_path / spec.name), 7, "runs/mine")
    unused = lineup.unused_trainers(path)
    assert {spec.trainer for spec in line_up} | set(unused) >= set(lineup.trainer_names())
    assert "not in the line-up" not in unused.values(), "each trainer that is left out has a reason"


def test_settings_of_steps_are_kept_from_drafters_without_gradient(tmp_path: Path) -> None:
    table = tmp_path / "table.yaml"
    table.write_text(TABLE.replace("max_steps: 4", "max_steps: 4, group_by_length: true"))
    runs = {spec.name: lineup._settings(spec, tmp_path, {})[1] for spec in lineup.read(table)}
    assert {name: run.group_by_length for name, run in runs.items()} == {"lookup": False, "heads": True, "both": False}


def test_preset_of_smollm2_is_valid() -> None:
    preset = LINE_UP.with_name("bakeoff-smollm2.yaml")
    (run,) = parse_settings(BakeoffRunSettings, description=None, argv=["--config", str(preset)])
    assert (LINE_UP.parents[2] / run.line_up).is_file() and run.teacher_store and run.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("all:", "every:", "must contain `drafters`"),
        ("trainer: medusa", "trainer: medussa", "did you mean 'medusa'"),
        ("trainer: medusa", "trainer: settings", "heads has the unknown trainer"),
        ("num_draft: 5", "batch_size: 5", "lookup sets batch_size, which must be the same"),
        ("[lookup, heads]", "[lookup, head]", "both has the part 'head'; parts must be"),
        ("num_draft: 5}", "num_draft: 5", "cannot be read as YAML"),
    ],
)
def test_read_rejects_an_invalid_line_up(tiny: BakeoffRunSettings, old: str, new: str, message: str) -> None:
    Path(tiny.line_up).write_text(TABLE.replace(old, new))
    with pytest.raises(ValueError, match=message):
        main(tiny)
    assert not Path(tiny.output).exists()


def test_invalid_setting_stops_before_any_training(
    tiny: BakeoffRunSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="no such file"):
        lineup.read(Path(tiny.line_up).with_name("nowhere.yaml"))
    Path(tiny.line_up).write_text(TABLE.replace("num_heads: 2", "num_head: 2"))
    with pytest.raises(SystemExit):
        main(tiny)
    assert "unknown setting 'num_head'" in capsys.readouterr().err
    assert not Path(tiny.output).exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("drafters: [a, b]", r"drafters is \['a', 'b'\]; it must hold settings"),
        ("drafters: {medusa: 5}", "medusa is 5; it must hold settings"),
        ("drafters: {medusa: {parts: 5}}", "medusa has the parts 5; they must be a list"),
        ("all: [1]\ndrafters: {medusa: {}}", r"all is \[1\]; it must hold settings"),
        ("[" * 5000, "nested too deeply"),
    ],
    ids=lambda value: value[:20],
)
def test_read_rejects_tables_of_another_form(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "table.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        lineup.read(tmp_path / "table.yaml")


@pytest.mark.parametrize("name", ["../heads", "/heads", "a/../../heads"])
def test_read_rejects_names_that_leave_the_output_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "table.yaml").write_text(f"drafters: {{{json.dumps(name)}: {{trainer: lookup}}}}")
    with pytest.raises(ValueError, match=r"table.yaml names the file .*; it must be a relative path without '..'"):
        lineup.read(tmp_path / "table.yaml")


def test_bakeoff_trains_from_one_teacher_store(tiny: BakeoffRunSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store holds what the line-up reads; an unexpected failure of one drafter is named and costs no other."""
    table = TABLE.replace("  both", "  small: {trainer: distill, loss: forward_kl, teacher_top_k: 5}\n  both")
    Path(tiny.line_up).write_text(table)

    def fail(*_: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(distill, "loss", fail)
    main(replace(tiny, teacher_store=True))
    manifest = json.loads((Path(tiny.output) / "teacher-store" / "teacher_store.json").read_text())
    assert (manifest["layers"], manifest["top_k"]) == ([3], 5)
    rows = json.loads((Path(tiny.output) / "bakeoff.json").read_text())
    assert rows[0]["left_out"]["small"] == "failed with RuntimeError: no memory"
    assert {row["drafter"] for row in rows} >= {"lookup", "heads", "both"}
    assert read_manifest(Path(tiny.output) / "heads")["settings"]["data"].endswith("teacher-store")
