"""Compares drafters made in two ways, as a table and as a plot."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.plots.bakeoff import COLOURS
from eval.report.table import grid

Row = dict[str, Any]
METRICS = {"acceptance": "first-token acceptance", "tau": "mean accepted length (tau)", "speedup": "speed-up"}


def pairs_of(rows: Sequence[Row], ways: Sequence[str]) -> list[Row]:
    """Returns the metrics of artifacts `WAY/NAME` for each target, name and temperature, with one entry per way.

    Names without an artifact in every way are left out.
    """
    found: dict[tuple[str, str, float], Row] = {}
    for row in rows:
        way, _, name = row["drafter"].partition("/")
        if way in ways:
            pair = found.setdefault(
                (row["target"], name, row["temperature"]),
                {"target": row["target"], "drafter": name, "temperature": row["temperature"]},
            )
            accepted = row["accepted_per_depth"][0] if row["accepted_per_depth"] else 0.0
            pair[way] = {"acceptance": accepted, "tau": row["tau"], "speedup": row["speedup"]}
    return [pair for pair in found.values() if all(way in pair for way in ways)]


def pair_table(pairs: Sequence[Row], ways: Sequence[str]) -> list[str]:
    """Returns a Markdown table with a line per target, drafter and temperature."""
    heading = [f"{way}: {label}" for label in METRICS.values() for way in ways]
    cells = [
        [
            f"{pair['drafter']} on {pair['target']}, T={pair['temperature']:g}",
            *(f"{pair[way][metric]:.2f}" for metric in METRICS for way in ways),
        ]
        for pair in pairs
    ]
    return grid([["drafter", *heading], *cells], "markdown")


def draw_pairs(pairs: Sequence[Row], ways: Sequence[str], path: Path) -> None:
    """Writes a PNG with a row of panels per target and temperature, a panel per metric and a bar per way."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    conditions = list(dict.fromkeys((pair["target"], pair["temperature"]) for pair in pairs))
    figure = Figure(figsize=(4.2 * len(METRICS), 2.6 * len(conditions)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid_of_axes = figure.subplots(len(conditions), len(METRICS), squeeze=False)
    for line, (target, temperature) in zip(grid_of_axes, conditions, strict=True):
        found = [pair for pair in pairs if (pair["target"], pair["temperature"]) == (target, temperature)]
        for axes, (metric, label) in zip(line, METRICS.items(), strict=True):
            for at, way in enumerate(ways):
                positions = [position + 0.4 * (at - 0.5 * (len(ways) - 1)) for position in range(len(found))]
                bars = axes.bar(
                    positions,
                    [pair[way][metric] for pair in found],
                    width=0.36,
                    color=COLOURS[at],
                    hatch="//" * at,
                    edgecolor="white",
                    label=way,
                )
                axes.bar_label(bars, fmt="%.2f", fontsize=8)
            axes.set_xticks(range(len(found)), [pair["drafter"] for pair in found])
            axes.set_title(f"{label}: {target}, temperature {temperature:g}", fontsize=10)
            axes.margins(y=0.15)
            axes.spines[["top", "right"]].set_visible(False)
            if metric == "speedup":
                axes.axhline(1.0, color="black", linewidth=1, linestyle="--")
    grid_of_axes[0][0].legend(fontsize=9, frameon=False)
    figure.savefig(path, format="png")
