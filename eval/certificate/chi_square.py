"""Chi-square tests of sampled tokens against exact distributions, and the smallest bias that they detect.

Shape suffixes: T positions, V vocabulary or any other set that is sampled from, C cells, I counts from 0 up, R ranks,
K tokens of a draft, N drafts, F the tokens of all drafts.
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
"""Minimum expected count of every cell of a group."""
MANY = 50.0
"""Minimum expected count of a cell of ranks, whose statistic is chi-square only in the limit; also used for drafts."""
RANK_ENDS = (1, 2, 4, 8)
"""Ends of the cells of ranks: 0, 1, 2 to 3, 4 to 7, and 8 or more."""
POWER = 0.9
"""Probability with which a bias of `detectable_shift` is detected."""

Tokens = tuple[int, ...]
ReferenceProbs = Callable[[int, list[Tokens]], Iterable[tuple[Tensor, Tensor]]]


@dataclass(frozen=True, kw_only=True)
class SampledText:
    """One sampled text and its drafts."""

    prompt: int
    """Index of the prompt that it continues."""
    tokens: Tokens
    drafts: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """For positions where a draft began: distinct tokens [K] that it could draft first, and their weights [K]."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The sum of independent chi-square statistics."""

    statistic: float = 0.0
    freedom: int = 0
    """Degrees of freedom."""
    num_groups: int = 0
    num_samples: int = 0
    num_excluded: int = 0
    """Samples of zero probability; a single one fails the test."""
    num_unclear: int = 0
    """Groups left out because rounding could change their distribution."""
    leverage: float = 0.0
    """Increase of the statistic per squared probability mass shifted; see `detectable_shift`."""

    def __add__(self, other: "Evidence") -> "Evidence":
        return Evidence(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    @property
    def p_value(self) -> float:
        """Returns the probability of a statistic this large under the exact distributions; 1 if nothing was tested."""
        return 0.0 if self.num_excluded else p_value(self.statistic, self.freedom)


# --- One distribution --------------------------------------------------------------------------------------------


def chi_square(counts_V: Tensor, probs_V: Tensor, generator: torch.Generator) -> Evidence:
    """Returns the evidence of counts [V] against the distribution [V] that they should be sampled from.

    Each of the likeliest tokens is a cell and the rest is one cell, so that each expects MIN_EXPECTED or more. The
    statistic is the sum of squared normal scores of the cells' counts, each conditional on the cells before it. It
    equals Pearson's in the limit, and is exactly chi-square because the scores are randomised quantile residuals (Dunn
    and Smyth 1996). Pearson's own exceeds the level 1e-5 up to 20 times too often where cells expect five.
    """
    num_samples, num_excluded = int(counts_V.sum()), int(counts_V[probs_V == 0].sum())
    sorted_V, order_V = probs_V.double().sort(descending=True, stable=True)
    # Summed from the end, so that an empty rest is exactly zero.
    rest_V = torch.nn.functional.pad(sorted_V.flip(0).cumsum(0).flip(0)[1:], (0, 1))
    is_enough_V = (num_samples * sorted_V >= MIN_EXPECTED) & ((num_samples * rest_V >= MIN_EXPECTED) | (rest_V == 0))
    num_own = int(is_enough_V.nonzero()[-1]) + 1 if is_enough_V.any() else 0
    # Given the cells before it, a cell's count is binomial; the last cell's count is determined by the others.
    num_tested = num_own if num_own and rest_V[num_own - 1] > 0 else num_own - 1
    if num_tested < 1:
        return Evidence(num_excluded=num_excluded)
    counts_C = counts_V[order_V[:num_tested]].double().cpu()
    probs_C = (sorted_V / (sorted_V + rest_V))[:num_tested].cpu()
    scores_C = _normal_scores(counts_C, num_samples - (counts_C.cumsum(0) - counts_C), probs_C, generator)
    return Evidence(
        statistic=float(scores_C.square().sum()),
        freedom=num_tested,
        num_groups=1,
        num_samples=num_samples,
        num_excluded=num_excluded,
        leverage=num_samples * (1 / float(sorted_V[0]) - 1),
    )


def _normal_scores(counts_C: Tensor, trials_C: Tensor, probs_C: Tensor, generator: torch.Generator) -> Tensor:
    """Returns randomised quantile residuals [C] of binomial counts, which are exactly standard normal."""
    counts_C1, trials_C1, probs_C1 = counts_C[:, None], trials_C[:, None], probs_C[:, None]
    counts_I = torch.arange(int(trials_C.max()) + 1, dtype=torch.float64)
    failures_CI = (trials_C1 - counts_I).clamp(min=0)
    log_ways_CI = torch.lgamma(trials_C1 + 1) - torch.lgamma(counts_I + 1) - torch.lgamma(failures_CI + 1)
    prob_CI = log_ways_CI + torch.xlogy(counts_I, probs_C1) + torch.special.xlog1py(failures_CI, -probs_C1)
    prob_CI = prob_CI.exp() * (counts_I <= trials_C1)
    below_C, here_C, above_C = (
        (prob_CI * is_in_CI).sum(1) for is_in_CI in (counts_I < counts_C1, counts_I == counts_C1, counts_I > counts_C1)
    )
    uniforms_C = torch.rand(len(counts_C), generator=generator, dtype=torch.float64)
    # The smaller tail keeps its precision; the sign does not matter after squaring.
    tail_C = torch.minimum(below_C + uniforms_C * here_C, above_C + (1 - uniforms_C) * here_C)
    return torch.special.ndtri(tail_C.clamp(min=sys.float_info.min))


# --- Many distributions ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EvidenceByGrouping:
    """Evidence of the same texts, with tokens grouped in three ways."""

    by_prefix: list[Evidence]
    """Evidence at each position."""
    by_rank: Evidence
    by_draft: Evidence


def collect_evidence(
    texts: Iterable[SampledText], num_tokens: int, probs_for: ReferenceProbs, generator: torch.Generator
) -> EvidenceByGrouping:
    """Returns the evidence of texts of at most `num_tokens` tokens.

    `probs_for(prompt, texts)` yields, for each of the distinct texts of one prompt, the distributions [T, V] of its
    tokens, and which positions [T] are clear, that is, not changed by rounding; the others are left out.

    By prefix: texts with the same prompt and the same tokens before a position form a group there. Which groups are
    tested depends on earlier tokens alone, so that, given these, a position's statistic is chi-square if every token
    follows its distribution. By rank: tokens, grouped or not, are counted by their rank in their distribution. By
    draft: the weights that a draft gives to the tokens sampled at its first position are summed; they may depend on
    everything before that token, but not on the token. Both sums minus their expectations are martingales, whose
    squares divided by their predictable variances are chi-square in the limit.
    """
    different: dict[int, dict[Tokens, list[SampledText]]] = defaultdict(lambda: defaultdict(list))
    groups: dict[tuple[int, Tokens], list[int]] = defaultdict(list)
    for drawn in texts:
        different[drawn.prompt][drawn.tokens].append(drawn)
        for at, token in enumerate(drawn.tokens):
            groups[drawn.prompt, drawn.tokens[:at]].append(token)
    positions, ranks, weights = [Evidence()] * num_tokens, _RankCounts(), _DraftWeights()
    for prompt, by_text in different.items():
        probs = probs_for(prompt, list(by_text))
        for (tokens, same), (probs_TV, is_clear_T) in zip(by_text.items(), probs, strict=True):
            for at in range(len(tokens)):
                group = groups.pop((prompt, tokens[:at]), [])
                if len(group) >= 2 * MIN_EXPECTED and is_clear_T[at]:
                    counts_V = torch.tensor(group, device=probs_TV.device).bincount(minlength=probs_TV.shape[1])
                    positions[at] += chi_square(counts_V, probs_TV[at], generator)
                elif len(group) >= 2 * MIN_EXPECTED:
                    positions[at] += Evidence(num_unclear=1)
            tokens_T = torch.tensor(tokens, device=probs_TV.device)
            ranks.add(tokens_T[is_clear_T], probs_TV[is_clear_T], len(same))
            tested = {at for at, is_clear in enumerate(is_clear_T.tolist()) if is_clear and at < len(tokens)}
            drafts = [(at, *draft) for drawn in same for at, draft in drawn.drafts.items() if at in tested]
            weights.add(tokens_T, probs_TV, drafts)
    return EvidenceByGrouping(by_prefix=positions, by_rank=ranks.evidence(), by_draft=weights.evidence())


class _DraftWeights:
    """Sum of the draft's weights of the sampled tokens, with its expectation and variance."""

    def __init__(self) -> None:
        self._num_drafts = 0
        # For the tokens of all drafts: the draft's number, the token's probability and weight, and whether it came.
        self._tokens: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def add(self, tokens_T: Tensor, probs_TV: Tensor, drafts: list[tuple[int, Tensor, Tensor]]) -> None:
        """Adds drafts of texts of the same tokens: each one's position, and the tokens [K] and weights [K] it has."""
        if not drafts:
            return
        positions, drafted, weights = zip(*drafts, strict=True)
        numbers_F = torch.arange(len(drafts)).repeat_interleave(torch.tensor([len(one) for one in drafted]))
        at_F, drafted_F = torch.tensor(positions)[numbers_F].to(probs_TV.device), torch.cat(drafted).to(probs_TV.device)
        is_sampled_F = drafted_F == tokens_T[at_F]
        probs_F = probs_TV[at_F, drafted_F].double()
        self._tokens.append((numbers_F + self._num_drafts, probs_F.cpu(), torch.cat(weights), is_sampled_F.cpu()))
        self._num_drafts += len(drafts)

    def evidence(self) -> Evidence:
        """Returns the evidence; none if too few drafted tokens were probable for a normal approximation."""
        if not self._tokens:
            return Evidence()
        numbers_F, probs_F, weights_F, is_sampled_F = map(torch.cat, zip(*self._tokens, strict=True))
        weights_F = weights_F.double()

        def sums(values_F: Tensor) -> Tensor:
            return torch.zeros(self._num_drafts, dtype=torch.float64).index_add(0, numbers_F, values_F)

        mean_N, rest_N = sums(probs_F * weights_F), 1 - sums(probs_F)
        excess = float(weights_F[is_sampled_F].sum() - mean_N.sum())
        gain = float((sums(weights_F.square()) / sums(weights_F) - mean_N).sum())
        # Tokens that are not in the draft have weight 0.
        second_N, third_N, fourth_N = (
            sums(probs_F * (weights_F - mean_N[numbers_F]) ** power) + rest_N * (-mean_N) ** power
            for power in (2, 3, 4)
        )
        variance, third = float(second_N.sum()), float(third_N.sum())
        fourth = float((fourth_N - 3 * second_N.square()).sum())
        # As close to normal as a Poisson count with expectation MANY.
        if variance <= 0 or MANY * third**2 > variance**3 or MANY * fourth > variance**2:
            return Evidence()
        return Evidence(
            statistic=excess**2 / variance,
            freedom=1,
            num_samples=self._num_drafts,
            leverage=gain**2 / variance,
        )


class _RankCounts:
    """Counts of tokens by their rank in their distributions, with expectations and covariance."""

    def __init__(self) -> None:
        num_ranks = len(RANK_ENDS) + 1
        self._counts_R, self._expected_R = torch.zeros(2, num_ranks, dtype=torch.float64)
        self._variance_RR = torch.zeros(num_ranks, num_ranks, dtype=torch.float64)
        self._num_samples = self._num_excluded = 0

    def add(self, tokens_T: Tensor, probs_TV: Tensor, number: int) -> None:
        """Adds `number` equal texts: their tokens [T] and the distributions [T, V] of these."""
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
        """Returns the evidence; cells that expect too few tokens are merged with those before them."""
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
        # The last cell's count is determined by the others.
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


# --- P-values and power ------------------------------------------------------------------------------------------


def p_value(statistic: float, freedom: int) -> float:
    """Returns the probability of a chi-square statistic this large or larger."""
    if freedom == 0:
        return 1.0
    halves = (torch.tensor(number / 2, dtype=torch.float64) for number in (freedom, statistic))
    return float(torch.special.gammaincc(*halves))


def combine_p_values(p_values: Sequence[float]) -> tuple[float, int]:
    """Returns Fisher's combination (statistic, degrees of freedom) of p-values: -2 times the sum of their logarithms.

    Used for positions in place of adding their statistics, because a position's degrees of freedom depend on the
    tokens before it, and so on earlier statistics.
    """
    return sum(-2 * math.log(max(value, sys.float_info.min)) for value in p_values), 2 * len(p_values)


def detectable_shift(evidence: Evidence, level: float) -> float | None:
    """Returns the smallest probability mass that, shifted at every position, is detected with POWER; None if none is.

    It is shifted to each distribution's likeliest token, or by draft to the draft's tokens. By the normal approximation
    of the non-central chi-square distribution, and Wilson and Hilferty's (1931) of the quantile at `level`.
    """
    if evidence.freedom == 0:
        return None
    z_level, z_power = torch.special.ndtri(torch.tensor([1 - level, POWER], dtype=torch.float64)).tolist()
    freedom = evidence.freedom
    spread = 2 / (9 * freedom)
    excess = freedom * (1 - spread + z_level * math.sqrt(spread)) ** 3 - freedom
    # Increasing the mean by `added` makes the variance 2 freedom + 4 added.
    deviation = 2 * (z_power + math.sqrt(z_power**2 + freedom / 2 + excess))
    added = excess + z_power * deviation
    shift = math.sqrt(added / evidence.leverage) if evidence.leverage > 0 else math.inf
    return shift if shift <= 1 else None
