"""The bake-off's picture: speed-up in every cell, and acceptance by depth."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
# Okabe and Ito's colours, told apart by the colour-blind; markers and dashes tell lines apart without any colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX*"
DASHES = ("-", "--", "-.", ":")
FASTER, SLOWER, NEUTRAL = "#0072B2", "#D55E00", "#8C8C8C"
BAR_INCHES, PANEL_INCHES = 0.36, 4.4
MAX_DEPTH = 10


def draw(rows: Sequence[Row], path: Path) -> None:
    """Writes a PNG: a row of panels for each temperature, a column for each batch size, and one for acceptance."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

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
            panel.set_title(f"Speed-up at {_law(temperature)}, batch {batch_size}", fontsize=11)
        found = [row for row in rows if (row["temperature"], row["batch_size"]) == (temperature, batch_sizes[0])]
        _acceptance(panels[-1], found)
        panels[-1].set_title(f"% accepted, {_law(temperature)}, batch {batch_sizes[0]}", fontsize=11)
    first = rows[0]
    figure.suptitle(f"{first['target']} on {first['hardware']}, {first['threads']} thread(s)", fontsize=12)
    figure.savefig(path, format="png")


def _law(temperature: float) -> str:
    return f"temperature {temperature:g}"


def _bars(panel: Any, rows: Sequence[Row], longest: float) -> None:
    """Draws horizontal bars, so that names of any length stay readable, with the quartiles over rounds as whiskers."""
    for place, row in enumerate(rows):
        value, low, high = row["speedup"], row["speedup_low"], row["speedup_high"]
        is_drafted = row["family"] is not None
        colour = NEUTRAL if not is_drafted else FASTER if value >= 1 else SLOWER
        panel.barh(place, value, height=0.62, color=colour, alpha=0.85, hatch="//" if not row["lossless"] else None)
        panel.errorbar(value, place, xerr=[[value - low], [high - value]], color="black", capsize=3, linewidth=1.2)
        note = " slower" if value < 0.995 else ""
        note += " lossy" if not row["lossless"] else ""
        panel.annotate(
            f"{value:.2f}x{note}",
            (high, place),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            fontsize=9.5,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
        )
    panel.axvline(1.0, color="black", linewidth=1, linestyle="--", zorder=0.5)
    panel.set_yticks(range(len(rows)), [_short(row["drafter"]) for row in rows], fontsize=10)
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.set_xlim(0, 1.45 * longest)  # room for the labels
    panel.set_xlabel("tokens/s over plain decoding", fontsize=9.5)
    panel.spines[["top", "right"]].set_visible(False)


def _acceptance(panel: Any, rows: Sequence[Row]) -> None:
    """Draws a line of cells for each bar, a cell a depth, with its per cent: readable of many drafters at once."""
    shares = [row["accepted_per_depth"][:MAX_DEPTH] for row in rows]
    deepest = max(1, *map(len, shares))
    cells = [[*found, *[float("nan")] * (deepest - len(found))] for found in shares]
    panel.imshow(cells, cmap="Blues", vmin=0, vmax=1.6, aspect="auto")  # black on the darkest is still readable
    for place, found in enumerate(shares):
        for depth, share in enumerate(found):
            panel.text(depth, place, f"{100 * share:.0f}", ha="center", va="center", fontsize=9)
    panel.set_xticks(range(deepest), range(1, deepest + 1))
    panel.set_yticks(range(len(rows)), [_short(row["drafter"]) for row in rows], fontsize=10)
    panel.set_xlabel("depth in the draft, tokens", fontsize=9.5)
    panel.spines[["top", "right", "bottom", "left"]].set_visible(False)
    panel.tick_params(length=0)


def _short(name: str) -> str:
    return name if len(name) <= 26 else "..." + name[-23:]
