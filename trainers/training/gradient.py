"""Training by gradient: transformers' Trainer over the drafter alone, with losses summed instead of averaged.

The optimised loss is the sum over all supervised tokens of an optimiser step, on every rank and in every micro-batch,
divided by their number; so neither the number of ranks nor gradient accumulation changes the result.
"""

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainingArguments

from data.batches import Batch, collate, grouped_order, truncate
from data.teacher import complete
from draftsmith import Target
from draftsmith.length.costs import Stopwatch
from draftsmith.loading.weights import check_finite
from trainers import Needs
from trainers.training import checkpoints, evaluation
from trainers.training.evaluation import ACCEPTANCE, MetricSums
from trainers.training.jsonl import HELD_OUT, LOG
from trainers.training.logs import JsonlCallback, ProgressCallback
from trainers.training.run_settings import RunSettings

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


class LossModule(nn.Module):
    """Module for training: a drafter whose forward pass returns its family's loss, or metrics on held-out rows."""

    def __init__(
        self, drafter: nn.Module, family: ModuleType, settings: Any, target: Target, costs: dict[str, float]
    ) -> None:
        super().__init__()
        self.drafter = drafter
        self.needs: Needs = family.needs(settings, target)
        self._family, self._settings, self._target, self._costs = family, settings, target, costs

    def forward(self, batch: Batch, is_held_out: bool = False) -> Any:
        if is_held_out:
            return evaluation.evaluate(self.drafter, batch, self._family, self._settings, self._target, self.needs)
        return self._family.loss(self.drafter, batch, self._settings, self._target)

    def transform_batch(self, batch: Batch, salt: str) -> Batch:
        """Returns a training batch as changed by the family, if it changes any."""
        if not hasattr(self._family, "transform_batch"):
            return batch
        return self._family.transform_batch(self.drafter, batch, self._settings, self._target, salt)

    def summarise(self, means: dict[str, float]) -> dict[str, float]:
        """Returns the means with the metrics that the family computes from them."""
        return evaluation.summarise(means, self._costs, self._family)

    def step_needs(self, step: int) -> Needs:
        """Returns what a training batch must contain when `step` steps are done."""
        if hasattr(self._family, "step_needs"):
            needs: Needs = self._family.step_needs(self._settings, self._target, step)
            return needs
        return self.needs

    def begin_step(self, step: int, num_steps: int) -> None:
        """Calls the family before an optimiser step; `step` are done of `num_steps`."""
        if hasattr(self._family, "begin_step"):
            self._family.begin_step(self.drafter, self._settings, step, num_steps)

    def learning_rate_factors(self) -> dict[str, Callable[[int], float]]:
        """Returns the family's learning-rate factors by prefix of the weights' names."""
        if not hasattr(self._family, "learning_rate_factors"):
            return {}
        factors = self._family.learning_rate_factors(self._settings)
        return {f"drafter.{prefix}": factor for prefix, factor in factors.items()}


class DraftTrainer(Trainer):
    """Trainer with a loss scaled by supervised tokens, the families' held-out metrics and complete checkpoints."""

    loss_is_scaled_for_ga = True
    control: TrainerControl

    def __init__(
        self,
        module: LossModule,
        arguments: TrainingArguments,
        *,
        target: Target,
        held_out: list[Batch],
        output: Path,
        facts: dict[str, Any],
        earlier_s: float,
        max_length: int,
        group_by_length: bool = False,
        observers: Sequence[TrainerCallback] = (),
        **options: Any,
    ) -> None:
        callbacks = [ProgressCallback(), JsonlCallback(output / LOG), CheckpointSchedule(), GradientCheck(), *observers]
        super().__init__(module, arguments, callbacks=callbacks, **options)
        self.remove_callback(PrinterCallback)
        self._module, self._target, self._needs, self._held_out = module, target, module.needs, held_out
        self._output, self._facts = output, facts
        self._sums, self._num_tokens, self._num_supervised = MetricSums(), 0, 0
        self._teacher_ms = 0.0
        self._epoch: Iterator | None = None
        self._batches: Generator | None = None
        self._started = self._logged = time.perf_counter()
        self._earlier_s, self._max_length, self._group_by_length = earlier_s, max_length, group_by_length

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        return RowsByLength(self, self._max_length) if self._group_by_length else super()._get_train_sampler()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Splits parameter groups by the prefixes of the family's learning-rate factors; the longest match counts."""
        optimizer = super().create_optimizer(model)
        prefix_of: dict[int, str] = {}
        for prefix in sorted(self._module.learning_rate_factors(), key=len):
            prefix_of |= {id(one): prefix for name, one in self._module.named_parameters() if name.startswith(prefix)}
        if prefix_of:
            optimizer.param_groups = [
                group
                | {"params": [one for one in group["params"] if prefix_of.get(id(one)) == prefix], "prefix": prefix}
                for group in optimizer.param_groups
                for prefix in dict.fromkeys(prefix_of.get(id(one)) for one in group["params"])
            ]
        return optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Multiplies the schedule of each parameter group by the factor of its prefix."""
        is_new, factors = self.lr_scheduler is None, self._module.learning_rate_factors()
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if factors and is_new:
            groups = scheduler.optimizer.param_groups
            scheduler.lr_lambdas = [
                _product(rate, factors.get(group["prefix"]))
                for group, rate in zip(groups, scheduler.lr_lambdas, strict=True)
            ]
            for group, base, rate in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
                group["lr"] = base * rate(0)
        return scheduler

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        watch = Stopwatch(self._target.device)
        needs = self._module.step_needs(self.state.global_step)
        batch = complete(inputs["batch"], self._target, needs.layers, needs.top_k)
        self._teacher_ms += watch.lap_ms()
        self._module.begin_step(self.state.global_step, self.state.max_steps)
        total, metrics = model(batch)
        if not torch.isfinite(total):
            raise ValueError(
                f"the loss is {total.item()} at step {self.state.global_step + 1}, in the batch of rows "
                f"{', '.join(batch.names)}; the last checkpoint is unchanged: check these rows or lower --learning-rate"
            )
        self._sums.add({"loss": (total, _num_supervised(batch)), **metrics})
        self._num_tokens += int(batch.lengths_B.sum())
        self._num_supervised += _num_supervised(batch)
        # The gradients of ranks are averaged, and their sum is needed.
        return total * self.accelerator.num_processes / num_items_in_batch

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple:
        """Lets the family change the batches of an optimiser step before their tokens are counted."""
        if self._epoch is not epoch_iterator:
            self._epoch, self._batches = epoch_iterator, read_ahead(epoch_iterator)
        return super().get_batch_samples(map(self._transformed, self._timed()), num_batches, device)

    def train(self, *arguments: Any, **options: Any) -> Any:
        """Trains, and stops reading ahead when training ends or fails."""
        try:
            return super().train(*arguments, **options)
        finally:
            if self._batches is not None:
                self._batches.close()

    def _timed(self) -> Iterator:
        """Yields the batches, of which a teacher store is part, and counts the time that training waits for them.

        Rows are cut to the longest length.
        """
        assert self._batches is not None
        while True:
            watch = Stopwatch(self._target.device)
            rows = next(self._batches, None)
            # Joined here: a second thread with OpenMP's threads of its own would slow down those of this one.
            batch = None if rows is None else collate([truncate(row, self._max_length) for row in rows])
            self._teacher_ms += watch.lap_ms()
            if batch is None:
                return
            yield {"batch": batch}

    def _transformed(self, inputs: dict[str, Batch]) -> dict[str, Batch]:
        with self.compute_loss_context_manager():
            salt = f"{self.args.seed}:{self.state.global_step}"
            return {"batch": self._module.transform_batch(inputs["batch"], salt)}

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        count = torch.tensor(sum(_num_supervised(inputs["batch"]) for inputs in batch_samples), device=device)
        return self.accelerator.reduce(count, "sum").clamp(min=1)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_runtime" in logs:
            return
        if "loss" in logs:
            now = time.perf_counter()
            counts = [float(self._num_tokens), float(self._num_supervised), self._teacher_ms / 1e3]
            totals = self._reduce(torch.tensor(counts, device=self.args.device)) / (now - self._logged)
            tokens_per_s, supervised_per_s, teachers = totals.tolist()
            logs |= self._sums.means(self._reduce) | {
                "tokens_per_s": tokens_per_s,
                "supervised_tokens_per_s": supervised_per_s,
                "teacher_share": teachers / self.accelerator.num_processes,
            }
            logs["seconds"] = self._earlier_s + now - self._started
            self._sums, self._num_tokens, self._num_supervised = MetricSums(), 0, 0
            self._teacher_ms, self._logged = 0.0, now
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Evaluates the held-out batches, distributed over the ranks, and logs the means."""
        started, num_ranks, sums = time.perf_counter(), self.accelerator.num_processes, MetricSums()
        self.model_wrapped.eval()
        for begin in range(0, len(self._held_out), num_ranks):
            # Sharded weights require as many forward passes on every rank; those beyond the last batch do not count.
            index = min(begin + self.accelerator.process_index, len(self._held_out) - 1)
            is_counted = index == begin + self.accelerator.process_index
            metrics = self.model_wrapped(self._held_out_batch(index), is_held_out=True)
            sums.add({name: (total * is_counted, count * is_counted) for name, (total, count) in metrics.items()})
        means = self._module.summarise(sums.means(self._reduce))
        metrics = {HELD_OUT + name: value for name, value in means.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._logged += time.perf_counter() - started
        return metrics

    def _held_out_batch(self, index: int) -> Batch:
        """Returns a held-out batch with the outputs of the target, which are computed once and kept."""
        layers = self._needs.layers + self._needs.held_out_layers
        # `complete` also converts stored outputs of the target to its precision and device.
        self._held_out[index] = complete(self._held_out[index], self._target, layers, self._needs.top_k)
        return self._held_out[index]

    def _reduce(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, "sum")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Saves and marks a checkpoint; raises ValueError, keeping the one before, if a weight is not finite."""
        check_finite(f"the weights after step {self.state.global_step}", self.model.named_parameters())
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            train_s = self._earlier_s + time.perf_counter() - self._started
            step = self.state.global_step
            facts = {**self._facts, "best_step": self.state.best_global_step, "spent_s": train_s}
            checkpoints.mark_complete(checkpoints.folder(self._output, step), facts)
            checkpoints.keep_only(self._output, {step, self.state.best_global_step or step})

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        assert output_dir is not None
        if self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            weights = self.model.state_dict() if state_dict is None else state_dict
            # Tied weights are saved twice, as safetensors does not store aliases.
            copies = {name: weight.detach().cpu().contiguous().clone() for name, weight in weights.items()}
            save_file(copies, Path(output_dir) / checkpoints.WEIGHTS)


class RowsByLength(Sampler[int]):
    """The rows in the order of `grouped_order`, of the epoch that the trainer has reached."""

    def __init__(self, trainer: Trainer, max_length: int) -> None:
        self._trainer, self._max_length = trainer, max_length

    def __len__(self) -> int:
        return len(self._trainer.train_dataset)

    def __iter__(self) -> Iterator[int]:
        arguments, num_ranks = self._trainer.args, self._trainer.accelerator.num_processes
        rows_per_batch = arguments.train_batch_size * num_ranks
        num_batches = len(self) // rows_per_batch
        steps_per_epoch = max(math.ceil(num_batches / arguments.gradient_accumulation_steps), 1)
        return grouped_order(
            self._trainer.train_dataset,
            rows_per_batch * arguments.gradient_accumulation_steps,
            self._max_length,
            seed=arguments.seed,
            epoch=self._trainer.state.global_step // steps_per_epoch,
        )


class GradientCheck(TrainerCallback):
    """Stops training before an optimiser step whose gradient is not finite."""

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: Any, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        if gradients and not bool(torch.nn.utils.get_total_norm(gradients).isfinite()):
            raise ValueError(
                f"the gradient is not finite at step {state.global_step + 1}; the last checkpoint is unchanged: lower"
                " --learning-rate"
            )


class CheckpointSchedule(TrainerCallback):
    """Evaluates at the last step too, saves at every evaluation and logs before saving.

    So the best step always has a checkpoint, and no checkpoint is taken with metrics that are not yet logged.
    """

    def on_step_end(self, args: TrainingArguments, state: Any, control: TrainerControl, **_: Any) -> None:
        control.should_evaluate |= state.global_step >= state.max_steps
        control.should_save |= control.should_evaluate
        control.should_log |= control.should_save


def training_arguments(
    run: RunSettings, output: Path, deepspeed: str | None, best_metric: str = ACCEPTANCE
) -> TrainingArguments:
    """Returns the run's settings as transformers' arguments; `best_metric` is the held-out metric to maximise."""
    arguments = TrainingArguments(
        output_dir=str(output / "checkpoints"),
        max_steps=run.max_steps,
        seed=run.seed,
        per_device_train_batch_size=run.batch_size,
        gradient_accumulation_steps=run.gradient_accumulation,
        learning_rate=run.learning_rate,
        lr_scheduler_type=SCHEDULES[run.schedule],
        warmup_steps=run.warmup_steps,
        weight_decay=run.weight_decay,
        max_grad_norm=run.clip,
        bf16=run.bf16,
        eval_strategy="steps",
        eval_steps=run.eval_steps,
        save_strategy="steps",
        save_steps=run.save_steps,
        logging_steps=run.log_steps,
        metric_for_best_model=best_metric,
        greater_is_better=True,
        logging_nan_inf_filter=False,
        dataloader_drop_last=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        report_to=["wandb"] if run.report_to == "wandb" else [],
        run_name=output.name,
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        deepspeed=deepspeed,
    )
    # Without a launcher, transformers would use nn.DataParallel on several visible GPUs.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def read_ahead(batches: Iterator) -> Generator:
    """Yields the batches, each read from its files by another thread while the one before it is in use."""
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as reader:
        waiting = reader.submit(next, batches, None)
        while (batch := waiting.result()) is not None:
            waiting = reader.submit(next, batches, None)
            yield batch


def _product(rate: Callable[[int], float], factor: Callable[[int], float] | None) -> Callable[[int], float]:
    return rate if factor is None else lambda step: rate(step) * factor(step)


def _num_supervised(batch: Batch) -> int:
    """Returns the number of supervised tokens; the first token of a row, which has no context, does not count."""
    return int(batch.loss_mask_BT[:, 1:].sum())
