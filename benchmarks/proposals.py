"""Measures drafters' time to propose and to observe a step, relative to a plain step of the target.

    .venv/bin/python benchmarks/proposals.py --artifacts runs/lookup runs/medusa       # pocket target

All, and plain decoding, decode the same prompts in turn, in one process, at batch size 1. Milliseconds are medians over
steps for `propose` and `observe`, over prompts for `start`; the share is `propose` plus `observe` over a plain step. On
a CPU they are process CPU times.
One core of an AMD EPYC, with other work running, a plain step of 6.32 ms; shares in %: lookup 1.3, lookahead and suffix
4.5, rest 4.8, recycling 6.7, ngram 7.2, trigram 7.5; in an earlier run, with draft models or heads among their parts,
cascade 22, merge 29, translated 44, staged 74.
"""

import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import draftsmith
from data import POCKET
from data.prompts import load_prompts
from draftsmith import Target
from draftsmith.artifacts.artifact import read_manifest
from draftsmith.core.drafter import Drafter, Session, Step
from draftsmith.core.tree import Draft
from draftsmith.length.costs import num_threads
from eval import hardware
from trainers.training.settings import parse_settings


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
    """The drafters, target, prompts and sampling."""

    artifacts: tuple[str, ...]
    """Artifacts of the drafters."""
    target: str = str(POCKET)
    """A transformers folder or hub name."""
    data: str = "python-source"
    """Source of the prompts."""
    num_prompts: int = 8
    """Number of prompts."""
    max_new_tokens: int = 64
    """New tokens per prompt."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""
    dtype: str = "float32"
    """Dtype of the target's weights."""
    threads: int = 1
    """CPU threads; 0 keeps torch's default."""


@dataclass(kw_only=True)
class Times:
    """Milliseconds of every call."""

    start: list[float] = field(default_factory=list)
    propose: list[float] = field(default_factory=list)
    observe: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    """From the beginning of `propose` to the beginning of `observe`."""
    num_nodes: list[int] = field(default_factory=list)
    """Nodes verified, the pending one included."""


class Timed(Drafter):
    """A drafter whose calls are timed; plain decoding without one."""

    def __init__(self, drafter: Any, target: Target) -> None:
        self.drafter, self.target, self.times = drafter, target, Times()
        self.config = None
        if drafter is not None:
            self.config, self.hidden_layers, self.policy = drafter.config, drafter.hidden_layers, drafter.policy

    def start(self, session: Session) -> None:
        self._session = session
        began = self._now_ms()
        if self.drafter is not None:
            self.drafter.start(session)
        self.times.start.append(self._now_ms() - began)

    def propose(self, budget: int) -> Draft:
        self._began = self._now_ms()
        draft = self._session.empty_draft() if self.drafter is None else self.drafter.propose(budget)
        self.times.propose.append(self._now_ms() - self._began)
        return draft

    def observe(self, step: Step) -> None:
        began = self._now_ms()
        if self.drafter is not None:
            self.drafter.observe(step)
        self.times.observe.append(self._now_ms() - began)
        self.times.step.append(began - self._began)
        self.times.num_nodes.append(step.draft.tree.num_nodes)

    def _now_ms(self) -> float:
        """Returns process CPU time on a CPU, which excludes other work on the machine, and wall-clock time on a GPU."""
        if self.target.device.type != "cuda":
            return 1e3 * time.process_time()
        torch.cuda.synchronize(self.target.device)
        return 1e3 * time.perf_counter()


def main(run: BenchmarkSettings) -> None:
    for path in run.artifacts:
        read_manifest(path)
    target = Target.from_pretrained(run.target, dtype=run.dtype)
    prompts = load_prompts(run.data, target.tokenizer, max_prompts=run.num_prompts)
    # A drafter that fine-tunes its target decodes with that; plain steps of both take equally long.
    drafters = [draftsmith.load(path, target) for path in run.artifacts]
    contenders = [Timed(None, target), *(Timed(drafter, drafter.target) for drafter in drafters)]
    print(
        f"{hardware.describe(target.device)}, {run.threads} thread(s), {run.dtype}; {len(prompts)} prompts,"
        f" {run.max_new_tokens} new tokens, temperature {run.temperature:g}; commit {hardware.commit() or 'unknown'}"
    )
    with num_threads(run.threads):
        for contender in contenders:
            decode(contender, prompts[0].ids, run, seed=0)
            contender.times = Times()
        for turn, prompt in enumerate(prompts):
            for index in range(len(contenders)):
                decode(contenders[(turn + index) % len(contenders)], prompt.ids, run, seed=turn)
    show(run.artifacts, contenders)


def decode(contender: Timed, prompt: list[int], run: BenchmarkSettings, seed: int) -> None:
    ids = torch.tensor([prompt], device=contender.target.device)
    draftsmith.generate(
        contender.target,
        ids,
        contender,
        max_new_tokens=run.max_new_tokens,
        temperature=run.temperature,
        seed=seed,
        eos_token_id=(),
    )


def show(names: tuple[str, ...], contenders: list[Timed]) -> None:
    plain, *drafting = contenders
    step_ms = statistics.median(plain.times.step)
    print(f"a plain step takes {step_ms:.2f} ms")
    width = max(map(len, names))
    print(f"{'artifact':{width}}   start  propose  observe  share of a plain step  nodes  whole step")
    for name, contender in zip(names, drafting, strict=True):
        times = contender.times
        start, propose, observe, step, num_nodes = map(
            statistics.median, (times.start, times.propose, times.observe, times.step, times.num_nodes)
        )
        print(
            f"{name:{width}} {start:7.2f} {propose:8.3f} {observe:8.3f} {(propose + observe) / step_ms:21.1%}"
            f" {num_nodes:6.0f} {step:15.2f} ms"
        )


if __name__ == "__main__":
    try:
        main(*parse_settings(BenchmarkSettings, description=__doc__))
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
