"""The training loop: what is learnt, what is logged, what survives `kill -9`, and what is refused."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import draftsmith
from data.pseudo_data import read_pseudo_data
from data.store import StoreSettings, write_store
from draftsmith.artifacts.artifact import read_manifest
from draftsmith.drafters import lookup
from tests.support.runs import SMALL, command, environment, logged, make_data, make_target, weights
from trainers import Needs, distill, medusa
from trainers.training import checkpoints
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings

HEADS = medusa.Settings(num_heads=2, tree_nodes=4)
LOSSES = ("loss", "head0_loss", "head1_loss", "grad_norm", "learning_rate", "eval_acceptance")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny target in `target` and its text in `data`."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("runs")
    make_data(make_target(root / "target"), root / "data")
    return root


@pytest.fixture(scope="module")
def unbroken(folder: Path) -> Path:
    return train(medusa, HEADS, settings(folder, "unbroken"))


def settings(folder: Path, name: str, **changes: Any) -> RunSettings:
    paths = {"target": str(folder / "target"), "data": str(folder / "data"), "output": str(folder / name)}
    return RunSettings(**{**paths, **SMALL, **changes})


def test_a_run_leaves_an_artifact_and_says_how_it_was_made(folder: Path, unbroken: Path) -> None:
    assert {path.name for path in unbroken.iterdir()} == {
        "README.md",
        "draft_config.json",
        "log.jsonl",
        "model.safetensors",
        "run.json",
    }
    manifest = read_manifest(unbroken)
    assert manifest["data_fingerprint"] == read_pseudo_data(folder / "data").fingerprint
    assert manifest["settings"]["learning_rate"] == RunSettings().learning_rate
    assert manifest["train_s"] > 0
    evaluated = [line["eval_acceptance"] for line in logged(unbroken, "eval_acceptance") if "eval_acceptance" in line]
    assert manifest["measured_acceptance"]["acceptance"] == pytest.approx(max(evaluated))
    drafter = draftsmith.load(unbroken, draftsmith.Target.from_pretrained(str(folder / "target"), dtype="float32"))
    assert len(drafter.config.tree) == 4


def test_a_finished_run_is_left_alone(
    folder: Path, unbroken: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draftsmith.Target, "from_pretrained", None)
    before = (unbroken / "model.safetensors").stat().st_mtime_ns
    train(medusa, HEADS, settings(folder, "unbroken"))
    assert "nothing is left to do" in capsys.readouterr().out
    assert (unbroken / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="learning_rate was 0.001, is 0.5"):
        train(medusa, HEADS, settings(folder, "unbroken", learning_rate=0.5))


def test_accumulated_batches_equal_the_joined_one(folder: Path, unbroken: Path) -> None:
    """Rows have unequal numbers of supervised tokens; only float32's order of summation differs (1e-5)."""
    parts = train(medusa, HEADS, settings(folder, "parts", batch_size=1, gradient_accumulation=4))
    for one, other in zip(logged(unbroken, *LOSSES), logged(parts, *LOSSES), strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    for name, weight in weights(unbroken).items():
        torch.testing.assert_close(weights(parts)[name], weight, rtol=1e-4, atol=1e-6)


def test_a_run_killed_while_writing_a_checkpoint_goes_on_from_the_one_before(
    folder: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first checkpoint is whole, the second never declared so, and a third, marked whole, has lost some bytes."""
    run, mark_whole = settings(folder, "broken"), checkpoints.mark_whole

    def stop_at_the_end(checkpoint: Path, facts: dict[str, Any]) -> None:
        if checkpoint.name == "checkpoint-8":
            raise KeyboardInterrupt
        mark_whole(checkpoint, facts)

    monkeypatch.setattr(checkpoints, "mark_whole", stop_at_the_end)
    with pytest.raises(KeyboardInterrupt):
        train(medusa, HEADS, run)
    monkeypatch.undo()
    output = folder / "broken"
    assert (output / "checkpoints" / "checkpoint-8" / "model.safetensors").exists()
    assert checkpoints.newest_whole(output)[0] == 4  # type: ignore[index]
    mark_whole(checkpoints.folder(output, 8), {})
    weights_file = checkpoints.folder(output, 8) / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-1])
    assert checkpoints.newest_whole(output)[0] == 4  # type: ignore[index]
    with (output / "log.jsonl").open("a") as log:
        log.write('{"step": 9, "lo')
    train(medusa, HEADS, run)
    same_as_unbroken(output, unbroken)


def same_as_unbroken(output: Path, unbroken: Path) -> None:
    assert logged(output, *LOSSES) == logged(unbroken, *LOSSES)
    for name, weight in weights(unbroken).items():
        assert torch.equal(weights(output)[name], weight), name
    assert not (output / "checkpoints").exists()


def test_a_run_killed_after_its_last_step_is_only_finished(
    folder: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The drafter comes from the best checkpoint; a half-published artifact is no artifact."""

    def stop(staging: Path, output: Path) -> None:
        (staging / "model.safetensors").replace(output / "model.safetensors")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "publish", stop)
    with pytest.raises(KeyboardInterrupt):
        train(medusa, HEADS, settings(folder, "unpublished"))
    monkeypatch.undo()
    assert not checkpoints.is_finished(folder / "unpublished")
    train(medusa, HEADS, settings(folder, "unpublished"))
    same_as_unbroken(folder / "unpublished", unbroken)


def test_kill_9(folder: Path) -> None:
    """A process killed at some moment past its first checkpoint, then the same command again: the same to the bit."""
    changes = {"max_steps": 40, "save_steps": 2, "eval_steps": 8}
    run = settings(folder, "killed", **changes)
    flags = {"num_heads": 2, "tree_nodes": 4, **SMALL, **changes}
    words = command("medusa", target=run.target, data=run.data, output=run.output, **flags)
    process = subprocess.Popen(words, env=environment(), start_new_session=True, stderr=subprocess.PIPE, text=True)
    while checkpoints.newest_whole(Path(run.output)) is None and process.poll() is None:
        time.sleep(0.01)
    time.sleep(int.from_bytes(os.urandom(2), "big") / 2**16 / 2)
    os.killpg(process.pid, signal.SIGKILL)
    _, error = process.communicate()
    assert process.returncode == -signal.SIGKILL, error
    whole = train(medusa, HEADS, settings(folder, "whole", **changes))
    train(medusa, HEADS, run)
    same_as_unbroken(Path(run.output), whole)


def test_a_run_with_other_settings_or_ranks_or_data_is_not_continued(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = settings(folder, "half")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "keep_only", stop)
    with pytest.raises(KeyboardInterrupt):
        train(medusa, HEADS, run)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"num_heads was 2, is 3"):
        train(medusa, medusa.Settings(num_heads=3, tree_nodes=4), run)
    marker = checkpoints.folder(folder / "half", 4) / checkpoints.WHOLE
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"num_ranks": 2}))
    with pytest.raises(ValueError, match="num_ranks was 2, is 1"):
        train(medusa, HEADS, run)


def test_what_is_refused_before_the_target_loads(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draftsmith.Target, "from_pretrained", None)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "w1 w2"}\n{"prompt": \n')
    cases = {
        "contains other files": {"output": str(tmp_path)},
        "nowhere": {"target": str(tmp_path / "nowhere")},
        "no such file or folder": {"data": str(tmp_path / "no-data")},
        "broken.jsonl, line 2": {"data": str(tmp_path / "broken.jsonl")},
        "none of zero0, zero1, zero2, zero3": {"deepspeed": "zero9"},
    }
    for message, changes in cases.items():
        with pytest.raises(ValueError, match=message):
            train(medusa, HEADS, settings(folder, "refused", **changes))
    for message, changes in {"max_steps is 0": {"max_steps": 0}, "held_out_share": {"held_out_share": 1.0}}.items():
        with pytest.raises(ValueError, match=message):
            RunSettings(**changes)
    assert not (folder / "refused" / "checkpoints").exists()


def test_what_is_refused_once_the_target_is_known(folder: Path, tmp_path: Path) -> None:
    make_target(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="other|another"):
        train(medusa, HEADS, settings(folder, "mismatch", target=str(tmp_path / "other")))
    with pytest.raises(ValueError, match="fewer than the 64 of one batch"):
        train(medusa, HEADS, settings(folder, "too-few", batch_size=64))


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_rows(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 6 fails; the checkpoint of step 4 stays, and without the fault the run goes on from there."""
    calls, loss = [], medusa.loss

    def poisoned(*given: Any) -> Any:
        calls.append(0)
        total, metrics = loss(*given)
        return total * (float("nan") if len(calls) == 6 else 1.0), metrics

    monkeypatch.setattr(medusa, "loss", poisoned)
    with pytest.raises(ValueError, match=r"loss is nan at step 6, in the batch of rows row-\d+, row-\d+"):
        train(medusa, HEADS, settings(folder, "nan"))
    assert checkpoints.newest_whole(folder / "nan")[0] == 4  # type: ignore[index]


@pytest.mark.parametrize("divergence", ["forward_kl", "tvd"])
def test_the_store_stands_in_for_the_live_target(folder: Path, divergence: str) -> None:
    """Top 8 logits (fp16) and hidden states (bf16) round at 4e-3; losses from the store agree to 2e-2."""
    target = draftsmith.Target.from_pretrained(str(folder / "target"), dtype="float32")
    rows = read_pseudo_data(folder / "data")
    if not (folder / "store").exists():
        write_store(target, rows, folder / "store", StoreSettings(layers=(target.num_layers,), top_k=8))
    small = distill.Settings(hidden_size=32, loss=divergence, teacher_top_k=8)
    outputs = [
        train(distill, small, settings(folder, f"{divergence}-{data}", data=str(folder / data)))
        for data in ("data", "store")
    ]
    live, stored = (logged(output, "loss", "eval_acceptance") for output in outputs)
    for one, other in zip(live, stored, strict=True):
        assert one == pytest.approx(other, rel=2e-2)


def test_a_family_without_gradient_runs_by_the_same_entry(folder: Path) -> None:
    """`fit` is given the rows to train on; judgement, record and artifact are the same."""
    seen = []

    def fit(settings: Any, target: draftsmith.Target, rows: Any, run: RunSettings, output: Path) -> lookup.Drafter:
        seen.append(len(rows))
        return lookup.Drafter(lookup.Config(max_ngram=2), target)

    family = SimpleNamespace(
        __name__="trainers.counted",
        fit=fit,
        needs=lambda settings, target: Needs(),
        evaluate=lambda drafter, batch, settings, target: {"acceptance": (batch.lengths_B.sum(), len(batch.keys))},
    )
    output = train(family, HEADS, settings(folder, "counted"))  # type: ignore[arg-type]
    assert 30 < seen[0] < 40
    assert read_manifest(output)["measured_acceptance"]["acceptance"] > 0


def test_trees_are_sized_on_as_many_threads_as_decoding_has(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, finish = [], medusa.finish

    def watched(*given: Any) -> Any:
        seen.append(torch.get_num_threads())
        return finish(*given)

    monkeypatch.setattr(medusa, "finish", watched)
    torch.set_num_threads(2)
    try:
        for name, threads in (("one-thread", 1), ("own-choice", 0)):
            train(medusa, HEADS, settings(folder, name, max_steps=1, decode_threads=threads))
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert seen == [1, 2]
    with pytest.raises(ValueError, match="decode_threads is -1"):
        RunSettings(decode_threads=-1)


@pytest.mark.slow
def test_wandb_offline(folder: Path) -> None:
    """A run reports to wandb without an account; its files lie in the output folder."""
    run = settings(folder, "wandb")
    words = command("medusa", target=run.target, data=run.data, output=run.output, report_to="wandb", **SMALL)
    subprocess.run(words, env=environment() | {"WANDB_MODE": "offline"}, check=True, timeout=300)
    assert list(Path(run.output).glob("wandb/offline-run-*/*.wandb"))
