r"""Measures the rate at which heads are trained from a teacher store, by this checkout and by an earlier commit.

    .venv/bin/python benchmarks/training_rate.py --target smollm2 --data runs/pseudo-data --medusa-repository Medusa

`data` is pseudo-data of the target; the earlier commit writes the store, which both versions read. Each trains the same
rows with its own recipe and the same hyper-parameters in bfloat16. Steps are timed from the end of the first one on,
without evaluation and checkpoints; the loss is the mean of the timed steps; memory is the process's largest resident
set. With `--medusa-repository`, a checkout of FasterDecoding/Medusa, the loss of its trainer (medusa/train/
train_legacy.py) is run on the same batches and heads as ours.
"""

import ast
import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from pseudo_data import ROOT, checkout, run_recipe
from torch import Tensor

from data import POCKET
from data.batches import Batch, batches
from data.teacher import complete
from data.teacher_store import open_teacher_store
from draftsmith import Target
from draftsmith.drafters.medusa import Drafter
from draftsmith.loading.target_names import model_folder
from trainers import medusa
from trainers.training.settings import parse_settings


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
    """What is trained, and with what it is compared."""

    before: str = "8f876b6"
    """The earlier commit."""
    target: str = str(POCKET)
    """Transformers folder, or name of a target."""
    data: str = "runs/pseudo-data"
    """Pseudo-data of the target."""
    store: str = ""
    """A teacher store of it that the earlier commit wrote; written into a temporary folder if empty."""
    layers: tuple[int, ...] = (2, 15, 27, 30)
    """Hidden layers of the store: those that EAGLE-3 fuses, and the last."""
    families: tuple[str, ...] = ("medusa", "eagle3")
    """Families to train."""
    steps: int = 6
    """Optimiser steps of each run; the first is not timed."""
    batch_size: int = 8
    """Rows of a step."""
    num_threads: int = 2
    """Threads of each process."""
    repeats: int = 1
    """Runs of each version; of several, the medians are compared."""
    medusa_repository: str = ""
    """Checkout of FasterDecoding/Medusa, whose trainer's loss is run as well; none if empty."""
    medusa_batches: int = 2
    """Batches of that comparison."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a run took."""

    step_ms: float
    """Mean over the timed steps."""
    loss: float
    """Per supervised token."""
    peak_mb: float
    """Largest resident set in MiB."""
    num_supervised: float
    """Supervised tokens of a timed step; of the earlier commit, which does not log them, NaN."""


def train(root: Path, family: str, store: Path, output: Path, settings: BenchmarkSettings) -> Measured:
    """Trains with one version's recipe."""
    options = {
        "target": Path(model_folder(settings.target)).resolve(),
        "data": store,
        "output": output,
        "max_steps": settings.steps,
        "batch_size": settings.batch_size,
        "eval_steps": settings.steps,
        "save_steps": settings.steps,
        "log_steps": 1,
        "tree_nodes": 16,
    }
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    usage = run_recipe(root, [f"recipes/{family}.py", "--bf16", *flags], settings.num_threads)
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    first, *timed = [line for line in lines if "loss" in line]
    seconds = [after["seconds"] - before["seconds"] for before, after in zip([first, *timed], timed, strict=False)]
    supervised = [line.get("supervised_tokens_per_s", float("nan")) * s for line, s in zip(timed, seconds, strict=True)]
    return Measured(
        step_ms=statistics.mean(seconds) * 1e3,
        loss=statistics.mean(line["loss"] for line in timed),
        peak_mb=usage.ru_maxrss / 1024,
        num_supervised=statistics.mean(supervised),
    )


def main(settings: BenchmarkSettings) -> None:
    with TemporaryDirectory() as folder:
        roots = {settings.before: checkout(settings.before, Path(folder) / "before"), "this checkout": ROOT}
        store = Path(settings.store or Path(folder) / "store").resolve()
        if not settings.store:
            data = f"--data={Path(settings.data).resolve()}"
            target = f"--target={Path(model_folder(settings.target)).resolve()}"
            layers = ["--layers", *map(str, settings.layers)]
            run_recipe(
                roots[settings.before],
                ["recipes/teacher_store.py", target, data, f"--output={store}", *layers],
                settings.num_threads,
            )
        for family in settings.families:
            compare(family, roots, store, Path(folder), settings)
        if settings.medusa_repository:
            compare_with_medusa(Path(settings.medusa_repository), store, settings)


def compare(family: str, roots: dict[str, Path], store: Path, folder: Path, settings: BenchmarkSettings) -> None:
    """Trains a family with both versions in turn and prints what each took, and the ratios of the medians."""
    found: dict[str, list[Measured]] = {name: [] for name in roots}
    for turn in range(settings.repeats):
        for name, root in roots.items():
            found[name].append(train(root, family, store, folder / f"{family}-{root.name}-{turn}", settings))
    # The same rows have the same supervised tokens.
    num_supervised = next(one.num_supervised for one in found["this checkout"])
    before, after = (
        Measured(
            **{f.name: statistics.median(getattr(one, f.name) for one in runs) for f in dataclasses.fields(Measured)}
        )
        for runs in found.values()
    )
    for name, one in zip(roots, (before, after), strict=True):
        print(
            f"{family}, {name}: {num_supervised / one.step_ms * 1e3:,.0f} supervised tokens/s"
            f" ({one.step_ms:,.0f} ms a step), loss {one.loss:.4f}, {one.peak_mb:,.0f} MiB",
            flush=True,
        )
    print(
        f"{family}: {before.step_ms / after.step_ms:.2f} times the supervised tokens/s,"
        f" {after.loss - before.loss:+.4f} in loss, {after.peak_mb / before.peak_mb:.2f} times the memory",
        flush=True,
    )


def compare_with_medusa(repository: Path, store: Path, settings: BenchmarkSettings) -> None:
    """Prints time and value of the published trainer's loss and of ours, forward and backward, on the same batches."""
    torch.set_num_threads(settings.num_threads)
    target = Target.from_pretrained(settings.target, dtype="bfloat16")
    target.model.requires_grad_(False)
    options, theirs = medusa.Settings(), published_loss(repository / "medusa" / "train" / "train_legacy.py")
    torch.manual_seed(0)
    drafter = medusa.build(options, target)
    read = batches(open_teacher_store(store, target), settings.batch_size, seed=0)
    taken = [complete(batch, target, (target.num_layers,)) for batch in itertools.islice(read, settings.medusa_batches)]

    def ours(drafter: Drafter, batch: Batch) -> Tensor:
        """Returns the sum of the heads' mean losses, which the published loss is."""
        total, metrics = medusa.loss(drafter, batch, options, target)
        total.backward()
        return sum(value / count for value, count in metrics.values())  # type: ignore[return-value]

    for name, loss in (("FasterDecoding/Medusa's loss", theirs), ("ours", ours)):
        times, losses = time_losses(loss, drafter, taken)
        supervised = sum(int(batch.loss_mask_BT[:, 1:].sum()) for batch in taken)
        values = ", ".join(f"{value:.4f}" for value in losses)
        print(f"{name}: {supervised / sum(times):,.0f} supervised tokens/s, losses {values}", flush=True)


def time_losses(
    loss: Callable[[Drafter, Batch], Tensor], drafter: Drafter, taken: list[Batch]
) -> tuple[list[float], list[float]]:
    """Returns the seconds and the values of a loss with its gradient on each batch, after one more."""
    times, losses = [], []
    for batch in (taken[0], *taken):
        drafter.zero_grad()
        begin = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(loss(drafter, batch).item())
        times.append(time.perf_counter() - begin)
    return times[1:], losses[1:]


def published_loss(file: Path) -> Callable[[Drafter, Batch], Tensor]:
    """Returns the loss of the published trainer as a function of our heads; its other imports are not needed for it."""
    (trainer,) = [node for node in ast.parse(file.read_text()).body if getattr(node, "name", "") == "CustomizedTrainer"]
    assert isinstance(trainer, ast.ClassDef)
    names: dict[str, Any] = {"CrossEntropyLoss": torch.nn.CrossEntropyLoss, "IGNORE_TOKEN_ID": -100}
    exec(compile(ast.Module(body=[trainer.body[0]], type_ignores=[]), str(file), "exec"), names)
    logger = SimpleNamespace(log=lambda _: None)

    def loss(drafter: Drafter, batch: Batch) -> Tensor:
        normed_BTD = drafter.target.norm(batch.hidden[drafter.target.num_layers])

        def model(**_: Tensor) -> Tensor:
            return torch.stack([drafter.head(k, z_BTD) for k, z_BTD in enumerate(drafter.heads(normed_BTD))])

        model.medusa = drafter.config.num_heads  # type: ignore[attr-defined]
        inputs = {
            "input_ids": batch.tokens_BT,
            "attention_mask": batch.loss_mask_BT,
            "labels": batch.tokens_BT.masked_fill(~batch.loss_mask_BT, -100),
        }
        total: Tensor = names["compute_loss"](logger, model, inputs)
        total.backward()
        return total.detach()

    return loss


if __name__ == "__main__":
    main(*parse_settings(BenchmarkSettings, description=__doc__))
