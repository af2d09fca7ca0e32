"""From a fresh clone to a table: the target writes, drafters learn from that, and all are compared with plain decoding.

    ./launch.sh quickstart                  # pocket target, into runs/quickstart: five minutes on two CPU cores
    ./launch.sh quickstart --target T --data prompts.jsonl --output runs/mine

The drafters are those of recipes/configs/quickstart-*.yaml, presets of trainers. A run that was stopped is continued by
the same command, and nothing is trained twice.
"""

import importlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

import draftsmith
from data import POCKET
from data.prompts import Prompt, load_prompts
from data.pseudo_data import write_pseudo_data
from data.writers import LocalTarget, PseudoDataSettings
from draftsmith import Target
from draftsmith.core.model_info import read_target_info
from draftsmith.length.costs import num_threads
from eval.bakeoff.results import claim
from eval.bakeoff.settings import BakeoffSettings
from eval.compare import compare
from eval.report.table import header, table
from trainers.training import launchers
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings
from trainers.training.settings import parse_settings

PRESETS = Path(__file__).resolve().parent / "configs"
LEARNT, HELD_OUT = "python-source:train", "python-source"
MAX_TRAINING_THREADS = 4  # more slow small models down
NEXT = """
{output}/bakeoff.png is the picture; bakeoff.md, .csv and .json hold the table. What next:

  draftsmith generate --draft {drafter} --show-drafts 'def main('      marks what the drafter got right
  draftsmith inspect {drafter}
  ./launch.sh quickstart --target MODEL --data PROMPTS.jsonl --output runs/mine
  ./launch.sh --help                     lists the recipes, and each of them has its own --help
"""


@dataclass(frozen=True, kw_only=True)
class QuickstartSettings:
    """What is drafted for, and how much of everything."""

    target: str = str(POCKET)
    """A transformers folder or hub name."""
    data: str = LEARNT
    """Prompts that the target continues, for drafters to learn from."""
    held_out: str = ""
    """Prompts to compare on; if empty some of `data` set aside, or the source files held out from the pocket target."""
    output: str = "runs/quickstart"
    """Folder for the text, the drafters, the table and the picture."""
    max_steps: int = 0
    """Steps of each training, 0 for what its preset says."""
    seed: int = 0
    """Of everything."""
    num_texts: int = 720
    """Prompts that the target continues."""
    text_tokens: int = 112
    """Tokens written after each."""
    num_prompts: int = 8
    """Prompts to compare on."""
    max_new_tokens: int = 32
    """Tokens decoded after each of them."""
    rounds: int = 3
    """Times that all of them are decoded."""


def main(run: QuickstartSettings) -> None:
    if launchers.num_ranks() > 1:
        raise ValueError("the quickstart is one process; run the recipes one by one to train on several devices")
    began, output = time.perf_counter(), Path(run.output)
    settings = BakeoffSettings(rounds=run.rounds, max_new_tokens=run.max_new_tokens, forecast_sizes=(), seed=run.seed)
    transformers.utils.logging.disable_progress_bar()
    claim(output)
    learnt, judged = _prompts(run)
    settings.check_prompts(len(judged))
    target = Target.from_pretrained(run.target, dtype="float32")

    _say(f"{Path(run.target).name} is given:\n{judged[0].text}")
    _say("It writes:")
    with num_threads(settings.threads):
        streamer = transformers.TextStreamer(target.tokenizer, skip_prompt=True)
        ids = torch.tensor([judged[0].ids], device=target.device)
        draftsmith.generate(target, ids, max_new_tokens=run.max_new_tokens, streamer=streamer)
    with num_threads(min(MAX_TRAINING_THREADS, torch.get_num_threads())):
        _say(f"It continues {len(learnt)} prompts, for drafters to learn from")
        wanted = PseudoDataSettings(max_new_tokens=run.text_tokens, batch_size=120, shard_batches=1, seed=run.seed)
        write_pseudo_data(LocalTarget(target), learnt, output / "pseudo-data", wanted)
        artifacts = [_make(preset, run, target) for preset in sorted(PRESETS.glob("quickstart-*.yaml"))]
    _say(f"All are compared on {len(judged)} prompts that nothing was trained on")
    rows = compare(target, judged, artifacts, output, settings)
    print("\n".join(["", header(rows, "terminal"), *table(rows, "terminal")]))
    best = max((row for row in rows if row["family"] is not None), key=lambda row: row["speedup"])
    print(NEXT.format(output=output, drafter=output / best["drafter"]))
    print(f"Done in {time.perf_counter() - began:.0f} s.")


def _prompts(run: QuickstartSettings) -> tuple[list[Prompt], list[Prompt]]:
    """Returns the prompts to learn from and those to compare on."""
    facts = read_target_info(run.target)
    room = facts.context_length - max(run.text_tokens, run.max_new_tokens)

    def load(source: str, number: int) -> list[Prompt]:
        options = {"max_prompts": number, "max_prompt_tokens": room, "long_prompts": "drop", "seed": run.seed}
        return load_prompts(source, facts.tokenizer, **options)  # type: ignore[arg-type]

    held_out = run.held_out or (HELD_OUT if run.data == LEARNT else "")
    if held_out:
        return load(run.data, run.num_texts), load(held_out, run.num_prompts)
    found = load(run.data, run.num_texts + run.num_prompts)
    return found[run.num_prompts :], found[: run.num_prompts]


def _make(preset: Path, run: QuickstartSettings, target: Target) -> Path:
    """Makes the drafter of `preset`; returns its artifact."""
    name = preset.stem.removeprefix("quickstart-")
    output = Path(run.output) / name
    _say(f"{name}, by {preset.name}")
    trainer = importlib.import_module(f"trainers.{name}")
    given = {"config": preset, "target": run.target, "data": Path(run.output) / "pseudo-data", "output": output}
    given |= {"seed": run.seed} | ({"max_steps": run.max_steps} if run.max_steps else {})
    argv = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    return train(trainer, *parse_settings(trainer.Settings, RunSettings, description=None, argv=argv))


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    try:
        main(*parse_settings(QuickstartSettings, description=__doc__))
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
