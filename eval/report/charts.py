"""Charts of the report as inline SVG: nothing in them is told by colour alone, and the page's style sheet colours them.

Sizes are in pixels of a drawing that is as wide as a phone and a quarter, so that its text stays readable there.
"""

import math
from collections.abc import Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT = 460, 400
LEFT, RIGHT, TOP, BOTTOM = 42, 14, 14, 40
LETTER = 7.2
"""Width of a letter of a label."""
TICKS_S = (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000)
SHAPES = ("circle", "square", "triangle")
Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


def against_cost(points: Sequence[tuple[str, float, float]], label: str) -> str:
    """Returns points (name, seconds of training, speed-up), seconds on a scale of powers; slow-downs are hollow."""
    seconds = [max(second, 1.0) for _, second, _ in points]
    low, high = math.log(min(seconds) / 1.6), math.log(max(seconds) * 1.6)
    worst, best = (pick(1.0, *(speedup for _, _, speedup in points)) for pick in (min, max))
    least, most = worst - 0.12 * (best - worst) - 0.05, best + 0.08 * (best - worst) + 0.05

    def place(second: float, speedup: float) -> tuple[float, float]:
        x = LEFT + (math.log(max(second, 1.0)) - low) / (high - low) * (WIDTH - LEFT - RIGHT)
        return x, HEIGHT - BOTTOM - (speedup - least) / (most - least) * (HEIGHT - BOTTOM - TOP)

    parts = [_rule(place(1, at)[1], f"{at:g}x") for at in _steps(least, most)]
    for tick in TICKS_S:
        if low <= math.log(tick) <= high:
            parts.append(_text(place(tick, 1)[0], HEIGHT - BOTTOM + 15, f"{tick:,}", "middle"))
    parts.append(_text(WIDTH / 2, HEIGHT - 6, "seconds of training", "middle"))
    y = place(1, 1)[1]
    parts.append(f'<line class="even" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
    taken: list[Box] = []
    for _, second, speedup in points:
        x, y = place(second, speedup)
        taken.append((x - 6, y - 6, x + 6, y + 6))
    # The outermost have most room beside them: labels of the others go where there is some left.
    for name, second, speedup in sorted(points, key=lambda point: -abs(point[2] - 1)):
        x, y = place(second, speedup)
        box = _room(x, y, LETTER * len(name), taken)
        taken.append(box)
        near_x, near_y = min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3])
        if math.dist((x, y), (near_x, near_y)) > 12:
            parts.append(f'<line class="lead" x1="{x:.1f}" y1="{y:.1f}" x2="{near_x:.1f}" y2="{near_y:.1f}"/>')
        kind = "faster" if round(speedup, 2) >= 1 else "slower"
        told = f"{name}: {speedup:.2f}x, {second:,.0f} s of training"
        parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{escape(told)}</title></circle>')
        parts.append(_text(box[0], box[3] - 3, name, kind="label"))
    return _svg(WIDTH, HEIGHT, label, parts)


def by_depth(lines: Sequence[tuple[str, Sequence[float]]], label: str) -> str:
    """Returns shares from 0 to 1 at depth 1, 2, ..., a line for each name, told apart by dashes and markers."""
    width, height, left, bottom = 230, 130, 30, 28
    deepest = max(len(shares) for _, shares in lines)
    step = (width - left - 12) / max(deepest, 2)

    def place(depth: int, share: float) -> tuple[float, float]:
        return left + step * (depth - 0.5), height - bottom - share * (height - bottom - 12)

    parts = []
    for share in (0.0, 0.5, 1.0):
        y = place(1, share)[1]
        parts.append(f'<line class="grid" x1="{left}" y1="{y:.1f}" x2="{width - 4}" y2="{y:.1f}"/>')
        parts.append(_text(left - 4, y + 4, f"{100 * share:.0f}", "end"))
    parts += [_text(place(depth, 0)[0], height - bottom + 13, str(depth), "middle") for depth in range(1, deepest + 1)]
    parts.append(_text((left + width) / 2, height - 3, "depth", "middle"))
    for number, (name, shares) in enumerate(lines):
        places = [place(depth, share) for depth, share in enumerate(shares, start=1)]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline class="line line{number % 3}" points="{points}"/>')
        for depth, ((x, y), share) in enumerate(zip(places, shares, strict=True), start=1):
            told = f"{name}: {100 * share:.0f}% accepted to depth {depth}"
            parts.append(_marker(number, x, y, told))
    return _svg(width, height, label, parts)


def tree(nodes: Sequence[dict[str, Any]], label: str) -> str:
    """Returns a draft's places from left to right, each with the per cent of its drafts that were accepted."""
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

    def place(path: tuple[int, ...]) -> tuple[float, float]:
        return 16 + across * len(path), 16 + down * rows[path]

    parts = []
    for path in paths:
        (x1, y1), (x2, y2) = place(path[:-1]), place(path)
        parts.append(f'<line class="edge" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')
    x, y = place(())
    parts.append(f'<rect class="root" x="{x - 5:.1f}" y="{y - 5:.1f}" width="10" height="10"/>')
    for path, node in paths.items():
        (x, y), share = place(path), node["accepted"] / node["drafted"]
        told = f"choice {path[-1] + 1} at depth {len(path)}: drafted {node['drafted']}, accepted {node['accepted']}"
        circle = f'cx="{x:.1f}" cy="{y:.1f}" r="{radius}"'
        parts.append(f'<circle class="base" {circle}/>')
        style = f"fill-opacity:{0.05 + 0.5 * share:.2f}"
        parts.append(f'<circle class="node" {circle} style="{style}"><title>{told}</title></circle>')
        parts.append(_text(x, y + 4, f"{100 * share:.0f}", "middle"))
    return _svg(32 + across * deepest, 32 + down * max(number - 1, 0), label, parts)


def _steps(least: float, most: float) -> list[float]:
    """Returns round numbers between the two, six at most."""
    step = next(step for step in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, most) if (most - least) / step <= 6)
    return [round(step * at, 2) for at in range(math.ceil(least / step), math.floor(most / step) + 1)]


def _room(x: float, y: float, width: float, taken: Sequence[Box]) -> Box:
    """Returns where a label of a point fits, the nearest place first and those at its sides before others."""
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


def _marker(number: int, x: float, y: float, told: str) -> str:
    title = f"<title>{escape(told)}</title>"
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


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    inner = "".join(parts)
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    return f'<svg role="img" aria-label="{escape(label)}" {size}>{inner}</svg>'
