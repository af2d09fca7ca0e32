"""Compresses a target by several methods to several sizes, heals each copy, and compares them as draft models.

    ./launch.sh tradeoff                                            # pocket target, into runs/tradeoff
    ./launch.sh tradeoff --methods influence neurons --sizes 0.25 0.5 0.75 --max-steps 300 --target T --data runs/mine
    ./launch.sh tradeoff --no-heal                                  # without healing

`tradeoff.png` plots the number of weights against acceptance, and against measured and predicted speed-up; `.md` and
`.json` have the numbers, `bakeoff.*` the comparison they come from. The same command continues an interrupted run.

On a busy CPU, pocket target, `--loss forward_kl --max-steps 100 --learning-rate 1e-3`: three to nine minutes per
healing. Half of the layers, healed, is the best size (speed-up 1.02 at temperature 0 in one round of 8 prompts,
predicted 1.29) and the only one that does not slow the pocket target down; at temperature 1 all do. Acceptance is
measured on the target's own text, whereas drafts begin where the last one was rejected: the prediction is an upper
bound.
"""

import dataclasses
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

import draftsmith
from data.batches import Batch
from data.prompts import load_prompts
from draftsmith import Target
from draftsmith.length.costs import num_threads, verify_ms
from draftsmith.parts.neural.quantised import SCHEMES
from eval.bakeoff.results import claimed
from eval.bakeoff.settings import BakeoffSettings
from eval.compare import compare
from eval.plots.tradeoff import Point, publish_tradeoff
from recipes.compress import held_out_acceptance, held_out_batches, make_artifact
from trainers import distill
from trainers.compress import ZEROS, CompressSettings, compress
from trainers.training import launchers
from trainers.training.checkpoints import WEIGHTS
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings
from trainers.training.settings import parse_settings

CUT, HEALED = "cut", "healed"
COST_ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class TradeoffSettings:
    """The compression methods and sizes, and the measurement."""

    methods: tuple[str, ...] = ("influence", "width", "neurons", "wanda", "int8")
    """Compression methods; see recipes/compress.py."""
    sizes: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Fractions to keep; quantisation has none, and methods that cannot keep a fraction leave it out."""
    heal: bool = True
    """If true, each copy is also healed by distillation for the run's steps."""
    calibration_batches: int = 32
    """Batches of text that determine what to keep."""
    held_out: str = "python-source"
    """Source of the prompts to decode."""
    num_prompts: int = 8
    """Number of prompts."""
    max_new_tokens: int = 64
    """New tokens per prompt."""
    rounds: int = 3
    """Number of times that these are decoded."""


def main(tradeoff: TradeoffSettings, loss: distill.Settings, run: RunSettings) -> None:
    output = Path(run.output or "runs/tradeoff").resolve()
    with claimed(output) as now:
        artifacts: list[Path] = []
        for settings in _compressions(tradeoff, run, output):
            name = Path(settings.output).name
            try:
                folder = compress(settings)
            except ValueError as error:
                print(f"{name} is left out: {error}")
                continue
            artifacts.append(make_artifact(folder, settings, output / CUT / name))
            if tradeoff.heal and settings.method not in SCHEMES:
                how = dataclasses.replace(loss, init=str(folder), keep_zeros=settings.method in ZEROS)
                healed = dataclasses.replace(run, output=str(output / HEALED / name))
                artifacts.append(train(distill, how, healed))
        target = Target.from_pretrained(run.target, dtype="float32")
        prompts = load_prompts(
            tradeoff.held_out, target.tokenizer, max_prompts=tradeoff.num_prompts, now=now, seed=run.seed
        )
        bakeoff_settings = BakeoffSettings(
            rounds=tradeoff.rounds,
            max_new_tokens=tradeoff.max_new_tokens,
            batch_sizes=(1,),
            forecast_sizes=(),
            seed=run.seed,
        )
        batches = held_out_batches(next(_compressions(tradeoff, run, output)), target)
        rows = compare(target, prompts, artifacts, output, bakeoff_settings)
        points = [
            point for index, path in enumerate(artifacts) for point in _points(target, path, index, rows, batches)
        ]
        print(publish_tradeoff(points, output))


def _compressions(tradeoff: TradeoffSettings, run: RunSettings, output: Path) -> Iterator[CompressSettings]:
    """Yields the settings of each compression; quantisation has no sizes."""
    shared: dict[str, Any] = {name: getattr(run, name) for name in ("target", "data", "seed", "batch_size", "bf16")}
    shared["max_steps"] = tradeoff.calibration_batches
    for method in tradeoff.methods:
        if method in SCHEMES:
            yield CompressSettings(method=method, output=str(output / "models" / method), **shared)
            continue
        for keep in tradeoff.sizes:
            folder = str(output / "models" / f"{method}-{keep:g}")
            yield CompressSettings(method=method, keep=keep, output=folder, **shared)


def _points(
    target: Target, artifact: Path, index: int, rows: list[dict[str, Any]], batches: list[Batch]
) -> Iterator[Point]:
    """Yields the results of the comparison's artifact number `index` at each temperature."""
    drafter = draftsmith.load(artifact, target)
    acceptance = held_out_acceptance(drafter, batches, target)
    with num_threads(1):
        ratios = [verify_ms(drafter.draft_model, (0,))[0] / verify_ms(target, (0,))[0] for _ in range(COST_ROUNDS)]
    method, kind = artifact.name.partition("-")[0], artifact.parent.name
    num_weights = sum(int((one != 0).sum()) for one in load_file(artifact / WEIGHTS).values())
    for temperature in sorted({row["temperature"] for row in rows}):
        drafting = [row for row in rows if row["temperature"] == temperature and row["family"] is not None]
        yield Point(
            line=f"{method}, {kind}",
            name=f"{artifact.name}, {kind}",
            temperature=temperature,
            num_weights=num_weights,
            cost_ratio=statistics.median(ratios),
            acceptance=acceptance["acceptance" if temperature else "greedy_agreement"],
            tau=drafting[index]["tau"],
            speedup=drafting[index]["speedup"],
        )


if __name__ == "__main__":
    with launchers.user_errors():
        main(*parse_settings(TradeoffSettings, distill.Settings, RunSettings, description=__doc__))
