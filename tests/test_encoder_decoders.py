"""Every trainer without gradient on encoder-decoders, end to end: it drafts, or says that it cannot."""

import dataclasses
import importlib
import pkgutil
from pathlib import Path

import pytest

import draftsmith
import trainers
from data.pseudo_data import read_pseudo_data
from draftsmith import Target
from draftsmith.artifact import read_manifest
from tests.family import Watched, texts
from tests.models import SEQ2SEQ, padded
from tests.runs import make_data, make_target
from trainers.loop import train
from trainers.run import RunSettings


def fitters() -> list[str]:
    """Returns the name of every trainer without gradient whose settings name no other drafters."""
    modules = {
        info.name: importlib.import_module(f"trainers.{info.name}") for info in pkgutil.iter_modules(trainers.__path__)
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


@pytest.fixture(scope="module", params=SEQ2SEQ)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny encoder-decoder in `target` and its text in `data`."""
    root = tmp_path_factory.mktemp(request.param)
    make_data(
        make_target(root / "target", request.param), root / "data", num_rows=24, max_new_tokens=12, temperature="0"
    )
    return root


@pytest.mark.parametrize("name", fitters())
def test_it_is_trained_and_drafts_or_refuses(folder: Path, name: str) -> None:
    module = importlib.import_module(f"trainers.{name}")
    run = RunSettings(
        target=str(folder / "target"), data=str(folder / "data"), output=str(folder / name), batch_size=4, max_steps=4
    )
    refusal = ""
    try:
        output = train(module, module.Settings(), run)
    except ValueError as error:
        refusal = str(error)
    if refusal:
        assert "encoder-decoder" in refusal and ". " not in refusal
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
