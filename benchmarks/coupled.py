"""The price of the verifier coupled: the time of a position's noise, and plain sampling with it against plain sampling.

    .venv/bin/python benchmarks/coupled.py                               # pocket target, temperature 1
    .venv/bin/python benchmarks/coupled.py --target smollm2 --dtype bfloat16

The two ways of sampling take turns on every prompt in one process; the ratio is the median over prompts. CPU time is
printed as well, which other work on the machine changes little. docs/families.md has the figures.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import draftsmith
from data import POCKET
from data.prompts import load_prompts
from draftsmith import Target
from draftsmith.length.costs import num_threads
from draftsmith.verify.research.position_noise import exponentials
from eval import hardware
from trainers.training.settings import parse_settings


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
    """The target and the prompts."""

    target: str = str(POCKET)
    """A transformers folder, GGUF file, named target or hub name."""
    dtype: str = "float32"
    """Dtype of the target's weights."""
    data: str = "python-source"
    """Source of the prompts."""
    num_prompts: int = 8
    """Number of prompts, decoded one by one."""
    max_new_tokens: int = 32
    """New tokens per prompt."""
    threads: int = 1
    """CPU threads; 0 keeps torch's default."""


def seconds(run: Callable[[], object]) -> tuple[float, float]:
    """Returns the wall-clock and the CPU time of a call."""
    began, cpu_began = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - began, time.process_time() - cpu_began


def main(run: BenchmarkSettings) -> None:
    target = Target.from_pretrained(run.target, dtype=run.dtype)
    prompts = [prompt.ids for prompt in load_prompts(run.data, target.tokenizer, max_prompts=run.num_prompts)]
    print(f"{target.name} ({run.dtype}) on {hardware.describe(target.device)}; commit {hardware.commit()}")
    with num_threads(run.threads):
        for vocab_size in dict.fromkeys([target.vocab_size, 49_152, 151_936]):
            times = [
                seconds(lambda size=vocab_size, at=at: exponentials([(0, 0)], [at], size, target.device))
                for at in range(50)
            ]
            wall_ms, cpu_ms = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
            print(f"noise of one position, {vocab_size:,} tokens: {wall_ms:.2f} ms, of CPU time {cpu_ms:.2f} ms")
        spent: dict[str, list[tuple[float, float]]] = {"auto": [], "coupled": []}
        for number, prompt in enumerate([prompts[0], *prompts]):  # the first one warms up
            for verifier in sorted(spent, reverse=bool(number % 2)):
                options = {"max_new_tokens": run.max_new_tokens, "eos_token_id": (), "seed": number}

                def decode(options: dict = options, verifier: str = verifier, prompt: list[int] = prompt) -> object:
                    return draftsmith.generate(target, [prompt], temperature=1.0, verifier=verifier, **options)

                spent[verifier].append(seconds(decode))
    for index, name in enumerate(("wall-clock", "CPU")):
        plain, coupled = ([pair[index] / run.max_new_tokens for pair in spent[key][1:]] for key in spent)
        ratios = [one / other for one, other in zip(coupled, plain, strict=True)]
        print(
            f"plain sampling, {name} ms per token: {1e3 * statistics.median(plain):.2f}, coupled"
            f" {1e3 * statistics.median(coupled):.2f}; ratio {statistics.median(ratios):.3f}"
            f" ({min(ratios):.3f} to {max(ratios):.3f})"
        )


if __name__ == "__main__":
    try:
        torch.set_grad_enabled(False)
        main(*parse_settings(BenchmarkSettings, description=__doc__))
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
