"""Rows of the comparison table: a contender's metrics at one temperature and batch size, from its tallies."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from eval.bakeoff.contenders import COUPLED, Contender
from eval.bakeoff.measure import Tally, largest, merge_forwards, sum_counts


def sum_categories(parts: Sequence[dict[str, Tally]]) -> dict[str, Tally]:
    """Returns each contender's tally summed over categories."""
    names = list(parts[0])
    return {name: sum_tallies([part[name] for part in parts]) for name in names}


def sum_tallies(tallies: Sequence[Tally]) -> Tally:
    """Returns the sum of several tallies."""
    times = ("seconds", "prefill_ms", "draft_ms", "verify_ms", "commit_ms")
    numbers = ("tokens", "calls", "rounds", "steps", "num_rows", "num_different", *times)
    return Tally(
        **{name: sum(getattr(tally, name) for tally in tallies) for name in numbers},
        verified=merge_forwards(tally.verified for tally in tallies),
        drafted=sum_counts(tally.drafted for tally in tallies),
        accepted=sum_counts(tally.accepted for tally in tallies),
        is_identical=all(tally.is_identical for tally in tallies),
        largest_gap=largest(tally.largest_gap for tally in tallies),
    )


def row_of(
    contender: Contender,
    temperature: float,
    batch_size: int,
    rounds: Sequence[dict[str, Tally]],
    rounding: float | None = None,
) -> dict[str, Any]:
    """Returns a contender's table row from the tallies of each round; `rounding` is that of its target's logits.

    Speed-ups are ratios within a round: the median over rounds, with quartiles.
    """
    tallies = [tallies[contender.method.name] for tallies in rounds]
    speeds = [tally.tokens / tally.seconds for tally in tallies]
    baselines = [base[contender.reference] for base in rounds]
    ratios = [speed / (base.tokens / base.seconds) for speed, base in zip(speeds, baselines, strict=True)]
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75]).tolist()
    total = sum_tallies(tallies)
    gap = total.largest_gap if temperature == 0 else None
    is_compared = temperature == 0 or contender.used_verifier == COUPLED

    def per_step(name: str) -> float | None:
        """Returns the median milliseconds per step and row, None for methods that count no steps."""
        return float(np.median([getattr(tally, name) / tally.steps for tally in tallies])) if total.steps else None

    return {
        "drafter": contender.method.name,
        "temperature": temperature,
        "batch_size": batch_size,
        "tau": total.tokens / total.steps if total.steps else 1.0 if contender.counts_forwards else None,
        "tokens_per_s": float(np.median(speeds)),
        "speedup": middle,
        "speedup_low": low,
        "speedup_high": high,
        "identical": all(tally.is_identical for tally in tallies) if is_compared else None,
        "num_decoded": total.num_rows if is_compared else None,
        "num_different": total.num_different if is_compared else None,
        "largest_gap": gap if gap is not None and math.isfinite(gap) else None,
        "rounding": rounding if temperature == 0 else None,
        "is_tie": gap is not None and rounding is not None and gap <= rounding if temperature == 0 else None,
        "lossless": contender.is_lossless,
        "tuned": contender.is_fine_tuned,
        "draft_ms": per_step("draft_ms"),
        "verify_ms": per_step("verify_ms"),
        "commit_ms": per_step("commit_ms"),
        "accepted_per_depth": [a / d for a, d in zip(total.accepted, total.drafted, strict=True) if d],
        "num_parameters": contender.num_parameters,
        "artifact_mb": contender.artifact_mb,
        "train_s": contender.train_s,
        "family": contender.family,
        "verifier": contender.verifier,
        "length": contender.length,
        "confidence_threshold": contender.confidence_threshold,
        "is_ablation": contender.is_ablation,
    }
