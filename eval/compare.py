"""The bake-off: drafters, plain decoding and transformers' own `generate` on the same prompts, in one table."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from tqdm import tqdm

from data.prompts import Prompt
from draftsmith import Target
from draftsmith.core.stats import num_threads
from eval.bakeoff import forecast, machine
from eval.bakeoff.contenders import Contender, contenders, fingerprint
from eval.bakeoff.measure import DecodingRequest, Tally, measure, warm_up
from eval.bakeoff.optimal_transport import first_token_acceptance
from eval.bakeoff.results import Cell, Results, claim, publish
from eval.bakeoff.rows import added_up, row_of
from eval.bakeoff.settings import BakeoffSettings
from eval.plots.bakeoff import draw
from eval.report.page import write_report
from eval.report.recorded_texts import record_texts
from eval.report.table import header, table, to_csv

OTHERS = "others"


def compare(
    target: Target, prompts: Sequence[Prompt], artifacts: Sequence[Path], output: Path, settings: BakeoffSettings
) -> list[dict[str, Any]]:
    """Returns one row for each contender, temperature and batch size, and writes them as `bakeoff.*` in `output`.

    A comparison that was killed continues with what had been measured. Raises ValueError for an artifact that does
    not fit the target, too few prompts for a batch, or a folder that contains other files.
    """
    settings.check_prompts(len(prompts))
    with num_threads(settings.threads):
        competing = contenders(target, prompts, artifacts, settings)
        facts = _facts(target, prompts, settings)
        identity = facts | asdict(settings) | {"artifacts": [fingerprint(path) for path in artifacts]}
        identity |= {"prompts": [prompt.key for prompt in prompts], "fingerprint": target.fingerprint}
        claim(output)
        results = Results(output, identity)
        _measure(target, prompts, competing, results, settings)
        rows = [row | facts for row in _rows(prompts, competing, results, settings)]
        _add_optima(rows, prompts, competing, settings)
        _add_forecasts(rows, prompts, competing, results, settings)
        drafters = {one.contender.name: one.drafter for one in competing if one.family and not one.is_ablation}
        texts = record_texts(target, prompts, drafters, settings.max_new_tokens)
    markdown = "\n".join([header(rows, "markdown"), *table(rows, "markdown"), "", "![speed-up](bakeoff.png)", ""])
    publish(output, rows, texts=texts, markdown=markdown, csv=to_csv(rows), picture=lambda path: draw(rows, path))
    write_report(output)
    return rows


def _facts(target: Target, prompts: Sequence[Prompt], settings: BakeoffSettings) -> dict[str, Any]:
    """Returns what holds for every row."""
    return {
        "target": Path(target.name).name if Path(target.name).is_dir() else target.name,
        "dtype": str(target.dtype).removeprefix("torch."),
        "hardware": machine.hardware(target.device),
        "threads": torch.get_num_threads(),
        "commit": machine.commit(),
        "torch": torch.__version__,
        "transformers_version": transformers.__version__,
        "num_prompts": len(prompts),
        "max_new_tokens": settings.max_new_tokens,
        "rounds": settings.rounds,
    }


def _interval() -> float:
    """Returns seconds between updates of a progress bar: where there is no terminal each is a line of its own."""
    return 0.5 if sys.stderr.isatty() else 20


def by_category(prompts: Sequence[Prompt], batch_size: int) -> dict[str, list[Prompt]]:
    """Returns the prompts of each category that fills a batch, those of smaller ones together; "" if there are none."""
    groups: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault(prompt.category or OTHERS, []).append(prompt)
    large = {name: group for name, group in groups.items() if len(group) >= batch_size and name != OTHERS}
    left = [prompt for prompt in prompts if prompt.category not in large]
    if not large:
        return {"": left}
    return large | ({OTHERS: left} if len(left) >= batch_size else {})


def _cells(prompts: Sequence[Prompt], settings: BakeoffSettings) -> list[Cell]:
    """Returns (round, temperature, batch size, category) in the order in which they are measured."""
    return [
        (number, temperature, size, category)
        for number in range(settings.rounds)
        for temperature in settings.temperatures
        for size in settings.batch_sizes
        for category in by_category(prompts, size)
    ]


def _asks(prompts: Sequence[Prompt], cell: Cell, settings: BakeoffSettings) -> list[DecodingRequest]:
    """Returns a cell's full batches."""
    number, temperature, batch_size, category = cell
    ids = [prompt.ids for prompt in by_category(prompts, batch_size)[category]]
    return [
        DecodingRequest(
            prompts=ids[begin : begin + batch_size],
            temperature=temperature,
            max_new_tokens=settings.max_new_tokens,
            seed=settings.seed + number * len(prompts) + begin,
        )
        for begin in range(0, len(ids) - batch_size + 1, batch_size)
    ]


def _measure(
    target: Target,
    prompts: Sequence[Prompt],
    competing: Sequence[Contender],
    results: Results,
    settings: BakeoffSettings,
) -> None:
    """Measures the cells that are missing."""
    cells = _cells(prompts, settings)
    num_rows = {
        cell: cell[2] * len(_asks(prompts, cell, settings)) * sum(entry.competes_at(cell[1]) for entry in competing)
        for cell in cells
    }
    missing = [cell for cell in cells if cell not in results.cells]
    num_done = sum(num_rows.values()) - sum(num_rows[cell] for cell in missing)
    if num_done:
        print(f"{results.path.parent}: continuing; {len(cells) - len(missing)} of {len(cells)} parts are there")
    total = sum(num_rows.values())
    options = {"desc": "bake-off", "unit": "prompt", "smoothing": 0, "mininterval": _interval()}
    with tqdm(total=total, initial=num_done, **options) as bar:
        for cell in missing:
            number, temperature, batch_size, category = cell
            where = [f"temperature {temperature:g}", f"batch {batch_size}", *([category] if category else [])]
            bar.set_postfix_str(", ".join(where), refresh=False)
            contenders = [entry.contender for entry in competing if entry.competes_at(temperature)]
            asks = _asks(prompts, cell, settings)
            for contender in contenders:
                warm_up(contender, asks[0].prompts, temperature)
            results.add(cell, measure(contenders, asks, target.device, first=number, done=bar.update))


def _tallies(
    groups: Iterable[str], temperature: float, size: int, results: Results, settings: BakeoffSettings
) -> dict[str, list[dict[str, Tally]]]:
    """Returns, of each category, the tallies of all rounds."""
    return {
        name: [results.cells[number, temperature, size, name] for number in range(settings.rounds)] for name in groups
    }


def _wholes(tallies: dict[str, list[dict[str, Tally]]]) -> list[dict[str, Tally]]:
    """Returns them of all categories together."""
    return [added_up(parts) for parts in zip(*tallies.values(), strict=True)]


def _rows(
    prompts: Sequence[Prompt], competing: Sequence[Contender], results: Results, settings: BakeoffSettings
) -> list[dict[str, Any]]:
    rows = []
    for temperature in settings.temperatures:
        for size in settings.batch_sizes:
            groups = by_category(prompts, size)
            tallies = _tallies(groups, temperature, size, results, settings)
            whole = _wholes(tallies)
            for entry in competing:
                if entry.competes_at(temperature):
                    shares = {name: row_of(entry, temperature, size, found) for name, found in tallies.items() if name}
                    row = row_of(entry, temperature, size, whole)
                    row["speedup_by_category"] = {name: share["speedup"] for name, share in shares.items()}
                    rows.append(row | {"prompts_by_category": {name: len(groups[name]) for name in shares}})
    return rows


def _add_optima(
    rows: list[dict[str, Any]], prompts: Sequence[Prompt], competing: Sequence[Contender], settings: BakeoffSettings
) -> None:
    """Adds, untimed, how close each verifier comes to the best that any could do."""
    ids = [prompt.ids for prompt in prompts[: max(8, *settings.batch_sizes)]]
    sampled = [temperature for temperature in settings.temperatures if temperature > 0]
    given = {"max_new_tokens": settings.max_new_tokens, "seed": settings.seed}
    best = {
        (entry.contender.name, temperature): first_token_acceptance(
            entry.drafter, ids, verifier=entry.verifier, temperature=temperature, **given
        )
        for entry in competing
        for temperature in sampled
        if entry.drafter is not None and entry.is_lossless and entry.length == "auto" and entry.gate is None
    }
    for row in rows:
        found = best.get((row["drafter"], row["temperature"])) or (None, None)
        row["first_accepted"], row["first_optimum"] = found


def _add_forecasts(
    rows: list[dict[str, Any]],
    prompts: Sequence[Prompt],
    competing: Sequence[Contender],
    results: Results,
    settings: BakeoffSettings,
) -> None:
    """Adds the speed-ups to expect of each drafter's parts, and where it would stop paying."""
    sizes = {*settings.batch_sizes, *settings.forecast_sizes} if settings.forecast_sizes else set()
    drafting = [entry for entry in competing if sizes and entry.drafter is not None]
    wholes = {
        (temperature, size): _wholes(_tallies(by_category(prompts, size), temperature, size, results, settings))
        for temperature, size in product(settings.temperatures, settings.batch_sizes)
    }
    costs = {
        entry.drafter.target: forecast.VerificationCosts(entry.drafter.target, [prompt.ids for prompt in prompts])
        for entry in drafting
    }
    found: dict[tuple[str, float], dict[int, float]] = {}
    measured: dict[tuple[str, float, int], float] = {}
    asked = [(entry, at) for entry in drafting for at in settings.temperatures if entry.competes_at(at)]
    for entry, temperature in tqdm(asked, desc="forecasts", unit="drafter", delay=2, mininterval=_interval()):
        name = entry.contender.name
        plain, drafted = (
            {size: [of[one] for of in wholes[temperature, size]] for size in settings.batch_sizes}
            for one in (entry.reference, name)
        )
        priced = costs[entry.drafter.target]
        for size in settings.batch_sizes:
            pairs = zip(plain[size], drafted[size], strict=True)
            measured[name, temperature, size] = median(
                forecast.predict_static_batching(one, other, size, priced) for one, other in pairs
            )
        found[name, temperature] = forecast.predict_by_batch_size(plain, drafted, sizes, priced)
    for row in rows:
        by_size = found.get((row["drafter"], row["temperature"]), {})
        row["predicted_speedup"] = measured.get((row["drafter"], row["temperature"], row["batch_size"]))
        row["predicted_by_batch_size"] = {str(size): speedup for size, speedup in by_size.items()}
        row["break_even_batch"] = forecast.break_even(by_size)
