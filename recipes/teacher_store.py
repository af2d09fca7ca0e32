"""Writes the teacher store: what the target says of a data set (hidden layers, top logits), read once for all trainers.

    ./launch.sh teacher_store --layers 4 8 --top-k 16                # of runs/pseudo-data, into runs/teacher-store
    ./launch.sh teacher_store --target T --data runs/mine --layers 16 --output runs/mine-store --limit-gb 50

The size is printed before anything is written. A run that was killed is continued by the same command. The first line:
57,500 tokens, 65 MB, about 6,700 tokens/s on one CPU core.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import draftsmith
from data import POCKET
from data.examples import check_target, open_examples
from data.store import StoreSettings, plan_store, write_store
from draftsmith.core.model_info import read_target_info
from trainers.training.settings import parse_settings


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What is read and where it goes; what is kept of it is in StoreSettings."""

    target: str = str(POCKET)
    """A transformers folder or hub name."""
    data: str = "runs/pseudo-data"
    """Pseudo-data of this target, or any texts or conversations."""
    output: str = "runs/teacher-store"
    """Folder for the shards."""
    max_steps: int = 0
    """Batches to read at most, 0 for all: for a quick trial."""
    seed: int = 0
    """Taken for the sake of other recipes' commands; nothing here is drawn at random."""
    dtype: str = "auto"
    """What its weights are loaded as."""


def main(run: RunSettings, settings: StoreSettings) -> None:
    facts = read_target_info(run.target)
    examples = open_examples(run.data, facts)
    num_rows = len(examples) if not run.max_steps else min(len(examples), run.max_steps * settings.batch_size)
    rows = [examples[index] for index in range(num_rows)]
    plan_store(facts, rows, Path(run.output), settings)
    target = draftsmith.Target.from_pretrained(run.target, dtype=run.dtype)
    check_target(examples, run.data, target)
    write_store(target, rows, Path(run.output), settings)


if __name__ == "__main__":
    try:
        main(*parse_settings(RunSettings, StoreSettings, description=__doc__))
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
