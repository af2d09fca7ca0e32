"""A comparison's rows: what each contender did at one temperature and batch size, from its tallies."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from eval.bakeoff.contenders import Contender
from eval.bakeoff.measure import Tally, add_up, merged


def added_up(parts: Sequence[dict[str, Tally]]) -> dict[str, Tally]:
    """Returns each contender's tallies of several categories as one."""
    names = list(parts[0])
    return {name: sum_of([part[name] for part in parts]) for name in names}


def sum_of(tallies: Sequence[Tally]) -> Tally:
    """Returns one tally of all that was decoded."""
    numbers = ("seconds", "tokens", "calls", "rounds", "steps", "prefill_ms", "draft_ms", "verify_ms", "commit_ms")
    return Tally(
        **{name: sum(getattr(tally, name) for tally in tallies) for name in numbers},
        verified=merged(tally.verified for tally in tallies),
        drafted=add_up(tally.drafted for tally in tallies),
        accepted=add_up(tally.accepted for tally in tallies),
        is_identical=all(tally.is_identical for tally in tallies),
    )


def row_of(entry: Contender, temperature: float, batch_size: int, rounds: Sequence[dict[str, Tally]]) -> dict[str, Any]:
    """Returns a contender's row of the table, from its tally of each round."""
    tallies = [tallies[entry.contender.name] for tallies in rounds]
    speeds = [tally.tokens / tally.seconds for tally in tallies]
    plain = [base[entry.reference] for base in rounds]
    ratios = [speed / (base.tokens / base.seconds) for speed, base in zip(speeds, plain, strict=True)]
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75]).tolist()
    whole = sum_of(tallies)

    def per_step(name: str) -> float | None:
        """Returns milliseconds for a row's share of a step, None where nothing counted steps."""
        return float(np.median([getattr(tally, name) / tally.steps for tally in tallies])) if whole.steps else None

    return {
        "drafter": entry.contender.name,
        "temperature": temperature,
        "batch_size": batch_size,
        "tau": whole.tokens / whole.steps if whole.steps else 1.0,
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
        "accepted_per_depth": [a / d for a, d in zip(whole.accepted, whole.drafted, strict=True) if d],
        "num_parameters": entry.num_parameters,
        "artifact_mb": entry.artifact_mb,
        "train_s": entry.train_s,
        "family": entry.family,
        "verifier": entry.verifier,
        "length": entry.length,
        "gate": entry.gate,
        "is_ablation": entry.is_ablation,
    }
