"""Same text: batch-invariant decoding with a drafter gives the ids, and the bits of logits, of decoding without one.

Shape suffixes: B rows, N nodes of a draft, V vocabulary.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import draftsmith
from draftsmith import Target
from draftsmith.core.drafter import Drafter, Session, Step
from draftsmith.core.tree import Draft


class BitsRecorder(Drafter):
    """Wraps a drafter, or none, and hashes the logits by which each row's tokens were chosen."""

    def __init__(self, target: Target, drafter: Drafter | None) -> None:
        self._drafter, self.target = drafter, target
        self.config: Any = drafter.config if drafter is not None else None
        self.hidden_layers = drafter.hidden_layers if drafter is not None else ()
        self.parts = [_Part(drafter)] if drafter is not None else ()
        self.policy = drafter.policy if drafter is not None else None

    def start(self, session: Session) -> None:
        self._session = session
        self.hashes: list[list[str]] = [[] for _ in session.rows]
        if self._drafter is not None:
            self._drafter.start(session)

    def propose(self, budget: int) -> Draft:
        return self._session.empty_draft() if self._drafter is None else self._drafter.propose(budget)

    def observe(self, step: Step) -> None:
        for row, path in enumerate(step.paths):
            self.hashes[row] += [hash_of(step.logits_BNV[row, node]) for node in path]
        if self._drafter is not None:
            self._drafter.observe(step)


def first_difference(one: Sequence[str], other: Sequence[str]) -> int | None:
    """Returns the first index at which two rows' hashes differ, of those that both have; None if they do not."""
    return next((index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)


@dataclass(frozen=True)
class _Part:
    drafter: Drafter


@dataclass(frozen=True, kw_only=True)
class DecodedText:
    """New tokens of each prompt, and hashes of the logits that they were chosen by; the last ones may have none."""

    rows: list[list[int]]
    hashes: list[list[str]]
    steps: int = 0
    """Verified drafts, summed over rows."""

    def __add__(self, other: "DecodedText") -> "DecodedText":
        return DecodedText(
            rows=self.rows + other.rows, hashes=self.hashes + other.hashes, steps=self.steps + other.steps
        )


def hash_of(logits_V: Tensor) -> str:
    """Returns a hash of the bits."""
    return hashlib.sha256(logits_V.contiguous().view(torch.uint8).cpu().numpy().tobytes()).hexdigest()[:16]


def decode(
    target: Target,
    drafter: Drafter | None,
    prompts: Sequence[list[int]],
    *,
    temperature: float,
    seeds: Sequence[int],
    max_new_tokens: int,
) -> DecodedText:
    """Decodes each prompt batch-invariantly by the verifier coupled under its own seed."""
    recorder = BitsRecorder(target, drafter)
    out = draftsmith.generate(
        target,
        list(prompts),
        recorder,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=list(seeds),
        verifier="coupled",
        batch_invariant=True,
    )
    starts = [1 if target.is_encoder_decoder else len(prompt) for prompt in prompts]
    rows = zip(out.sequences.tolist(), starts, out.lengths.tolist(), strict=True)
    texts = [row[start:length] for row, start, length in rows]
    return DecodedText(rows=texts, hashes=recorder.hashes, steps=out.stats.steps)


def count_differences(plain: DecodedText, drafted: DecodedText) -> dict[str, Any]:
    """Returns in how many rows the ids differ, and in how many the bits of the logits of any token."""
    ids = sum(one != other for one, other in zip(plain.rows, drafted.rows, strict=True))
    bits = sum(
        first_difference(own, others) is not None for own, others in zip(plain.hashes, drafted.hashes, strict=True)
    )
    tau = sum(map(len, drafted.rows)) / max(drafted.steps, 1)
    return {"num_rows": len(plain.rows), "different_ids": ids, "different_bits": bits, "tau": round(tau, 3)}
