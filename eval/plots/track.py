"""A comparison in wandb: its table, its picture and every contender's figures."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FIGURES = ("tau", "tokens_per_s", "speedup")


def to_wandb(rows: Sequence[dict[str, Any]], output: Path, project: str) -> None:
    """Reports the rows of a comparison that lies in `output`, as one run; offline where $WANDB_MODE says so."""
    import wandb

    columns = list(rows[0])
    settings = {name: rows[0][name] for name in columns if all(row[name] == rows[0][name] for row in rows)}
    project = os.environ.get("WANDB_PROJECT", project)
    with wandb.init(project=project, name=output.name, job_type="bakeoff", dir=output, config=settings) as run:
        logged: dict[str, Any] = {
            f"{row['drafter']}/{figure}_t{row['temperature']:g}_b{row['batch_size']}": row[figure]
            for row in rows
            for figure in FIGURES
        }
        logged["bakeoff"] = wandb.Table(columns=columns, data=[[_cell(row[name]) for name in columns] for row in rows])
        # The picture bakeoff.png is shown beside the table of that name.
        logged |= {f"picture of {picture.stem}": wandb.Image(str(picture)) for picture in sorted(output.glob("*.png"))}
        run.log(logged)


def _cell(value: Any) -> Any:
    """Returns what a column of one kind can hold."""
    return json.dumps(value) if isinstance(value, list | dict) else value
