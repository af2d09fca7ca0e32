"""Measures every draft length at every batch size and context, and compares the fastest with what `plan` chooses.

    .venv/bin/python benchmarks/plan.py --target smollm2 --data prompts.jsonl --threads 2
    .venv/bin/python benchmarks/plan.py --target smollm2 --data prompts.jsonl --draft runs/distill --threads 2

The plan is made first, from its own measurements. Then the same texts are decoded with each length in turn, in batches
that are stopped once their rows have written enough tokens together, so that none is idle. Each cell shows tokens
per second by length, the planned length, and how far it is behind the fastest; the last line has the largest of these.
"""

import dataclasses
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import SimpleNamespace

import torch

import draftsmith
from draftsmith import Target
from draftsmith.core.drafter import Drafter, Session, Step
from draftsmith.core.fixed_shapes.chains import likeliest_chain
from draftsmith.core.tree import Draft
from draftsmith.drafters import lookup
from draftsmith.length.costs import Stopwatch, num_threads
from draftsmith.planning.contexts import contexts, read_texts
from draftsmith.planning.grid import Grid
from draftsmith.planning.lengths import Plan
from draftsmith.planning.measure import chains_only, measure
from eval import hardware
from trainers.training.settings import parse_settings


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
    """The pair, the texts and the grid."""

    data: str
    """Texts, as of `draftsmith plan`."""
    target: str = "smollm2"
    """A transformers folder, GGUF file, named target or hub name."""
    draft: str = ""
    """Folder of the drafter; prompt look-up if empty."""
    dtype: str = "bfloat16"
    """Precision of target and drafter."""
    batch_sizes: tuple[int, ...] = (1, 4, 8, 16)
    """Rows per batch; each must divide num_texts."""
    contexts: tuple[int, ...] = (128, 512, 1024)
    """Tokens before the drafts."""
    lengths: tuple[int, ...] = tuple(range(9))
    """Draft lengths, 0 for plain decoding."""
    num_texts: int = 16
    """Texts per context."""
    num_tokens: int = 48
    """New tokens per text."""
    repeats: int = 5
    """Timed rounds of each length in the plan."""
    rounds: int = 1
    """Number of times that everything is decoded."""
    threads: int = 2
    """CPU threads; 0 keeps torch's default."""


class Enough(Exception):
    """Ends a call of `generate`."""


class Stopped(Drafter):
    """Drafts chains of `length` tokens until the rows have `num_tokens` new ones together, and times that."""

    def __init__(self, drafter: Drafter, length: int, num_tokens: int) -> None:
        self.config, self.target, self.hidden_layers = SimpleNamespace(length="fixed"), drafter.target, ()
        self.hidden_layers = drafter.hidden_layers if length else ()
        self._drafter, self._length, self._num_tokens = drafter, length, num_tokens
        self.tokens, self.ms = 0, 0.0

    def start(self, session: Session) -> None:
        self._session = session
        self._first = sum(map(len, session.rows))
        if self._length:
            self._drafter.start(session)
        self._watch = Stopwatch(self.target.device)

    def propose(self, budget: int) -> Draft:
        self.tokens = sum(map(len, self._session.rows)) - self._first
        if self.tokens >= self._num_tokens:
            self.ms = self._watch.lap_ms()
            raise Enough
        return likeliest_chain(self._drafter.propose(self._length)) if self._length else self._session.empty_draft()

    def observe(self, step: Step) -> None:
        if self._length:
            self._drafter.observe(step)


def decode(target: Target, drafter: Drafter, rows: list[list[int]], length: int, num_tokens: int) -> tuple[int, float]:
    """Returns the new tokens of a batch and the milliseconds that they took, without the prefill."""
    drafter.forget()
    stopped = Stopped(drafter, length, num_tokens * len(rows))
    with suppress(Enough):
        draftsmith.generate(target, rows, stopped, max_new_tokens=num_tokens * len(rows) + length + 3, eos_token_id=[])
    return stopped.tokens, stopped.ms


def speeds(
    run: BenchmarkSettings, target: Target, drafter: Drafter, rows: Sequence[list[int]], size: int
) -> list[float]:
    """Returns the tokens per second of each length; lengths take turns on every batch of `size` rows."""
    tokens, ms = [0] * len(run.lengths), [0.0] * len(run.lengths)
    for turn in range(run.rounds * len(rows) // size):
        begin = turn * size % len(rows)
        for offset in range(len(run.lengths)):
            at = (turn + offset) % len(run.lengths)
            found = decode(target, drafter, list(rows[begin : begin + size]), run.lengths[at], run.num_tokens)
            tokens[at], ms[at] = tokens[at] + found[0], ms[at] + found[1]
    return [1e3 * number / time_ms for number, time_ms in zip(tokens, ms, strict=True)]


def main(run: BenchmarkSettings) -> None:
    target = Target.from_pretrained(run.target, dtype=run.dtype)
    drafter = draftsmith.load(run.draft, target) if run.draft else lookup.Drafter(lookup.Config(), target)
    texts = read_texts(run.data, target.tokenizer)
    names = {one.name for one in dataclasses.fields(Grid)} & vars(run).keys()
    grid = Grid(**{name: getattr(run, name) for name in names})
    with num_threads(run.threads):
        machine = f"{hardware.describe(target.device)}, {torch.get_num_threads()} thread(s)"
        print(f"{machine}; {run.target} in {run.dtype}, drafter {run.draft or 'look-up'}")
        began = time.perf_counter()
        measured = measure(target, drafter, lambda length, number: contexts(texts, length, number), grid)
        plan = Plan(measured, grid)
        print(f"planned in {time.perf_counter() - began:.0f} s\n")
        print("batch context  " + "".join(f"{f'n={length}':>8}" for length in run.lengths) + "  planned  behind")
        behind: list[float] = []
        with chains_only(drafter, run.lengths[-1]):
            for context in run.contexts:
                rows = contexts(texts, context, run.num_texts)
                for size in run.batch_sizes:
                    found = speeds(run, target, drafter, rows, size)
                    planned = plan.best(size, context).length
                    behind.append(1 - found[run.lengths.index(planned)] / max(found))
                    cells = "".join(f"{speed:8.1f}" for speed in found)
                    print(f"{size:5} {context:7}  {cells}  {planned or 'off':>7}  {behind[-1]:6.1%}", flush=True)
                    expected = plan.expected[size, context]
                    known = [f"{expected[n].tokens_per_s:8.1f}" if n in expected else " " * 8 for n in run.lengths]
                    print(" " * 10 + "plan " + "".join(known), flush=True)
    print(f"\nthe planned length is at most {max(behind):.1%} behind the fastest, in {len(behind)} cells")


if __name__ == "__main__":
    (settings,) = parse_settings(BenchmarkSettings, description=__doc__)
    if any(settings.num_texts % size for size in settings.batch_sizes) or settings.lengths[0] != 0:
        sys.exit("each of --batch-sizes must divide --num-texts, and --lengths must begin with 0")
    main(settings)
