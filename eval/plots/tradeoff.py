"""Trade-off of compressed draft models: number of weights against acceptance and against speed-up."""

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.shards import write_atomically
from draftsmith.artifacts import json_text
from draftsmith.length import predicted_speedup
from eval.plots.bakeoff import COLOURS, DASHES, MARKERS

HEADER = (
    "| model | weights, M | relative cost | temperature | acceptance | mean accepted length (tau) | speed-up |"
    " predicted |\n"
    "|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One draft model at one temperature."""

    line: str
    """Method that it was made by; the models of one method are joined by a line in the plot."""
    name: str
    temperature: float
    num_weights: int
    """Number of non-zero weights, including embedding and LM head."""
    cost_ratio: float
    """Time of a one-token forward relative to the target's."""
    acceptance: float
    """Probability that a drafted token is accepted after the target's held-out text."""
    tau: float
    speedup: float
    """Measured speed-up over plain decoding in the same process."""

    @property
    def predicted(self) -> float:
        """The largest, over draft lengths n, of (1 - a^(n + 1)) / (1 - a) / (n c + 1) (2211.17192, theorem 3.8)."""
        return predicted_speedup.best(self.acceptance, self.cost_ratio)[1]

    def as_row(self) -> dict[str, Any]:
        return asdict(self) | {"predicted": self.predicted}


def publish_tradeoff(points: Sequence[Point], folder: Path) -> str:
    """Writes `tradeoff.json`, `.md` and `.png`, each atomically, and returns the table."""
    text = json_text.text_of([point.as_row() for point in points], indent=1) + "\n"
    lines = "\n".join([HEADER, *map(_line, points)])
    write_atomically(folder / "tradeoff.json", lambda path: path.write_text(text))
    write_atomically(folder / "tradeoff.md", lambda path: path.write_text(f"{lines}\n\n![trade-off](tradeoff.png)\n"))
    write_atomically(folder / "tradeoff.png", functools.partial(_draw, points))
    return lines


def _line(point: Point) -> str:
    cells = (
        point.name,
        f"{point.num_weights / 1e6:.2f}",
        f"{point.cost_ratio:.2f}",
        f"{point.temperature:g}",
        f"{point.acceptance:.3f}",
        f"{point.tau:.2f}",
        f"{point.speedup:.2f}",
        f"{point.predicted:.2f}",
    )
    return f"| {' | '.join(cells)} |"


def _draw(points: Sequence[Point], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    temperatures = sorted({point.temperature for point in points})
    lines = list(dict.fromkeys(point.line for point in points))
    figure = Figure(figsize=(11, 3.9 * len(temperatures) + 0.9), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(temperatures), 2, squeeze=False)
    for (left, right), temperature in zip(grid, temperatures, strict=True):
        for at, line in enumerate(lines):
            found = [one for one in points if (one.line, one.temperature) == (line, temperature)]
            found.sort(key=lambda one: one.num_weights)
            weights = [one.num_weights / 1e6 for one in found]
            style = {"color": COLOURS[at % len(COLOURS)], "marker": MARKERS[at % len(MARKERS)], "markersize": 6}
            dash = DASHES[at // len(COLOURS) % len(DASHES)]
            left.plot(weights, [one.acceptance for one in found], label=line, linestyle=dash, **style)
            right.plot(weights, [one.speedup for one in found], linestyle=dash, **style)
            hollow = style | {"markerfacecolor": "white", "linestyle": ":", "alpha": 0.8}
            right.plot(weights, [one.predicted for one in found], **hollow)
        left.set_ylim(0, 1.02)
        left.set_title(f"Acceptance rate, temperature {temperature:g}", fontsize=11)
        right.set_title(f"Speed-up (hollow: predicted), temperature {temperature:g}", fontsize=11)
        right.axhline(1.0, color="black", linewidth=1, linestyle="--", zorder=0.5)
        right.set_ylim(bottom=0)
        for panel in (left, right):
            panel.set_xlabel("non-zero weights, millions", fontsize=9.5)
            panel.grid(alpha=0.3)
            panel.spines[["top", "right"]].set_visible(False)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9.5, frameon=False)
    figure.savefig(path, format="png")
