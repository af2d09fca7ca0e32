"""Compares prophet with early exit on the same data and steps, and tests if a prophet lowers its target's loss.

    ./launch.sh prophet_vs_early_exit                               # into runs/prophet_vs_early_exit
    ./launch.sh prophet_vs_early_exit --target T --data runs/mine --max-steps 2000 --report-to wandb

lucidrains/speculative-decoding planned this comparison but never published it. Both drafters have two blocks of their
own; the exit is after the target's second block. `curves.png` and `.jsonl` show first-token acceptance during training,
`bakeoff.*` the decoding speed afterwards. Then two copies of the target are trained on `--text`, each with a prophet:
the prophet's gradient reaches one of the copies and not the other.

One busy CPU core, pocket target, `--max-steps 150 --learning-rate 2e-3 --eval-steps 30 --max-held-out 16 --max-length
256 --text-steps 60 --rounds 2` on the 1.27 M tokens of `./launch.sh pseudo_data --max-prompts 10000`: 13 minutes. The
first-token acceptance rate is 0.34 (prophet) and 0.45 (early exit), in that order since step 30. Tau is 1.46 and 1.47
greedily, 1.48 and 1.43 sampled; both slow the pocket target down, to 0.62 and 0.74 of its speed. The prophet did not
help: the target's held-out loss is 1.952 nats with its gradient and 1.928 without, and was 1.984 and 1.936 half-way.
This is a new prophet on a trained target, one seed; targets trained from scratch with a prophet were not measured.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from data.prompts import load_prompts
from draftsmith import Target
from eval.bakeoff.results import claimed
from eval.bakeoff.settings import BakeoffSettings
from eval.compare import compare
from eval.plots.curves import Panel, publish_curves, read_curve
from eval.plots.wandb_logging import to_wandb
from eval.report.table import header, table
from trainers import early_exit, prophet
from trainers.training import launchers
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings
from trainers.training.settings import from_flat, parse_settings

LOSS = "forward_kl"
EARLY_EXIT = {"exit_layer": 2, "num_blocks": 2, "loss": LOSS}
DRAFTERS: dict[str, tuple[ModuleType, Any, str]] = {
    "prophet": (prophet, from_flat(prophet.Settings, {"num_layers": 2, "loss": LOSS}), "eval_first_acceptance"),
    "early_exit": (early_exit, from_flat(early_exit.Settings, EARLY_EXIT), "eval_acceptance"),
}
JOINT = from_flat(prophet.Settings, {"num_layers": 2, "joint": True, "own_head": True})
TARGETS = {"text and prophet": JOINT, "text alone": dataclasses.replace(JOINT, detach=True)}


@dataclass(frozen=True, kw_only=True)
class ComparisonSettings:
    """Settings of the comparison, beside those of the training runs."""

    text: str = "python-source:train"
    """Text to train the copies of the target on; empty skips this part."""
    text_steps: int = 100
    """Optimiser steps on it."""
    text_rate: float = 1e-4
    """Peak learning rate on it."""
    held_out: str = "python-source"
    """Source of the prompts to compare speeds on."""
    num_prompts: int = 8
    """Number of prompts."""
    max_new_tokens: int = 64
    """New tokens per prompt."""
    rounds: int = 3
    """Number of times that these are decoded."""


def main(comparison: ComparisonSettings, run: RunSettings) -> None:
    if launchers.num_ranks() > 1:
        raise ValueError(
            "the comparison runs as one process; to train on several devices, run the recipes of both families"
        )
    output = Path(run.output or "runs/prophet_vs_early_exit")
    settings = BakeoffSettings(
        rounds=comparison.rounds,
        max_new_tokens=comparison.max_new_tokens,
        batch_sizes=(1,),
        forecast_sizes=(),
        seed=run.seed,
    )
    with claimed(output) as now:
        panels = [Panel(title="First-token acceptance, held out (sum of min(target, draft))")]
        for name, (family, its_settings, metric) in DRAFTERS.items():
            folder = _train(family, its_settings, dataclasses.replace(run, output=str(output / name)))
            panels[0].lines[name] = read_curve(folder, metric)
        if comparison.text:
            panels.append(Panel(title="The target's own loss, held out (nats per token)"))
            changes: dict[str, Any] = {
                "data": comparison.text,
                "max_steps": comparison.text_steps,
                "learning_rate": comparison.text_rate,
            }
            for name, its_settings in TARGETS.items():
                target_folder = str(output / f"target-{name.replace(' ', '-')}")
                folder = _train(prophet, its_settings, dataclasses.replace(run, output=target_folder, **changes))
                panels[1].lines[name] = read_curve(folder, "eval_main_loss")
        publish_curves(panels, output)

        target = Target.from_pretrained(run.target, dtype="float32")
        prompts = load_prompts(
            comparison.held_out, target.tokenizer, max_prompts=comparison.num_prompts, now=now, seed=run.seed
        )
        rows = compare(target, prompts, [output / name for name in DRAFTERS], output, settings)
        if run.report_to == "wandb":
            to_wandb(rows, output, run.wandb_project)
        print("\n".join(["", header(rows, "terminal"), *table(rows, "terminal")]))
        for panel in panels:
            last_values = (f"{name} {points[-1][1]:.4f}" for name, points in panel.lines.items())
            print(f"{panel.title}: at the end {', '.join(last_values)}")
        print(f"Plots: {output}/curves.png and {output}/bakeoff.png")


def _train(family: ModuleType, settings: Any, run: RunSettings) -> Path:
    folder = train(family, settings, run)
    if run.report_to == "wandb":
        import wandb

        wandb.finish()  # otherwise the next run would be logged into this one
    return folder


if __name__ == "__main__":
    with launchers.user_errors():
        main(*parse_settings(ComparisonSettings, RunSettings, description=__doc__))
