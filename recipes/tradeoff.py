"""Compresses a target in several ways to several sizes, heals each, and shows what that costs and what it saves.

    ./launch.sh tradeoff                                            # pocket target, into runs/tradeoff
    ./launch.sh tradeoff --methods influence neurons --sizes 0.25 0.5 0.75 --max-steps 300 --target T --data runs/mine
    ./launch.sh tradeoff --no-heal                                  # as they are when cut

`tradeoff.png` has weights against acceptance, and against speed-up, measured and predicted from acceptance and cost;
`.md` and `.json` have the figures, and `bakeoff.*` the comparison they come from. A run that was killed goes on.

A share of a busy CPU, pocket target, `--loss forward_kl --max-steps 100 --learning-rate 1e-3`: three to nine minutes a
healing. Half of the layers, healed, is the best size (1.02 greedily in one round of 8 prompts, predicted 1.29) and the
only one that does not slow the pocket down; at temperature 1 all do. Acceptance is read off the target's own text, and
rounds begin where the last one failed: what it predicts is a ceiling.
"""

import dataclasses
import statistics
import sys
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
from eval.bakeoff.results import claim
from eval.bakeoff.settings import BakeoffSettings
from eval.compare import compare
from eval.plots.tradeoff import Point, publish_tradeoff
from recipes.compress import accepted, draft_with, held_out
from trainers import distill
from trainers.compress import ZEROS, CompressSettings, compress
from trainers.training.checkpoints import WEIGHTS
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings
from trainers.training.settings import parse_settings

CUT, HEALED = "cut", "healed"
COST_ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """What is compressed, and what it is measured on."""

    methods: tuple[str, ...] = ("influence", "width", "neurons", "wanda", "int8")
    """Ways to compress; see recipes/compress.py."""
    sizes: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Shares that are kept; fewer bits have none, and a way that cannot keep one leaves it out."""
    heal: bool = True
    """Whether each is healed too, by as many steps as the run has."""
    calibration_batches: int = 32
    """Batches of text by which is chosen what to keep."""
    held_out: str = "python-source"
    """Prompts to decode."""
    num_prompts: int = 8
    """Of these."""
    max_new_tokens: int = 64
    """Decoded after each."""
    rounds: int = 3
    """Times that all of them are decoded."""


def main(wanted: SweepSettings, loss: distill.Settings, run: RunSettings) -> None:
    output = Path(run.output or "runs/tradeoff").resolve()
    claim(output)
    artifacts: list[Path] = []
    for settings in _choices(wanted, run, output):
        name = Path(settings.output).name
        try:
            folder = compress(settings)
        except ValueError as error:
            print(f"{name} is left out: {error}")
            continue
        artifacts.append(draft_with(folder, settings, output / CUT / name))
        if wanted.heal and settings.method not in SCHEMES:
            how = dataclasses.replace(loss, init=str(folder), keep_zeros=settings.method in ZEROS)
            healed = dataclasses.replace(run, output=str(output / HEALED / name))
            artifacts.append(train(distill, how, healed))
    target = Target.from_pretrained(run.target, dtype="float32")
    prompts = load_prompts(wanted.held_out, target.tokenizer, max_prompts=wanted.num_prompts, seed=run.seed)
    laws = BakeoffSettings(
        rounds=wanted.rounds, max_new_tokens=wanted.max_new_tokens, batch_sizes=(1,), forecast_sizes=(), seed=run.seed
    )
    judged = held_out(next(_choices(wanted, run, output)), target)
    rows = compare(target, prompts, artifacts, output, laws)
    points = [point for at, path in enumerate(artifacts) for point in _points(target, path, at, rows, judged)]
    print(publish_tradeoff(points, output))


def _choices(wanted: SweepSettings, run: RunSettings, output: Path) -> Iterator[CompressSettings]:
    """Yields what is compressed; sizes mean nothing to fewer bits."""
    shared: dict[str, Any] = {name: getattr(run, name) for name in ("target", "data", "seed", "batch_size", "bf16")}
    shared["max_steps"] = wanted.calibration_batches
    for method in wanted.methods:
        if method in SCHEMES:
            yield CompressSettings(method=method, output=str(output / "models" / method), **shared)
            continue
        for keep in wanted.sizes:
            place = str(output / "models" / f"{method}-{keep:g}")
            yield CompressSettings(method=method, keep=keep, output=place, **shared)


def _points(
    target: Target, artifact: Path, at: int, rows: list[dict[str, Any]], judged: list[Batch]
) -> Iterator[Point]:
    """Yields what the artifact in place `at` of the comparison did, at each temperature."""
    drafter = draftsmith.load(artifact, target)
    acceptance = accepted(drafter, judged, target)
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
            tau=drafting[at]["tau"],
            speedup=drafting[at]["speedup"],
        )


if __name__ == "__main__":
    try:
        main(*parse_settings(SweepSettings, distill.Settings, RunSettings, description=__doc__))
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
