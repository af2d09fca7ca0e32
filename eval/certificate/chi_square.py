"""Drawn tokens judged against exact laws: statistics that follow a chi-square law, and the least bias they would see.

Shape suffixes: T positions, V vocabulary or whatever else is drawn from, C cells, I counts from 0 up, R ranks, K tokens
of a draft.
"""

import itertools
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

MIN_EXPECTED = 5.0
"""What every cell of a group expects."""
MANY = 50.0
"""What a cell of ranks expects, whose statistic is a chi-square in the limit; drafts are no further from it."""
RANK_ENDS = (1, 2, 4, 8)
"""Ranks are told apart as 0, 1, 2 to 3, 4 to 7, and those from 8 on."""
CERTAINTY = 0.9
"""With which `smallest_shift` would be seen."""

Tokens = tuple[int, ...]
ReferenceProbs = Callable[[int, list[Tokens]], Iterable[tuple[Tensor, Tensor]]]


@dataclass(frozen=True, kw_only=True)
class SampledText:
    """One text, and what was drafted for it."""

    prompt: int
    """The number of the prompt that it continues."""
    tokens: Tokens
    drafts: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """For positions where a draft began: different tokens [K] that it favoured, and how much [K]."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Chi-square statistics that are independent of each other, added up."""

    statistic: float = 0.0
    freedom: int = 0
    """Degrees of freedom."""
    num_groups: int = 0
    num_samples: int = 0
    num_excluded: int = 0
    """Samples that their law gives no chance: one is enough."""
    num_unclear: int = 0
    """Groups left out because rounding could change their law."""
    leverage: float = 0.0
    """What the statistic gains if a share of probability moves, over that share squared; see `smallest_shift`."""

    def __add__(self, other: "Evidence") -> "Evidence":
        return Evidence(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    @property
    def p_value(self) -> float:
        """The chance of such evidence, or worse, under the laws; 1 where nothing could be judged."""
        return 0.0 if self.num_excluded else p_value(self.statistic, self.freedom)


# --- One law -----------------------------------------------------------------------------------------------------


def chi_square(counts_V: Tensor, probs_V: Tensor, generator: torch.Generator) -> Evidence:
    """Returns the evidence of counts [V] against the law [V] that they were drawn from.

    The likeliest tokens are a cell each and the rest one cell, so that each expects MIN_EXPECTED or more. The statistic
    is the sum of squared normal scores of the cells' counts, one after the other given those before: Pearson's in the
    limit, and, as each score is drawn where the count jumps (Dunn and Smyth 1996), of an exact chi-square law always.
    Pearson's own is past the level 1e-5 up to 20 times too often where cells expect five.
    """
    num_samples, num_excluded = int(counts_V.sum()), int(counts_V[probs_V == 0].sum())
    sorted_V, order_V = probs_V.double().sort(descending=True, stable=True)
    # Summed from the end, so that where nothing is left it is zero exactly.
    rest_V = torch.nn.functional.pad(sorted_V.flip(0).cumsum(0).flip(0)[1:], (0, 1))
    is_enough_V = (num_samples * sorted_V >= MIN_EXPECTED) & ((num_samples * rest_V >= MIN_EXPECTED) | (rest_V == 0))
    num_own = int(is_enough_V.nonzero()[-1]) + 1 if is_enough_V.any() else 0
    # Given the cells before, what a cell holds follows a binomial law; that of the last cell is settled.
    num_judged = num_own if num_own and rest_V[num_own - 1] > 0 else num_own - 1
    if num_judged < 1:
        return Evidence(num_excluded=num_excluded)
    counts_C = counts_V[order_V[:num_judged]].double().cpu()
    chances_C = (sorted_V / (sorted_V + rest_V))[:num_judged].cpu()
    scores_C = _normal_scores(counts_C, num_samples - (counts_C.cumsum(0) - counts_C), chances_C, generator)
    return Evidence(
        statistic=float(scores_C.square().sum()),
        freedom=num_judged,
        num_groups=1,
        num_samples=num_samples,
        num_excluded=num_excluded,
        leverage=num_samples * (1 / float(sorted_V[0]) - 1),
    )


def _normal_scores(counts_C: Tensor, trials_C: Tensor, chances_C: Tensor, generator: torch.Generator) -> Tensor:
    """Returns scores [C] that are normal if the counts are binomial, by drawing within each jump of their law."""
    counts_C1, trials_C1, chances_C1 = counts_C[:, None], trials_C[:, None], chances_C[:, None]
    order_I = torch.arange(int(trials_C.max()) + 1, dtype=torch.float64)
    misses_CI = (trials_C1 - order_I).clamp(min=0)
    ways_CI = torch.lgamma(trials_C1 + 1) - torch.lgamma(order_I + 1) - torch.lgamma(misses_CI + 1)
    chance_CI = ways_CI + torch.xlogy(order_I, chances_C1) + torch.special.xlog1py(misses_CI, -chances_C1)
    chance_CI = chance_CI.exp() * (order_I <= trials_C1)
    below_C, here_C, above_C = (
        (chance_CI * is_there_CI).sum(1)
        for is_there_CI in (order_I < counts_C1, order_I == counts_C1, order_I > counts_C1)
    )
    uniforms_C = torch.rand(len(counts_C), generator=generator, dtype=torch.float64)
    # The smaller tail keeps its digits; which side it is on is lost in the square.
    tail_C = torch.minimum(below_C + uniforms_C * here_C, above_C + (1 - uniforms_C) * here_C)
    return torch.special.ndtri(tail_C.clamp(min=sys.float_info.min))


# --- Many laws ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EvidenceByGrouping:
    """What texts are evidence of, in three ways."""

    by_prefix: list[Evidence]
    """At each position."""
    by_rank: Evidence
    by_draft: Evidence


def collect_evidence(
    texts: Iterable[SampledText], num_tokens: int, probs_for: ReferenceProbs, generator: torch.Generator
) -> EvidenceByGrouping:
    """Returns the evidence of texts of at most `num_tokens` tokens.

    `laws_along(prompt, texts)` gives, of different texts of one prompt, each one's laws [T, V] before its tokens, and
    which of them are clear [T]; the others are left out.

    By prefix: texts that agree in prompt and in all tokens before a position are a group there. Which groups are judged
    depends on earlier tokens alone, so that given these a position's statistic follows a chi-square law if every token
    follows the law before it. By rank: tokens, grouped or not, are counted by their rank in the law before them. By
    draft: what the draft favours at its first token is added up over tokens; what it favours may depend on anything
    before, but not on the token that comes. Both sums, less what the laws expect, are martingales, whose squares over
    their own predicted variance are chi-squares in the limit.
    """
    different: dict[int, dict[Tokens, list[SampledText]]] = defaultdict(lambda: defaultdict(list))
    groups: dict[tuple[int, Tokens], list[int]] = defaultdict(list)
    for drawn in texts:
        different[drawn.prompt][drawn.tokens].append(drawn)
        for at, token in enumerate(drawn.tokens):
            groups[drawn.prompt, drawn.tokens[:at]].append(token)
    positions, ranks, favour = [Evidence()] * num_tokens, _RankCounts(), _DraftWeights()
    for prompt, by_text in different.items():
        laws = probs_for(prompt, list(by_text))
        for (tokens, same), (probs_TV, is_clear_T) in zip(by_text.items(), laws, strict=True):
            for at in range(len(tokens)):
                group = groups.pop((prompt, tokens[:at]), [])
                if len(group) >= 2 * MIN_EXPECTED and is_clear_T[at]:
                    counts_V = torch.tensor(group, device=probs_TV.device).bincount(minlength=probs_TV.shape[1])
                    positions[at] += chi_square(counts_V, probs_TV[at], generator)
                elif len(group) >= 2 * MIN_EXPECTED:
                    positions[at] += Evidence(num_unclear=1)
            tokens_T = torch.tensor(tokens, device=probs_TV.device)
            ranks.add(tokens_T[is_clear_T], probs_TV[is_clear_T], len(same))
            for drawn in same:
                for at, (drafted_K, weights_K) in drawn.drafts.items():
                    if at < len(tokens) and is_clear_T[at]:
                        favour.add(tokens[at], probs_TV[at], drafted_K, weights_K)
    return EvidenceByGrouping(by_prefix=positions, by_rank=ranks.evidence(), by_draft=favour.evidence())


class _DraftWeights:
    """How much what came was favoured by the draft, what the laws expect of that, and how much it varies."""

    def __init__(self) -> None:
        self._excess = self._gain = 0.0
        self._cumulants = torch.zeros(3, dtype=torch.float64)
        self._num_samples = 0

    def add(self, token: int, probs_V: Tensor, drafted_K: Tensor, weights_K: Tensor) -> None:
        """Takes up one token, the law [V] before it, and what the draft favoured there [K]."""
        probs_K, weights_K = probs_V[drafted_K.to(probs_V.device)].cpu(), weights_K.double()
        mean = float(probs_K @ weights_K)
        self._excess += float(weights_K[drafted_K == token].sum()) - mean
        self._gain += float(weights_K.square().sum() / weights_K.sum()) - mean
        # Of a token that is not drafted the weight is 0.
        second, third, fourth = (
            float(probs_K @ (weights_K - mean) ** power + (1 - probs_K.sum()) * (-mean) ** power) for power in (2, 3, 4)
        )
        self._cumulants += torch.tensor([second, third, fourth - 3 * second**2], dtype=torch.float64)
        self._num_samples += 1

    def evidence(self) -> Evidence:
        """Returns the evidence; none where too little of what was drafted had a chance."""
        variance, third, fourth = self._cumulants.tolist()
        # A count that expects MANY is as far from a normal law.
        if variance <= 0 or MANY * third**2 > variance**3 or MANY * fourth > variance**2:
            return Evidence()
        return Evidence(
            statistic=self._excess**2 / variance,
            freedom=1,
            num_samples=self._num_samples,
            leverage=self._gain**2 / variance,
        )


class _RankCounts:
    """Tokens counted by their rank in their laws, what these expect, and how much the counts vary."""

    def __init__(self) -> None:
        num_ranks = len(RANK_ENDS) + 1
        self._counts_R, self._expected_R = torch.zeros(2, num_ranks, dtype=torch.float64)
        self._variance_RR = torch.zeros(num_ranks, num_ranks, dtype=torch.float64)
        self._num_samples = self._num_excluded = 0

    def add(self, tokens_T: Tensor, probs_TV: Tensor, number: int) -> None:
        """Counts `number` texts that agree: their tokens [T] and the laws [T, V] before these."""
        sorted_TV, order_TV = probs_TV.sort(descending=True, stable=True)
        rank_T = (order_TV == tokens_T[:, None]).to(torch.uint8).argmax(1).cpu()
        ends = [0, *(min(end, probs_TV.shape[1]) for end in RANK_ENDS), probs_TV.shape[1]]
        masses_TR = torch.stack([sorted_TV[:, a:b].sum(1) for a, b in itertools.pairwise(ends)], dim=1).cpu()
        cell_T = torch.bucketize(rank_T, torch.tensor(RANK_ENDS), right=True)
        self._counts_R += number * cell_T.bincount(minlength=len(RANK_ENDS) + 1)
        self._expected_R += number * masses_TR.sum(0)
        self._variance_RR += number * (masses_TR.sum(0).diag() - masses_TR.T @ masses_TR)
        self._num_samples += number * len(tokens_T)
        self._num_excluded += number * int((probs_TV.gather(1, tokens_T[:, None]) == 0).sum())

    def evidence(self) -> Evidence:
        """Returns the evidence; ranks that expect too little are counted with those before them."""
        cells: list[list[int]] = []
        for rank in range(len(self._expected_R)):
            if cells and self._expected_R[cells[-1]].sum() < MANY:
                cells[-1].append(rank)
            else:
                cells.append([rank])
        if len(cells) > 1 and self._expected_R[cells[-1]].sum() < MANY:
            cells[-2:] = [cells[-2] + cells[-1]]
        if len(cells) == 1:
            return Evidence(num_excluded=self._num_excluded)
        # The last cell is settled by the others.
        is_in_CR = torch.zeros(len(cells) - 1, len(self._expected_R), dtype=torch.float64)
        for cell, ranks in enumerate(cells[:-1]):
            is_in_CR[cell, ranks] = 1.0
        excess_C = is_in_CR @ (self._counts_R - self._expected_R)
        gain_C = -is_in_CR @ self._expected_R
        gain_C[0] += self._num_samples
        inverse_CC = (is_in_CR @ self._variance_RR @ is_in_CR.T).inverse()
        return Evidence(
            statistic=float(excess_C @ inverse_CC @ excess_C),
            freedom=len(cells) - 1,
            num_samples=self._num_samples,
            num_excluded=self._num_excluded,
            leverage=float(gain_C @ inverse_CC @ gain_C),
        )


# --- Chances -----------------------------------------------------------------------------------------------------


def p_value(statistic: float, freedom: int) -> float:
    """Returns the chance of a chi-square statistic this large or larger."""
    if freedom == 0:
        return 1.0
    halves = (torch.tensor(number / 2, dtype=torch.float64) for number in (freedom, statistic))
    return float(torch.special.gammaincc(*halves))


def combine_p_values(p_values: Sequence[float]) -> tuple[float, int]:
    """Returns (statistic, degrees of freedom) of independent p-values combined: -2 times the sum of their logarithms.

    Positions are combined so, and not by adding their statistics up: how many degrees of freedom one has depends on the
    tokens before it, and so on earlier statistics.
    """
    return sum(-2 * math.log(max(value, sys.float_info.min)) for value in p_values), 2 * len(p_values)


def detectable_shift(evidence: Evidence, level: float) -> float | None:
    """Returns the least share of probability that, moved everywhere, is seen with CERTAINTY; None if none would be.

    It moves to each law's likeliest token, or where drafts are judged to what the draft favours. By the normal
    approximation of the non-central chi-square law, and Wilson and Hilferty's (1931) of its quantile at `level`.
    """
    if evidence.freedom == 0:
        return None
    z_level, z_certainty = torch.special.ndtri(torch.tensor([1 - level, CERTAINTY], dtype=torch.float64)).tolist()
    freedom = evidence.freedom
    spread = 2 / (9 * freedom)
    excess = freedom * (1 - spread + z_level * math.sqrt(spread)) ** 3 - freedom
    # What is added to the mean makes the variance 2 freedom + 4 added.
    deviation = 2 * (z_certainty + math.sqrt(z_certainty**2 + freedom / 2 + excess))
    added = excess + z_certainty * deviation
    shift = math.sqrt(added / evidence.leverage) if evidence.leverage > 0 else math.inf
    return shift if shift <= 1 else None
