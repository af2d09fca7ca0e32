"""Charts of the report as inline SVG, coloured by the page's style sheet; no chart relies on colour alone.

Sizes are in pixels, for drawings little wider than a phone's screen, where their text must stay readable.
"""

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup, escape

WIDTH, HEIGHT = 460, 400
LEFT, RIGHT, TOP, BOTTOM = 42, 14, 14, 40
LETTER = 7.2
"""Width of a letter in a label."""
TICKS_S = (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000)
SHAPES = ("circle", "square", "triangle")
Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


def against_cost(points: Sequence[tuple[str, float, float]], label: str) -> Markup:
    """Returns a scatter plot of points (name, training seconds, speed-up): logarithmic time, slow-downs hollow."""
    seconds = [max(second, 1.0) for _, second, _ in points]
    low, high = math.log(min(seconds) / 1.6), math.log(max(seconds) * 1.6)
    worst, best = (pick(1.0, *(speedup for _, _, speedup in points)) for pick in (min, max))
    least, most = worst - 0.12 * (best - worst) - 0.05, best + 0.08 * (best - worst) + 0.05

    def position(second: float, speedup: float) -> tuple[float, float]:
        x = LEFT + (math.log(max(second, 1.0)) - low) / (high - low) * (WIDTH - LEFT - RIGHT)
        return x, HEIGHT - BOTTOM - (speedup - least) / (most - least) * (HEIGHT - BOTTOM - TOP)

    parts = [_rule(position(1, at)[1], f"{at:g}x") for at in _steps(least, most)]
    for tick in TICKS_S:
        if low <= math.log(tick) <= high:
            parts.append(_text(position(tick, 1)[0], HEIGHT - BOTTOM + 15, f"{tick:,}", "middle"))
    parts.append(_text(WIDTH / 2, HEIGHT - 6, "training time, s", "middle"))
    y = position(1, 1)[1]
    parts.append(f'<line class="even" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
    taken: list[Box] = []
    for _, second, speedup in points:
        x, y = position(second, speedup)
        taken.append((x - 6, y - 6, x + 6, y + 6))
    # Outliers have most room beside them and are labelled first; the other labels take what space is left.
    for name, second, speedup in sorted(points, key=lambda point: -abs(point[2] - 1)):
        x, y = position(second, speedup)
        box = _room(x, y, LETTER * len(name), taken)
        taken.append(box)
        near_x, near_y = min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3])
        if math.dist((x, y), (near_x, near_y)) > 12:
            parts.append(f'<line class="lead" x1="{x:.1f}" y1="{y:.1f}" x2="{near_x:.1f}" y2="{near_y:.1f}"/>')
        kind = "faster" if round(speedup, 2) >= 1 else "slower"
        title = f"{name}: {speedup:.2f}x, {second:,.0f} s of training"
        parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{escape(title)}</title></circle>')
        parts.append(_text(box[0], box[3] - 3, name, kind="label"))
    return _svg(WIDTH, HEIGHT, label, parts)


def by_depth(lines: Sequence[tuple[str, Sequence[float]]], label: str) -> Markup:
    """Returns a line chart of acceptance rates by depth, with a dash pattern and a marker for each named line."""
    width, height, left, bottom = 230, 130, 30, 28
    deepest = max(len(rates) for _, rates in lines)
    step = (width - left - 12) / max(deepest, 2)

    def position(depth: int, rate: float) -> tuple[float, float]:
        return left + step * (depth - 0.5), height - bottom - rate * (height - bottom - 12)

    parts = []
    for rate in (0.0, 0.5, 1.0):
        y = position(1, rate)[1]
        parts.append(f'<line class="grid" x1="{left}" y1="{y:.1f}" x2="{width - 4}" y2="{y:.1f}"/>')
        parts.append(_text(left - 4, y + 4, f"{100 * rate:.0f}", "end"))
    parts += [
        _text(position(depth, 0)[0], height - bottom + 13, str(depth), "middle") for depth in range(1, deepest + 1)
    ]
    parts.append(_text((left + width) / 2, height - 3, "depth", "middle"))
    for number, (name, rates) in enumerate(lines):
        positions = [position(depth, rate) for depth, rate in enumerate(rates, start=1)]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in positions)
        parts.append(f'<polyline class="line line{number % 3}" points="{points}"/>')
        for depth, ((x, y), rate) in enumerate(zip(positions, rates, strict=True), start=1):
            parts.append(_marker(number, x, y, f"{name}: {100 * rate:.0f}% accepted up to depth {depth}"))
    return _svg(width, height, label, parts)


def tree(nodes: Sequence[dict[str, Any]], label: str) -> Markup:
    """Returns a draft tree from left to right, each node with the percentage of its drafted tokens accepted."""
    paths = {tuple(node["path"]): node for node in nodes}
    rows: dict[tuple[int, ...], float] = {}
    number = 0
    for path in sorted(paths):
        if not any(other[:-1] == path for other in paths):
            rows[path] = number
            number += 1
    for path in sorted(paths, key=lambda path: -len(path)):
        children = [rows[other] for other in paths if other[:-1] == path]
        if children:
            rows[path] = sum(children) / len(children)
    deepest = max(map(len, paths))
    across, down, radius = 36, 27, 12
    tops = [rows[path] for path in paths if len(path) == 1]
    rows[()] = sum(tops) / len(tops)

    def position(path: tuple[int, ...]) -> tuple[float, float]:
        return 16 + across * len(path), 16 + down * rows[path]

    parts = []
    for path in paths:
        (x1, y1), (x2, y2) = position(path[:-1]), position(path)
        parts.append(f'<line class="edge" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')
    x, y = position(())
    parts.append(f'<rect class="root" x="{x - 5:.1f}" y="{y - 5:.1f}" width="10" height="10"/>')
    for path, node in paths.items():
        (x, y), rate = position(path), node["accepted"] / node["drafted"]
        title = f"sibling {path[-1] + 1} at depth {len(path)}: drafted {node['drafted']}, accepted {node['accepted']}"
        circle = f'cx="{x:.1f}" cy="{y:.1f}" r="{radius}"'
        parts.append(f'<circle class="base" {circle}/>')
        style = f"fill-opacity:{0.05 + 0.5 * rate:.2f}"
        parts.append(f'<circle class="node" {circle} style="{style}"><title>{title}</title></circle>')
        parts.append(_text(x, y + 4, f"{100 * rate:.0f}", "middle"))
    return _svg(32 + across * deepest, 32 + down * max(number - 1, 0), label, parts)


def _steps(least: float, most: float) -> list[float]:
    """Returns up to six round numbers between the two."""
    step = next(step for step in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, most) if (most - least) / step <= 6)
    return [round(step * at, 2) for at in range(math.ceil(least / step), math.floor(most / step) + 1)]


def _room(x: float, y: float, width: float, taken: Sequence[Box]) -> Box:
    """Returns the free box nearest to the point for a label of this width, preferring its left and right side."""
    for away in range(9, HEIGHT, 4):
        for turn in (0, 6, 1, 11, 5, 7, 2, 10, 4, 8, 3, 9):
            across, down = away * math.cos(turn * math.pi / 6), away * math.sin(turn * math.pi / 6)
            left = x + across - (0 if across > 1 else width if across < -1 else width / 2)
            box = (left, y + down - 7, left + width, y + down + 7)
            is_inside = box[0] >= LEFT and box[2] <= WIDTH and box[1] >= 0 and box[3] <= HEIGHT - BOTTOM
            if is_inside and not any(_overlap(box, other) for other in taken):
                return box
    return (max(LEFT, min(x + 9, WIDTH - width)), y - 7, x + 9 + width, y + 7)


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _marker(number: int, x: float, y: float, text: str) -> str:
    title = f"<title>{escape(text)}</title>"
    shape = SHAPES[number % len(SHAPES)]
    if shape == "circle":
        return f'<circle class="mark mark0" cx="{x:.1f}" cy="{y:.1f}" r="3.5">{title}</circle>'
    if shape == "square":
        return f'<rect class="mark mark1" x="{x - 3:.1f}" y="{y - 3:.1f}" width="6" height="6">{title}</rect>'
    points = f"{x:.1f},{y - 4:.1f} {x - 4:.1f},{y + 3:.1f} {x + 4:.1f},{y + 3:.1f}"
    return f'<polygon class="mark mark2" points="{points}">{title}</polygon>'


def _rule(y: float, text: str) -> str:
    line = f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>'
    return line + _text(LEFT - 5, y + 4, text, "end")


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "plain") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> Markup:
    inner = "".join(parts)
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    return Markup(f'<svg role="img" aria-label="{escape(label)}" {size}>{inner}</svg>')
