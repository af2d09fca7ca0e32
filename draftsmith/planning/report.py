"""Prints a plan as one table, and writes its files: `printed`, `write`."""

from pathlib import Path
from typing import Any

from draftsmith.artifacts import json_text
from draftsmith.artifacts.files import atomic_folder
from draftsmith.planning.engines import Table
from draftsmith.planning.lengths import Plan

PLAN = "plan.json"


def printed(plan: Plan) -> str:
    """Returns the table of lengths by batch size and context, with the expected speed-up over plain decoding."""
    contexts = plan.grid.contexts
    rows = [["batch size", *(f"context {one:,}" for one in contexts), "all contexts"]]
    for size, length in plan.by_batch_size().items():
        cells = [_cell(plan, size, context) for context in contexts]
        rows.append([str(size), *cells, str(length) if length else "off"])
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def write(plan: Plan, tables: list[Table], folder: Path, facts: dict[str, Any]) -> None:
    """Writes every engine's table and plan.json, which has all measurements, into a folder that appears whole.

    Raises ValueError, writing nothing, if `folder` contains anything but an earlier plan.
    """
    record = facts | {
        "draft_length_by_batch_size": plan.by_batch_size(),
        "accepted_by_depth": {context: plan.accepted_by_depth(context) for context in plan.grid.contexts},
        "cells": [_record(plan, size, context) for context in plan.grid.contexts for size in plan.grid.batch_sizes],
        "engines": {one.engine: {"file": one.file, "notes": list(one.notes)} for one in tables},
    }
    with atomic_folder(folder, marker=PLAN) as staging:
        for one in tables:
            if one.file:
                (staging / one.file).write_text(one.text)
        (staging / PLAN).write_text(json_text.text_of(record, indent=1) + "\n")


def _cell(plan: Plan, size: int, context: int) -> str:
    best = plan.best(size, context)
    if best.length:
        return f"{best.length} ({plan.speedup(size, context, best.length):.2f}x, tau {best.tau:.2f})"
    others = [length for length in plan.lengths if length]
    most = max((plan.speedup(size, context, length) for length in others), default=0.0)
    return f"off ({most:.2f}x at best)" if others else "off"


def _record(plan: Plan, size: int, context: int) -> dict[str, Any]:
    measured, choices = plan.measured, plan.expected[size, context]
    return {
        "batch_size": size,
        "context": context,
        "draft_length": plan.best(size, context).length,
        "draft_ms": measured.draft_ms[size, context],
        "verify_ms": measured.verify_ms[size, context],
        "tau": {length: one.tau for length, one in choices.items()},
        "tokens_per_s": {length: one.tokens_per_s for length, one in choices.items()},
    }
