"""Renders a comparison's folder as one self-contained HTML page, `bakeoff.html`, by the template page.html.j2.

The page has sortable tables, charts as inline SVG, draft trees, and texts token by token. Parts are left out where
their data are missing: rows of older comparisons lack some columns, and their folders `bakeoff.texts.json`.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup, escape

from data.shards import write_atomically
from draftsmith.artifacts import json_text
from eval.report import charts
from eval.report.recorded_texts import NAME, TEXTS
from eval.report.table import definitions, header, is_slower, output_of, ranked
from eval.report.token_view import KINDS, annotated_texts

Row = dict[str, Any]
PAGE = f"{NAME}.html"
NEEDED = {"drafter", "family", "temperature", "batch_size", "speedup", "tuned", "lossless", "accepted_per_depth"}
"""Columns without which no page is made; the oldest supported comparisons have them."""
NUM_OPEN = 3
"""Drafters of each text that are shown unfolded."""
LINE_END = Markup('<span class="end" aria-hidden="true">&#8629;</span>\n')


def _visible(piece: str) -> Markup:
    """Returns a token's text with visible line ends; a token that is only part of a character becomes a box."""
    return escape(piece or "\u25af").replace("\n", LINE_END)


ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)
ENVIRONMENT.tests["slower"] = is_slower
ENVIRONMENT.filters["visible"] = _visible


class Cell(NamedTuple):
    """A table cell."""

    text: str
    value: float | None = None
    """Sort key of a number; text cells have none."""


class Table(NamedTuple):
    """A sortable table; the first cell of each row is its name."""

    title: str
    headings: list[str]
    rows: list[list[Cell]]


def write_report(folder: Path) -> Path:
    """Writes the page of the comparison in `folder` and returns its path; raises ValueError if there is none."""
    rows = _read(folder / f"{NAME}.json")
    if (
        not isinstance(rows, list)
        or not rows
        or not all(isinstance(row, dict) and row.keys() >= NEEDED for row in rows)
    ):
        raise ValueError(f"{folder / NAME}.json contains no comparison, or one too old; run recipes/bakeoff.py again")
    recorded = _read(folder / TEXTS) if (folder / TEXTS).is_file() else {"texts": [], "trees": {}}
    text = page(rows, recorded)
    write_atomically(folder / PAGE, lambda path: path.write_text(text, encoding="utf-8"))
    return folder / PAGE


def page(rows: Sequence[Row], recorded: dict[str, Any]) -> str:
    """Returns the HTML of a comparison's rows and of what eval/report/recorded_texts.py recorded."""
    rows = ranked(rows)
    groups = [(title, list(group)) for title, group in groupby(rows, key=_conditions)]
    acceptance = _acceptance(rows)
    return ENVIRONMENT.get_template("page.html.j2").render(
        target=rows[0]["target"],
        conditions=header(rows, "terminal"),
        summaries=[_summary(title, group) for title, group in groups if any(map(_is_own, group))],
        tables=_tables(groups),
        definitions=definitions(rows),
        costs=_costs(groups),
        forecasts=_forecasts(rows),
        categories=_categories(groups),
        acceptance=[(name, charts.by_depth(lines, f"Acceptance of {name} by depth")) for name, lines in acceptance],
        temperatures=[label for label, _ in max((lines for _, lines in acceptance), key=len, default=[])],
        trees=_trees(recorded["trees"]),
        texts=annotated_texts(recorded["texts"]),
        token_kinds=KINDS,
        num_open=NUM_OPEN,
    )


def _read(file: Path) -> Any:
    if not file.is_file():
        raise ValueError(f"{file.parent} has no {file.name}; make a comparison with recipes/bakeoff.py")
    try:
        return json_text.read(file)
    except ValueError as error:
        raise ValueError(f"{error}; make the comparison again") from None


def _conditions(row: Row) -> str:
    return f"Temperature {row['temperature']:g}, batch {row['batch_size']}"


def _is_own(row: Row) -> bool:
    """Returns True for a drafter with its own settings, False for baselines and ablations."""
    return row["family"] is not None and not row.get("is_ablation")


def _summary(title: str, rows: list[Row]) -> dict[str, Any]:
    """Returns the fastest drafter, None if none is faster than plain decoding, and how many are slower."""
    drafters = [row for row in rows if _is_own(row)]
    best = max(drafters, key=lambda row: row["speedup"])
    return {
        "title": title,
        "best": None if is_slower(best["speedup"]) else best,
        "num_slower": sum(is_slower(row["speedup"]) for row in drafters),
        "num_drafters": len(drafters),
    }


# Tables


def _number(key: str, digits: int, unit: str = "") -> Callable[[Row], Cell]:
    """Returns a function that makes the cell of a numeric column."""

    def cell(row: Row) -> Cell:
        value = row.get(key)
        return Cell("-") if value is None else Cell(f"{value:,.{digits}f}{unit}", value)

    return cell


def _speedup(row: Row) -> Cell:
    return Cell(f"{row['speedup']:.2f}x" + " slower" * is_slower(row["speedup"]), row["speedup"])


def _break_even(row: Row) -> Cell:
    """Returns the batch size from which the drafter is predicted to be slower; unknown for rows without a forecast."""
    sizes = row.get("predicted_by_batch_size")
    if not sizes:
        return Cell("-")
    size = row.get("break_even_batch")
    return Cell(f"over {max(map(int, sizes))}", float(2**30)) if size is None else Cell(str(size), size)


COLUMNS: dict[str, Callable[[Row], Cell]] = {
    "drafter": lambda row: Cell(row["drafter"]),
    "speed-up": _speedup,
    "quartiles": lambda row: Cell(f"{row['speedup_low']:.2f}-{row['speedup_high']:.2f}", row["speedup_low"]),
    "predicted speed-up": _number("predicted_speedup", 2, "x"),
    "break-even batch": _break_even,
    "mean accepted length (tau)": _number("tau", 2),
    "tok/s": _number("tokens_per_s", 0),
    "output": lambda row: Cell(output_of(row)),
    "draft ms": _number("draft_ms", 2),
    "verify ms": _number("verify_ms", 2),
    "first token": _number("first_accepted", 2),
    "bound": _number("first_optimum", 2),
    "training s": _number("train_s", 0),
    "parameters": _number("num_parameters", 0),
    "MB": _number("artifact_mb", 2),
}


def _tables(groups: Sequence[tuple[str, list[Row]]]) -> list[Table]:
    """Returns a table for each temperature and batch size, without columns that are empty in all rows."""
    tables = []
    for title, rows in groups:
        cells = [[cell_of(row) for cell_of in COLUMNS.values()] for row in rows]
        kept = [index for index in range(len(COLUMNS)) if index == 0 or any(line[index].text != "-" for line in cells)]
        headings = list(COLUMNS)
        tables.append(Table(title, [headings[at] for at in kept], [[line[at] for at in kept] for line in cells]))
    return tables


def _forecasts(rows: Sequence[Row]) -> list[tuple[Table, list[str]]]:
    """Returns for each temperature the predicted speed-ups by batch size, and the drafters that never pay off."""
    with_forecast = [row for row in rows if row.get("predicted_by_batch_size")]
    forecasts = []
    for temperature, group in groupby(with_forecast, key=lambda row: row["temperature"]):
        drafters = list({row["drafter"]: row for row in group}.values())
        headings = [
            "drafter",
            *(f"batch {size}" for size in drafters[0]["predicted_by_batch_size"]),
            "break-even batch",
        ]
        lines = [
            [
                Cell(row["drafter"]),
                *(Cell(f"{ratio:.2f}x", ratio) for ratio in row["predicted_by_batch_size"].values()),
                _break_even(row),
            ]
            for row in drafters
        ]
        table = Table(f"Continuous batching, temperature {temperature:g}", headings, lines)
        forecasts.append((table, [row["drafter"] for row in drafters if row.get("break_even_batch") == 1]))
    return forecasts


# Charts


def _costs(groups: Sequence[tuple[str, list[Row]]]) -> list[tuple[str, Markup]]:
    """Returns a chart of speed-up against training time for each temperature and batch size."""
    figures = []
    for title, rows in groups:
        points = [
            (row["drafter"], row["train_s"], row["speedup"])
            for row in rows
            if _is_own(row) and row["train_s"] is not None
        ]
        if points:
            figures.append((title, charts.against_cost(points, f"Speed-up against training time, {title}")))
    return figures


def _categories(groups: Sequence[tuple[str, list[Row]]]) -> list[dict[str, Any]]:
    """Returns the speed-ups by prompt category for each temperature and batch size."""
    found = []
    for title, all_rows in groups:
        rows = [row for row in all_rows if _is_own(row) and row.get("speedup_by_category")]
        if rows:
            bars = {
                category: [
                    (row["drafter"], row["speedup_by_category"][category])
                    for row in rows
                    if row["speedup_by_category"].get(category) is not None
                ]
                for category in rows[0]["speedup_by_category"]
            }
            longest = max(1.0, *(speedup for row in rows for speedup in row["speedup_by_category"].values()))
            counts = rows[0].get("prompts_by_category") or {}
            found.append({"title": title, "bars": bars, "longest": longest, "counts": counts})
    return found


def _acceptance(rows: Sequence[Row]) -> list[tuple[str, list[tuple[str, list[float]]]]]:
    """Returns for each drafter the acceptance by depth at the smallest batch size and up to 3 temperatures."""
    smallest = min(row["batch_size"] for row in rows)
    lines: dict[str, list[tuple[str, list[float]]]] = {}
    for row in rows:
        if _is_own(row) and row["batch_size"] == smallest and row["accepted_per_depth"]:
            label = f"temperature {row['temperature']:g}"
            lines.setdefault(row["drafter"], []).append((label, row["accepted_per_depth"][:10]))
    return [(name, of_drafter[:3]) for name, of_drafter in lines.items()]


def _trees(trees: dict[str, Any]) -> list[tuple[str, Markup]]:
    """Returns a chart of each drafter's average draft tree."""
    figures = []
    for name, tree in trees.items():
        if tree["nodes"]:
            depth = max(len(node["path"]) for node in tree["nodes"])
            caption = f"{name}: {tree['num_nodes']:.1f} tokens drafted per step, depth {depth}"
            figures.append((caption, charts.tree(tree["nodes"], f"Draft tree of {name}")))
    return figures
