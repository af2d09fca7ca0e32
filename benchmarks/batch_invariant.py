"""The price of batch-invariant decoding, plain and with drafts of equal lengths, against decoding without it.

    .venv/bin/python benchmarks/batch_invariant.py --target smollm2 --dtype bfloat16 --threads 2

Drafts are the text that plain decoding in the same mode has written: in the mode every token of them is accepted,
without it nearly every one. The modes take turns on every prompt in one process; the ratio is the median over prompts,
of wall-clock time and of CPU time, which other work on the machine changes less. docs/same-text.md has the figures.
"""

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import draftsmith
from data import POCKET
from data.prompts import load_prompts
from draftsmith import Target
from draftsmith.core import drafter
from draftsmith.core.drafter import Session, Step
from draftsmith.core.tree import Draft, chain
from draftsmith.inputs.invariance.self_test import shapes_for
from draftsmith.length.costs import num_threads
from eval import hardware
from trainers.training.settings import parse_settings

MODES = (False, True)


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
    """The target, the prompts and the drafts."""

    target: str = str(POCKET)
    """A transformers folder, GGUF file, named target or hub name."""
    dtype: str = "float32"
    """Dtype of the target's weights."""
    data: str = "python-source"
    """Source of the prompts."""
    num_prompts: int = 8
    """Number of prompts, decoded one by one."""
    max_new_tokens: int = 64
    """New tokens per prompt."""
    draft_lengths: str = "0,4,8,16"
    """Drafted tokens per round, separated by commas; 0 is plain decoding."""
    batch_size: int = 1
    """Copies of each prompt that are decoded together."""
    threads: int = 1
    """CPU threads; 0 keeps torch's default."""


class Replay(drafter.Drafter):
    """Drafts a fixed number of tokens of a text that is known, and notes when decoding began, after the prefill."""

    config: Any = None

    def __init__(self, target: Target, text: list[int], num_draft: int) -> None:
        self.target, self._text, self._num_draft = target, text, num_draft

    def start(self, session: Session) -> None:
        self._session = session
        self._began = time.perf_counter(), time.process_time()

    def propose(self, budget: int) -> Draft:
        longest = min(self._num_draft, budget) + 1
        tokens = [self._text[len(row) - 1 : len(row) - 1 + longest] for row in self._session.rows]
        return Draft(tokens_BN=torch.tensor(tokens), tree=chain(longest))

    def observe(self, step: Step) -> None:
        """Learns nothing."""

    def end(self, num_rounds: int) -> None:
        """Ends the clock."""
        self._ended, self._num_rounds = (time.perf_counter(), time.process_time()), num_rounds

    def spent_per_round(self) -> tuple[float, float]:
        """Returns the wall-clock and the CPU seconds of a round."""
        wall_s, cpu_s = (end - begin for begin, end in zip(self._began, self._ended, strict=True))
        return wall_s / self._num_rounds, cpu_s / self._num_rounds


def main(run: BenchmarkSettings) -> None:
    target = Target.from_pretrained(run.target, dtype=run.dtype, device="cpu")
    prompts = [prompt.ids for prompt in load_prompts(run.data, target.tokenizer, max_prompts=run.num_prompts)]
    print(f"{target.name} ({run.dtype}) on {hardware.describe(target.device)}; commit {hardware.commit()}")
    lengths = [int(number) for number in run.draft_lengths.split(",")]
    spent: dict[tuple[int, bool], list[tuple[float, float]]] = {(n, mode): [] for n in lengths for mode in MODES}
    with num_threads(run.threads):
        began = time.process_time()
        shapes = shapes_for(target, run.batch_size)
        print(f"self-test: {time.process_time() - began:.1f} s of CPU time; {shapes}")
        for number, prompt in enumerate([prompts[0], *prompts]):  # the first one warms up
            texts = [decode(target, run, prompt, mode) for mode in MODES]
            for num_draft in lengths:
                for mode in sorted(MODES, reverse=bool(number % 2)):
                    replay = Replay(target, texts[mode], num_draft)
                    text = decode(target, run, prompt, mode, replay)
                    assert text == texts[mode] or not mode, "a draft changed the text"
                    spent[num_draft, mode].append(replay.spent_per_round())
    for num_draft in lengths:
        for index, name in enumerate(("wall-clock", "CPU")):
            without, within = ([pair[index] for pair in spent[num_draft, mode][1:]] for mode in MODES)
            ratios = [one / other for one, other in zip(within, without, strict=True)]
            print(
                f"{num_draft} drafted tokens, {name} ms per round: {1e3 * statistics.median(without):.2f}, in the mode"
                f" {1e3 * statistics.median(within):.2f}; ratio {statistics.median(ratios):.3f}"
                f" ({min(ratios):.3f} to {max(ratios):.3f})"
            )


def decode(
    target: Target, run: BenchmarkSettings, prompt: list[int], batch_invariant: bool, replay: Replay | None = None
) -> list[int]:
    """Returns a prompt's text; tells `replay` when it was complete, and in how many rounds."""
    rows = [prompt] * run.batch_size
    out = draftsmith.generate(
        target, rows, replay, max_new_tokens=run.max_new_tokens, eos_token_id=(), batch_invariant=batch_invariant
    )
    if replay is not None:
        replay.end(out.stats.rounds)
    return out.sequences[0].tolist()


if __name__ == "__main__":
    try:
        torch.set_grad_enabled(False)
        main(*parse_settings(BenchmarkSettings, description=__doc__))
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
