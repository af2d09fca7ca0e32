"""Trains on 1, 2 and 4 % of the data, and extrapolates the mean accepted length that all of it would reach: `pilot`.

Two curves are fitted to the three points by least squares: tau is linear in the logarithm of the number of rows; and
the share of tokens that the target writes itself, 1 / tau, is a power of it. What grows as a power of the data early on
tends to bend towards the logarithm later, so that the truth is expected between the two. The interval is of both curves
over resamples of the held-out rows. It does not contain what another seed of training would change.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import draftsmith
from data.batches import Batch
from draftsmith import Target
from draftsmith.artifacts.families import find
from trainers.training.estimates.trial import Trial, TrialRun

SHARES = (0.01, 0.02, 0.04)
NEW_TOKENS = 48
NUM_RESAMPLES = 1_000
QUANTILES = (0.1, 0.9)


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """Tokens and steps of each held-out row, decoded greedily from its first half."""

    tokens_R: np.ndarray
    steps_R: np.ndarray

    def tau(self, rows: Any = slice(None)) -> float:
        """Returns the mean accepted length of some rows, the target's own token included."""
        return float(self.tokens_R[rows].sum() / self.steps_R[rows].sum())


@dataclass(frozen=True, kw_only=True)
class Pilot:
    """What short runs reached, and what the whole run is expected to reach."""

    num_rows: tuple[int, ...]
    taus: tuple[float, ...]
    seconds: float
    lookup_tau: float
    expected: float
    interval: tuple[float, float]
    """The 10 and 90 % quantiles."""


def pilot(trial: Trial, folder: Path) -> Pilot:
    """Returns what runs on 1, 2 and 4 % of the rows reach, each of as many epochs as the whole run has."""
    began, run = time.perf_counter(), trial.run
    lookup = find("lookup")
    baseline = accepted(trial.target, lookup.Drafter(lookup.Config(), trial.target), trial.held_out)
    least = max(run.batch_size, 2)
    found, numbers = [], []
    for index, share in enumerate(SHARES):
        # Of little data, each share is still twice the one before.
        rows = trial.share_of_rows(share, least=least * 2**index)
        steps = max(1, round(run.max_steps * len(rows) / len(trial.rows)))
        short = replace(
            run,
            max_steps=steps,
            eval_steps=steps,
            save_steps=steps,
            warmup_steps=min(run.warmup_steps, steps // 10),
        )
        place = folder / f"{index}"
        place.mkdir()
        drafter = trial.train(TrialRun(run=short, rows=rows, folder=place)).drafter
        found.append(accepted(drafter.target, drafter, trial.held_out))
        numbers.append(len(rows))
    expected, interval = extrapolate(numbers, found, len(trial.rows), seed=run.seed)
    return Pilot(
        num_rows=tuple(numbers),
        taus=tuple(one.tau() for one in found),
        seconds=time.perf_counter() - began,
        lookup_tau=baseline.tau(),
        expected=expected,
        interval=interval,
    )


def accepted(target: Target, drafter: Any, batches: Sequence[Batch]) -> Accepted:
    """Returns the tokens and steps of each held-out row when the target continues its first half greedily."""
    counts = []
    for batch in batches:
        causal = batch.source_BS is None or batch.source_lengths_B is None
        prompts_BT, lengths_B = (
            (batch.tokens_BT, batch.lengths_B // 2) if causal else (batch.source_BS, batch.source_lengths_B)
        )
        assert prompts_BT is not None and lengths_B is not None
        for ids, length in zip(prompts_BT.tolist(), lengths_B.tolist(), strict=True):
            prompt = ids[: max(length, 1)]
            room = target.context_length - (len(prompt) if causal else 1)
            if room > 0:
                drafter.forget()
                with torch.no_grad():
                    stats = draftsmith.generate(target, [prompt], drafter, max_new_tokens=min(NEW_TOKENS, room)).stats
                counts.append((stats.new_tokens, stats.steps))
    tokens_R, steps_R = np.array(counts).T
    return Accepted(tokens_R=tokens_R, steps_R=steps_R)


def extrapolate(
    num_rows: Sequence[int], found: Sequence[Accepted], num_all: int, *, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """Returns the expected tau with `num_all` rows, and its 10 and 90 % quantiles."""
    generator = np.random.default_rng(seed)
    number = len(found[0].tokens_R)
    ends = curve_ends(num_rows, [one.tau() for one in found], num_all)
    drawn = []
    for _ in range(NUM_RESAMPLES):
        rows = generator.integers(0, number, number)
        drawn += curve_ends(num_rows, [one.tau(rows) for one in found], num_all)
    low, high = np.quantile(drawn, QUANTILES).tolist()
    return sum(ends) / len(ends), (low, high)


def curve_ends(num_rows: Sequence[int], taus: Sequence[float], num_all: int) -> list[float]:
    """Returns tau at `num_all` rows by both curves, at least 1: linear in log n, and 1 / tau a power of n."""
    x, at = np.log(num_rows), math.log(num_all)
    slope, base = np.polyfit(x, taus, 1)
    power, log_base = np.polyfit(x, np.log(taus), 1)
    return [max(1.0, float(base + slope * at)), max(1.0, float(np.exp(log_base + power * at)))]
