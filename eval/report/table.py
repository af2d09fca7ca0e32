"""A comparison's rows as text: Markdown, the terminal's 120 columns, and CSV."""

import csv
import io
import json
import textwrap
from collections.abc import Sequence
from itertools import compress, groupby
from typing import Any, Literal

Row = dict[str, Any]
Style = Literal["markdown", "terminal"]
MAX_NAME, MAX_DEPTHS = 26, 5
COLUMNS = (
    "drafter",
    "tau",
    "tokens/s",
    "speed-up",
    "quartiles",
    "predicted",
    "output",
    "draft ms",
    "verify ms",
    "accepted, %",
    "first, best",
)
FACTS = ("drafter", "parameters", "artifact MB", "training s")


def header(rows: Sequence[Row], style: Style) -> str:
    """Returns what was measured, and where, from any row."""
    row = rows[0]
    text = (
        f"{row['target']} ({row['dtype']}) on {row['hardware']}, {row['threads']} thread(s);"
        f" {row['num_prompts']} prompts, {row['max_new_tokens']} new tokens each, {row['rounds']} rounds;"
        f" commit {row['commit'] or 'unknown'}, torch {row['torch']}, transformers {row['transformers_version']}"
    )
    return f"# Bake-off\n\n{text}" if style == "markdown" else textwrap.fill(text, 120)


def table(rows: Sequence[Row], style: Style) -> list[str]:
    """Returns the lines of one table for each temperature and batch size, then one of the drafters' sizes."""
    lines = []
    for (temperature, batch_size), group in groupby(rows, key=lambda row: (row["temperature"], row["batch_size"])):
        title = f"temperature {temperature:g}, batch {batch_size}"
        lines += ["", f"## {title}" if style == "markdown" else title, ""]
        lines += grid(_without_empty([COLUMNS, *map(_cells, group)]), style)
    sizes = {row["drafter"]: row for row in rows if row["family"] is not None and not row["is_ablation"]}
    if sizes:
        lines += ["", "## Drafters", ""] if style == "markdown" else [""]
        lines += grid([FACTS, *map(_fact_cells, sizes.values())], style)
    lines += _by_category(rows, style) + _break_even(rows, style)
    lines += [
        "",
        "tau: tokens a target forward. Speed-up: over plain decoding in the same round; median, quartiles of rounds.",
        "Draft and verify ms: a row's share of one step. Accepted: % of the drafts that reached depth 1, 2, ...",
    ]
    if any(row["predicted_speedup"] is not None for row in rows):
        lines += [
            "Predicted: by the rounds counted and the drafter's own time, the target's forwards at their cost alone.",
            "Kept full: no row waits for slower ones, as on servers; measured, rows of a batch begin and end together.",
        ]
    if any(row["tuned"] for row in rows):
        lines += ["*: of the target as its drafter has tuned it; the speed-up is over plain decoding of that one too."]
    if any(row["first_optimum"] is not None for row in rows):
        lines += [
            "First, best: how often a drawn first token was accepted, and would be by the best rule there can be."
        ]
    return lines


def _by_category(rows: Sequence[Row], style: Style) -> list[str]:
    """Returns a table of speed-ups at the first temperature and batch size that has categories, if there is one."""
    with_some = [row for row in rows if row["speedup_by_category"]]
    if not with_some:
        return []
    law = (with_some[0]["temperature"], with_some[0]["batch_size"])
    found = [row for row in with_some if (row["temperature"], row["batch_size"]) == law and row["family"] is not None]
    numbers = [f"{name} ({count})" for name, count in with_some[0]["prompts_by_category"].items()]
    cells = [[_name(row), *(f"{ratio:.2f}x" for ratio in row["speedup_by_category"].values())] for row in found]
    title = f"Speed-up by category (prompts), temperature {law[0]:g}, batch {law[1]}"
    return ["", f"## {title}" if style == "markdown" else title, "", *grid([["drafter", *numbers], *cells], style)]


def _break_even(rows: Sequence[Row], style: Style) -> list[str]:
    """Returns what is predicted of each drafter as batches grow, and who is predicted to slow the user down."""
    found = [row for row in rows if row["predicted_by_batch_size"]]
    lines = []
    for temperature, group in groupby(found, key=lambda row: row["temperature"]):
        drafters = list({row["drafter"]: row for row in group}.values())
        cells = [
            [_name(row), *(f"{ratio:.2f}x" for ratio in row["predicted_by_batch_size"].values()), _end(row)]
            for row in drafters
        ]
        title = f"Predicted speed-up by batch size, batches kept full, temperature {temperature:g}"
        heading = ["drafter", *drafters[0]["predicted_by_batch_size"], "stops paying at"]
        lines += ["", f"## {title}" if style == "markdown" else title, "", *grid([heading, *cells], style)]
        slow = [row["drafter"] for row in drafters if row["break_even_batch"] == 1]
        if slow:
            told = f"At temperature {temperature:g} these are predicted to slow you down: {', '.join(slow)}."
            lines += ["", *(textwrap.wrap(told, 120) if style == "terminal" else [told])]
    return lines


def _end(row: Row) -> str:
    return "-" if row["break_even_batch"] is None else f"batch {row['break_even_batch']}"


def is_slower(speedup: float) -> bool:
    """Returns whether a speed-up, as it is shown, is less than none."""
    return speedup < 0.995


def to_csv(rows: Sequence[Row]) -> str:
    """Returns all columns; lists and truth values are written as in JSON, what is not known is left empty."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _csv_value(value) for key, value in row.items()})
    return text.getvalue()


def _csv_value(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def _cells(row: Row) -> list[str]:
    speedup = f"{row['speedup']:.2f}x" + " slower" * is_slower(row["speedup"])
    return [
        _name(row),
        f"{row['tau']:.2f}",
        f"{row['tokens_per_s']:,.0f}",
        speedup,
        f"{row['speedup_low']:.2f}-{row['speedup_high']:.2f}",
        "" if row["predicted_speedup"] is None else f"{row['predicted_speedup']:.2f}x",
        output_of(row),
        _number(row["draft_ms"], 2),
        _number(row["verify_ms"], 2),
        " ".join(f"{100 * share:.0f}" for share in row["accepted_per_depth"][:MAX_DEPTHS]),
        "" if row["first_optimum"] is None else f"{row['first_accepted']:.2f} of {row['first_optimum']:.2f}",
    ]


def _without_empty(cells: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """Returns the table without columns that say nothing in any row."""
    kept = [any(column) for column in zip(*cells[1:], strict=True)]
    return [list(compress(line, kept)) for line in cells]


def output_of(row: Row) -> str:
    """Returns what became of the target's own output or law, or of those of the target that its drafter has tuned."""
    if row["tuned"] and row["family"] is None:
        return "tuned*"
    mark = "*" * row["tuned"]
    if row["identical"]:
        return f"identical{mark}"
    if not row["lossless"]:
        return "lossy"
    return f"same law{mark}" if row["identical"] is None else "DIFFERS"


def _fact_cells(row: Row) -> list[str]:
    return [_name(row), f"{row['num_parameters']:,}", f"{row['artifact_mb']:.2f}", _number(row["train_s"], 0)]


def _name(row: Row) -> str:
    name = row["drafter"]
    return name if len(name) <= MAX_NAME else "..." + name[3 - MAX_NAME :]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def grid(cells: Sequence[Sequence[str]], style: Style) -> list[str]:
    """Returns aligned lines: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    aligned = []
    for name, *numbers in cells:
        padded = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
        aligned.append([name.ljust(widths[0]), *padded])
    if style == "terminal":
        return ["  ".join(line).rstrip() for line in aligned]
    rule = [("-" * width) if at == 0 else "-" * (width - 1) + ":" for at, width in enumerate(widths)]
    return [f"| {' | '.join(line)} |" for line in (aligned[0], rule, *aligned[1:])]
