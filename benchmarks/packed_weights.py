r"""Measures forwards of a target on a CPU with its weights packed and as the model stores them, side by side.

    .venv/bin/python benchmarks/packed_weights.py --target smollm2 --dtype bfloat16 --threads 2

Both targets share one model and take turns on the same tokens, behind `context` committed ones in each row; the head is
included. `x1` is the time as a multiple of that of one token: what verification costs. With `--drafts` the drafting of
these artifacts in a call of `generate` is timed as well, with their weights packed and as saved.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from verification import time_in_turn

import draftsmith
from data import POCKET
from draftsmith import Target
from draftsmith.core.tree import chain
from draftsmith.length.costs import num_threads
from eval import hardware
from trainers.training.settings import parse_settings


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
    """Which forwards are measured."""

    target: str = str(POCKET)
    """Transformers folder, or name of a target."""
    dtype: str = "auto"
    """Dtype in which the weights are loaded."""
    context: int = 128
    """Committed tokens of each row."""
    num_tokens: tuple[int, ...] = (1, 2, 4, 8, 16, 24, 32)
    """New tokens of a forward of one row."""
    batch_sizes: tuple[int, ...] = (8, 32)
    """Rows of a forward of one new token each."""
    drafts: tuple[str, ...] = ()
    """Artifacts whose drafting is timed."""
    new_tokens: int = 48
    """Tokens that each of these helps to decode, after a context of random tokens."""
    rounds: int = 15
    """Measurements of each, in turn."""
    threads: int = 2
    """CPU threads; 0 keeps torch's default."""


def main(run: BenchmarkSettings) -> None:
    packed = Target.from_pretrained(run.target, dtype=run.dtype, device="cpu", pack_weights=True)
    targets = {"stored": Target(packed.model, packed.tokenizer, pack_weights=False), "packed": packed}
    with num_threads(run.threads), torch.inference_mode():
        machine = f"{hardware.describe(packed.device)}, {torch.get_num_threads()} thread(s)"
        print(f"{machine}; {run.target} in {run.dtype}, behind {run.context} tokens")
        print(f"{'rows':>4} {'tokens':>6} {'stored ms':>9} {'x1':>5} {'packed ms':>9} {'x1':>5} {'times':>5}")
        first: dict[str, float] = {}
        for num_rows, num_new in [
            *((1, number) for number in run.num_tokens),
            *((size, 1) for size in run.batch_sizes),
        ]:
            works = {name: forward_of(one, num_rows, num_new, run.context) for name, one in targets.items()}
            times = time_in_turn(works, run.rounds, time.perf_counter)
            median = {name: statistics.median(own) for name, own in times.items()}
            first = first or median
            columns = "".join(f" {median[name]:9.1f} {median[name] / first[name]:5.2f}" for name in targets)
            ratio = statistics.median(own / packed for own, packed in zip(*times.values(), strict=True))
            print(f"{num_rows:4} {num_new:6}{columns} {ratio:5.2f}", flush=True)
        for path in run.drafts:
            drafts = {name: drafting_ms(path, target, run) for name, target in targets.items()}
            found = [{name: one() for name, one in drafts.items()} for _ in range(run.rounds + 1)][1:]
            ratio = statistics.median(one["stored"] / one["packed"] for one in found)
            columns = ", ".join(f"{name} {statistics.median(one[name] for one in found):.2f} ms" for name in targets)
            print(f"{path}, drafting of a round: {columns}, {ratio:.2f} times", flush=True)


def forward_of(target: Target, num_rows: int, num_new: int, context: int) -> Callable[[], object]:
    """Returns a forward of `num_new` tokens in each row, logits included; its tokens are never committed."""
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(target.vocab_size, (num_rows, context + num_new), generator=generator)
    cache = target.new_cache(num_rows)
    target.prefill(tokens_BT[:, :context].tolist(), cache)
    tree, new_BN = chain(num_new, tokens_BT.device), tokens_BT[:, context:]
    return lambda: target.logits(target.forward(new_BN, tree, cache).hidden_BND)


def drafting_ms(path: str, target: Target, run: BenchmarkSettings) -> Callable[[], float]:
    """Returns a function that decodes with the artifact and returns the milliseconds of drafting in a round."""
    drafter = draftsmith.load(path, target)
    generator = torch.Generator().manual_seed(0)
    tokens_1T = torch.randint(target.vocab_size, (1, run.context), generator=generator)

    def decode() -> float:
        options = {"max_new_tokens": run.new_tokens, "temperature": 0, "eos_token_id": ()}
        stats = draftsmith.generate(target, tokens_1T, drafter, **options).stats
        return stats.draft_ms / stats.rounds

    return decode


if __name__ == "__main__":
    try:
        main(*parse_settings(BenchmarkSettings, description=__doc__))
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
