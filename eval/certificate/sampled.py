"""Tests of the sampled distribution: a few prompts are continued many times, and tested by chi_square.py.

Shape suffixes: B rows, T positions, N nodes of a draft, V vocabulary, K drafted tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

import draftsmith
from data.prompts import Prompt
from draftsmith import Target, verify
from draftsmith.core.drafter import Drafter, Session, Step
from draftsmith.core.sampling import Sampling
from draftsmith.core.tree import Draft
from eval.certificate.chi_square import (
    Evidence,
    SampledText,
    Tokens,
    collect_evidence,
    combine_p_values,
    detectable_shift,
    p_value,
)
from eval.certificate.identity import FAILED, PASSED
from eval.certificate.reference import reference_logits, reference_probs, rounding_error

KIND = "sampled distribution"
TOO_FEW = "too few samples"
GROUPINGS = ("prefix", "rank", "draft")
EXTRA_TOKENS = 2
"""Tokens sampled beyond the tested ones, so that no draft is cut short among these."""
NUM_TOP_TOKENS = 16
"""Number of the draft distribution's likeliest tokens that are recorded."""


@dataclass(frozen=True, kw_only=True)
class SampledTestSettings:
    """The texts to sample, and the strictness of their tests."""

    verifier: str = "auto"
    """Verifier to sample with; a lossy one is tested too, but gets no certificate. With coupled, sampled text must be
    that of plain decoding with the same seed."""
    statistics: bool = False
    """With coupled, test the distribution of sampled text as well, as with every other verifier."""
    samplings: tuple[str, ...] = ("temperature=1", "temperature=1,top_p=0.9", "temperature=1,top_k=5")
    """Sampling settings to test."""
    num_rows: int = 1500
    """Continuations sampled for each drafter and sampling setting."""
    num_tokens: int = 6
    """Tested tokens of each continuation."""
    sampled_prompts: int = 4
    """Number of prompts to continue when sampling."""
    rows_at_once: int = 64
    """Continuations sampled in one batch."""
    sampled_dtype: Literal["float32", "float64"] = "float32"
    """Dtype of the target when sampling; in lower precision its distribution depends on the batch's shape."""
    false_alarm: float = 1e-4
    """Probability that a lossless system fails any test of its distribution."""
    seed: int = 0
    """Random seed of the choice of prompts and of sampling."""
    threads: int = 1
    """CPU threads; 0 uses torch's default. A small target is fastest on one."""

    def __post_init__(self) -> None:
        for name in ("num_rows", "num_tokens", "sampled_prompts", "rows_at_once"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.verifier == "greedy":
            raise ValueError("verifier 'greedy' is for temperature 0, which is always tested; use 'auto'")
        if self.verifier != "auto":
            verify.find(self.verifier)
        if not self.samplings:
            raise ValueError("samplings is empty; name at least one sampling setting")
        for text in self.samplings:
            parse_sampling(text)
        if self.sampled_dtype not in ("float32", "float64"):
            raise ValueError(f"sampled_dtype is {self.sampled_dtype!r}; it must be float32 or float64")
        if not 0 < self.false_alarm < 1:
            raise ValueError(f"false_alarm is {self.false_alarm}; it must lie between 0 and 1")
        if self.threads < 0:
            raise ValueError(f"threads is {self.threads}; it must be 0 or more")

    @property
    def is_coupled(self) -> bool:
        """Returns True if sampled text must equal plain decoding's."""
        return self.verifier == "coupled"

    @property
    def samples(self) -> bool:
        """Returns True if the distribution of sampled text is tested."""
        return self.statistics or not self.is_coupled

    @property
    def is_lossy(self) -> bool:
        """Returns True if the verifier changes the target's distribution by construction."""
        return self.verifier != "auto" and not verify.find(self.verifier)[0].LOSSLESS


def parse_sampling(text: str) -> Sampling:
    """Parses `temperature=X,top_p=X,top_k=N`; raises ValueError for anything else."""
    kinds: dict[str, type] = {"temperature": float, "top_p": float, "top_k": int}
    values: dict[str, Any] = {"temperature": 1.0}
    for part in text.split(","):
        key, _, value = part.partition("=")
        try:
            values[key] = kinds[key](value)
        except (KeyError, ValueError):
            raise ValueError(
                f"samplings: {text!r} is not valid; expected settings such as temperature=1,top_p=0.9,top_k=5"
            ) from None
    sampling = Sampling(**values)
    if sampling.is_greedy:
        raise ValueError(f"samplings: {text!r} is greedy, which is always tested; name a temperature above 0")
    return sampling


def sample_and_test(
    target: Target,
    drafter: Any,
    sampling: Sampling,
    settings: SampledTestSettings,
    *,
    prompts: Sequence[Prompt],
    level: float,
    tie_tolerance: float,
    on_progress: Callable[[int], Any],
) -> list[dict[str, Any]]:
    """Tests sampled continuations of `prompts` in each of GROUPINGS; a p-value below `level` is a failure.

    `tie_tolerance` is that of GreedySettings; `on_progress` is called with the number of tokens after each batch.
    Raises ValueError for a verifier that does not fit the drafter.
    """
    recorder = _RecordedDrafter(drafter, settings.verifier, sampling)
    texts: list[SampledText] = []
    num_steps = num_new = 0
    for number, prompt in enumerate(prompts):
        remaining = len(range(number, settings.num_rows, len(prompts)))
        while remaining:
            size = min(remaining, settings.rows_at_once)
            out = draftsmith.generate(
                target,
                torch.tensor([prompt.ids] * size, device=target.device),
                recorder,
                max_new_tokens=settings.num_tokens + EXTRA_TOKENS,
                seed=(settings.seed << 20) + len(texts),
                verifier=settings.verifier,
                **sampling.as_arguments(),
            )
            rows = zip(out.sequences.tolist(), out.lengths.tolist(), recorder.drafts, strict=True)
            for row, length, drafts in rows:
                tokens = tuple(row[recorder.start_length : length][: settings.num_tokens])
                texts.append(SampledText(prompt=number, tokens=tokens, drafts=drafts))
            num_steps, num_new = num_steps + out.stats.steps, num_new + out.stats.new_tokens
            remaining -= size
            on_progress(size * (settings.num_tokens + EXTRA_TOKENS))

    def probs_for(number: int, different: list[Tokens]) -> Iterator[tuple[Tensor, Tensor]]:
        # The distribution after the last token is not tested.
        for logits_TV in reference_logits(target, prompts[number].ids, [text[:-1] for text in different]):
            yield reference_probs(logits_TV, sampling, rounding_error(logits_TV, target.dtype, tie_tolerance))

    found = collect_evidence(texts, settings.num_tokens, probs_for, torch.Generator().manual_seed(settings.seed))
    p_values = [evidence.p_value for evidence in found.by_prefix if evidence.freedom or evidence.num_excluded]
    positions = [asdict(evidence) | {"p_value": evidence.p_value} for evidence in found.by_prefix]
    outcomes = [
        {"positions": positions} | _outcome(sum(found.by_prefix, Evidence()), *combine_p_values(p_values), level),
        *(_outcome(one, one.statistic, one.freedom, level) for one in (found.by_rank, found.by_draft)),
    ]
    conditions = {
        "kind": KIND,
        "dtype": str(target.dtype).removeprefix("torch."),
        "verifier": ", ".join(sorted(recorder.verifiers)) or settings.verifier,
        **asdict(sampling),
        "seed": settings.seed,
        "num_prompts": len(prompts),
        "num_rows": len(texts),
        "num_tokens": settings.num_tokens,
        "tau": num_new / num_steps,
    }
    return [
        conditions | {"grouped_by": grouping} | outcome for grouping, outcome in zip(GROUPINGS, outcomes, strict=True)
    ]


def _outcome(evidence: Evidence, statistic: float, freedom: int, level: float) -> dict[str, Any]:
    """Returns one test's result as JSON data."""
    probability = 0.0 if evidence.num_excluded else p_value(statistic, freedom)
    shift = detectable_shift(evidence, level)
    return {
        "num_samples": evidence.num_samples,
        "num_excluded": evidence.num_excluded,
        "num_unclear": evidence.num_unclear,
        "statistic": statistic,
        "degrees_of_freedom": freedom,
        "p_value": probability,
        "level": level,
        "detectable_shift": shift,
        "verdict": FAILED if probability < level else TOO_FEW if shift is None else PASSED,
    }


class _RecordedDrafter(Drafter):
    """Wraps a drafter and records the tokens likely to be drafted first, and the verifiers used."""

    def __init__(self, drafter: Any, verifier: str, sampling: Sampling) -> None:
        self.config, self.target, self.hidden_layers = drafter.config, drafter.target, drafter.hidden_layers
        self.policy = drafter.policy
        self._drafter, self._verifier, self._sampling = drafter, verifier, sampling
        self.verifiers: set[str] = set()

    def start(self, session: Session) -> None:
        self._rows, self.start_length = session.rows, len(session.rows[0])
        self.drafts: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in session.rows]
        self._drafter.start(session)

    def propose(self, budget: int) -> Draft:
        draft = self._drafter.propose(budget)
        if draft.tree.num_nodes == 1:
            return draft
        self.verifiers.add(verify.choose(self._verifier, self._sampling, draft).name)
        for row, (ids, first_tokens) in enumerate(zip(self._rows, _first_tokens(draft), strict=True)):
            if len(first_tokens[0]):
                self.drafts[row][len(ids) - self.start_length] = first_tokens
        return draft

    def observe(self, step: Step) -> None:
        self._drafter.observe(step)


def _first_tokens(draft: Draft) -> list[tuple[Tensor, Tensor]]:
    """Returns for each row the tokens [K] that can be drafted first, and their weights [K].

    They must not depend on the sampled draft: given the draft, the next token does not have the target's distribution.
    """
    if draft.draft_probs_BNV is not None:
        probs_BV = draft.draft_probs_BNV[:, 0].cpu()
        weights_BK, tokens_BK = probs_BV.topk(min(NUM_TOP_TOKENS, probs_BV.shape[1]))
        return list(zip(tokens_BK, weights_BK, strict=True))
    is_child_BN = (draft.tree.parents_RN == 0).expand_as(draft.tokens_BN)
    if (valid_BN := draft.valid_BN()) is not None:
        is_child_BN = is_child_BN & valid_BN
    children = [ids[is_child].unique().cpu() for ids, is_child in zip(draft.tokens_BN, is_child_BN, strict=True)]
    return [(tokens_K, torch.ones(len(tokens_K))) for tokens_K in children]
