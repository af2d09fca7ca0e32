"""What a run tells: a progress bar on rank 0, `log.jsonl` in its folder, and wandb if that is asked for.

Every family's lines hold the same names. While it learns by gradient: `loss`, `tokens_per_s` and `seconds`; of held-out
rows: `eval_acceptance` and what else is judged; in the last line, whatever the family, both `eval_acceptance` and
`seconds`, of the artifact itself. wandb shows them, as transformers does, as `train/loss` and `eval/acceptance`.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trainers.training import launchers
from trainers.training.jsonl import HELD_OUT, LOG, wandb_name
from trainers.training.run_settings import RunSettings


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


def begin(run: RunSettings, config: dict[str, Any], output: Path) -> None:
    """Opens wandb's run on rank 0, if it is asked for, with every setting in its config."""
    if run.report_to == "wandb" and launchers.rank() == 0:
        import wandb

        wandb.init(project=os.environ["WANDB_PROJECT"], name=output.name, dir=output, config=config)


def reporter(run: RunSettings, output: Path) -> Callable[[dict[str, Any]], None]:
    """Returns what notes lines of a run without gradient, each with its "step"."""

    def report(line: dict[str, Any]) -> None:
        with (output / LOG).open("a") as file:
            file.write(json.dumps(line) + "\n")
        if run.report_to == "wandb":
            import wandb

            shown = {wandb_name(name): value for name, value in line.items() if name != "step"}
            wandb.log(shown | {"train/global_step": line["step"]})

    return report


def conclude(run: RunSettings, judged: dict[str, float], seconds: float, output: Path) -> None:
    """Notes how the artifact itself was judged and what it cost, in place of what a run killed since has noted."""
    log = output / LOG
    if log.exists():
        # The last line of a killed run may be cut short.
        lines = [line for line in log.read_text().splitlines() if _step(line) < float("inf") and not _concludes(line)]
        log.write_text("".join(line + "\n" for line in lines))
    numbers = {HELD_OUT + name: value for name, value in judged.items()}
    reporter(run, output)({"step": run.max_steps, **numbers, "seconds": seconds})


def _concludes(line: str) -> bool:
    return {HELD_OUT + "acceptance", "seconds"} <= json.loads(line).keys()


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")
