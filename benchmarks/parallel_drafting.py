"""One draft LM drafting in one forward (PARD) against drafting token by token, after equally much training.

    ./launch.sh compress --data runs/text --method even --output runs/even
    ./launch.sh distill --data runs/text --init runs/even --max-steps 150 --output runs/before
    ./launch.sh distill --data runs/text --init runs/even --start-from runs/before --max-steps 150 --output runs/lm
    ./launch.sh pard --data runs/text --parts runs/before --max-steps 150 --output runs/pard
    .venv/bin/python benchmarks/parallel_drafting.py --lm runs/lm --pard runs/pard

Both continue one draft LM for as many steps of the same rows. Some prompts, decoded once, choose each drafter's own
best number of drafted tokens. Then plain decoding and both drafters, each at its own and at the other's number, take
turns on other prompts in one process. Speeds are medians over rounds, ratios are within a round, milliseconds are per
round of drafting and verification. The last lines say where the time of PARD's forward goes. LOG.md has figures.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import draftsmith
from data import POCKET
from data.prompts import load_prompts
from draftsmith import Target
from draftsmith.artifacts.artifact import read_manifest
from draftsmith.core.tree import chain
from draftsmith.length.costs import num_threads
from draftsmith.parts.neural.draft_models import listed_logits, listed_tokens
from eval import hardware
from eval.bakeoff.measure import (
    DecodingMethod,
    DecodingRequest,
    DecodingResult,
    Tally,
    draftsmith_method,
    measure,
    warm_up,
)
from trainers.training import launchers
from trainers.training.settings import parse_settings

PLAIN = "plain"
READ = 2
"""Committed tokens that PARD's timed forward reads before its masks."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
    """The target, the drafters and the prompts."""

    lm: str
    """Artifact of the draft LM (family lm)."""
    pard: str
    """Artifact of the same draft LM, continued as PARD."""
    target: str = str(POCKET)
    """A transformers folder, GGUF file, named target or hub name."""
    dtype: str = "float32"
    """Dtype of the weights."""
    data: str = "python-source"
    """Source of the prompts."""
    max_prompt_tokens: int = 320
    """Longest prompt; longer ones are left out."""
    lengths: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    """Numbers of drafted tokens to choose from; PARD drafts at most as many as it was trained for."""
    num_choosing: int = 4
    """Prompts that choose the number of drafted tokens."""
    num_prompts: int = 8
    """Prompts that are measured."""
    max_new_tokens: int = 64
    """New tokens per prompt."""
    rounds: int = 3
    """Number of times that all prompts are decoded."""
    threads: int = 2
    """CPU threads; 0 keeps torch's default."""


def main(run: BenchmarkSettings) -> None:
    for path in (run.lm, run.pard):
        read_manifest(path)
    target = Target.from_pretrained(run.target, dtype=run.dtype)
    limits = {"max_prompts": run.num_choosing + run.num_prompts, "max_prompt_tokens": run.max_prompt_tokens}
    prompts = [one.ids for one in load_prompts(run.data, target.tokenizer, long_prompts="drop", **limits)]
    drafters = {"token by token": draftsmith.load(run.lm, target), "PARD": draftsmith.load(run.pard, target)}
    print(
        f"{target.name} on {hardware.describe(target.device)}, {run.threads} thread(s), {run.dtype}; {run.data},"
        f" {len(prompts) - run.num_choosing} prompts, {run.max_new_tokens} new tokens, {run.rounds} rounds; commit"
        f" {hardware.commit() or 'unknown'}"
    )
    with num_threads(run.threads):
        plain = DecodingMethod(name=PLAIN, decode=draftsmith_method(target))
        lengths = {name: [n for n in run.lengths if n <= drafters["PARD"].config.num_draft] for name in drafters}
        methods = [plain, *(method_of(target, name, drafters[name], n) for name in drafters for n in lengths[name])]
        for method in methods[:: len(lengths["PARD"])]:
            warm_up(method, prompts[:1], 0.0)
        tallies = decode(methods, prompts[: run.num_choosing], run, 0)
        best = {}
        for name in drafters:
            speeds = {n: speed(tallies[label(name, n)]) for n in lengths[name]}
            best[name] = max(speeds, key=lambda n, speeds=speeds: speeds[n])
            print(f"{name}, tokens/s by drafted tokens:", ", ".join(f"{n}: {one:.1f}" for n, one in speeds.items()))
        compared = sorted(set(best.values()))
        methods = [plain, *(method_of(target, name, drafters[name], n) for name in drafters for n in compared)]
        rounds = [decode(methods, prompts[run.num_choosing :], run, number) for number in range(run.rounds)]
        show(rounds, best)
        where_time_goes(drafters["PARD"], best["PARD"])


def label(name: str, num_draft: int) -> str:
    return f"{name}, {num_draft}"


def method_of(target: Target, name: str, drafter: Any, num_draft: int) -> DecodingMethod:
    """Returns the method that drafts this number of tokens with a drafter."""
    inner = draftsmith_method(target, drafter, policy="fixed")

    def run(request: DecodingRequest) -> DecodingResult:
        drafter.config = dataclasses.replace(drafter.config, num_draft=num_draft)
        return inner(request)

    return DecodingMethod(name=label(name, num_draft), decode=run, drafter=drafter)


def decode(
    methods: Sequence[DecodingMethod], prompts: Sequence[list[int]], run: BenchmarkSettings, number: int
) -> dict[str, Tally]:
    """Returns each method's tally over the prompts, greedily and one at a time."""
    options = {"temperature": 0.0, "max_new_tokens": run.max_new_tokens, "seed": 0}
    requests = [DecodingRequest(prompts=[ids], **options) for ids in prompts]
    return measure(methods, requests, torch.device("cpu"), first=number)


def speed(tally: Tally) -> float:
    """Returns tokens per second."""
    return tally.tokens / tally.seconds


def show(rounds: Sequence[dict[str, Tally]], best: dict[str, int]) -> None:
    """Prints a line per method, and the ratios of PARD to drafting token by token."""
    plain = [speed(tallies[PLAIN]) for tallies in rounds]
    print(f"{'drafted tokens':<20} tokens/s  of plain   tau  draft ms  verify ms  accepted by depth, %")
    for name in rounds[0]:
        own = [tallies[name] for tallies in rounds]
        of_plain = statistics.median(speed(one) / base for one, base in zip(own, plain, strict=True))
        draft_ms, verify_ms = (
            statistics.median(getattr(one, part) / one.steps for one in own) for part in ("draft_ms", "verify_ms")
        )
        reached = zip(own[0].accepted, own[0].drafted, strict=False)  # some depths may never be accepted
        depths = " ".join(f"{100 * hits / max(tried, 1):.0f}" for hits, tried in reached)
        texts = "" if all(one.is_identical for one in own) else f"  {own[0].num_different} texts differ"
        print(
            f"{name:<20} {statistics.median(map(speed, own)):8.1f} {of_plain:8.2f}x {own[0].tokens / own[0].steps:6.2f}"
            f" {draft_ms:9.1f} {verify_ms:10.1f}  {depths}{texts}"
        )
    for what, numbers in (
        ("each at its best", best),
        *((f"both at {n}", dict.fromkeys(best, n)) for n in sorted(set(best.values()))),
    ):
        one, other = (label(name, numbers[name]) for name in ("PARD", "token by token"))
        ratios = [speed(tallies[one]) / speed(tallies[other]) for tallies in rounds]
        print(f"ratio, {what}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


@torch.inference_mode()
def where_time_goes(drafter: Any, num_draft: int) -> None:
    """Prints the milliseconds of PARD's blocks and LM head for one round, and of a single token's."""
    model = drafter.draft_model
    cache = model.new_cache(1)
    model.prefill([[5] * 128], cache)
    for what, num_read, num_logits in (("PARD", READ + num_draft - 1, num_draft), ("one token", 1, 1)):
        tokens_1T = torch.full((1, num_read), drafter.config.mask_token)
        hidden_1TD = torch.randn(1, num_logits, drafter.model.config.get_text_config(decoder=True).hidden_size)
        blocks_ms = median_ms(partial(model.forward, tokens_1T, chain(num_read, model.device), cache))
        head_ms = median_ms(partial(listed_logits, model, hidden_1TD.to(model.dtype), listed_tokens(model)))
        share = head_ms / (blocks_ms + head_ms)
        print(
            f"{what}: {num_read} tokens through the blocks {blocks_ms:.1f} ms, the head at {num_logits} of them"
            f" {head_ms:.1f} ms ({share:.0%})"
        )


def median_ms(run: Callable[[], Any], repeats: int = 9) -> float:
    """Returns the median wall-clock milliseconds of a call, after one that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


if __name__ == "__main__":
    with launchers.user_errors():
        main(*parse_settings(BenchmarkSettings, description=__doc__))
