"""Every trainer with a loss: resumed runs, runs from the teacher store, and runs on two ranks give the same results.

Settings are `SETTINGS` of the trainer's own test module if it has them, else the defaults.
"""

import importlib
import importlib.util
import pkgutil
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import draftsmith
import trainers
from data.pseudo_data import read_pseudo_data
from data.teacher_store import TeacherStoreSettings, write_teacher_store
from tests.support import runs
from tests.support.runs import SMALL, command, logged, make_data, make_target, run, weights
from trainers.training import checkpoints
from trainers.training.loop import train
from trainers.training.settings import flat

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
DEEPSPEED = (str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2")


def trainers_with_loss() -> list[str]:
    """Returns the names of all trainers with a loss."""
    names = [info.name for info in pkgutil.iter_modules(trainers.__path__) if not info.ispkg]
    modules = {name: importlib.import_module(f"trainers.{name}") for name in names}
    return [name for name, module in modules.items() if hasattr(module, "Settings") and hasattr(module, "loss")]


def trainer_and_settings(name: str) -> tuple[ModuleType, Any]:
    """Returns the trainer and its settings."""
    module = importlib.import_module(f"trainers.{name}")
    for test in (f"trainers.test_{name}_trainer", f"trainers.test_{name}", f"drafters.test_{name}"):
        if importlib.util.find_spec(f"tests.{test}") is not None:
            return module, getattr(importlib.import_module(f"tests.{test}"), "SETTINGS", module.Settings())
    return module, module.Settings()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny target in `target` and its text in `data`."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("trainers")
    make_data(make_target(root / "target"), root / "data")
    return root


run_settings = partial(runs.run_settings, **SMALL)


EVERY_DAY = ("medusa", "eagle3", "dflash", "lstm")
"""Trainers of the default suite: heads, a recurrent chain on hidden states, a parallel block, a small model."""
EVERY_TRAINER = [
    pytest.param(name, marks=[pytest.mark.slow] * (name not in EVERY_DAY)) for name in trainers_with_loss()
]


def losses(output: Path) -> list[float]:
    """Returns the loss of every step."""
    return [line["loss"] for line in logged(output, "loss") if "loss" in line]


@pytest.mark.parametrize("name", EVERY_TRAINER)
def test_an_interrupted_run_ends_as_an_unbroken_one(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped while writing its second checkpoint, it has the same losses and weights to the bit."""
    module, settings = trainer_and_settings(name)
    mark_complete = checkpoints.mark_complete

    def stop_at_the_end(checkpoint: Path, facts: dict[str, Any]) -> None:
        if checkpoint.name == "checkpoint-8":
            raise KeyboardInterrupt
        mark_complete(checkpoint, facts)

    whole = train(module, settings, run_settings(folder, f"{name}-whole"))
    monkeypatch.setattr(checkpoints, "mark_complete", stop_at_the_end)
    broken = run_settings(folder, f"{name}-broken")
    with pytest.raises(KeyboardInterrupt):
        train(module, settings, broken)
    monkeypatch.undo()
    train(module, settings, broken)
    names = ("loss", "grad_norm", "eval_acceptance")
    assert logged(Path(broken.output), *names) == logged(whole, *names)
    assert weights(whole)
    for tensor_name, weight in weights(whole).items():
        assert torch.equal(weights(Path(broken.output))[tensor_name], weight), tensor_name


@pytest.mark.parametrize("name", EVERY_TRAINER)
def test_the_teacher_store_gives_the_live_targets_losses(folder: Path, name: str) -> None:
    """Hidden states are stored in bf16, with 8 significant bits, so that losses agree to 3 %."""
    module, settings = trainer_and_settings(name)
    target = draftsmith.Target.from_pretrained(str(folder / "target"), dtype="float32")
    needs, store = module.needs(settings, target), folder / f"{name}-store"
    write_teacher_store(
        target, read_pseudo_data(folder / "data"), store, TeacherStoreSettings(layers=needs.layers, top_k=needs.top_k)
    )
    live, stored = (
        losses(train(module, settings, run_settings(folder, f"{name}-{data.name}-run", data=str(data), max_steps=4)))
        for data in (folder / "data", store)
    )
    assert len(live) == 4 and live == pytest.approx(stored, rel=3e-2)


@pytest.mark.slow
@pytest.mark.parametrize("name", trainers_with_loss())
def test_compiled_losses_train_the_same_drafter(folder: Path, name: str) -> None:
    """Losses agree to 1e-4, as rounding alone differs; weights have the same names."""
    torch._dynamo.reset()  # functions are compiled for few settings in one process
    module, settings = trainer_and_settings(name)
    changes = {"max_steps": 4, "eval_steps": 2, "save_steps": 2, "gradient_accumulation": 2, "batch_size": 2}
    plain, compiled = (
        train(module, settings, run_settings(folder, f"{name}-{is_compiled}-compile", compile=is_compiled, **changes))
        for is_compiled in (False, True)
    )
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)
    shapes = [{key: weight.shape for key, weight in weights(output).items()} for output in (plain, compiled)]
    assert shapes[0] == shapes[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "options"),
    [(TORCHRUN, {}), (TORCHRUN, {"deepspeed": "zero2"}), (DEEPSPEED, {"deepspeed": "zero2"})],
    ids=["torchrun", "torchrun zero2", "deepspeed zero2"],
)
@pytest.mark.parametrize("name", trainers_with_loss())
def test_two_ranks_equal_one_process(
    folder: Path, name: str, launcher: tuple[str, ...], options: dict[str, str], tmp_path: Path
) -> None:
    """Losses agree to 1e-4, as only the order of summation differs; the artifact loads."""
    module, settings = trainer_and_settings(name)
    changes = {"max_steps": 4, "eval_steps": 2, "save_steps": 2, "clip": 0.0}
    alone = folder / f"{name}-alone"
    if not alone.exists():
        train(module, settings, run_settings(folder, alone.name, **changes))
    defaults = flat(module.Settings())
    given = {key: value for key, value in flat(settings).items() if value != defaults[key]}
    flags = {**SMALL, **changes, **given, **options, "batch_size": 2, "target": "target", "data": "data"}
    done = run(command(name, *launcher, **flags, output=tmp_path / "two"), folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(alone), rel=1e-4)
    target = draftsmith.Target.from_pretrained(str(folder / "target"), dtype="float32")
    draftsmith.load(tmp_path / "two", target)
