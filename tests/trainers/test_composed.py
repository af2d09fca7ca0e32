"""Recipes that compose artifacts: evaluation, saving, losslessness, and ValueError for parts that do not fit."""

import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import draftsmith
from data.batches import Batch, Example
from draftsmith import Target
from draftsmith.drafters import lm, lookup, medusa
from draftsmith.loading.model_info import read_target_info
from tests.support import runs
from tests.support.family import Watched, built, texts
from tests.support.models import VOCAB_SIZE, tiny_config
from tests.support.runs import command, make_data, make_target, run, trainer_settings
from trainers import cascade, merge, staged
from trainers.training import checkpoints
from trainers.training.loop import train

SMALL = tiny_config("llama", vocab_size=VOCAB_SIZE, num_hidden_layers=1).to_dict()
RECURRENT = tiny_config("mamba", hidden_size=32, num_hidden_layers=1).to_dict()
PARTS = {cascade: ("looks", "heads"), merge: ("looks", "heads"), staged: ("model", "looks")}
CASES = [
    (cascade, {"adaptive": False, "min_tokens": 2}),
    (merge, {"num_nodes": 6, "num_texts": 3}),
    (staged, {"num_draft": 4, "length": "fixed"}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny target, its text in `data`, and artifacts of a look-up, heads and two draft models."""
    root = tmp_path_factory.mktemp("composed")
    target = make_target(root / "target")
    make_data(target, root / "data", num_rows=24)
    heads = built(medusa, medusa.Config(num_heads=3, tree=((0,), (1,), (0, 0))), target)
    model = built(lm, lm.Config(model=SMALL, num_draft=3), target)
    recurrent = built(lm, lm.Config(model=RECURRENT, num_draft=3), target)
    made = {"looks": lookup.Drafter(lookup.Config(), target), "heads": heads, "model": model, "recurrent": recurrent}
    for name, drafter in made.items():
        draftsmith.save(drafter, root / name, target, record={"train_s": 100.0})
    return root


run_settings = partial(runs.run_settings, batch_size=2, max_held_out=2)


def paths_of(folder: Path, trainer: ModuleType) -> tuple[str, ...]:
    return tuple(str(folder / name) for name in PARTS[trainer])


@pytest.mark.parametrize(("trainer", "given"), CASES)
def test_a_composite_is_evaluated_saved_and_lossless(folder: Path, trainer: ModuleType, given: dict[str, Any]) -> None:
    settings = trainer_settings(trainer, parts=paths_of(folder, trainer), **given)
    output = train(trainer, settings, run_settings(folder, trainer.__name__))
    manifest = json.loads((output / "draft_config.json").read_text())
    assert manifest["measured_acceptance"]["acceptance"] >= 0
    assert manifest["train_s"] > 200, "the seconds that its parts took are its own"
    assert [part["family"] for part in manifest["config"]["parts"]] == [
        json.loads((folder / name / "draft_config.json").read_text())["family"] for name in PARTS[trainer]
    ]
    target = Target.from_pretrained(str(folder / "target"), dtype="float32")
    drafter = draftsmith.load(output, target)
    ids = torch.tensor([[3, 4, 5, 3, 4, 5, 3]])
    plain = draftsmith.generate(target, ids, max_new_tokens=20)
    watched = Watched(drafter)
    assert texts(draftsmith.generate(target, ids, watched, max_new_tokens=20)) == texts(plain)
    assert watched.num_drafted > 0


def test_composing_is_reproducible_also_after_a_kill(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is killed after the parts and before the manifest have been moved into the run's folder."""
    settings = trainer_settings(merge, parts=paths_of(folder, merge), num_texts=4)
    whole = train(merge, settings, run_settings(folder, "whole"))
    replace = Path.replace

    def killed(self: Path, other: Path) -> Path:
        if self.name == "draft_config.json" and other.parent.name == "broken":
            raise KeyboardInterrupt
        return replace(self, other)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        train(merge, settings, run_settings(folder, "broken"))
    monkeypatch.undo()
    broken = folder / "broken"
    assert not checkpoints.is_finished(broken) and (broken / "drafters" / "1").exists()
    train(merge, settings, run_settings(folder, "broken"))
    names = {str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file()}
    assert names == {str(path.relative_to(broken)) for path in broken.rglob("*") if path.is_file()}
    for name in names - {"draft_config.json", "run.json", "README.md", "log.jsonl"}:
        assert (whole / name).read_bytes() == (broken / name).read_bytes(), name
    assert json.loads((whole / "drafters" / "1" / "draft_config.json").read_text())["train_s"] == 100.0


def test_accuracy_is_measured_on_rows_that_the_parts_were_not_trained_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, fitted, evaluate, fit = list[str](), list[str](), merge.evaluate, merge.fit

    def spy(drafter: Any, batch: Batch, *others: Any) -> Any:
        measured.extend(batch.keys)
        return evaluate(drafter, batch, *others)

    def spy_fit(settings: Any, target: Target, rows: Sequence[Example], *others: Any) -> Any:
        fitted.extend(row.key for row in rows)
        return fit(settings, target, rows, *others)

    monkeypatch.setattr(merge, "evaluate", spy)
    monkeypatch.setattr(merge, "fit", spy_fit)
    settings = trainer_settings(merge, parts=paths_of(folder, merge), num_texts=1)
    output = train(merge, settings, run_settings(folder, "measured"))
    assert measured and not set(measured) & set(fitted)
    counts = np.load(output / "counts.npy")
    assert counts[..., 1].sum((1, 2, 3)).all(), "nodes of both parts were evaluated"


def test_parts_that_do_not_fit_raise_before_the_target_loads(folder: Path, tmp_path: Path) -> None:
    target_info = read_target_info(str(folder / "target"))
    paths = paths_of(folder, merge)
    for trainer in (cascade, merge):
        with pytest.raises(ValueError, match="--parts names 1 artifact"):
            trainer.check(trainer_settings(trainer, parts=paths[:1]), target_info)
    with pytest.raises(ValueError, match=r"--parts names 3 artifact\(s\); name two, the draft model's first"):
        staged.check(trainer_settings(staged, parts=(*paths, paths[0])), target_info)
    for first, message in (
        ("heads", "of family 'medusa', which has no draft model"),
        ("recurrent", "recurrent layers"),
    ):
        with pytest.raises(ValueError, match=f"--parts .*{first} .*{message}"):
            staged.check(trainer_settings(staged, parts=(str(folder / first), paths[0])), target_info)
    shutil.copytree(folder / "heads", tmp_path / "heads")
    manifest = json.loads((folder / "heads" / "draft_config.json").read_text())
    (tmp_path / "heads" / "draft_config.json").write_text(json.dumps(manifest | {"vocab_size": 5}))
    with pytest.raises(ValueError, match="heads was made for a vocabulary of 5"):
        cascade.check(trainer_settings(cascade, parts=(paths[0], str(tmp_path / "heads"))), target_info)
    for settings in ({"num_nodes": 0}, {"num_texts": -1}, {"least_chance": 1.0}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))} is"):
            trainer_settings(merge, parts=paths, **settings)
    with pytest.raises(ValueError, match="min_tokens is 0"):
        trainer_settings(cascade, parts=paths, min_tokens=0)
    with pytest.raises(ValueError, match="unknown length policy 'long'"):
        trainer_settings(staged, parts=paths, length="long")


def test_staged_accepts_drafters_made_for_the_draft_model_or_the_target(folder: Path) -> None:
    target = Target.from_pretrained(str(folder / "target"), dtype="float32")
    model = draftsmith.load(folder / "model", target)
    little = built(lm, lm.Config(model=SMALL, num_draft=2), model.draft_model)
    draftsmith.save(little, folder / "little", model.draft_model)
    for second in ("little", "model"):
        settings = trainer_settings(staged, parts=(str(folder / "model"), str(folder / second)), length="fixed")
        drafter = staged.fit(settings, target, [], run_settings(folder, "unused"), folder)
        assert drafter.parts[1].drafter.target is drafter.draft_model
        ids = torch.tensor([[3, 4, 5, 3, 4, 5, 3]])
        found = texts(draftsmith.generate(target, ids, drafter, max_new_tokens=12))
        assert found == texts(draftsmith.generate(target, ids, max_new_tokens=12))


@pytest.mark.slow
@pytest.mark.parametrize(("trainer", "given"), CASES)
def test_the_recipe_runs_from_any_folder(
    folder: Path, trainer: ModuleType, given: dict[str, Any], tmp_path: Path
) -> None:
    name = trainer.__name__.rpartition(".")[2]
    flags = {"target": folder / "target", "data": folder / "data", "output": tmp_path / "out", "batch_size": 2}
    words = [word for key, value in given.items() if key != "adaptive" for word in (f"--{key}", str(value))]
    done = run([*command(name, **flags), *words, "--parts", *paths_of(folder, trainer)], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out" / "drafters" / "1" / "draft_config.json").exists()
    done = run([*command(name, **flags), "--parts", "nowhere", "nor-there"], tmp_path)
    assert done.returncode == 1 and "artifact nowhere: no such folder" in done.stderr
