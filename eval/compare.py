"""The bake-off: drafters, plain decoding and transformers' own `generate` on the same prompts, in one table."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from tqdm import tqdm

import draftsmith
from data.prompts import Prompt
from data.shards import hash_files
from draftsmith import Target, length, verify
from draftsmith.artifact import read_manifest
from draftsmith.gate import Gated
from draftsmith.stats import num_threads
from eval import machine
from eval.measure import Ask, Contender, Tally, add_up, measure, own_loop, transformers_loop, warm_up
from eval.oracle import first_token
from eval.plots import draw
from eval.results import Cell, Results, claim, publish
from eval.table import header, table, to_csv

PLAIN, TRANSFORMERS = "plain", "transformers"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much is decoded, and under which laws."""

    temperatures: tuple[float, ...] = (0.0, 1.0)
    """0 is greedy."""
    batch_sizes: tuple[int, ...] = (1, 8)
    """Prompts decoded at once."""
    rounds: int = 3
    """Times that everything is decoded; speed-ups are medians over rounds."""
    max_new_tokens: int = 64
    """After each prompt."""
    verifiers: tuple[str, ...] = ()
    """Further rows for each drafter, with these verifiers in place of the default lossless ones."""
    lengths: tuple[str, ...] = ()
    """Further rows for each drafter, with these policies of draftsmith/length.py in place of its own."""
    gates: tuple[float, ...] = ()
    """Further rows for each drafter, which drafts nothing where the target is less confident than this."""
    seed: int = 0
    """Of what is sampled."""
    threads: int = 1
    """CPU threads, 0 for torch's own choice; a small target is fastest and steadiest on one."""

    def __post_init__(self) -> None:
        for name in ("rounds", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.temperatures or not all(0 <= t < float("inf") for t in self.temperatures):
            raise ValueError(f"temperatures are {list(self.temperatures)}; each must be 0 or a positive number")
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ValueError(f"batch sizes are {list(self.batch_sizes)}; each must be at least 1")
        if self.threads < 0:
            raise ValueError(f"threads is {self.threads}; it must be 0 or more")
        for name in self.verifiers:
            verify.find(name)
        for name in self.lengths:
            length.make(name)
        for threshold in self.gates:
            if not 0 < threshold < 1:
                raise ValueError(f"gates are {list(self.gates)}; each must lie between 0 and 1")

    def check_prompts(self, num_prompts: int) -> None:
        """Raises ValueError if there are too few for a batch."""
        if num_prompts < max(self.batch_sizes):
            raise ValueError(f"batch size {max(self.batch_sizes)} needs as many prompts, and there are {num_prompts}")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A contender and what the table says of it beside its speed."""

    contender: Contender
    family: str | None = None
    """None where nothing drafts."""
    drafter: Any = None
    verifier: str = "auto"
    length: str = "auto"
    gate: float | None = None
    is_tuned: bool = False
    """Whether it decodes for a target that its drafter has tuned."""
    is_lossless: bool = True
    num_parameters: int = 0
    artifact_mb: float = 0.0
    train_s: float | None = 0.0
    """None where the manifest does not say."""

    def competes_at(self, temperature: float) -> bool:
        """At temperature 0 the law is one-hot, and every verifier keeps what "auto" does."""
        return temperature > 0 or self.verifier == "auto"

    @property
    def is_ablation(self) -> bool:
        """Whether its drafter has a row of its own, decoded otherwise."""
        return (self.verifier, self.length, self.gate) != ("auto", "auto", None)


def compare(
    target: Target, prompts: Sequence[Prompt], artifacts: Sequence[Path], output: Path, settings: Settings
) -> list[dict[str, Any]]:
    """Returns one row for each contender, temperature and batch size, and writes them as `bakeoff.*` in `output`.

    A comparison that was killed continues with what had been measured. Raises ValueError for an artifact that does
    not fit the target, too few prompts for a batch, or a folder that holds something else.
    """
    settings.check_prompts(len(prompts))
    with num_threads(settings.threads):
        entries = _entries(target, prompts, artifacts, settings)
        facts = _facts(target, prompts, settings)
        identity = facts | asdict(settings) | {"artifacts": [_fingerprint(path) for path in artifacts]}
        identity |= {"prompts": [prompt.key for prompt in prompts], "fingerprint": target.fingerprint}
        claim(output)
        results = Results(output, identity)
        _measure(target, prompts, entries, results, settings)
        best = _optima(prompts, entries, settings)
    rows = []
    for temperature in settings.temperatures:
        for batch_size in settings.batch_sizes:
            rounds = [results.cells[cell] for cell in _cells(settings) if cell[1:] == (temperature, batch_size)]
            for entry in entries:
                if entry.competes_at(temperature):
                    accepted, optimum = best.get((entry.contender.name, temperature)) or (None, None)
                    first = {"first_accepted": accepted, "first_optimum": optimum}
                    rows.append(_row(entry, temperature, batch_size, rounds) | first | facts)
    markdown = "\n".join([header(rows, "markdown"), *table(rows, "markdown"), "", "![speed-up](bakeoff.png)", ""])
    publish(output, rows, markdown=markdown, csv=to_csv(rows), picture=lambda path: draw(rows, path))
    return rows


def _entries(target: Target, prompts: Sequence[Prompt], artifacts: Sequence[Path], settings: Settings) -> list[Entry]:
    entries = [
        Entry(contender=Contender(name=PLAIN, decode=own_loop(target))),
        Entry(contender=Contender(name=TRANSFORMERS, decode=transformers_loop(target))),
    ]
    for name, path in zip(_names(artifacts), artifacts, strict=True):
        manifest = read_manifest(path)
        drafter = draftsmith.load(path, target)
        parameters: list[Tensor] = list(getattr(drafter, "parameters", list)())
        facts: dict[str, Any] = {
            "family": manifest["family"],
            "drafter": drafter,
            "is_tuned": drafter.target is not target,
            "num_parameters": sum(parameter.numel() for parameter in parameters),
            "artifact_mb": sum(file.stat().st_size for file in _files(path)) / 1e6,
            "train_s": manifest.get("train_s"),
        }
        reference = None
        if facts["is_tuned"]:
            # What it drafts for is decoded plainly too: its text is another than the target's own.
            reference = f"{name} ({PLAIN})"
            decode = own_loop(drafter.target)
            entries.append(Entry(contender=Contender(name=reference, decode=decode), is_tuned=True))
        contender = Contender(name=name, decode=own_loop(drafter.target, drafter), reference=reference, drafter=drafter)
        entries.append(Entry(contender=contender, **facts))
        for entry in _ablations(contender, drafter, facts, settings):
            try:
                warm_up(entry.contender, [prompts[0].ids], temperature=1.0)
                entries.append(entry)
            except ValueError as error:
                print(f"{entry.contender.name} is left out: {error}")
    return entries


def _ablations(own: Contender, drafter: Any, facts: dict[str, Any], settings: Settings) -> Iterator[Entry]:
    """Yields the drafter, in its own way contender `own`, with each other verifier, policy of lengths and gate."""

    def other(what: str, **options: Any) -> Contender:
        given = {"drafter": drafter} | options
        return replace(own, name=f"{own.name} ({what})", decode=own_loop(drafter.target, **given))

    for verifier in settings.verifiers:
        is_lossless = verify.find(verifier)[0].LOSSLESS
        yield Entry(contender=other(verifier, verifier=verifier), verifier=verifier, is_lossless=is_lossless, **facts)
    for policy in settings.lengths:
        yield Entry(contender=other(policy, policy=policy), length=policy, **facts)
    for gate in settings.gates:
        yield Entry(contender=other(f"gate {gate:g}", drafter=Gated(drafter, gate)), gate=gate, **facts)


def _names(artifacts: Sequence[Path]) -> list[str]:
    """Returns each folder's name, with its parent's before it where two are the same."""
    names = [path.resolve().name for path in artifacts]
    taken = [*names, PLAIN, TRANSFORMERS]
    longer = [
        name if taken.count(name) == 1 else f"{path.resolve().parent.name}/{name}"
        for name, path in zip(names, artifacts, strict=True)
    ]
    repeated = next((name for name in longer if longer.count(name) > 1), None)
    if repeated is not None:
        raise ValueError(f"two artifacts are called {repeated}; give them folders of different names")
    return longer


def _files(artifact: Path) -> list[Path]:
    return sorted(file for file in Path(artifact).rglob("*") if file.is_file())


def _fingerprint(artifact: Path) -> str:
    return hash_files(_files(artifact))


def _facts(target: Target, prompts: Sequence[Prompt], settings: Settings) -> dict[str, Any]:
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


def _cells(settings: Settings) -> list[Cell]:
    """Returns (round, temperature, batch size) in the order in which they are measured."""
    laws = [(temperature, size) for temperature in settings.temperatures for size in settings.batch_sizes]
    return [(number, *law) for number in range(settings.rounds) for law in laws]


def _measure(
    target: Target, prompts: Sequence[Prompt], entries: Sequence[Entry], results: Results, settings: Settings
) -> None:
    """Measures the cells that are missing."""
    ids = [prompt.ids for prompt in prompts]
    num_rows = {
        cell: len(ids) // cell[2] * cell[2] * sum(entry.competes_at(cell[1]) for entry in entries)
        for cell in _cells(settings)
    }
    missing = [cell for cell in _cells(settings) if cell not in results.cells]
    num_done = sum(num_rows.values()) - sum(num_rows[cell] for cell in missing)
    if num_done:
        print(f"{results.path.parent}: continuing; {len(num_rows) - len(missing)} of {len(num_rows)} parts are there")
    total = sum(num_rows.values())
    # Where there is no terminal every update is a line of its own.
    interval = 0.5 if sys.stderr.isatty() else 20
    with tqdm(total=total, initial=num_done, desc="bake-off", unit="prompt", smoothing=0, mininterval=interval) as bar:
        for number, temperature, batch_size in missing:
            bar.set_postfix_str(f"temperature {temperature:g}, batch {batch_size}", refresh=False)
            contenders = [entry.contender for entry in entries if entry.competes_at(temperature)]
            asks = [
                Ask(
                    prompts=ids[begin : begin + batch_size],
                    temperature=temperature,
                    max_new_tokens=settings.max_new_tokens,
                    seed=settings.seed + number * len(ids) + begin,
                )
                for begin in range(0, len(ids) - batch_size + 1, batch_size)
            ]
            for contender in contenders:
                warm_up(contender, asks[0].prompts, temperature)
            tallies = measure(contenders, asks, target.device, first=number, done=bar.update)
            results.add((number, temperature, batch_size), tallies)


def _optima(
    prompts: Sequence[Prompt], entries: Sequence[Entry], settings: Settings
) -> dict[tuple[str, float], tuple[float, float] | None]:
    """Returns, untimed, how close each verifier comes to the best that any could do, by contender and temperature."""
    ids = [prompt.ids for prompt in prompts[: max(8, *settings.batch_sizes)]]
    sampled = [temperature for temperature in settings.temperatures if temperature > 0]
    given = {"max_new_tokens": settings.max_new_tokens, "seed": settings.seed}
    return {
        (entry.contender.name, temperature): first_token(
            entry.drafter, ids, verifier=entry.verifier, temperature=temperature, **given
        )
        for entry in entries
        for temperature in sampled
        if entry.drafter is not None and entry.is_lossless and entry.length == "auto" and entry.gate is None
    }


def _row(entry: Entry, temperature: float, batch_size: int, rounds: Sequence[dict[str, Tally]]) -> dict[str, Any]:
    """Returns a contender's row of the table, from its tally of each round."""
    tallies = [tallies[entry.contender.name] for tallies in rounds]
    speeds = [tally.tokens / tally.seconds for tally in tallies]
    plain = [base[entry.contender.reference or PLAIN] for base in rounds]
    ratios = [speed / (base.tokens / base.seconds) for speed, base in zip(speeds, plain, strict=True)]
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75]).tolist()
    steps = sum(tally.steps for tally in tallies)
    drafted, accepted = (add_up(getattr(tally, name) for tally in tallies) for name in ("drafted", "accepted"))

    def per_step(name: str) -> float | None:
        """Returns milliseconds for a row's share of a step, None where nothing counted steps."""
        return float(np.median([getattr(tally, name) / tally.steps for tally in tallies])) if steps else None

    return {
        "drafter": entry.contender.name,
        "temperature": temperature,
        "batch_size": batch_size,
        "tau": sum(tally.tokens for tally in tallies) / steps if steps else 1.0,
        "tokens_per_s": float(np.median(speeds)),
        "speedup": middle,
        "speedup_low": low,
        "speedup_high": high,
        "identical": all(tally.is_identical for tally in tallies) if temperature == 0 else None,
        "lossless": entry.is_lossless,
        "tuned": entry.is_tuned,
        "draft_ms": per_step("draft_ms"),
        "verify_ms": per_step("verify_ms"),
        "commit_ms": per_step("commit_ms"),
        "accepted_per_depth": [a / d for a, d in zip(accepted, drafted, strict=True) if d],
        "num_parameters": entry.num_parameters,
        "artifact_mb": entry.artifact_mb,
        "train_s": entry.train_s,
        "family": entry.family,
        "verifier": entry.verifier,
        "length": entry.length,
        "gate": entry.gate,
        "is_ablation": entry.is_ablation,
    }
