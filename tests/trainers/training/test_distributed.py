"""Launchers: several ranks train as one process does on the joined batch, and every launcher writes an artifact."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import draftsmith
from tests.support.runs import ROOT, SMALL, command, environment, logged, make_data, make_target, run, weights
from trainers.training import checkpoints

LOSSES = ("loss", "head0_loss", "head1_loss", "grad_norm", "eval_acceptance", "eval_head0_accuracy")
"""DeepSpeed logs no grad_norm at stage 0."""
HEADS = {"num_heads": 2, "num_blocks": 2, "tree_nodes": 4}
FEW_STEPS = {"max_steps": 4, "eval_steps": 2, "save_steps": 2, "clip": 0}
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ranks")
    make_data(make_target(root / "target"), root / "data")
    return root


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """One process with batches of four."""
    return launch(folder, "alone", batch_size=4)


def words_of(folder: Path, output: str, *launcher: str, recipe: str = "medusa", **changes: Any) -> list[str]:
    """Returns the recipe's command line, with paths relative to `folder`."""
    own = HEADS if recipe == "medusa" else {}
    flags = {**SMALL, **FEW_STEPS, **own, "target": "target", "data": "data", "output": output, **changes}
    return command(recipe, *launcher, **flags)


def launch(folder: Path, output: str, *launcher: str, script: Path | None = None, **changes: Any) -> Path:
    """Runs the recipe, or `script` in place of it, checks that its artifact loads and returns the output folder."""
    words = words_of(folder, output, *launcher, **changes)
    if script:
        words = [str(script) if word == str(ROOT / "recipes" / "medusa.py") else word for word in words]
    options: dict[str, Any] = {"cwd": folder, "env": environment(), "capture_output": True, "text": True}
    done = subprocess.run(words, timeout=600, **options) if launcher else run(words, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    draftsmith.load(folder / output, draftsmith.Target.from_pretrained(str(folder / "target"), dtype="float32"))
    return folder / output


def check_same(output: Path, alone: Path) -> None:
    """Checks that losses and weights agree to 1e-5, a hundredth of one step; only the order of summation differs."""
    for one, other in zip(logged(output, *LOSSES), logged(alone, *LOSSES), strict=True):
        assert one == pytest.approx({key: other[key] for key in one}, rel=1e-5)
    for name, weight in weights(alone).items():
        torch.testing.assert_close(weights(output)[name], weight, rtol=0, atol=1e-5)


def test_two_ranks_equal_one_process_on_the_joined_batch(folder: Path) -> None:
    """Loss, gradients of the first step and final weights are equal."""
    script = ROOT / "tests" / "trainers" / "training" / "first_gradients.py"
    one = launch(folder, "one", script=script, batch_size=4)
    two = launch(folder, "two", *TORCHRUN, script=script, batch_size=2)
    check_same(two, one)
    gradients = [load_file(output / "gradients.safetensors") for output in (one, two)]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)
    assert any(gradient.any() for gradient in gradients[0].values())


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero0", "zero1", "zero2", "zero3"])
def test_zero_stage_equals_one_process(folder: Path, alone: Path, stage: str) -> None:
    check_same(launch(folder, stage, *TORCHRUN, deepspeed=stage, batch_size=2), alone)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"deepspeed": "zero3"}], ids=["data parallel", "zero3"])
def test_two_ranks_with_compiled_losses_equal_one_process(folder: Path, alone: Path, options: dict[str, str]) -> None:
    name = f"compiled-{len(options)}"
    check_same(launch(folder, name, *TORCHRUN, compile="true", batch_size=2, **options), alone)


@pytest.mark.slow
def test_zero3_with_tied_weights_equals_one_process(folder: Path) -> None:
    """ZeRO-3 shards the embedding, which is also the LM head."""
    small = {"recipe": "distill", "hidden_size": 32, "loss": "forward_kl"}
    one = launch(folder, "distilled", batch_size=4, **small)
    two = launch(folder, "distilled-zero3", *TORCHRUN, deepspeed="zero3", batch_size=2, **small)
    check_same(two, one)


@pytest.mark.slow
def test_killed_run_of_two_ranks_continues_bit_identically(folder: Path) -> None:
    """All processes are killed after the first checkpoint; the same command then equals an uninterrupted run."""
    changes = {"deepspeed": "zero2", "batch_size": 2, "max_steps": 30, "save_steps": 3}
    uninterrupted = launch(folder, "uninterrupted", *TORCHRUN, **changes)
    output = folder / "killed"
    words = words_of(folder, "killed", *TORCHRUN, **changes)
    process = subprocess.Popen(words, cwd=folder, env=environment(), start_new_session=True)
    while checkpoints.newest_complete(output) is None and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not checkpoints.is_finished(output)
    launch(folder, "killed", *TORCHRUN, **changes)
    assert logged(output, *LOSSES) == logged(uninterrupted, *LOSSES)
    for name, weight in weights(uninterrupted).items():
        assert torch.equal(weights(output)[name], weight), name


@pytest.mark.slow
def test_deepspeed_launcher_equals_one_process(folder: Path, alone: Path) -> None:
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    check_same(launch(folder, "ds", deepspeed, "--num_gpus", "2", deepspeed="zero2", batch_size=2), alone)
    check_same(launch(folder, "ds-plain", deepspeed, "--num_gpus", "2", batch_size=2), alone)


@pytest.mark.slow
def test_deepspeed_under_plain_python_equals_one_process(folder: Path, alone: Path) -> None:
    check_same(launch(folder, "python-zero1", deepspeed="zero1", batch_size=4), alone)
