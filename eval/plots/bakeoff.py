"""Plots a bake-off: speed-up at every temperature and batch size, and acceptance by depth."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.report.table import MAX_NAME, output_of, ranked, shorten

Row = dict[str, Any]
# Okabe and Ito's colour-blind-safe palette; markers and dashes distinguish lines without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX*"
DASHES = ("-", "--", "-.", ":")
FASTER, SLOWER, NEUTRAL = "#0072B2", "#D55E00", "#8C8C8C"
BAR_INCHES, PANEL_INCHES = 0.36, 4.4
MAX_DEPTH = 10


def draw(rows: Sequence[Row], path: Path) -> None:
    """Writes a PNG with a row of panels per temperature, a column per batch size, and a column for acceptance.

    Each panel lists the drafters by speed-up, the best first.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = ranked(rows)
    temperatures = sorted({row["temperature"] for row in rows})
    batch_sizes = sorted({row["batch_size"] for row in rows})
    num_bars = len({row["drafter"] for row in rows})
    height = len(temperatures) * max(2.8, BAR_INCHES * num_bars + 1.2) + 0.7
    figure = Figure(figsize=(PANEL_INCHES * (len(batch_sizes) + 1), height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(temperatures), len(batch_sizes) + 1, squeeze=False)
    longest = max(row["speedup_high"] for row in rows)
    for panels, temperature in zip(grid, temperatures, strict=True):
        for panel, batch_size in zip(panels, batch_sizes, strict=False):
            found = [row for row in rows if (row["temperature"], row["batch_size"]) == (temperature, batch_size)]
            _bars(panel, found, longest)
            panel.set_title(f"Speed-up at {_label(temperature)}, batch {batch_size}", fontsize=11)
        found = [row for row in rows if (row["temperature"], row["batch_size"]) == (temperature, batch_sizes[0])]
        _acceptance(panels[-1], found)
        panels[-1].set_title(f"Accepted, %, batch {batch_sizes[0]}", fontsize=11)
    first = rows[0]
    figure.suptitle(f"{first['target']} on {first['hardware']}, {first['threads']} thread(s)", fontsize=12)
    figure.savefig(path, format="png")


def _label(temperature: float) -> str:
    return f"temperature {temperature:g}"


def _bars(panel: Any, rows: Sequence[Row], longest: float) -> None:
    """Draws horizontal bars, on which long names stay readable, with quartiles over rounds as whiskers."""
    for position, row in enumerate(rows):
        value, low, high = row["speedup"], row["speedup_low"], row["speedup_high"]
        is_drafted = row["family"] is not None
        colour = NEUTRAL if not is_drafted else FASTER if value >= 1 else SLOWER
        panel.barh(position, value, height=0.62, color=colour, alpha=0.85, hatch="//" if not row["lossless"] else None)
        panel.errorbar(value, position, xerr=[[value - low], [high - value]], color="black", capsize=3, linewidth=1.2)
        note = " slower" if value < 0.995 else ""
        note += " lossy" if not row["lossless"] else ""
        note += " DIFFERS" if output_of(row).startswith("DIFFERS") else ""
        panel.annotate(
            f"{value:.2f}x{note}",
            (high, position),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            fontsize=9.5,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
        )
    panel.axvline(1.0, color="black", linewidth=1, linestyle="--", zorder=0.5)
    panel.set_yticks(range(len(rows)), [shorten(row["drafter"], MAX_NAME) for row in rows], fontsize=10)
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.set_xlim(0, 1.45 * longest)  # room for the labels
    panel.set_xlabel("tok/s relative to plain decoding", fontsize=9.5)
    panel.spines[["top", "right"]].set_visible(False)


def _acceptance(panel: Any, rows: Sequence[Row]) -> None:
    """Draws a table with a row per drafter and a cell per depth with its percentage, readable for many drafters."""
    rows = [row for row in rows if row["accepted_per_depth"]]
    rates = [row["accepted_per_depth"][:MAX_DEPTH] for row in rows]
    deepest = max([1, *map(len, rates)])
    if not rows:
        panel.set_axis_off()
        return
    cells = [[*found, *[float("nan")] * (deepest - len(found))] for found in rates]
    panel.imshow(cells, cmap="Blues", vmin=0, vmax=1.6, aspect="auto")  # keeps black text readable on the darkest cell
    for position, found in enumerate(rates):
        for depth, rate in enumerate(found):
            panel.text(depth, position, f"{100 * rate:.0f}", ha="center", va="center", fontsize=9)
    panel.set_xticks(range(deepest), range(1, deepest + 1))
    panel.set_yticks(range(len(rows)), [shorten(row["drafter"], MAX_NAME) for row in rows], fontsize=10)
    panel.set_xlabel("draft depth", fontsize=9.5)
    panel.spines[["top", "right", "bottom", "left"]].set_visible(False)
    panel.tick_params(length=0)
