"""Draft models with another vocabulary: a given model, and a trained one."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import draftsmith
from draftsmith import Target
from draftsmith.loading.model_info import read_target_info
from tests.drafters.test_translated import NUM_NEW, drafter_for, text_rows
from tests.support import runs
from tests.support.families.vocabularies import shared_target, tokenizer
from tests.support.family import texts
from tests.support.runs import SMALL, command, make_data, run, trainer_settings
from trainers import translated as trainer
from trainers.training.loop import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny target that has text, its pseudo-data, and a causal LM of another vocabulary."""
    root = tmp_path_factory.mktemp("other-vocabulary")
    target = shared_target()
    target.model.save_pretrained(root / "target")
    target.tokenizer.save_pretrained(root / "target")
    make_data(Target.from_pretrained(str(root / "target"), dtype="float32"), root / "data")
    small = drafter_for(target, tokenizer("bytes-300"))
    small.model.save_pretrained(root / "small")
    tokenizer("bytes-300").save_pretrained(root / "small")
    return root


run_settings = partial(runs.run_settings, **SMALL | {"max_length": 64, "held_out_share": 0.1, "max_held_out": 4})


def test_a_given_model_is_used_unchanged(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = train(trainer, trainer_settings(trainer, draft_model=str(folder / "small")), run_settings(folder, "given"))
    assert "has 300 of its 300 tokens in common with the 384 of" in capsys.readouterr().out
    target = Target.from_pretrained(str(folder / "target"), dtype="float32")
    drafter = draftsmith.load(output, target)
    theirs = drafter_for(shared_target(), tokenizer("bytes-300")).model.state_dict()
    assert all(torch.equal(weight, theirs[name]) for name, weight in drafter.model.state_dict().items())
    manifest = json.loads((output / "draft_config.json").read_text())
    assert manifest["measured_acceptance"]["acceptance"] >= 0


def test_too_few_shared_tokens_raise_before_weights_load(folder: Path) -> None:
    given_settings = trainer_settings(trainer, draft_model=str(folder / "small"), least_shared=301)
    with pytest.raises(ValueError, match=r"has 300 tokens in common with that of .*, fewer than least_shared \(301\)"):
        trainer.check(given_settings, read_target_info(str(folder / "target")))
    with pytest.raises(ValueError, match="train_vocab is 259"):
        trainer_settings(trainer, train_vocab=259)
    with pytest.raises(ValueError, match="smaller --max-length"):
        train(trainer, trainer_settings(trainer, train_vocab=280), run_settings(folder, "long", max_length=10_000))


def test_training_a_model_and_resuming_an_interrupted_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped while writing its second checkpoint, it ends with the same artifact to the byte."""
    chosen = trainer_settings(trainer, train_vocab=280, hidden_size=32)
    mark_complete = trainer.checkpoints.mark_complete

    def stop_at_the_end(checkpoint: Path, facts: dict[str, Any]) -> None:
        if checkpoint.name == "checkpoint-8":
            raise KeyboardInterrupt
        mark_complete(checkpoint, facts)

    whole = train(trainer, chosen, run_settings(folder, "whole"))
    monkeypatch.setattr(trainer.checkpoints, "mark_complete", stop_at_the_end)
    with pytest.raises(KeyboardInterrupt):
        train(trainer, chosen, run_settings(folder, "broken"))
    monkeypatch.undo()
    broken = train(trainer, chosen, run_settings(folder, "broken"))
    for name in ("model.safetensors", "tokenizer.json", "draft-model/model.safetensors"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes(), name
    assert not (broken / "checkpoints").exists()
    lines = [json.loads(line) for line in (broken / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 8 and sum(losses[4:]) < sum(losses[:4])
    target = Target.from_pretrained(str(folder / "target"), dtype="float32")
    drafter = draftsmith.load(broken, target)
    assert len(drafter.counterparts_U) == 280
    ids = torch.tensor([text_rows(target)[0]])
    out = draftsmith.generate(target, ids, drafter, max_new_tokens=NUM_NEW)
    assert texts(out) == target.model.generate(ids, do_sample=False, max_new_tokens=NUM_NEW).tolist()


@pytest.mark.slow
def test_the_recipe_reports_errors_in_one_line(folder: Path) -> None:
    flags = {"target": folder / "target", "data": folder / "data", "draft_model": folder / "data"}
    done = run(command("translated", **flags, output=folder / "wrong"), folder)
    assert done.returncode == 1 and "has no config.json" in done.stderr and done.stderr.count("\n") == 1
