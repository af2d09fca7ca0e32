"""The output folder of a comparison: `bakeoff.json`, `.md`, `.csv`, `.png`, its texts, and measurements so far."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from data.folder_lock import locked
from data.shards import write_atomically
from draftsmith.artifacts import json_text
from draftsmith.artifacts.files import LOCK, check_folder
from eval.bakeoff.measure import Tally
from eval.report.recorded_texts import NAME, TEXTS

PARTIAL, STARTED = f"{NAME}.partial.jsonl", f"{NAME}.started.txt"

Cell = tuple[int, float, int, str]
"""(round, temperature, batch size, prompt category); the category is "" for prompts without one."""


def check_output(folder: Path) -> None:
    """Raises ValueError if `folder` is a file, or contains files but no comparison."""
    check_folder(folder)
    if folder.is_dir() and {path.name for path in folder.iterdir()} - {LOCK} and not any(folder.glob(f"{NAME}.*")):
        raise ValueError(f"{folder} contains other files (no {NAME}.json in it); name a new or empty folder")


@contextmanager
def claimed(folder: Path) -> Iterator[datetime]:
    """Locks `folder` as a comparison's output while the block runs, and creates and marks it.

    Yields the time of the comparison's first run, at which chat templates render the prompts of continued runs too.
    Raises ValueError as `check_output` does, and if another run uses the folder.
    """
    check_output(folder)
    with locked(folder):
        partial, started = folder / PARTIAL, folder / STARTED
        partial.touch()
        if not started.exists():
            now = datetime.now().isoformat(timespec="seconds")
            write_atomically(started, lambda path: path.write_text(now))
        try:
            yield datetime.fromisoformat(started.read_text())
        finally:
            if {path.name for path in folder.iterdir()} == {LOCK, PARTIAL, STARTED} and not partial.stat().st_size:
                started.unlink()
                partial.unlink()


class Results:
    """Tallies of the cells measured so far and roundings, one line for each on disk.

    Lines of a comparison with another `identity` (settings, commit, artifacts, prompts) are discarded with a message.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.path = folder / PARTIAL
        self.cells: dict[Cell, dict[str, Tally]] = {}
        self.roundings: dict[tuple[str, int], float] = {}
        """How far rounding moves logits, by reference method and batch size."""
        self._identity = json.loads(json.dumps(identity))
        header, *lines = [_parse(line) for line in self.path.read_text().splitlines()] or [None]
        if header != self._identity:
            self._report_discarded(header, len(lines))
        else:
            for line in filter(None, lines):
                if "rounding" in line:
                    self.roundings[line["reference"], line["batch_size"]] = line["rounding"]
                else:
                    tallies = {name: Tally(**counts) for name, counts in line["tallies"].items()}
                    self.cells[tuple(line["cell"])] = tallies
        write_atomically(self.path, self._rewrite)

    def add(self, cell: Cell, tallies: dict[str, Tally]) -> None:
        """Stores a cell's tallies; they are on disk when this returns."""
        self.cells[cell] = tallies
        self._append(self._line(cell))

    def add_rounding(self, reference: str, batch_size: int, rounding: float) -> None:
        """Stores the rounding at a batch size; it is on disk when this returns."""
        self.roundings[reference, batch_size] = rounding
        self._append(self._rounding_line(reference, batch_size))

    def _append(self, line: str) -> None:
        with self.path.open("a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _report_discarded(self, header: Any, num_lines: int) -> None:
        if num_lines and isinstance(header, dict):
            changed = ", ".join(sorted(key for key in self._identity if header.get(key) != self._identity[key]))
            print(f"{self.path.parent}: starting over, since the {num_lines} measured parts differ in: {changed}")

    def _rewrite(self, path: Path) -> None:
        roundings = [self._rounding_line(*key) for key in self.roundings]
        lines = [json.dumps(self._identity), *map(self._line, self.cells), *roundings]
        path.write_text("".join(line + "\n" for line in lines))

    def _line(self, cell: Cell) -> str:
        tallies = {name: asdict(tally) for name, tally in self.cells[cell].items()}
        return json.dumps({"cell": cell, "tallies": tallies})

    def _rounding_line(self, reference: str, batch_size: int) -> str:
        rounding = self.roundings[reference, batch_size]
        return json.dumps({"reference": reference, "batch_size": batch_size, "rounding": rounding})


def publish(
    folder: Path,
    rows: list[dict[str, Any]],
    *,
    texts: dict[str, Any],
    markdown: str,
    csv: str,
    plot: Callable[[Path], None],
) -> None:
    """Writes the result files, each atomically, and removes the file of partial measurements."""
    write_atomically(folder / TEXTS, lambda path: path.write_text(json_text.text_of(texts) + "\n"))
    write_atomically(folder / f"{NAME}.png", plot)
    write_atomically(folder / f"{NAME}.csv", lambda path: path.write_text(csv, newline=""))
    write_atomically(folder / f"{NAME}.md", lambda path: path.write_text(markdown))
    write_atomically(folder / f"{NAME}.json", lambda path: path.write_text(json_text.text_of(rows, indent=1) + "\n"))
    (folder / PARTIAL).unlink()


def _parse(line: str) -> Any:
    """Returns a line's JSON value, or None for the truncated last line of a killed run."""
    try:
        return json.loads(line)
    except ValueError:
        return None
