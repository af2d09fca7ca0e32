"""The bake-off: drafters, plain decoding and transformers' `generate` on the same prompts, in one table."""

import sys
from collections.abc import Iterable, Mapping, Sequence
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
from draftsmith.inputs.generation_config import described, parse_config
from draftsmith.length.costs import num_threads
from eval import hardware
from eval.bakeoff import forecast
from eval.bakeoff.contenders import PLAIN, Contender, contenders, fingerprint, left_out
from eval.bakeoff.measure import DecodingRequest, Tally, draftsmith_method, measure, warm_up
from eval.bakeoff.optimal_transport import first_token_acceptance
from eval.bakeoff.results import Cell, Results, claimed, publish
from eval.bakeoff.rounding import MAX_PROMPTS, GapReader, measured_rounding
from eval.bakeoff.rows import row_of, sum_categories
from eval.bakeoff.settings import BakeoffSettings
from eval.plots.bakeoff import draw
from eval.report.page import write_report
from eval.report.recorded_texts import record_texts
from eval.report.table import header, table, to_csv

OTHERS = "others"


def compare(
    target: Target,
    prompts: Sequence[Prompt],
    artifacts: Sequence[Path],
    output: Path,
    settings: BakeoffSettings,
    *,
    notes: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Returns one row per contender, temperature and batch size, and writes them as `bakeoff.*` into `output`.

    `notes` are further conditions that every row repeats; `left_out` among them says why a drafter is not compared.
    A drafter that cannot draft at a temperature is left out there, with its reason. An interrupted comparison continues
    from its measured parts. Raises ValueError for an artifact that does not fit the target, too few prompts for a
    batch, or a folder that contains other files or that another run uses, and if no artifact can draft.
    """
    settings.check_prompts(len(prompts))
    if settings.batch_invariant != target.batch_invariant:
        raise ValueError(
            f"batch_invariant is {settings.batch_invariant} in the settings and {target.batch_invariant} in the target;"
            " set target.batch_invariant alike"
        )
    with num_threads(settings.threads):
        competing = contenders(target, prompts, artifacts, settings)
        conditions = _conditions(target, prompts, settings)
        own_settings = asdict(settings)
        for choice in ("batch_invariant", "continuous_batching"):
            if not own_settings[choice]:
                del own_settings[choice]  # comparisons begun before there was a choice go on
        identity = conditions | own_settings | {"artifacts": [fingerprint(path) for path in artifacts]}
        identity |= {"prompts": [prompt.key for prompt in prompts], "fingerprint": target.fingerprint}
        with claimed(output):
            results = Results(output, identity)
            _measure(target, prompts, competing, results, settings)
            _measure_rounding(target, prompts, competing, results, settings)
            described = conditions | dict(notes or {})
            described["left_out"] = {
                **described.get("left_out", {}),
                **_left_out(target, settings),
                **left_out(competing, settings),
            }
            rows = [row | described for row in _rows(prompts, competing, results, settings)]
            _add_first_token_acceptance(rows, prompts, competing, settings)
            _add_forecasts(rows, prompts, competing, results, settings)
            drafters = {
                one.method.name: one.drafter
                for one in competing
                if one.family and not one.is_ablation and 0 not in one.left_out_at
            }
            config = parse_config(settings.generation_config)
            texts = record_texts(target, prompts, drafters, settings.max_new_tokens, config)
            markdown = "\n".join(
                [header(rows, "markdown"), *table(rows, "markdown"), "", "![speed-up](bakeoff.png)", ""]
            )
            publish(output, rows, texts=texts, markdown=markdown, csv=to_csv(rows), plot=lambda path: draw(rows, path))
            write_report(output)
    return rows


def _conditions(target: Target, prompts: Sequence[Prompt], settings: BakeoffSettings) -> dict[str, Any]:
    """Returns the conditions of the measurement, which every row repeats."""
    return {
        "target": Path(target.name).name if Path(target.name).is_dir() else target.name,
        "dtype": str(target.dtype).removeprefix("torch."),
        "hardware": hardware.describe(target.device, target.dtype),
        "threads": torch.get_num_threads(),
        "commit": hardware.commit(),
        "torch": torch.__version__,
        "transformers_version": transformers.__version__,
        "num_prompts": len(prompts),
        "max_new_tokens": settings.max_new_tokens,
        "rounds": settings.rounds,
        "generation_config": described(target, parse_config(settings.generation_config)),
        **({"batch_invariant": True} if settings.batch_invariant else {}),
        **({"continuous_batching": True} if settings.continuous_batching else {}),
    }


def _left_out(target: Target, settings: BakeoffSettings) -> dict[str, str]:
    """Returns why transformers' loop and assisted generation are missing from some tables."""
    larger = [size for size in settings.batch_sizes if size > 1]
    at_batch = f"at batch {' and '.join(map(str, larger))}"
    found = {}
    if larger and settings.continuous_batching:
        found[f"transformers' loop {at_batch}"] = "the rows of its batches begin together"
    if settings.assisted and target.is_encoder_decoder:
        found["transformers' assisted generation"] = "timed for causal targets only"
    elif settings.assisted and larger:
        found[f"transformers' assisted generation {at_batch}"] = "it takes one prompt at a time"
    return found


def _interval() -> float:
    """Returns the seconds between progress-bar updates; without a terminal each update is a new line."""
    return 0.5 if sys.stderr.isatty() else 20


def by_category(prompts: Sequence[Prompt], batch_size: int) -> dict[str, list[Prompt]]:
    """Returns the prompts of each category that fills a batch, and those of smaller categories together.

    If no category fills a batch, all prompts are in the category "".
    """
    groups: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault(prompt.category or OTHERS, []).append(prompt)
    large = {name: group for name, group in groups.items() if len(group) >= batch_size and name != OTHERS}
    rest = [prompt for prompt in prompts if prompt.category not in large]
    if not large:
        return {"": rest}
    return large | ({OTHERS: rest} if len(rest) >= batch_size else {})


def _groups(prompts: Sequence[Prompt], batch_size: int, settings: BakeoffSettings) -> dict[str, list[Prompt]]:
    """Returns the prompts that are decoded one after the other: by category, or all if batches are kept full."""
    return {"": list(prompts)} if settings.is_stream(batch_size) else by_category(prompts, batch_size)


def _cells(prompts: Sequence[Prompt], settings: BakeoffSettings) -> list[Cell]:
    """Returns the cells (round, temperature, batch size, category) in the order of measurement."""
    return [
        (number, temperature, size, category)
        for number in range(settings.rounds)
        for temperature in settings.temperatures
        for size in settings.batch_sizes
        for category in _groups(prompts, size, settings)
    ]


def _requests(prompts: Sequence[Prompt], cell: Cell, settings: BakeoffSettings) -> list[DecodingRequest]:
    """Returns a cell's full batches."""
    number, temperature, batch_size, category = cell
    ids = [prompt.ids for prompt in _groups(prompts, batch_size, settings)[category]]
    is_stream = settings.is_stream(batch_size)
    num_together = len(ids) if is_stream else batch_size
    return [
        DecodingRequest(
            prompts=ids[begin : begin + num_together],
            temperature=temperature,
            max_new_tokens=settings.max_new_tokens,
            seed=settings.seed + number * len(prompts) + begin,
            stream_size=batch_size if is_stream else 0,
        )
        for begin in range(0, len(ids) - num_together + 1, num_together)
    ]


def _measure(
    target: Target,
    prompts: Sequence[Prompt],
    competing: Sequence[Contender],
    results: Results,
    settings: BakeoffSettings,
) -> None:
    """Measures the cells that have no results yet."""
    cells = _cells(prompts, settings)
    num_rows = {
        cell: sum(len(request.prompts) for request in _requests(prompts, cell, settings))
        * sum(one.competes_at(cell[1], cell[2]) for one in competing)
        for cell in cells
    }
    missing = [cell for cell in cells if cell not in results.cells]
    num_done = sum(num_rows.values()) - sum(num_rows[cell] for cell in missing)
    if num_done:
        print(f"{results.path.parent}: continuing; {len(cells) - len(missing)} of {len(cells)} parts are measured")
    total = sum(num_rows.values())
    gaps_of = GapReader(_targets(target, competing), parse_config(settings.generation_config))
    is_warm = set[tuple[float, int]]()
    options = {"desc": "bake-off", "unit": "prompt", "smoothing": 0, "mininterval": _interval()}
    with tqdm(total=total, initial=num_done, **options) as bar:
        for cell in missing:
            number, temperature, batch_size, category = cell
            status = [f"temperature {temperature:g}", f"batch {batch_size}", *([category] if category else [])]
            bar.set_postfix_str(", ".join(status), refresh=False)
            methods = [one.method for one in competing if one.competes_at(temperature, batch_size)]
            requests = _requests(prompts, cell, settings)
            for method in () if (temperature, batch_size) in is_warm else methods:
                warm_up(method, requests[0].prompts, temperature)
            is_warm.add((temperature, batch_size))
            tallies = measure(methods, requests, target.device, first=number, gaps_of=gaps_of, on_progress=bar.update)
            results.add(cell, tallies)


def _targets(target: Target, competing: Sequence[Contender]) -> dict[str, Target]:
    """Returns the target of each method that others are compared with."""
    tuned = {one.reference: one.drafter.target for one in competing if one.drafter is not None}
    return tuned | {PLAIN: target}


def _measure_rounding(
    target: Target,
    prompts: Sequence[Prompt],
    competing: Sequence[Contender],
    results: Results,
    settings: BakeoffSettings,
) -> None:
    """Measures rounding by reference method and batch size, where greedy rows differ from the reference's.

    Forwards are as wide as 2, 4, 8, ... tokens up to the widest draft.
    """
    for size in settings.batch_sizes if 0 in settings.temperatures else ():
        groups = _groups(prompts, size, settings)
        for reference, own_target in _targets(target, competing).items():
            if (reference, size) in results.roundings:
                continue
            names = [one.method.name for one in competing if one.reference == reference and one.competes_at(0, size)]
            tallies = [
                rounds[name]
                for parts in _tallies(groups, 0.0, size, results, settings).values()
                for rounds in parts
                for name in names
            ]
            if not any(tally.num_different for tally in tallies):
                continue
            widest = max((nodes + 1 for tally in tallies for _, nodes, _ in tally.verified), default=1)
            widths = [2**power for power in range(1, max(widest - 1, 1).bit_length() + 1)]
            batches = [prompts[begin : begin + size] for begin in range(0, max(size, MAX_PROMPTS) - size + 1, size)]
            batches = [batch for batch in batches if len(batch) == size]
            changes = []
            options = {"desc": f"rounding at batch {size}", "unit": "forward width", "mininterval": _interval()}
            with tqdm(total=len(batches) * len(widths), **options) as bar:
                for batch in batches:
                    ids = [prompt.ids for prompt in batch]
                    request = DecodingRequest(
                        prompts=ids, temperature=0.0, max_new_tokens=settings.max_new_tokens, seed=settings.seed
                    )
                    config = parse_config(settings.generation_config)
                    texts = draftsmith_method(own_target, config=config)(request).rows
                    changes.append(measured_rounding(own_target, ids, texts, widths, config, on_width=bar.update))
            results.add_rounding(reference, size, max(changes))


def _tallies(
    categories: Iterable[str], temperature: float, size: int, results: Results, settings: BakeoffSettings
) -> dict[str, list[dict[str, Tally]]]:
    """Returns the tallies of each category, one entry per round."""
    return {
        name: [results.cells[number, temperature, size, name] for number in range(settings.rounds)]
        for name in categories
    }


def _totals(tallies: dict[str, list[dict[str, Tally]]]) -> list[dict[str, Tally]]:
    """Returns the tallies of each round, summed over categories."""
    return [sum_categories(parts) for parts in zip(*tallies.values(), strict=True)]


def _rows(
    prompts: Sequence[Prompt],
    competing: Sequence[Contender],
    results: Results,
    settings: BakeoffSettings,
) -> list[dict[str, Any]]:
    """Returns the rows of the table, without forecasts."""
    rows = []
    for temperature, size in product(settings.temperatures, settings.batch_sizes):
        groups = _groups(prompts, size, settings)
        tallies = _tallies(groups, temperature, size, results, settings)
        totals = _totals(tallies)
        for contender in competing:
            if contender.competes_at(temperature, size):
                row = row_of(contender, temperature, size, totals, results.roundings.get((contender.reference, size)))
                row["speedup_by_category"] = {
                    name: row_of(contender, temperature, size, rounds)["speedup"]
                    for name, rounds in tallies.items()
                    if name
                }
                row["prompts_by_category"] = {name: len(groups[name]) for name in row["speedup_by_category"]}
                rows.append(row)
    return rows


def _add_first_token_acceptance(
    rows: list[dict[str, Any]], prompts: Sequence[Prompt], competing: Sequence[Contender], settings: BakeoffSettings
) -> None:
    """Adds the acceptance rate of first tokens and its optimal-transport bound, measured untimed."""
    ids = [prompt.ids for prompt in prompts[: max(8, *settings.batch_sizes)]]
    sampled = [temperature for temperature in settings.temperatures if temperature > 0]
    options: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens, "seed": settings.seed}
    options["generation_config"] = parse_config(settings.generation_config)
    rates = {
        (one.method.name, temperature): first_token_acceptance(
            one.drafter, ids, verifier=one.used_verifier, temperature=temperature, **options
        )
        for one in competing
        for temperature in sampled
        if one.drafter is not None and one.is_lossless and one.length == "auto" and one.confidence_threshold is None
        if one.competes_at(temperature, 1)
    }
    for row in rows:
        rate, bound = rates.get((row["drafter"], row["temperature"])) or (None, None)
        row["first_accepted"], row["first_optimum"] = rate, bound


def _add_forecasts(
    rows: list[dict[str, Any]],
    prompts: Sequence[Prompt],
    competing: Sequence[Contender],
    results: Results,
    settings: BakeoffSettings,
) -> None:
    """Adds predicted speed-ups and the batch size from which each drafter is predicted to slow decoding down."""
    sizes = {*settings.batch_sizes, *settings.forecast_sizes} if settings.forecast_sizes else set()
    if settings.generation_config:
        sizes = set()  # forecasts do not know what logits processors cost
    with_drafter = [contender for contender in competing if sizes and contender.drafter is not None]
    totals = {
        (temperature, size): _totals(_tallies(_groups(prompts, size, settings), temperature, size, results, settings))
        for temperature, size in product(settings.temperatures, settings.batch_sizes)
    }
    costs = {
        one.drafter.target: forecast.VerificationCosts(one.drafter.target, [prompt.ids for prompt in prompts])
        for one in with_drafter
    }
    predicted: dict[tuple[str, float, int], float] = {}
    by_batch_size: dict[tuple[str, float], dict[int, float]] = {}
    pairs = [(one, at) for one in with_drafter for at in settings.temperatures if one.competes_at(at, 1)]
    options = {"desc": "forecasts", "unit": "batch size", "delay": 2, "mininterval": _interval()}
    with tqdm(total=len(pairs) * len(sizes), **options) as bar:
        for one, temperature in pairs:
            name = one.method.name
            plain, drafted = (
                {size: [tallies[method] for tallies in totals[temperature, size]] for size in settings.batch_sizes}
                for method in (one.reference, name)
            )
            target_costs = costs[one.drafter.target]
            for size in settings.batch_sizes:
                predicted[name, temperature, size] = median(
                    forecast.predict_static_batching(*tallies, size, target_costs)
                    for tallies in zip(plain[size], drafted[size], strict=True)
                )
            for size in sorted(sizes):
                speedup = forecast.predict_over_rounds(plain, drafted, size, target_costs)
                by_batch_size.setdefault((name, temperature), {})[size] = speedup
                bar.update()
    for row in rows:
        speedups = by_batch_size.get((row["drafter"], row["temperature"]), {})
        row["predicted_speedup"] = predicted.get((row["drafter"], row["temperature"], row["batch_size"]))
        row["predicted_by_batch_size"] = {str(size): speedup for size, speedup in speedups.items()}
        row["break_even_batch"] = forecast.break_even(speedups)
