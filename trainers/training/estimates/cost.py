"""Estimates the time, memory and disk of a run from a few steps of it, made in a temporary folder: `estimate`."""

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

from trainers.training.estimates import clock
from trainers.training.estimates.rows import RowCounts
from trainers.training.estimates.trial import Trial, TrialRun

WARM_UP_STEPS, TIMED_STEPS = 3, 9
SHARES = (0.02, 0.06)
"""Shares of the rows that drafters without gradient are built from, to extrapolate to all."""
MIN_ROWS = 16
"""Rows of the first build at least, and a third of those of the second."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a run takes."""

    seconds: float
    parts: dict[str, float]
    """The same by part."""
    memory_bytes: int
    disk_bytes: int
    """Most space that the run needs at a time: checkpoints, then the artifact."""
    artifact_bytes: int


def by_gradient(trial: Trial, counts: RowCounts, folder: Path, earlier_s: float) -> Cost:
    """Returns the cost of a run by gradient; `earlier_s` are the seconds spent before training, loading included.

    The trial's first evaluation computes the target's outputs on held-out rows, which later ones reuse.
    """
    run, timer = trial.run, clock.StepClock()
    short = replace(
        run,
        max_steps=WARM_UP_STEPS + TIMED_STEPS,
        eval_steps=WARM_UP_STEPS,
        save_steps=WARM_UP_STEPS,
        log_steps=WARM_UP_STEPS,
        warmup_steps=0,
    )
    began = time.perf_counter()
    done = trial.train(TrialRun(run=short, rows=trial.rows, folder=folder, callbacks=(timer,)))
    total_s = time.perf_counter() - began
    tail_s = done.finish_s
    num_evaluations = math.ceil(run.max_steps / run.eval_steps)
    num_saves = len(
        {*range(run.eval_steps, run.max_steps, run.eval_steps), *range(run.save_steps, run.max_steps, run.save_steps)}
        | {run.max_steps}
    )
    mean_step_s = clock.mean(timer.steps[WARM_UP_STEPS:])
    # The first steps take longer, by half a minute if losses are compiled.
    warm_up_s = max(0.0, sum(timer.steps[:WARM_UP_STEPS]) - WARM_UP_STEPS * mean_step_s)
    inside_s = sum(timer.steps) + sum(timer.evaluations) + sum(timer.checkpoints)
    first_s = timer.evaluations[0] if timer.evaluations else 0.0
    parts = {
        "loading": earlier_s,
        "preparation": max(0.0, total_s - tail_s - inside_s) + warm_up_s,
        "steps": mean_step_s * run.max_steps,
        "evaluation": first_s + clock.mean(timer.evaluations[1:]) * (num_evaluations - 1),
        "checkpoints": clock.mean(timer.checkpoints) * num_saves,
        "finish": tail_s,
    }
    checkpoint = max((clock.folder_bytes(path) for path in (folder / "checkpoints").glob("checkpoint-*")), default=0)
    artifact = clock.folder_bytes(folder / "artifact")
    return Cost(
        seconds=sum(parts.values()),
        parts=parts,
        memory_bytes=clock.peak_memory_bytes(),
        # The best and the newest are kept while another is written.
        disk_bytes=3 * checkpoint + artifact,
        artifact_bytes=artifact,
    )


def without_gradient(trial: Trial, folder: Path, earlier_s: float) -> Cost:
    """Returns the cost of a drafter that is built from the rows, on the line through two builds from few of them."""
    points = []
    for index, share in enumerate(SHARES):
        rows = trial.share_of_rows(share, least=MIN_ROWS * 3**index)
        place = folder / str(index)
        place.mkdir()
        began = time.perf_counter()
        done = trial.train(TrialRun(run=trial.run, rows=rows, folder=place))
        built_s = time.perf_counter() - began - done.finish_s
        points.append((len(rows), built_s, clock.folder_bytes(place / "artifact"), done.finish_s))
    (few, few_s, few_bytes, _), (many, many_s, many_bytes, finish_s) = points
    more = (len(trial.rows) - many) / max(many - few, 1)
    build_s = many_s + max(many_s - few_s, 0.0) * more
    artifact = round(many_bytes + max(many_bytes - few_bytes, 0) * more)
    parts = {"loading": earlier_s, "building": build_s, "finish": finish_s}
    return Cost(
        seconds=sum(parts.values()),
        parts=parts,
        memory_bytes=clock.peak_memory_bytes(),
        # What is counted so far is kept beside the artifact until it is whole.
        disk_bytes=2 * artifact,
        artifact_bytes=artifact,
    )
