"""Compares the speed of two decoding methods, for the benchmarks."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from data.prompts import Prompt
from draftsmith import Target
from draftsmith.length.costs import num_threads
from eval import hardware
from eval.bakeoff.measure import DecodingMethod, DecodingRequest, measure, warm_up


@dataclass(frozen=True, kw_only=True)
class PairSettings:
    """Decoding settings of both methods."""

    max_new_tokens: int = 128
    """New tokens per prompt."""
    rounds: int = 5
    """Number of times that both methods decode all prompts."""
    temperature: float = 0.0
    """0 is greedy."""
    batch_size: int = 1
    """Prompts per batch."""
    threads: int = 1
    """CPU threads; 0 uses torch's default."""


def compare_pair(
    ours: DecodingMethod, theirs: DecodingMethod, target: Target, prompts: Sequence[Prompt], settings: PairSettings
) -> str:
    """Returns a line with the median tokens/s of both, and the median, smallest and largest ratio over rounds."""
    ids = [prompt.ids for prompt in prompts]
    ratios, speeds, is_identical = [], [], True
    with num_threads(settings.threads):
        for method in (ours, theirs):
            warm_up(method, ids[: settings.batch_size], settings.temperature)
        for number in range(settings.rounds):
            requests = [
                DecodingRequest(
                    prompts=ids[begin : begin + settings.batch_size],
                    temperature=settings.temperature,
                    max_new_tokens=settings.max_new_tokens,
                    seed=number * len(ids) + begin,
                )
                for begin in range(0, len(ids), settings.batch_size)
            ]
            tallies = measure([ours, theirs], requests, target.device, first=number)
            own, other = (tallies[method.name] for method in (ours, theirs))
            speeds.append((own.tokens / own.seconds, other.tokens / other.seconds))
            ratios.append(speeds[-1][0] / speeds[-1][1])
            is_identical &= other.is_identical
    own_speed, other_speed = (statistics.median(column) for column in zip(*speeds, strict=True))
    output = "" if settings.temperature else f"; output {'identical' if is_identical else 'DIFFERENT'}"
    return (
        f"{ours.name} {own_speed:.0f} tokens/s, {theirs.name} {other_speed:.0f}: ratio {statistics.median(ratios):.2f}"
        f" ({min(ratios):.2f} to {max(ratios):.2f} in {settings.rounds} rounds){output}"
    )


def describe_conditions(target: Target, num_prompts: int, settings: PairSettings) -> str:
    """Returns a line with the hardware, the settings and the commit of a benchmark."""
    return (
        f"{hardware.describe(target.device)}, {settings.threads} thread(s), {str(target.dtype).removeprefix('torch.')};"
        f" {num_prompts} prompts, {settings.max_new_tokens} new tokens, temperature {settings.temperature:g},"
        f" batch {settings.batch_size}; commit {hardware.commit() or 'unknown'}"
    )
