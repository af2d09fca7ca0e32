"""Encoder-decoders end to end: trainers without gradient draft or raise, and the recipes compare and certify."""

import dataclasses
import importlib
import json
import pkgutil
from pathlib import Path

import pytest

import draftsmith
import trainers
from data.pseudo_data import read_pseudo_data
from draftsmith import Target
from draftsmith.artifacts.artifact import read_manifest
from draftsmith.drafters import lookup
from eval.certificate.identity import GreedySettings
from eval.certificate.sampled import SampledTestSettings
from recipes import bakeoff, lossless
from tests.support.family import Watched, texts
from tests.support.models import padded
from tests.support.runs import make_data, make_target
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings
from trainers.training.settings import parse_settings


def fitters() -> list[str]:
    """Returns the names of all trainers without gradient whose settings name no other artifacts."""
    modules = {
        info.name: importlib.import_module(f"trainers.{info.name}")
        for info in pkgutil.iter_modules(trainers.__path__)
        if not info.ispkg
    }
    found = {name: module for name, module in modules.items() if hasattr(module, "Settings") and hasattr(module, "fit")}
    fields = {
        name: {field.name: field for field in dataclasses.fields(module.Settings)} for name, module in found.items()
    }
    return [
        name
        for name, own in fields.items()
        if own.keys().isdisjoint({"parts", "draft_model"})
        and all(field.default is not dataclasses.MISSING for field in own.values())
    ]


@pytest.fixture(scope="module", params=["t5", pytest.param("bart", marks=pytest.mark.slow)])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny encoder-decoder in `target` and its text in `data`."""
    root = tmp_path_factory.mktemp(request.param)
    make_data(
        make_target(root / "target", request.param), root / "data", num_rows=24, max_new_tokens=12, temperature="0"
    )
    return root


@pytest.mark.parametrize("name", fitters())
def test_trainers_without_gradient_draft_or_raise(folder: Path, name: str) -> None:
    module = importlib.import_module(f"trainers.{name}")
    run = RunSettings(
        target=str(folder / "target"), data=str(folder / "data"), output=str(folder / name), batch_size=4, max_steps=4
    )
    message = ""
    try:
        output = train(module, module.Settings(), run)
    except ValueError as error:
        message = str(error)
    if message:
        assert "encoder-decoder" in message and ". " not in message
        return
    target = Target.from_pretrained(run.target, dtype="float32")
    drafter = Watched(draftsmith.load(output, target))
    data = read_pseudo_data(folder / "data", target)
    ids, mask = padded([data[at].source_S.tolist() for at in range(0, 20, 4)])
    plain = draftsmith.generate(target, ids, attention_mask=mask, max_new_tokens=12)
    drafted = draftsmith.generate(target, ids, drafter, attention_mask=mask, max_new_tokens=12)
    assert texts(drafted) == texts(plain)
    assert drafter.num_drafted > 0
    assert read_manifest(output)["measured_acceptance"]["acceptance"] >= 0


@pytest.mark.slow
def test_drafters_are_compared_and_certified_on_sources(tmp_path: Path) -> None:
    """Sources are articles; output is identical to transformers' own, and lossless when sampled."""
    target = make_target(tmp_path / "target", "t5")
    draftsmith.save(lookup.Drafter(lookup.Config(), target), tmp_path / "artifact", target=target)
    rows = [{"article": f"w{3 + row} w9 w7 w8 " * (1 + row % 3), "highlights": "w5"} for row in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--target", tmp_path / "target", "--data", tmp_path / "pairs.jsonl", "--num-prompts", "8"]
    wanted = [*given, "--drafts", tmp_path / "artifact", "--output", tmp_path / "bakeoff", "--rounds", "1"]
    wanted += ["--max-new-tokens", "12", "--batch-sizes", "8"]
    bakeoff.main(*parse_settings(bakeoff.RunSettings, description="", argv=[*map(str, wanted)]))
    found = json.loads((tmp_path / "bakeoff" / "bakeoff.json").read_text())
    greedy = [row for row in found if row["temperature"] == 0]
    assert {row["drafter"] for row in greedy} == {"plain", "transformers", "artifact"} and len(greedy) == 3
    assert all(row["identical"] for row in greedy)
    assert all(row["tau"] > 1 for row in greedy if row["drafter"] == "artifact")
    wanted = [*given, "--draft", tmp_path / "artifact", "--output", tmp_path / "lossless", "--max-new-tokens", "8"]
    wanted += ["--samplings", "temperature=1", "--num-tokens", "2", "--num-rows", "120", "--dtypes", "float32"]
    kinds = (lossless.RunSettings, SampledTestSettings, GreedySettings)
    lossless.main(*parse_settings(*kinds, description="", argv=[*map(str, wanted)]))
    tests = json.loads((tmp_path / "lossless" / "lossless.json").read_text())["tests"]
    assert {test["verdict"] for test in tests if test["kind"] == "greedy identity"} == {"passed"}
    assert len(tests) == 9 and not any(test["verdict"] == "failed" for test in tests)
