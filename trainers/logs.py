"""What a run tells: a progress bar on rank 0 and `log.jsonl` in its folder."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trainers.run import RunSettings

HELD_OUT = "eval_"


class Progress(TrainerCallback):
    """A bar with steps, time left, loss and tokens a second, and a line for every judgement on held-out rows."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            # Where there is no terminal every update is a line of its own.
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
            self._bar.set_postfix_str(f"loss {logs['loss']:.3f}, {logs['tokens_per_s']:,.0f} tokens/s", refresh=False)
        else:
            values = [f"{name.removeprefix(HELD_OUT)} {value:.3f}" for name, value in logs.items() if name != "epoch"]
            self._bar.write(f"step {state.global_step}, held out: {', '.join(values)}", file=sys.stderr)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self._bar.close()


class JsonLines(TrainerCallback):
    """Appends every log to a file, one object a line; a resumed run first drops lines past its checkpoint."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero and self._path.exists():
            # The last line of a killed run may be cut short; it belongs to a step past the checkpoint.
            kept = [line for line in self._path.read_text().splitlines() if _step(line) <= state.global_step]
            self._path.write_text("".join(line + "\n" for line in kept))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        if state.is_world_process_zero:
            with self._path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


def reporter(run: RunSettings, output: Path) -> Callable[[dict[str, Any]], None]:
    """Returns what passes lines of a run without gradient, each with its "step", on to wandb, if that is asked for."""
    if run.report_to != "wandb":
        return lambda line: None
    import wandb

    reported = wandb.init(project=os.environ["WANDB_PROJECT"], name=output.name, dir=output, config=asdict(run))
    return lambda line: reported.log({key: value for key, value in line.items() if key != "step"}, step=line["step"])


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")
