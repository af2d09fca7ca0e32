"""The sampled law: many continuations of a few prompts, drawn by the whole system and judged by eval/certificate/chi_square.py.

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

KIND = "sampled law"
TOO_FEW = "too few samples"
GROUPINGS = ("prefix", "rank", "draft")
EXTRA_TOKENS = 2
"""Tokens drawn beyond those judged, so that no draft is cut short among these."""
NUM_TOP_TOKENS = 16
"""Of a draft's law, so many of the likeliest tokens are noted."""


@dataclass(frozen=True, kw_only=True)
class SampledTestSettings:
    """What is drawn, and how sharply it is judged."""

    verifier: str = "auto"
    """Of the draws; one that is lossy is tested as well, and refused a certificate."""
    laws: tuple[str, ...] = ("temperature=1", "temperature=1,top_p=0.9", "temperature=1,top_k=5")
    """Sampling settings to judge."""
    num_rows: int = 1500
    """Continuations drawn for each drafter and law."""
    num_tokens: int = 6
    """Tokens of each continuation that are judged."""
    law_prompts: int = 4
    """So many of the prompts are continued."""
    rows_at_once: int = 64
    """Continuations drawn in one batch."""
    law_dtype: Literal["float32", "float64"] = "float32"
    """What the target is loaded as; in less precision its law depends on the batch's shape."""
    false_alarm: float = 1e-4
    """The chance that a lossless system fails any test of its law."""
    seed: int = 0
    """Of the choice of prompts and of what is drawn."""
    threads: int = 1
    """CPU threads, 0 for torch's own choice; a small target is fastest on one."""

    def __post_init__(self) -> None:
        for name in ("num_rows", "num_tokens", "law_prompts", "rows_at_once"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.verifier == "greedy":
            raise ValueError("verifier 'greedy' is for temperature 0, where it is used in any case; use 'auto'")
        if self.verifier != "auto":
            verify.find(self.verifier)
        if not self.laws:
            raise ValueError("laws must name one or more")
        for law in self.laws:
            parse_sampling(law)
        if self.law_dtype not in ("float32", "float64"):
            raise ValueError(f"law_dtype is {self.law_dtype!r}; it must be float32 or float64")
        if not 0 < self.false_alarm < 1:
            raise ValueError(f"false_alarm is {self.false_alarm}; it must lie between 0 and 1")
        if self.threads < 0:
            raise ValueError(f"threads is {self.threads}; it must be 0 or more")

    @property
    def is_lossy(self) -> bool:
        """Whether the verifier keeps another law than the target's by construction."""
        return self.verifier != "auto" and not verify.find(self.verifier)[0].LOSSLESS


def parse_sampling(text: str) -> Sampling:
    """Returns the sampling that `temperature=X,top_p=X,top_k=N` says; raises ValueError for anything else."""
    kinds: dict[str, type] = {"temperature": float, "top_p": float, "top_k": int}
    values: dict[str, Any] = {"temperature": 1.0}
    for part in text.split(","):
        key, _, value = part.partition("=")
        try:
            values[key] = kinds[key](value)
        except (KeyError, ValueError):
            raise ValueError(f"law {text!r}: expected settings such as temperature=1,top_p=0.9,top_k=5") from None
    law = Sampling(**values)
    if law.is_greedy:
        raise ValueError(f"law {text!r}: temperature 0 is what greedy identity tests; name a temperature above 0")
    return law


def sample_and_test(
    target: Target,
    drafter: Any,
    law: Sampling,
    settings: SampledTestSettings,
    *,
    prompts: Sequence[Prompt],
    level: float,
    tie_tolerance: float,
    on_progress: Callable[[int], Any],
) -> list[dict[str, Any]]:
    """Returns a test for each of WAYS, of continuations of `prompts`; each fails with a p-value below `level`.

    `tie_tolerance` is that of GreedySettings; `on_progress` is called with the number of tokens after each batch. Raises
    ValueError for a verifier that does not fit what is drafted.
    """
    watched = _RecordedDrafter(drafter, settings.verifier, law)
    texts: list[SampledText] = []
    num_steps = num_new = 0
    for number, prompt in enumerate(prompts):
        left = len(range(number, settings.num_rows, len(prompts)))
        while left:
            size = min(left, settings.rows_at_once)
            out = draftsmith.generate(
                target,
                torch.tensor([prompt.ids] * size, device=target.device),
                watched,
                max_new_tokens=settings.num_tokens + EXTRA_TOKENS,
                seed=(settings.seed << 20) + len(texts),
                verifier=settings.verifier,
                **asdict(law),
            )
            rows = zip(out.sequences.tolist(), out.lengths.tolist(), watched.drafts, strict=True)
            for row, length, drafts in rows:
                tokens = tuple(row[watched.start_length : length][: settings.num_tokens])
                texts.append(SampledText(prompt=number, tokens=tokens, drafts=drafts))
            num_steps, num_new, left = num_steps + out.stats.steps, num_new + out.stats.new_tokens, left - size
            on_progress(size * (settings.num_tokens + EXTRA_TOKENS))

    def probs_for(number: int, different: list[Tokens]) -> Iterator[tuple[Tensor, Tensor]]:
        # What follows the last token is not judged.
        for logits_TV in reference_logits(target, prompts[number].ids, [text[:-1] for text in different]):
            yield reference_probs(logits_TV, law, rounding_error(logits_TV, target.dtype, tie_tolerance))

    judged = collect_evidence(texts, settings.num_tokens, probs_for, torch.Generator().manual_seed(settings.seed))
    chances = [evidence.p_value for evidence in judged.by_prefix if evidence.freedom or evidence.num_excluded]
    of_positions = [asdict(evidence) | {"p_value": evidence.p_value} for evidence in judged.by_prefix]
    outcomes = [
        {"positions": of_positions} | _outcome(sum(judged.by_prefix, Evidence()), *combine_p_values(chances), level),
        *(_outcome(one, one.statistic, one.freedom, level) for one in (judged.by_rank, judged.by_draft)),
    ]
    told = {
        "kind": KIND,
        "dtype": str(target.dtype).removeprefix("torch."),
        "verifier": ", ".join(sorted(watched.verifiers)) or settings.verifier,
        **asdict(law),
        "seed": settings.seed,
        "num_prompts": len(prompts),
        "num_rows": len(texts),
        "num_tokens": settings.num_tokens,
        "tau": num_new / num_steps,
    }
    return [told | {"judged_by": way} | outcome for way, outcome in zip(GROUPINGS, outcomes, strict=True)]


def _outcome(evidence: Evidence, statistic: float, freedom: int, level: float) -> dict[str, Any]:
    chance = 0.0 if evidence.num_excluded else p_value(statistic, freedom)
    shift = detectable_shift(evidence, level)
    return {
        "num_samples": evidence.num_samples,
        "num_excluded": evidence.num_excluded,
        "num_unclear": evidence.num_unclear,
        "statistic": statistic,
        "degrees_of_freedom": freedom,
        "p_value": chance,
        "level": level,
        "sees_shift": shift,
        "verdict": FAILED if chance < level else TOO_FEW if shift is None else PASSED,
    }


class _RecordedDrafter(Drafter):
    """A drafter, what it favours where a draft begins, and the verifiers that its drafts meet."""

    def __init__(self, drafter: Any, verifier: str, law: Sampling) -> None:
        self.config, self.target, self.hidden_layers = drafter.config, drafter.target, drafter.hidden_layers
        self.policy = drafter.policy
        self._drafter, self._verifier, self._law = drafter, verifier, law
        self.verifiers: set[str] = set()

    def start(self, session: Session) -> None:
        self._rows, self.start_length = session.rows, len(session.rows[0])
        self.drafts: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in session.rows]
        self._drafter.start(session)

    def propose(self, budget: int) -> Draft:
        draft = self._drafter.propose(budget)
        if draft.tree.num_nodes == 1:
            return draft
        self.verifiers.add(verify.choose(self._verifier, self._law, draft).name)
        for row, (ids, favoured) in enumerate(zip(self._rows, _favoured(draft), strict=True)):
            if len(favoured[0]):
                self.drafts[row][len(ids) - self.start_length] = favoured
        return draft

    def observe(self, step: Step) -> None:
        self._drafter.observe(step)


def _favoured(draft: Draft) -> list[tuple[Tensor, Tensor]]:
    """Returns, for each row, tokens [K] that may be drafted first and their weights [K].

    They must not depend on what was drawn: a token's law, given what was drawn for its draft, is not the target's.
    """
    if draft.draft_probs_BNV is not None:
        probs_BV = draft.draft_probs_BNV[:, 0].cpu()
        weights_BK, tokens_BK = probs_BV.topk(min(NUM_TOP_TOKENS, probs_BV.shape[1]))
        return list(zip(tokens_BK, weights_BK, strict=True))
    is_child_BN = (draft.tree.parents_RN == 0).expand_as(draft.tokens_BN)
    if (valid_BN := draft.valid_BN()) is not None:
        is_child_BN = is_child_BN & valid_BN
    children = [ids[there].unique().cpu() for ids, there in zip(draft.tokens_BN, is_child_BN, strict=True)]
    return [(tokens_K, torch.ones(len(tokens_K))) for tokens_K in children]
