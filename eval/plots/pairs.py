"""Drafters made in two ways, side by side: a table and a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.plots.bakeoff import COLOURS
from eval.report.table import grid

Row = dict[str, Any]
QUANTITIES = {"acceptance": "first token accepted", "tau": "tokens a forward", "speedup": "speed-up"}


def pairs_of(rows: Sequence[Row], ways: Sequence[str]) -> list[Row]:
    """Returns what the rows of artifacts `WAY/NAME` say of each target, name and temperature, way by way.

    Names that were made in one way alone are left out.
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
    """Returns a Markdown table, a line for each target, drafter and temperature."""
    heading = [f"{way}: {said}" for said in QUANTITIES.values() for way in ways]
    cells = [
        [
            f"{pair['drafter']} on {pair['target']}, T={pair['temperature']:g}",
            *(f"{pair[way][quantity]:.2f}" for quantity in QUANTITIES for way in ways),
        ]
        for pair in pairs
    ]
    return grid([["drafter", *heading], *cells], "markdown")


def draw_pairs(pairs: Sequence[Row], ways: Sequence[str], path: Path) -> None:
    """Writes a PNG: a row of panels for each target and temperature, a panel for each quantity, a bar for each way."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    laws = list(dict.fromkeys((pair["target"], pair["temperature"]) for pair in pairs))
    figure = Figure(figsize=(4.2 * len(QUANTITIES), 2.6 * len(laws)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid_of_axes = figure.subplots(len(laws), len(QUANTITIES), squeeze=False)
    for line, (target, temperature) in zip(grid_of_axes, laws, strict=True):
        found = [pair for pair in pairs if (pair["target"], pair["temperature"]) == (target, temperature)]
        for axes, (quantity, said) in zip(line, QUANTITIES.items(), strict=True):
            for at, way in enumerate(ways):
                places = [place + 0.4 * (at - 0.5 * (len(ways) - 1)) for place in range(len(found))]
                bars = axes.bar(
                    places,
                    [pair[way][quantity] for pair in found],
                    width=0.36,
                    color=COLOURS[at],
                    hatch="//" * at,
                    edgecolor="white",
                    label=way,
                )
                axes.bar_label(bars, fmt="%.2f", fontsize=8)
            axes.set_xticks(range(len(found)), [pair["drafter"] for pair in found])
            axes.set_title(f"{said}: {target}, temperature {temperature:g}", fontsize=10)
            axes.margins(y=0.15)
            axes.spines[["top", "right"]].set_visible(False)
            if quantity == "speedup":
                axes.axhline(1.0, color="black", linewidth=1, linestyle="--")
    grid_of_axes[0][0].legend(fontsize=9, frameon=False)
    figure.savefig(path, format="png")
