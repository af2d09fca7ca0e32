r"""Measures the rate at which heads are trained from a teacher store, by this checkout and by an earlier commit.

    .venv/bin/python benchmarks/training_rate.py --target smollm2 --data runs/pseudo-data --medusa-repository Medusa

`data` is pseudo-data of the target; the earlier commit writes the store, which both versions read. Each trains the same
rows with its own recipe and the same hyper-parameters, in bfloat16 unless `--bf16 false` is given. Steps are timed from
the end of the first one on, without evaluation and checkpoints; the loss is the mean of the timed steps; memory is the
process's largest resident set. With `--compiled-families`, steps of these families with and without `--compile` take
turns in one process, on the same rows (with `--store`, `--families []` trains nothing with the earlier commit); with
`--grouped-families`, steps of rows grouped by length, as `--group-by-length` groups them, and in random order. With
`--medusa-repository`, a checkout of FasterDecoding/Medusa, the loss of its trainer (medusa/train/train_legacy.py) is
run on the same batches and heads as ours.
"""

import ast
import dataclasses
import importlib
import itertools
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from pseudo_data import ROOT, checkout, run_recipe
from torch import Tensor

from data import POCKET
from data.batches import STEPS_SORTED, Batch, batches, grouped_order, order
from data.teacher import complete
from data.teacher_store import open_teacher_store
from draftsmith import Target
from draftsmith.drafters.medusa import Drafter
from draftsmith.loading.target_names import model_folder
from trainers import medusa
from trainers.compilation.compiled_losses import compiled_losses
from trainers.training.settings import parse_settings

WARM_UP_STEPS = 2
"""First steps, with and without compiled losses, that are not timed: one of them compiles."""


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
    bf16: bool = True
    """Train in bfloat16; otherwise all is float32, for processors without instructions for bfloat16."""
    num_threads: int = 2
    """Threads of each process."""
    repeats: int = 1
    """Runs of each version; of several, the medians are compared."""
    compile: bool = False
    """Train with `--compile` with this checkout."""
    grouped_families: tuple[str, ...] = ()
    """Families whose steps are timed on the same rows in random order and grouped by length."""
    compiled_families: tuple[str, ...] = ()
    """Families whose steps are timed with compiled losses and without."""
    medusa_repository: str = ""
    """Checkout of FasterDecoding/Medusa, whose trainer's loss is run as well; none if empty."""
    medusa_batches: int = 2
    """Batches of that comparison."""

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.bf16 else "float32"


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
    flags += ["--bf16"] * settings.bf16 + ["--compile"] * (settings.compile and root == ROOT)
    usage = run_recipe(root, [f"recipes/{family}.py", *flags], settings.num_threads)
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
                ["recipes/teacher_store.py", target, data, f"--output={store}", f"--dtype={settings.dtype}", *layers],
                settings.num_threads,
            )
        for family in settings.families:
            compare(family, roots, store, Path(folder), settings)
        for family in settings.compiled_families:
            compare_compiled(family, store, settings)
        for family in settings.grouped_families:
            compare_grouped(family, store, settings)
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


def frozen_target(settings: BenchmarkSettings) -> Target:
    """Returns the target, in a process of `num_threads` threads."""
    torch.set_num_threads(settings.num_threads)
    return Target.from_pretrained(settings.target, dtype=settings.dtype)


def compare_compiled(name: str, store: Path, settings: BenchmarkSettings) -> None:
    """Prints the medians of training steps with compiled losses and without, which take turns on the same rows.

    With one thread, CPU times compare them where other work runs on the machine.
    """
    target = frozen_target(settings)
    family = importlib.import_module(f"trainers.{name}")
    options = family.Settings()
    needs = family.needs(options, target)
    read = batches(open_teacher_store(store, target).reading(needs.layers, top=False), settings.batch_size, seed=0)
    first, *rest = (complete(batch, target, needs.layers) for batch in itertools.islice(read, settings.steps))
    steps = {}
    for is_compiled in (False, True):
        torch.manual_seed(0)
        steps[is_compiled] = TimedSteps(family, options, target, is_compiled=is_compiled)
    for batch in (*[first] * WARM_UP_STEPS, *rest):
        for one in steps.values():
            one.run(batch)
    plain, compiled = (steps[is_compiled].times[WARM_UP_STEPS:] for is_compiled in (False, True))
    num_tokens = [int(batch.lengths_B.sum()) for batch in rest]
    for label, times in (("plain", plain), ("compiled", compiled)):
        rate = statistics.median(number / one.wall_s for number, one in zip(num_tokens, times, strict=True))
        wall_s, cpu_s = (statistics.median(getattr(one, kind) for one in times) for kind in ("wall_s", "cpu_s"))
        print(f"{name}, {label}: {rate:,.0f} tokens/s, {wall_s * 1e3:,.0f} ms a step, {cpu_s * 1e3:,.0f} of CPU time")
    pairs = list(zip(plain, compiled, strict=True))
    print(
        f"{name}: {statistics.median(one.wall_s / other.wall_s for one, other in pairs):.2f} times the tokens/s,"
        f" {statistics.median(one.cpu_s / other.cpu_s for one, other in pairs):.2f} by CPU time, after a first step of"
        f" {steps[True].times[0].wall_s:.0f} s; losses differ by at most"
        f" {max(abs(one.loss / other.loss - 1) for one, other in pairs):.1e}",
        flush=True,
    )


def compare_grouped(name: str, store: Path, settings: BenchmarkSettings) -> None:
    """Prints what training steps on the same rows take in random order and grouped by length; both take turns."""
    target = frozen_target(settings)
    family = importlib.import_module(f"trainers.{name}")
    options = family.Settings()
    needs = family.needs(options, target)
    examples = open_teacher_store(store, target).reading(needs.layers, top=False)
    num_rows = min(STEPS_SORTED, len(examples) // settings.batch_size) * settings.batch_size
    rows = [examples[index] for index in order(len(examples), seed=0, epoch=0)[:num_rows]]
    orders = {
        "in random order": list(range(num_rows)),
        "grouped by length": list(grouped_order(rows, settings.batch_size, target.context_length, seed=0, epoch=0)),
    }
    read, steps = {}, {}
    for label, indices in orders.items():
        joined = list(batches([rows[index] for index in indices], settings.batch_size))
        read[label] = [complete(batch, target, needs.layers) for batch in (*joined[:WARM_UP_STEPS], *joined)]
        torch.manual_seed(0)
        steps[label] = TimedSteps(family, options, target, is_compiled=False)
    for number in range(num_rows // settings.batch_size + WARM_UP_STEPS):
        for label, one in steps.items():
            one.run(read[label][number])
    num_tokens, totals = sum(len(row.tokens_T) for row in rows), {}
    for label, one in steps.items():
        taken = one.times[WARM_UP_STEPS:]
        totals[label] = [sum(getattr(step, kind) for step in taken) for kind in ("wall_s", "cpu_s")]
        padding = 1 - num_tokens / sum(batch.tokens_BT.numel() for batch in read[label][WARM_UP_STEPS:])
        print(f"{name}, {label}: {num_tokens / totals[label][0]:,.0f} tokens/s, {padding:.0%} of a batch is padding")
    wall, cpu = (one / other for one, other in zip(*totals.values(), strict=True))
    print(f"{name}: grouped {wall:.2f} times the tokens/s, {cpu:.2f} by CPU time", flush=True)


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """What a training step took, and its loss per supervised token."""

    wall_s: float
    cpu_s: float
    loss: float


class TimedSteps:
    """Training steps of a new drafter on given batches, in the target's dtype."""

    def __init__(self, family: ModuleType, options: Any, target: Target, *, is_compiled: bool) -> None:
        self.times = list[StepTimes]()
        self._family, self._options, self._target, self._is_compiled = family, options, target, is_compiled
        self._drafter = family.build(options, target).train()
        self._optimizer = torch.optim.AdamW(self._drafter.parameters(), lr=1e-4)

    def run(self, batch: Batch) -> None:
        """Times a step: loss, gradient and optimiser."""
        begin, cpu_begin = time.perf_counter(), time.process_time()
        if hasattr(self._family, "begin_step"):
            self._family.begin_step(self._drafter, self._options, len(self.times), 1000)
        with compiled_losses() if self._is_compiled else nullcontext():
            with torch.autocast("cpu", torch.bfloat16, enabled=self._target.dtype == torch.bfloat16):
                total, _ = self._family.loss(self._drafter, batch, self._options, self._target)
            num_supervised = int(batch.loss_mask_BT[:, 1:].sum())
            (total / num_supervised).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        loss = total.item() / num_supervised
        wall_s, cpu_s = time.perf_counter() - begin, time.process_time() - cpu_begin
        self.times.append(StepTimes(wall_s=wall_s, cpu_s=cpu_s, loss=loss))


def compare_with_medusa(repository: Path, store: Path, settings: BenchmarkSettings) -> None:
    """Prints time and value of the published trainer's loss and of ours, forward and backward, on the same batches."""
    target = frozen_target(settings)
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
        with torch.autocast("cpu", torch.bfloat16, enabled=drafter.target.dtype == torch.bfloat16):
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
