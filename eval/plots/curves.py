"""Learning curves of several runs, read from their logs and written as JSONL and as one plot."""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.shards import write_atomically
from eval.plots.bakeoff import COLOURS, DASHES, MARKERS

Points = list[tuple[int, float]]
"""(step, value)."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One panel of the plot: a metric in several runs."""

    title: str
    """The metric, with its unit."""
    lines: dict[str, Points] = field(default_factory=dict)
    """The points of each run, by its name."""


def read_curve(run: Path, metric: str) -> Points:
    """Returns a metric at each step from a run's log; raises ValueError if the log does not contain it."""
    points: dict[int, float] = {}
    for line in map(json.loads, (run / "log.jsonl").read_text().splitlines()):
        if metric in line:
            # The last line describes the artifact, which need not be of the last step.
            points.setdefault(line["step"], line[metric])
    if not points:
        raise ValueError(f"{run / 'log.jsonl'} does not contain the metric {metric}")
    return list(points.items())


def publish_curves(panels: Sequence[Panel], folder: Path) -> None:
    """Writes `curves.jsonl`, with a line per point, and `curves.png`, each atomically."""
    text = "".join(
        json.dumps({"panel": panel.title, "run": run, "step": step, "value": value}) + "\n"
        for panel in panels
        for run, points in panel.lines.items()
        for step, value in points
    )
    write_atomically(folder / "curves.jsonl", lambda path: path.write_text(text))
    write_atomically(folder / "curves.png", functools.partial(_draw, panels))


def _draw(panels: Sequence[Panel], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(5.4 * len(panels), 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for at, (run, points) in enumerate(panel.lines.items()):
            style = {"color": COLOURS[at], "marker": MARKERS[at], "linestyle": DASHES[at % len(DASHES)]}
            axes.plot(*zip(*points, strict=True), label=run, **style)
        axes.set_title(panel.title, fontsize=11)
        axes.set_xlabel("optimiser step", fontsize=9.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=9.5, frameon=False)
    figure.savefig(path, format="png")
