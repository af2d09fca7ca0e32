"""`--dry-run`: prints what a run reads, costs and, with `--pilot`, would reach, and leaves nothing behind."""

import tempfile
from pathlib import Path

from trainers.training.estimates import clock, cost, pilot, rows
from trainers.training.estimates.cost import Cost
from trainers.training.estimates.pilot import Pilot
from trainers.training.estimates.rows import RowCounts
from trainers.training.estimates.trial import Trial
from trainers.training.run_settings import RunSettings


def check(run: RunSettings, num_ranks: int) -> None:
    """Raises ValueError for settings with which nothing can be estimated."""
    if run.pilot and not run.dry_run:
        raise ValueError("--pilot is a part of --dry-run; give both, or neither to train")
    if run.dry_run and (num_ranks > 1 or run.deepspeed):
        raise ValueError("--dry-run measures one process; run it without torchrun, deepspeed and --deepspeed")


def dry_run(trial: Trial, max_length: int, earlier_s: float) -> None:
    """Prints counts, costs and the pilot's results; `earlier_s` are the seconds of loading the target and the data."""
    run = trial.run
    counts = rows.count(
        trial.rows,
        batch_size=run.batch_size,
        rows_per_step=run.batch_size * run.gradient_accumulation,
        max_length=max_length,
        seed=run.seed,
        group_by_length=run.group_by_length,
    )
    print("\n".join(counted(trial, counts)), flush=True)
    with tempfile.TemporaryDirectory(prefix="draftsmith-dry-run-") as name:
        folder = Path(name) / "cost"
        folder.mkdir()
        if trial.is_by_gradient:
            found = cost.by_gradient(trial, counts, folder, earlier_s)
        else:
            found = cost.without_gradient(trial, folder, earlier_s)
        print("\n".join(costs(trial, found)), flush=True)
        if run.pilot:
            folder = Path(name) / "pilot"
            folder.mkdir()
            print("\n".join(reached(pilot.pilot(trial, folder), len(trial.rows))))
    print(f"Nothing was written; run the same command without --dry-run{' and --pilot' * run.pilot} to train.")


def counted(trial: Trial, counts: RowCounts) -> list[str]:
    """Returns the lines on rows, tokens and steps."""
    run = trial.run
    is_sampled = counts.num_read < counts.num_rows
    note = f" (estimated from {counts.num_read:,})" if is_sampled else ""
    lines = [
        f"{trial.name} on {run.data}: {counts.num_rows:,} training rows, {counts.num_tokens:,} tokens{note},"
        f" {counts.supervised_share:.0%} supervised; {sum(len(batch.keys) for batch in trial.held_out):,} held-out rows"
    ]
    if trial.is_by_gradient:
        epochs = run.max_steps / max(counts.steps_per_epoch, 1)
        lines.append(
            f"{run.max_steps:,} steps of {run.batch_size * run.gradient_accumulation} rows: {epochs:.2g} epochs of"
            f" {counts.steps_per_epoch:,} steps; {counts.padding_share:.0%} of a batch is padding, and"
            f" packed rows would take {counts.packed_steps_per_epoch:,} steps an epoch"
        )
    return lines


def costs(trial: Trial, found: Cost) -> list[str]:
    """Returns the lines on time, memory and disk."""
    parts = ", ".join(f"{name} {duration(seconds)}" for name, seconds in found.parts.items())
    device = "accelerator" if trial.target.device.type == "cuda" else "machine"
    free = clock.free_bytes(trial.output)
    lines = [
        f"time: about {duration(found.seconds)} ({parts})",
        f"memory: {size(found.memory_bytes)} of the {device} at its peak",
        f"disk: {size(found.disk_bytes)} while it runs, {size(found.artifact_bytes)} for the artifact;"
        f" {size(free)} are free",
    ]
    if found.disk_bytes > free:
        lines.append(f"{trial.output}: there is too little space; free some or name another --output")
    return lines


def reached(found: Pilot, num_rows: int) -> list[str]:
    """Returns the lines on the mean accepted length."""
    points = ", ".join(f"{tau:.2f} with {number:,}" for number, tau in zip(found.num_rows, found.taus, strict=True))
    low, high = found.interval
    verdict = (
        "more than look-up"
        if low > found.lookup_tau
        else "less than look-up"
        if high < found.lookup_tau
        else "not clearly more than look-up"
    )
    return [
        f"pilot ({duration(found.seconds)}): mean accepted length {points} rows",
        f"with all {num_rows:,} about {found.expected:.2f} (80 % interval {low:.2f} to {high:.2f}): {verdict}, which"
        f" reaches {found.lookup_tau:.2f} on the same rows without training",
    ]


def duration(seconds: float) -> str:
    """Returns seconds as text: 12.3 s, 4 min 05 s or 2 h 10 min."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60} min {int(seconds) % 60:02} s"
    return f"{int(seconds) // 3600} h {int(seconds) % 3600 // 60:02} min"


def size(num_bytes: float) -> str:
    """Returns bytes as text in MB or GB."""
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes < 1e9 else f"{num_bytes / 1e9:,.2f} GB"
