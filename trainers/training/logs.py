"""Logs of a run: a progress bar on rank 0, `log.jsonl` in its folder and optionally wandb.

Metrics have the same names for every family. Training by gradient logs `loss`, `tokens_per_s` (prompts included),
`supervised_tokens_per_s`, `teacher_share` (of the time, for the target's outputs or reading them) and `seconds`;
evaluation logs `eval_acceptance` and the family's other metrics; the last line of every run has `eval_acceptance` and
`seconds` of the finished artifact. wandb shows them, as transformers does, as `train/loss` and `eval/acceptance`.
"""

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from data.shards import write_atomically
from draftsmith.artifacts import json_text
from trainers.training import launchers
from trainers.training.jsonl import HELD_OUT, LOG, wandb_name
from trainers.training.run_settings import RunSettings


class ProgressCallback(TrainerCallback):
    """Shows a progress bar with loss and tokens per second, and a line for every evaluation."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            # Without a terminal every update is a separate line.
            interval = 0.5 if sys.stderr.isatty() else 20
            self._bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="training", unit="step", mininterval=interval
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self._bar.update()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        if "loss" in logs:
            rates = f"{logs['tokens_per_s']:,.0f} tokens/s, {logs['supervised_tokens_per_s']:,.0f} supervised"
            shown = f"loss {logs['loss']:.3f}, {rates}, {logs['teacher_share']:.0%} on the teacher"
            self._bar.set_postfix_str(shown, refresh=False)
        else:
            values = [f"{name.removeprefix(HELD_OUT)} {value:.3f}" for name, value in logs.items() if name != "epoch"]
            self._bar.write(f"step {state.global_step}, held out: {', '.join(values)}", file=sys.stderr)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self._bar.close()


class JsonlCallback(TrainerCallback):
    """Appends every log to a file of JSON lines; a resumed run first removes lines past its checkpoint."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero and self._path.exists():
            # An incomplete last line, left by a killed run, counts as past the checkpoint.
            kept = [line for line in self._path.read_text().splitlines() if _step(line) <= state.global_step]
            self._path.write_text("".join(line + "\n" for line in kept))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        if state.is_world_process_zero:
            with self._path.open("a") as file:
                file.write(json_text.text_of(json_text.without_nan({"step": state.global_step, **logs})) + "\n")


def begin(run: RunSettings, config: dict[str, Any], output: Path) -> None:
    """Starts the wandb run on rank 0, if enabled, with all settings in its config; a continued run keeps its id.

    The id is kept in the file `wandb/run-id` of the folder, so offline sessions belong to one run when they are synced.
    """
    if run.report_to == "wandb" and launchers.rank() == 0:
        import wandb

        file, project = output / "wandb" / "run-id", os.environ["WANDB_PROJECT"]
        name = file.read_text() if file.exists() else None
        tracked = wandb.init(project=project, name=output.name, dir=output, config=config, id=name, resume="allow")
        write_atomically(file, lambda path: path.write_text(tracked.id))


def make_logger(run: RunSettings, output: Path) -> Callable[[dict[str, Any]], None]:
    """Returns a function that logs a line of metrics, which includes its "step", for families without gradient."""

    def report(line: dict[str, Any]) -> None:
        with (output / LOG).open("a") as file:
            file.write(json_text.text_of(json_text.without_nan(line)) + "\n")
        if run.report_to == "wandb":
            import wandb

            metrics = {wandb_name(name): value for name, value in line.items() if name != "step"}
            wandb.log(metrics | {"train/global_step": line["step"]})

    return report


def log_artifact(run: RunSettings, metrics: dict[str, float], seconds: float, output: Path) -> None:
    """Logs the metrics and training time of the artifact; replaces such a line if a killed run has left one."""
    log = output / LOG
    if log.exists():
        # A killed run may have left an incomplete last line.
        lines = [line for line in log.read_text().splitlines() if _step(line) < math.inf and not _is_of_artifact(line)]
        log.write_text("".join(line + "\n" for line in lines))
    held_out = {HELD_OUT + name: value for name, value in metrics.items()}
    make_logger(run, output)({"step": run.max_steps, **held_out, "seconds": seconds})


def _is_of_artifact(line: str) -> bool:
    return {HELD_OUT + "acceptance", "seconds"} <= json.loads(line).keys()


def _step(line: str) -> float:
    """Returns the step of a log line, infinity for an incomplete one."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf
