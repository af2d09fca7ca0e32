"""Logs a comparison to wandb: its table, its plots and the metrics of every contender."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

METRICS = ("tau", "tokens_per_s", "speedup")


def to_wandb(rows: Sequence[dict[str, Any]], output: Path, project: str) -> None:
    """Logs the rows and plots of the comparison in `output` as one run, offline with WANDB_MODE=offline."""
    import wandb

    columns = list(rows[0])
    settings = {name: rows[0][name] for name in columns if all(row[name] == rows[0][name] for row in rows)}
    project = os.environ.get("WANDB_PROJECT", project)
    with wandb.init(project=project, name=output.name, job_type="bakeoff", dir=output, config=settings) as run:
        logged: dict[str, Any] = {
            f"{row['drafter']}/{metric}_t{row['temperature']:g}_b{row['batch_size']}": row[metric]
            for row in rows
            for metric in METRICS
            if row[metric] is not None
        }
        logged["bakeoff"] = wandb.Table(columns=columns, data=[[_cell(row[name]) for name in columns] for row in rows])
        # A name of its own: bakeoff.png is logged beside the table "bakeoff".
        logged |= {f"plot of {plot.stem}": wandb.Image(str(plot)) for plot in sorted(output.glob("*.png"))}
        run.log(logged)


def _cell(value: Any) -> Any:
    """Returns a value that a wandb table column can hold: lists and dicts as JSON."""
    return json.dumps(value) if isinstance(value, list | dict) else value
