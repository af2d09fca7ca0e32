"""Formats the rows of a comparison as Markdown, as text for a terminal of 120 columns, and as CSV."""

import csv
import io
import json
import textwrap
from collections.abc import Sequence
from itertools import compress, groupby
from typing import Any, Literal

Row = dict[str, Any]
Style = Literal["markdown", "terminal"]
WIDTH, MAX_NAME, MIN_NAME, MAX_DEPTHS = 120, 28, 12, 5
COLUMNS = (
    "drafter",
    "mean\naccepted\nlength (tau)",
    "tok/s",
    "speed-up",
    "quartiles",
    "predicted\nspeed-up",
    "output",
    "draft\nms",
    "verify\nms",
    "accepted\nby depth,\n%",
    "first\ntoken,\nbound",
)
"""Headings; the terminal breaks them at line ends."""
SIZE_COLUMNS = ("drafter", "parameters", "artifact MB", "training s")


def header(rows: Sequence[Row], style: Style) -> str:
    """Returns the conditions of the measurement: target, hardware, prompts and versions."""
    row = rows[0]
    text = (
        f"{row['target']} ({row['dtype']}) on {row['hardware']}, {row['threads']} thread(s);"
        f"{' decoded batch-invariantly;' if row.get('batch_invariant') else ''}"
        f"{' batches above 1 kept full (continuous batching);' if row.get('continuous_batching') else ''}"
        f" {row['num_prompts']} prompts{_turns(row)}, {row['max_new_tokens']} new tokens each, {row['rounds']} rounds;"
        f"{_generation_config(row)}"
        f" commit {row['commit'] or 'unknown'}, torch {row['torch']}, transformers {row['transformers_version']}"
    )
    return f"# Bake-off\n\n{text}" if style == "markdown" else textwrap.fill(text, WIDTH)


def _generation_config(row: Row) -> str:
    settings = row.get("generation_config") or {}  # rows of earlier versions have none
    return f" generation config {json.dumps(settings)};" if settings else ""


def table(rows: Sequence[Row], style: Style) -> list[str]:
    """Returns one table per temperature and batch size, then drafter sizes, categories, forecasts and definitions."""
    lines = []
    rows = ranked(rows)
    for (temperature, batch_size), group in groupby(rows, key=lambda row: (row["temperature"], row["batch_size"])):
        lines += _title(f"temperature {temperature:g}, batch {batch_size}", style)
        lines += _measurements(list(group), style)
    drafters = {row["drafter"]: row for row in rows if row["family"] is not None and not row["is_ablation"]}
    if drafters:
        lines += _title("Drafters", style) + grid([SIZE_COLUMNS, *map(_size_cells, drafters.values())], style)
    lines += [*_by_category(rows, style), *_forecasts(rows, style), ""]
    for term, definition in definitions(rows):
        text = f"{term}: {definition}"
        lines += textwrap.wrap(text, WIDTH, subsequent_indent="  ") if style == "terminal" else [f"- {text}"]
    return lines


def ranked(rows: Sequence[Row]) -> list[Row]:
    """Returns the rows by speed-up, the best first, within each temperature and batch size."""
    groups = groupby(rows, key=lambda row: (row["temperature"], row["batch_size"]))
    return [row for _, group in groups for row in sorted(group, key=lambda row: -row["speedup"])]


def definitions(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Returns the terms in the tables of these rows with their definitions."""
    found = [
        ("tau", "committed tokens per target forward, for each row of the batch"),
        ("tok/s", "new tokens per second of wall-clock time, summed over the batch; median over rounds"),
        ("speed-up", "tok/s relative to plain decoding in the same round; median and quartiles over rounds"),
        (
            "output",
            "identical: equal to plain decoding, token for token, greedily or by the verifier coupled with the same"
            " seed; ties: equal but for rows of which the first difference is between two tokens whose logits rounding"
            " can swap, with the number of those rows and the largest gap of the logits; lossless: sampled from the"
            " target's distribution; lossy: by a verifier that changes the distribution; DIFFERS: not equal to plain"
            " decoding by more than rounding, which is read at temperature 0 alone",
        ),
        *_rounding(rows),
        ("draft ms, verify ms", "time per step, divided by the number of rows in the batch"),
        ("accepted by depth", "percentage of the drafts that reached depth 1, 2, ... that were accepted up to it"),
    ]
    if any(row.get("predicted_speedup") is not None for row in rows):
        found += [
            ("predicted speed-up", "from the measured tau and draft time, and target forwards timed without drafters"),
            ("continuous batching", "finished rows are replaced, so none waits for stragglers, as in servers"),
            ("break-even batch", "smallest of these batch sizes at which the drafter is predicted to be a slow-down"),
        ]
    if any(row.get("first_optimum") is not None for row in rows):
        found.append(
            (
                "first token, bound",
                "acceptance rate of sampled first tokens, and its optimal-transport upper bound",
            )
        )
    left_out = {name: reason for row in rows for name, reason in (row.get("left_out") or {}).items()}
    if left_out:
        found.append(("not in the table", "; ".join(f"{name} ({reason})" for name, reason in left_out.items())))
    if any(row["tuned"] for row in rows):
        found.append(("*", "compared with plain decoding of the target as fine-tuned by this drafter"))
    return found


def _turns(row: Row) -> str:
    """Returns that prompts are the turns of fewer conversations, or nothing."""
    number = row.get("num_conversations", row["num_prompts"])
    return "" if number == row["num_prompts"] else f" (all turns of {number} conversations)"


def _rounding(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Returns the definition of the measured rounding with its values, if any was measured."""
    found = {
        (row["batch_size"], "the fine-tuned target, " * bool(row["tuned"])): row["rounding"]
        for row in rows
        if row.get("rounding") is not None
    }
    if not found:
        return []
    values = "; ".join(f"{value:.2g} ({tuned}batch {size})" for (size, tuned), value in found.items())
    text = (
        "the most that forwards of several tokens change the lead of a likeliest token's logit over the next 15,"
        f" compared with forwards of one token, on this target and these prompts: {values}"
    )
    return [("rounding", text)]


def _title(text: str, style: Style) -> list[str]:
    return ["", f"## {text}" if style == "markdown" else text, ""]


def _measurements(rows: Sequence[Row], style: Style) -> list[str]:
    """Returns the table of one temperature and batch size; on a terminal, depths are left out until it fits."""
    for max_depths in range(MAX_DEPTHS, -1, -1):
        lines = grid(_without_empty([COLUMNS, *(_cells(row, max_depths) for row in rows)]), style)
        if style == "markdown" or max(map(len, lines)) <= WIDTH:
            return lines
    return lines


def _by_category(rows: Sequence[Row], style: Style) -> list[str]:
    """Returns a table of speed-ups by category for each temperature and batch size that has categories.

    A terminal gets as many tables as the categories need to fit its width.
    """
    with_categories = [row for row in rows if row["speedup_by_category"] and row["drafter"] != "plain"]
    lines = []
    for (temperature, size), group in groupby(with_categories, key=lambda row: (row["temperature"], row["batch_size"])):
        chosen = list(group)
        counts = chosen[0]["prompts_by_category"]
        lines += _title(f"Speed-up by category (prompts), temperature {temperature:g}, batch {size}", style)
        for number, names in enumerate(_fitting(list(counts), counts, style)):
            cells = [[_name(row), *(f"{row['speedup_by_category'][name]:.2f}x" for name in names)] for row in chosen]
            heading = ["drafter", *(f"{name} ({counts[name]})" for name in names)]
            lines += [""] * bool(number) + grid([heading, *cells], style)
    return lines


def _fitting(names: list[str], counts: dict[str, int], style: Style) -> list[list[str]]:
    """Returns the categories in groups, each of which fits beside the longest name on a terminal."""
    if style == "markdown":
        return [names]
    groups: list[list[str]] = [[]]
    for name in names:
        width = sum(len(f"{one} ({counts[one]})") + 2 for one in [*groups[-1], name])
        if groups[-1] and MAX_NAME + width > WIDTH:
            groups.append([])
        groups[-1].append(name)
    return groups


def _forecasts(rows: Sequence[Row], style: Style) -> list[str]:
    """Returns the predicted speed-ups by batch size, and the drafters that are predicted never to pay off."""
    with_forecast = [row for row in rows if row["predicted_by_batch_size"]]
    lines = []
    for temperature, group in groupby(with_forecast, key=lambda row: row["temperature"]):
        drafters = list({row["drafter"]: row for row in group}.values())
        cells = [
            [_name(row), *(f"{ratio:.2f}x" for ratio in row["predicted_by_batch_size"].values()), _break_even(row)]
            for row in drafters
        ]
        lines += _title(f"Predicted speed-up by batch size, continuous batching, temperature {temperature:g}", style)
        lines += grid([["drafter", *drafters[0]["predicted_by_batch_size"], "break-even batch"], *cells], style)
        slow = [row["drafter"] for row in drafters if row["break_even_batch"] == 1]
        if slow:
            text = (
                f"Predicted to slow decoding down even at batch size 1, temperature {temperature:g}: {', '.join(slow)}."
            )
            lines += ["", *(textwrap.wrap(text, WIDTH) if style == "terminal" else [text])]
    return lines


def _break_even(row: Row) -> str:
    size = row["break_even_batch"]
    return f"over {max(map(int, row['predicted_by_batch_size']))}" if size is None else str(size)


def is_slower(speedup: float) -> bool:
    """Returns True for a speed-up that is displayed as less than 1.00x."""
    return speedup < 0.995


def to_csv(rows: Sequence[Row]) -> str:
    """Returns all columns and one per prompt category, `speedup: NAME`.

    Lists and booleans are written as JSON, missing values are empty.
    """
    text = io.StringIO(newline="")
    categories = list(dict.fromkeys(name for row in rows for name in row["speedup_by_category"] or ()))
    writer = csv.DictWriter(text, [*rows[0], *(f"speedup: {name}" for name in categories)])
    writer.writeheader()
    for row in rows:
        by_category = {f"speedup: {name}": ratio for name, ratio in (row["speedup_by_category"] or {}).items()}
        writer.writerow({key: _csv_value(value) for key, value in (row | by_category).items()})
    return text.getvalue()


def _csv_value(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def _cells(row: Row, max_depths: int) -> list[str]:
    speedup = f"{row['speedup']:.2f}x" + " slower" * is_slower(row["speedup"])
    return [
        _name(row),
        _number(row["tau"], 2),
        f"{row['tokens_per_s']:,.0f}",
        speedup,
        f"{row['speedup_low']:.2f}-{row['speedup_high']:.2f}",
        "" if row["predicted_speedup"] is None else f"{row['predicted_speedup']:.2f}x",
        output_of(row),
        _number(row["draft_ms"], 2),
        _number(row["verify_ms"], 2),
        " ".join(f"{100 * rate:.0f}" for rate in row["accepted_per_depth"][:max_depths]),
        "" if row["first_optimum"] is None else f"{row['first_accepted']:.2f}, {row['first_optimum']:.2f}",
    ]


def _without_empty(cells: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """Returns the table without columns that are empty in all rows."""
    kept = [any(column) for column in zip(*cells[1:], strict=True)]
    return [list(compress(line, kept)) for line in cells]


def output_of(row: Row) -> str:
    """Returns how the output relates to the target's; a star marks the target as fine-tuned by the drafter."""
    if row["tuned"] and row["family"] is None:
        return "fine-tuned*"
    mark = "*" * row["tuned"]
    if row["identical"]:
        return f"identical{mark}"
    if not row["lossless"]:
        return "lossy"
    if row["identical"] is None:
        return f"lossless{mark}"
    word, gap = "ties" if row.get("is_tie") else "DIFFERS", row.get("largest_gap")
    # Rows of older comparisons have no counts, and a text that ends early has no gap.
    counts = f" {row['num_different']}/{row['num_decoded']}" if row.get("num_different") else ""
    return f"{word}{mark}{counts}" + ("" if gap is None else f" ({gap:.2g})")


def _size_cells(row: Row) -> list[str]:
    return [_name(row), f"{row['num_parameters']:,}", f"{row['artifact_mb']:.2f}", _number(row["train_s"], 0)]


def _name(row: Row) -> str:
    return shorten(row["drafter"], MAX_NAME)


def shorten(name: str, width: int) -> str:
    """Returns the name, or its end after "..." if it is longer than `width`."""
    return name if len(name) <= width else "..." + name[3 - width :]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def grid(cells: Sequence[Sequence[str]], style: Style) -> list[str]:
    """Returns the lines of a table, the first column aligned left and the others right; the first row is the heading.

    Line ends in headings break them on a terminal only. A terminal's table is narrowed by shortening its names.
    """
    heading, *body = cells
    broken = [text.split("\n") if style == "terminal" else [text.replace("\n", " ")] for text in heading]
    height = max(map(len, broken))
    cells = [*zip(*([""] * (height - len(words)) + words for words in broken), strict=True), *body]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    excess = sum(widths) + 2 * (len(widths) - 1) - WIDTH
    if style == "terminal" and excess > 0:
        widths[0] = max(widths[0] - excess, MIN_NAME)
        cells = [[shorten(name, widths[0]), *others] for name, *others in cells]
    aligned = []
    for name, *numbers in cells:
        padded = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
        aligned.append([name.ljust(widths[0]), *padded])
    if style == "terminal":
        return ["  ".join(line).rstrip() for line in aligned]
    rule = [("-" * width) if at == 0 else "-" * (width - 1) + ":" for at, width in enumerate(widths)]
    return [f"| {' | '.join(line)} |" for line in (aligned[0], rule, *aligned[1:])]
