"""Training by gradient: transformers' Trainer over a drafter alone, with sums and counts in place of means.

The optimised loss is the sum over all supervised tokens of a step, of every rank and micro-batch, divided by their
number; so neither ranks nor gradient accumulation change what is learnt.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainingArguments

from data.batches import Batch
from data.teacher import complete
from draftsmith import Target
from trainers import Needs
from trainers.training import checkpoints, evaluation
from trainers.training.evaluation import ACCEPTANCE, Sums
from trainers.training.jsonl import HELD_OUT, LOG
from trainers.training.logs import JsonLines, Progress
from trainers.training.run_settings import RunSettings

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


class Step(nn.Module):
    """What is wrapped for training: a drafter with its family's loss, or judgement, as the forward pass."""

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

    def mixed(self, batch: Batch, salt: str) -> Batch:
        """Returns the batch as the family wants to learn from it."""
        if not hasattr(self._family, "transform_batch"):
            return batch
        return self._family.transform_batch(self.drafter, batch, self._settings, self._target, salt)

    def summarise(self, means: dict[str, float]) -> dict[str, float]:
        """Returns the means of a judgement and what the family concludes from them."""
        return evaluation.summarise(means, self._costs, self._family)

    def begin(self, step: int, num_steps: int) -> None:
        """Tells the family how many of the optimiser's steps are done."""
        if hasattr(self._family, "begin_step"):
            self._family.begin_step(self.drafter, self._settings, step, num_steps)

    def learning_rate_factors(self) -> dict[str, Callable[[int], float]]:
        """Returns the family's factors of the learning rate by prefix of its weights' names, none if it has none."""
        given = (
            self._family.learning_rate_factors(self._settings) if hasattr(self._family, "learning_rate_factors") else {}
        )
        return {f"drafter.{prefix}": factor for prefix, factor in given.items()}


class DraftTrainer(Trainer):
    """transformers' Trainer, told how its loss is scaled, how to judge held-out rows and when a checkpoint is whole."""

    loss_is_scaled_for_ga = True
    control: TrainerControl

    def __init__(
        self,
        step: Step,
        arguments: TrainingArguments,
        *,
        target: Target,
        held_out: list[Batch],
        output: Path,
        facts: dict[str, Any],
        spent_s: float,
        **options: Any,
    ) -> None:
        super().__init__(step, arguments, callbacks=[Progress(), JsonLines(output / LOG), Rhythm()], **options)
        self.remove_callback(PrinterCallback)
        self._step, self._target, self._needs, self._held_out = step, target, step.needs, held_out
        self._output, self._facts = output, facts
        self._sums, self._num_tokens = Sums(), 0
        self._began = self._logged = time.perf_counter()
        self._spent_s = spent_s

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Splits the groups of weights by the prefixes that the family has factors for; the longest counts."""
        optimizer = super().create_optimizer(model)
        prefix_of: dict[int, str] = {}
        for prefix in sorted(self._step.learning_rate_factors(), key=len):
            prefix_of |= {id(one): prefix for name, one in self._step.named_parameters() if name.startswith(prefix)}
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
        """Has each group follow the schedule times the factor of its prefix."""
        is_new, factors = self.lr_scheduler is None, self._step.learning_rate_factors()
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
        batch = complete(inputs["batch"], self._target, self._needs.layers, self._needs.top_k)
        self._step.begin(self.state.global_step, self.state.max_steps)
        total, metrics = model(batch)
        if not torch.isfinite(total):
            raise ValueError(
                f"the loss is {total.item()} at step {self.state.global_step + 1}, in the batch of rows "
                f"{', '.join(batch.keys)}; nothing was overwritten: look at these rows or lower --learning-rate"
            )
        self._sums.add({"loss": (total, _num_supervised(batch)), **metrics})
        self._num_tokens += int(batch.lengths_B.sum())
        # Ranks' gradients are averaged, while the sum is wanted.
        return total * self.accelerator.num_processes / num_items_in_batch

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple:
        """Has the family change a step's batches before their tokens are counted."""
        return super().get_batch_samples(map(self._mixed, epoch_iterator), num_batches, device)

    def _mixed(self, inputs: dict[str, Batch]) -> dict[str, Batch]:
        with self.compute_loss_context_manager():
            return {"batch": self._step.mixed(inputs["batch"], f"{self.args.seed}:{self.state.global_step}")}

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        count = torch.tensor(sum(_num_supervised(inputs["batch"]) for inputs in batch_samples), device=device)
        return self.accelerator.reduce(count, "sum").clamp(min=1)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_runtime" in logs:
            return
        if "loss" in logs:
            now = time.perf_counter()
            seen = self._reduce(torch.tensor(float(self._num_tokens), device=self.args.device)).item()
            logs |= self._sums.means(self._reduce) | {"tokens_per_s": seen / (now - self._logged)}
            logs["seconds"] = self._spent_s + now - self._began
            self._sums, self._num_tokens, self._logged = Sums(), 0, now
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Judges held-out rows, shared out among ranks, and logs the means."""
        began, num_ranks, sums = time.perf_counter(), self.accelerator.num_processes, Sums()
        self.model_wrapped.eval()
        for begin in range(0, len(self._held_out), num_ranks):
            # All ranks run the same number of forwards, as sharded weights demand; one too many is not counted.
            index = min(begin + self.accelerator.process_index, len(self._held_out) - 1)
            is_counted = index == begin + self.accelerator.process_index
            metrics = self.model_wrapped(self._judged(index), is_held_out=True)
            sums.add({name: (total * is_counted, count * is_counted) for name, (total, count) in metrics.items()})
        means = self._step.summarise(sums.means(self._reduce))
        found = {HELD_OUT + name: value for name, value in means.items()}
        self.log(found)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        self._logged += time.perf_counter() - began
        return found

    def _judged(self, index: int) -> Batch:
        """Returns a held-out batch with what the target says of it, which is asked once."""
        wanted = self._needs.layers + self._needs.held_out_layers
        # What a store holds is in another precision, and on another device perhaps, than what is asked of the target.
        batch = complete(self._held_out[index], self._target, wanted, self._needs.top_k)
        self._held_out[index] = batch
        return batch

    def _reduce(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, "sum")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            spent_s = self._spent_s + time.perf_counter() - self._began
            step = self.state.global_step
            facts = {**self._facts, "best_step": self.state.best_global_step, "spent_s": spent_s}
            checkpoints.mark_whole(checkpoints.folder(self._output, step), facts)
            checkpoints.keep_only(self._output, {step, self.state.best_global_step or step})

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        assert output_dir is not None
        if self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            weights = self.model.state_dict() if state_dict is None else state_dict
            # Tied weights are written twice: safetensors holds no aliases.
            copies = {name: weight.detach().cpu().contiguous().clone() for name, weight in weights.items()}
            save_file(copies, Path(output_dir) / checkpoints.WEIGHTS)


class Rhythm(TrainerCallback):
    """Judges at the last step too, saves whenever it judges, and logs before it saves.

    So a best step always has its checkpoint, and no metric lies half added up in a checkpoint.
    """

    def on_step_end(self, args: TrainingArguments, state: Any, control: TrainerControl, **_: Any) -> None:
        control.should_evaluate |= state.global_step >= state.max_steps
        control.should_save |= control.should_evaluate
        control.should_log |= control.should_save


def arguments_of(run: RunSettings, output: Path, deepspeed: str | None, best: str = ACCEPTANCE) -> TrainingArguments:
    """Returns the run's settings as transformers names them; `best` is the held-out figure that is to be largest."""
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
        metric_for_best_model=best,
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
    # Several visible GPUs without a launcher would be driven by nn.DataParallel.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def _product(rate: Callable[[int], float], factor: Callable[[int], float] | None) -> Callable[[int], float]:
    return rate if factor is None else lambda step: rate(step) * factor(step)


def _num_supervised(batch: Batch) -> int:
    """Returns how many tokens are learnt; the first has no context to be predicted from."""
    return int(batch.loss_mask_BT[:, 1:].sum())
