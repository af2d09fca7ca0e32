"""From a fresh clone to a table: generates text with the target, trains drafters on it, and compares their speed.

    ./launch.sh quickstart                  # pocket target, into runs/quickstart: five minutes on two CPU cores
    ./launch.sh quickstart --target T --data prompts.jsonl --output runs/mine

The drafters are presets of trainers, recipes/configs/quickstart-*.yaml. The same command continues an interrupted run,
and nothing is trained twice.
"""

import importlib
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import transformers

import draftsmith
from data import POCKET
from data.prompts import Prompt, load_prompts
from data.pseudo_data import write_pseudo_data
from data.writers import LocalWriter, PseudoDataSettings
from draftsmith import Target
from draftsmith.length.costs import num_threads
from draftsmith.loading.model_info import read_target_info
from eval.bakeoff.results import claimed
from eval.bakeoff.settings import BakeoffSettings
from eval.compare import compare
from eval.report.table import header, table
from trainers.training import launchers
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings
from trainers.training.settings import parse_settings

PRESETS = Path(__file__).resolve().parent / "configs"
TRAINING, HELD_OUT = "python-source:train", "python-source"
MAX_TRAINING_THREADS = 4  # more threads slow small models down
NEXT = """
The report is {output}/bakeoff.html, the plot bakeoff.png, and the table bakeoff.md, .csv and .json. Next steps:

  # generate text and mark the drafted tokens that are accepted
  {draftsmith} generate --draft {drafter} --show-drafts 'def main('
  # show the drafter's manifest
  {draftsmith} inspect {drafter}
  # do all this for your own model and prompts
  ./launch.sh quickstart --target MODEL --data PROMPTS.jsonl --output runs/mine
  # list all recipes; each has its own --help
  ./launch.sh --help
"""


def command_path() -> str:
    """Returns how the user's shell finds the command `draftsmith`: its path, as the environment is not active there."""
    path = Path(sys.executable).with_name("draftsmith")
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


@dataclass(frozen=True, kw_only=True)
class QuickstartSettings:
    """The target, the data, and the amount of training and measurement."""

    target: str = str(POCKET)
    """A transformers folder or hub name."""
    data: str = TRAINING
    """Prompts that the target continues to make the drafters' training data."""
    held_out: str = ""
    """Prompts to compare on; if empty, held out from `data`, or the source files held out from the pocket target."""
    output: str = "runs/quickstart"
    """Folder for the training data, the drafters, the table and the plot."""
    max_steps: int = 0
    """Training steps of each drafter; 0 uses its preset."""
    seed: int = 0
    """Random seed."""
    num_texts: int = 720
    """Number of prompts that the target continues."""
    text_tokens: int = 112
    """New tokens per training prompt."""
    num_prompts: int = 8
    """Number of prompts to compare on."""
    max_new_tokens: int = 32
    """New tokens per compared prompt."""
    rounds: int = 3
    """Number of times that these are decoded."""


def main(run: QuickstartSettings) -> None:
    if launchers.num_ranks() > 1:
        raise ValueError("the quickstart runs as one process; to train on several devices, run the recipes one by one")
    start, output = time.perf_counter(), Path(run.output)
    settings = BakeoffSettings(rounds=run.rounds, max_new_tokens=run.max_new_tokens, forecast_sizes=(), seed=run.seed)
    transformers.utils.logging.disable_progress_bar()
    with claimed(output) as now:
        training, held_out = _prompts(run, now)
        settings.check_prompts(len(held_out))
        target = Target.from_pretrained(run.target, dtype="float32")

        _say(f"Prompt for {Path(run.target).name}:\n{held_out[0].text}")
        _say("Its greedy continuation:")
        with num_threads(settings.threads):
            streamer = transformers.TextStreamer(target.tokenizer, skip_prompt=True)
            ids = torch.tensor([held_out[0].ids], device=target.device)
            draftsmith.generate(target, ids, max_new_tokens=run.max_new_tokens, streamer=streamer)
        with num_threads(min(MAX_TRAINING_THREADS, torch.get_num_threads())):
            _say(f"Generating training data: continuations of {len(training)} prompts")
            data_settings = PseudoDataSettings(
                max_new_tokens=run.text_tokens, batch_size=120, shard_batches=1, seed=run.seed
            )
            write_pseudo_data(LocalWriter(target), training, output / "pseudo-data", data_settings, now=now)
            artifacts = [_train(preset, run) for preset in sorted(PRESETS.glob("quickstart-*.yaml"))]
        _say(f"Comparing all drafters with plain decoding on {len(held_out)} held-out prompts")
        rows = compare(target, held_out, artifacts, output, settings)
        print("\n".join(["", header(rows, "terminal"), *table(rows, "terminal")]))
        best = max((row for row in rows if row["family"] is not None), key=lambda row: row["speedup"])
        print(NEXT.format(output=output, drafter=output / best["drafter"], draftsmith=command_path()))
        print(f"Done in {time.perf_counter() - start:.0f} s.")


def _prompts(run: QuickstartSettings, now: datetime) -> tuple[list[Prompt], list[Prompt]]:
    """Returns the training prompts and the held-out prompts."""
    target_info = read_target_info(run.target)
    room = target_info.context_length - max(run.text_tokens, run.max_new_tokens)

    def load(source: str, number: int) -> list[Prompt]:
        options: dict[str, Any] = {"max_prompts": number, "max_prompt_tokens": room, "long_prompts": "drop"}
        return load_prompts(source, target_info.tokenizer, now=now, seed=run.seed, **options)

    held_out = run.held_out or (HELD_OUT if run.data == TRAINING else "")
    if held_out:
        return load(run.data, run.num_texts), load(held_out, run.num_prompts)
    prompts = load(run.data, run.num_texts + run.num_prompts)
    return prompts[run.num_prompts :], prompts[: run.num_prompts]


def _train(preset: Path, run: QuickstartSettings) -> Path:
    """Trains the drafter of `preset` and returns its artifact."""
    name = preset.stem.removeprefix("quickstart-")
    output = Path(run.output) / name
    _say(f"Training {name} with {preset.name}")
    trainer = importlib.import_module(f"trainers.{name}")
    options = {"config": preset, "target": run.target, "data": Path(run.output) / "pseudo-data", "output": output}
    options |= {"seed": run.seed} | ({"max_steps": run.max_steps} if run.max_steps else {})
    argv = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    return train(trainer, *parse_settings(trainer.Settings, RunSettings, description=None, argv=argv))


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    with launchers.user_errors():
        main(*parse_settings(QuickstartSettings, description=__doc__))
