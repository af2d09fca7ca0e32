"""A comparison's folder as one HTML page, `bakeoff.html`, which needs nothing but itself.

Tables sorted by their headings, charts as inline SVG, the trees that were drafted, and texts token by token. Rows of
older comparisons lack some columns, and folders without `bakeoff.texts.json` the trees and texts; these are left out.
"""

import json
from collections.abc import Callable, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from data.shards import write_whole
from eval.bakeoff.results import NAME, TEXTS
from eval.report import charts
from eval.report.table import header, is_slower, output_of
from eval.report.token_view import token_view

Row = dict[str, Any]
PAGE = f"{NAME}.html"
HERE = Path(__file__).parent
NEEDED = {"drafter", "family", "temperature", "batch_size", "speedup", "tuned", "lossless", "accepted_per_depth"}
"""What rows have had ever since drafters tune targets."""
# Nothing may be fetched, whatever text the page shows.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def write_report(folder: Path) -> Path:
    """Writes the page beside the comparison that `folder` holds and returns its path; raises ValueError without one."""
    rows = _read(folder / f"{NAME}.json")
    if (
        not isinstance(rows, list)
        or not rows
        or not all(isinstance(row, dict) and row.keys() >= NEEDED for row in rows)
    ):
        raise ValueError(f"{folder / NAME}.json holds no comparison, or one of long ago; run recipes/bakeoff.py again")
    written = _read(folder / TEXTS) if (folder / TEXTS).is_file() else {"texts": [], "trees": {}}
    text = page(rows, written)
    write_whole(folder / PAGE, lambda path: path.write_text(text, encoding="utf-8"))
    return folder / PAGE


def page(rows: Sequence[Row], written: dict[str, Any]) -> str:
    """Returns the page of a comparison's rows and of what eval/report/recorded_texts.py wrote down."""
    laws = [(title, list(group)) for title, group in groupby(rows, key=_law)]
    sections = [
        ("table", "Table", _tables(laws)),
        ("cost", "Speed-up against training", _costs(laws)),
        ("batches", "As batches grow", _batches(rows)),
        ("categories", "By category", _categories(laws)),
        ("acceptance", "Acceptance by depth", _acceptance(rows)),
        ("trees", "What is drafted", _trees(written["trees"])),
        ("texts", "Token by token", token_view(written["texts"]) if written["texts"] else ""),
    ]
    shown = [(name, title, inner) for name, title, inner in sections if inner]
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title, _ in shown)
    body = "\n".join(f'<section id="{name}"><h2>{title}</h2>\n{inner}\n</section>' for name, title, inner in shown)
    title = f"Bake-off: {escape(rows[0]['target'])}"
    style, script = ((HERE / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
<p>{escape(header(rows, "terminal"))}</p>
{_verdicts(laws)}
<nav aria-label="Parts of this page">{links}</nav>
</header>
<main>
{body}
</main>
<div id="note" role="status" hidden></div>
<script>
{script}</script>
</body>
</html>
"""


def _read(file: Path) -> Any:
    if not file.is_file():
        raise ValueError(f"{file.parent} has no {file.name}; make a comparison with recipes/bakeoff.py")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}); make the comparison again") from None


def _law(row: Row) -> str:
    return f"temperature {row['temperature']:g}, batch {row['batch_size']}"


def _is_own(row: Row) -> bool:
    """Returns whether this is a drafter as its artifact means it."""
    return row["family"] is not None and not row.get("is_ablation")


def _verdicts(laws: Sequence[tuple[str, list[Row]]]) -> str:
    lines = []
    for title, rows in laws:
        drafters = [row for row in rows if _is_own(row)]
        if not drafters:
            continue
        best = max(drafters, key=lambda row: row["speedup"])
        num_slower = sum(is_slower(row["speedup"]) for row in drafters)
        name = escape(best["drafter"])
        told = (
            f"fastest is <b>{name}</b>, {best['speedup']:.2f}x" if not is_slower(best["speedup"]) else "no drafter pays"
        )
        lines.append(f"<li>{title.capitalize()}: {told}; {num_slower} of {len(drafters)} slow decoding down.</li>")
    return f"<ul>{''.join(lines)}</ul>" if lines else ""


# Tables


def _number(key: str, digits: int, unit: str = "") -> Callable[[Row], tuple[str, float | None]]:
    """Returns what makes a cell of a column of numbers: its text and what it is sorted by."""

    def cell(row: Row) -> tuple[str, float | None]:
        value = row.get(key)
        return ("-", None) if value is None else (f"{value:,.{digits}f}{unit}", value)

    return cell


def _speedup(row: Row) -> tuple[str, float | None]:
    value = row["speedup"]
    return f"{value:.2f}x" + " slower" * is_slower(value), value


def _pays_to(row: Row) -> tuple[str, float | None]:
    """Returns where the drafter is predicted to stop paying; it is not known of rows without a forecast."""
    if not row.get("predicted_by_batch_size"):
        return "-", None
    size = row.get("break_even_batch")
    return (f"batch {size}", size) if size is not None else ("pays throughout", float(2**30))


COLUMNS: dict[str, Callable[[Row], tuple[str, float | None]]] = {
    "drafter": lambda row: (row["drafter"], None),
    "speed-up": _speedup,
    "quartiles": lambda row: (f"{row['speedup_low']:.2f}-{row['speedup_high']:.2f}", row["speedup_low"]),
    "predicted": _number("predicted_speedup", 2, "x"),
    "stops paying at": _pays_to,
    "tau": _number("tau", 2),
    "tokens/s": _number("tokens_per_s", 0),
    "output": lambda row: (output_of(row), None),
    "draft ms": _number("draft_ms", 2),
    "verify ms": _number("verify_ms", 2),
    "first accepted": _number("first_accepted", 2),
    "at best": _number("first_optimum", 2),
    "training s": _number("train_s", 0),
    "parameters": _number("num_parameters", 0),
    "MB": _number("artifact_mb", 2),
}


def _tables(laws: Sequence[tuple[str, list[Row]]]) -> str:
    parts = ["<p>Headings sort: once, and once more the other way round.</p>"]
    for title, rows in laws:
        cells = [[make(row) for make in COLUMNS.values()] for row in rows]
        kept = [at for at in range(len(COLUMNS)) if at == 0 or any(line[at][0] != "-" for line in cells)]
        names = [name for at, name in enumerate(COLUMNS) if at in kept]
        parts.append(_table(title.capitalize(), names, [[line[at] for at in kept] for line in cells]))
    parts.append(
        "<p>Speed-up: over plain decoding in the same round; median and quartiles of rounds. Tau: tokens a target"
        " forward. Draft and verify ms: a row's share of one step. Predicted: by the rounds"
        " counted and the drafter's own time, the target's forwards at what they cost alone. Stops paying:"
        " in batches of which no row waits for slower ones, as on servers; measured, rows begin and end together. First"
        " accepted, at best: how often a drawn first token was accepted, and would be by the best rule there can be."
        " *: compared with the target as its drafter has tuned it.</p>"
    )
    return "\n".join(parts)


def _table(title: str, names: Sequence[str], lines: Sequence[Sequence[tuple[str, float | None]]]) -> str:
    heads = "".join(f'<th scope="col"><button type="button">{escape(name)}</button></th>' for name in names)
    body = []
    for first, *others in lines:
        cells = "".join(f'<td data-value="{"" if by is None else repr(by)}">{escape(text)}</td>' for text, by in others)
        body.append(f'<tr><th scope="row">{escape(first[0])}</th>{cells}</tr>')
    return (
        f'<h3>{escape(title)}</h3><div class="wide" tabindex="0" role="region" aria-label="{escape(title)}">'
        f"<table><thead><tr>{heads}</tr></thead><tbody>\n" + "\n".join(body) + "\n</tbody></table></div>"
    )


def _batches(rows: Sequence[Row]) -> str:
    """Returns the predicted speed-ups by batch size, where rows have them."""
    found = [row for row in rows if row.get("predicted_by_batch_size")]
    parts = []
    for temperature, group in groupby(found, key=lambda row: row["temperature"]):
        drafters = list({row["drafter"]: row for row in group}.values())
        sizes = list(drafters[0]["predicted_by_batch_size"])
        lines = [
            [(row["drafter"], None)]
            + [(f"{ratio:.2f}x", ratio) for ratio in row["predicted_by_batch_size"].values()]
            + [_pays_to(row)]
            for row in drafters
        ]
        names = ["drafter", *(f"batch {size}" for size in sizes), "stops paying at"]
        parts.append(_table(f"Predicted speed-up, batches kept full, temperature {temperature:g}", names, lines))
        slow = [row["drafter"] for row in drafters if row.get("break_even_batch") == 1]
        if slow:
            parts.append(f"<p>Predicted to slow you down, even one prompt at a time: {escape(', '.join(slow))}.</p>")
    return "\n".join(parts)


# Charts


def _grid(figures: Sequence[tuple[str, str]]) -> str:
    inner = "".join(f"<figure><figcaption>{escape(told)}</figcaption>{chart}</figure>" for told, chart in figures)
    return f'<div class="figures">{inner}</div>'


def _costs(laws: Sequence[tuple[str, list[Row]]]) -> str:
    figures = []
    for title, rows in laws:
        points = [(row["drafter"], row["train_s"], row["speedup"]) for row in rows if _is_own(row)]
        known = [point for point in points if point[1] is not None]
        if known:
            figures.append((title.capitalize(), charts.against_cost(known, f"Speed-up and training, {title}")))
    told = "<p>Filled: faster than plain decoding, which is the dashed line. Hollow: slower.</p>"
    return told + _grid(figures) if figures else ""


def _categories(laws: Sequence[tuple[str, list[Row]]]) -> str:
    parts: list[str] = []
    for title, rows in laws:
        found = [row for row in rows if _is_own(row) and row.get("speedup_by_category")]
        if not found:
            continue
        longest = max(1.0, *(ratio for row in found for ratio in row["speedup_by_category"].values()))
        counts = found[0].get("prompts_by_category") or {}
        parts.append(f"<details{'' if parts else ' open'}><summary>{title.capitalize()}</summary>")
        for category in found[0]["speedup_by_category"]:
            number = f" ({counts[category]} prompts)" if category in counts else ""
            parts.append(f"<h4>{escape(category)}{number}</h4><ul class='bars'>")
            for row in found:
                ratio = row["speedup_by_category"].get(category)
                if ratio is not None:
                    parts.append(_bar(row["drafter"], ratio, longest))
            parts.append("</ul>")
        parts.append("</details>")
    return "\n".join(parts)


def _bar(name: str, ratio: float, longest: float) -> str:
    slower = is_slower(ratio)
    bar = f'<i class="{"slower" if slower else "faster"}" style="width:{100 * ratio / longest:.1f}%"></i>'
    track = f'<span class="track" style="--even:{1 / longest:.4f}">{bar}</span>'
    return f"<li><span>{escape(name)}</span>{track}<span>{ratio:.2f}x{' slower' * slower}</span></li>"


def _acceptance(rows: Sequence[Row]) -> str:
    """Returns a chart a drafter, at the smallest batch size of each temperature."""
    smallest = min(row["batch_size"] for row in rows)
    lines: dict[str, list[tuple[str, list[float]]]] = {}
    for row in rows:
        if _is_own(row) and row["batch_size"] == smallest and row["accepted_per_depth"]:
            lines.setdefault(row["drafter"], []).append(
                (f"temperature {row['temperature']:g}", row["accepted_per_depth"][:10])
            )
    figures = [(name, charts.by_depth(found[:3], f"Acceptance of {name} by depth")) for name, found in lines.items()]
    if not figures:
        return ""
    temperatures = [name for name, _ in max(lines.values(), key=len)][:3]
    kinds = zip(("circles, solid", "squares, dashed", "triangles, dotted"), temperatures, strict=False)
    told = "; ".join(f"{kind}: {temperature}" for kind, temperature in kinds)
    told = (
        f"<p>Per cent of the drafts that reached a depth whose tokens were accepted to there. {told.capitalize()}.</p>"
    )
    return told + _grid(figures)


def _trees(trees: dict[str, Any]) -> str:
    figures = []
    for name, tree in trees.items():
        if tree["nodes"]:
            deepest = max(len(node["path"]) for node in tree["nodes"])
            told = f"{name}: {tree['num_nodes']:.1f} tokens a step, {deepest} deep"
            figures.append((told, charts.tree(tree["nodes"], f"Drafts of {name}")))
    if not figures:
        return ""
    told = (
        "<p>As seen in the texts below, greedily. The square is the token to be continued; a circle is a place in the"
        " draft, the first choice uppermost, with the per cent of the tokens drafted there that were accepted. Places"
        " seldom drafted are left out.</p>"
    )
    return told + _grid(figures)
