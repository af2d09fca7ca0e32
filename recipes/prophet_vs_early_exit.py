"""Prophet against early exit, on the same text for as many steps, and whether a prophet helps its target's own loss.

    ./launch.sh prophet_vs_early_exit                               # into runs/prophet_vs_early_exit
    ./launch.sh prophet_vs_early_exit --target T --data runs/mine --max-steps 2000 --report-to wandb

The comparison that lucidrains/speculative-decoding set out to make and never published. Both have two blocks of their
own; the exit is after the target's second block. `curves.png` and `.jsonl` show how likely the target accepts the first
drafted token, as training goes on; `bakeoff.*` how fast both decode at its end. Then two copies of the target are
trained on `--text`, each with a prophet, whose loss reaches one of them and not the other.

One busy CPU core, pocket target, `--max-steps 150 --learning-rate 2e-3 --eval-steps 30 --max-held-out 16 --max-length
256 --text-steps 60 --rounds 2` on the 1.27 M tokens of `./launch.sh pseudo_data --max-prompts 10000`: 13 minutes. The
first drafted token is accepted with chance 0.34 (prophet) and 0.45 (early exit), ever since step 30 in that order. A
target forward gives 1.46 and 1.47 tokens greedily, 1.48 and 1.43 sampled; both slow the pocket down, to 0.62 and 0.74
of its speed. The prophet did not help: the target's held-out loss is 1.952 nats with its gradient and 1.928 without,
and was 1.984 and 1.936 at half time. That is a new prophet on a trained target, one seed; targets trained from
scratch with one were not measured.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from data.prompts import load_prompts
from draftsmith import Target
from eval.bakeoff.results import claim
from eval.bakeoff.settings import BakeoffSettings
from eval.compare import compare
from eval.plots.curves import Panel, publish_curves, read_curve
from eval.plots.track import to_wandb
from eval.report.table import header, table
from trainers import early_exit, prophet
from trainers.training import launchers
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings
from trainers.training.settings import from_flat, parse_settings

LOSS = "forward_kl"
SHALLOW = {"exit_layer": 2, "num_blocks": 2, "loss": LOSS}
DRAFTERS: dict[str, tuple[ModuleType, Any, str]] = {
    "prophet": (prophet, from_flat(prophet.Settings, {"num_layers": 2, "loss": LOSS}), "eval_first_acceptance"),
    "early_exit": (early_exit, from_flat(early_exit.Settings, SHALLOW), "eval_acceptance"),
}
JOINT = from_flat(prophet.Settings, {"num_layers": 2, "joint": True, "own_head": True})
TARGETS = {"text and prophet": JOINT, "text alone": dataclasses.replace(JOINT, detach=True)}


@dataclass(frozen=True, kw_only=True)
class ComparisonSettings:
    """What is compared beside the runs' own settings."""

    text: str = "python-source:train"
    """What copies of the target go on learning from, with a prophet and without; empty leaves this out."""
    text_steps: int = 100
    """Optimiser steps of that."""
    text_rate: float = 1e-4
    """Its peak learning rate."""
    held_out: str = "python-source"
    """Prompts to compare speeds on."""
    num_prompts: int = 8
    """Of these."""
    max_new_tokens: int = 64
    """Decoded after each."""
    rounds: int = 3
    """Times that all of them are decoded."""


def main(wanted: ComparisonSettings, run: RunSettings) -> None:
    if launchers.num_ranks() > 1:
        raise ValueError("the comparison is one process; run the recipes of both to train on several devices")
    output = Path(run.output or "runs/prophet_vs_early_exit")
    settings = BakeoffSettings(
        rounds=wanted.rounds,
        max_new_tokens=wanted.max_new_tokens,
        batch_sizes=(1,),
        forecast_sizes=(),
        seed=run.seed,
    )
    claim(output)
    panels = [Panel(title="First drafted token accepted, held out (sum of min of both laws)")]
    for name, (family, its_settings, metric) in DRAFTERS.items():
        folder = _train(family, its_settings, dataclasses.replace(run, output=str(output / name)))
        panels[0].lines[name] = read_curve(folder, metric)
    if wanted.text:
        panels.append(Panel(title="The target's own loss, held out (nats a token)"))
        changes: dict[str, Any] = {
            "data": wanted.text,
            "max_steps": wanted.text_steps,
            "learning_rate": wanted.text_rate,
        }
        for name, its_settings in TARGETS.items():
            place = str(output / f"target-{name.replace(' ', '-')}")
            folder = _train(prophet, its_settings, dataclasses.replace(run, output=place, **changes))
            panels[1].lines[name] = read_curve(folder, "eval_main_loss")
    publish_curves(panels, output)

    target = Target.from_pretrained(run.target, dtype="float32")
    prompts = load_prompts(wanted.held_out, target.tokenizer, max_prompts=wanted.num_prompts, seed=run.seed)
    rows = compare(target, prompts, [output / name for name in DRAFTERS], output, settings)
    if run.report_to == "wandb":
        to_wandb(rows, output, run.wandb_project)
    print("\n".join(["", header(rows, "terminal"), *table(rows, "terminal")]))
    for panel in panels:
        ends = (f"{name} {points[-1][1]:.4f}" for name, points in panel.lines.items())
        print(f"{panel.title}: at the end {', '.join(ends)}")
    print(f"{output}/curves.png and {output}/bakeoff.png are the pictures")


def _train(family: ModuleType, settings: Any, run: RunSettings) -> Path:
    folder = train(family, settings, run)
    if run.report_to == "wandb":
        import wandb

        wandb.finish()  # or the next run would go on in this one's
    return folder


if __name__ == "__main__":
    try:
        main(*parse_settings(ComparisonSettings, RunSettings, description=__doc__))
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
