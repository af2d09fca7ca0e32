"""Choice of an early-exit layer by acceptance on held-out text and by measured costs of its drafter.

Shape suffixes: B rows, T positions, N supervised positions, D hidden width, C exit layers, M metrics.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from data.batches import Batch
from draftsmith import Target
from draftsmith.core.drafter import Session
from draftsmith.core.sampling import Sampling
from draftsmith.length.costs import CONTEXT, quickest_ms
from draftsmith.length.policies import Policy
from trainers import Metrics
from trainers.layer_search.sublayer_costs import simulate
from trainers.parts.losses import Teacher, acceptance, outcome_log_probs, sum_in_chunks

RowOutcomes = tuple[list[bool], list[float]]
"""For a row's supervised tokens: whether draft and target agree, and the draft's probability of its own token."""

CANDIDATE_LAYERS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Exit layers that are tried, up to half of the target's layers."""
NUM_REPEATS = 3
"""Number of times that the costs of each exit layer are measured."""


class ExitSettings(Protocol):
    """Settings of a trainer of early exits."""

    @property
    def exit_layer(self) -> int:
        """The exit layer, 0 to try several."""


def candidate_layers(num_layers: int) -> tuple[int, ...]:
    """Returns the exit layers to be tried in a target of `num_layers` blocks."""
    return tuple(layer for layer in CANDIDATE_LAYERS if layer <= max(num_layers // 2, 1))


def exit_layers(settings: ExitSettings, target: Target) -> tuple[int, ...]:
    """Returns the exit layer of the settings, or those to be tried if it is 0."""
    return (settings.exit_layer,) if settings.exit_layer else candidate_layers(target.num_layers)


@torch.inference_mode()
def round_costs_ms(drafter: Any, num_draft: int) -> list[float]:
    """Returns the milliseconds of rounds that draft chains of 0, 1, ... `num_draft` tokens and verify them.

    Measured for one row after `CONTEXT` tokens, each the minimum of several runs, and made non-decreasing.
    """
    target = drafter.target
    prompt = [1] * min(CONTEXT, target.context_length // 2)
    cache = target.new_cache(1)
    session = Session(
        target=target,
        rows=[[*prompt, 1]],
        cache=cache,
        sampling=Sampling(),
        generator=torch.Generator(),
        hidden=target.prefill([prompt], cache, layers=drafter.hidden_layers),
    )
    drafter.start(session)

    def run_round(budget: int) -> Tensor:
        draft = drafter.propose(budget) if budget else session.empty_draft()
        span, resume_BND = None, None
        if draft.resume_point is not None:
            span, resume_BND = (draft.resume_point.layer, target.num_layers), draft.resume_point.hidden_BND
        out = target.forward(draft.tokens_BN, draft.tree, cache, span=span, resume_BND=resume_BND)
        return target.logits(out.hidden_BND)

    costs: list[float] = []
    for budget in range(num_draft + 1):
        costs.append(max([quickest_ms(partial(run_round, budget)), *costs]))
    return costs


def tokens_per_ms(rounds: Sequence[tuple[int, int]], costs_ms: Sequence[float]) -> float:
    """Returns the tokens per millisecond of rounds (tokens drafted, tokens accepted), target's own token included."""
    return sum(accepted + 1 for _, accepted in rounds) / sum(costs_ms[drafted] for drafted, _ in rounds)


def acceptance_metrics(
    heads: Mapping[int, Callable[[Tensor], Tensor]], outputs: Sequence[Tensor], theirs_ND: Tensor, target: Target
) -> Metrics:
    """Returns acceptance, the mean of sum_x min(p, q) at temperature 1, and the rate of agreement of both argmaxes.

    `heads` compute logits from `outputs` [N, D], one for each exit layer; `theirs_ND` is the target's last hidden
    state. With several exit layers, these are means over layers, and the acceptance of each is returned as well.
    """

    def compare(theirs_ND: Tensor, *outputs_ND: Tensor) -> Tensor:
        teacher = Teacher(logits=target.logits(theirs_ND[None])[0])
        both = [
            outcome_log_probs(head(z[None])[0], teacher) for head, z in zip(heads.values(), outputs_ND, strict=True)
        ]
        accepted_NC = torch.stack([acceptance(*pair) for pair in both], dim=1)
        agrees_NC = torch.stack([own.argmax(-1) == theirs.argmax(-1) for own, theirs in both], dim=1)
        return torch.stack([accepted_NC, agrees_NC.float()], dim=1)

    sums_MC, count = sum_in_chunks(compare, theirs_ND, *outputs, vocab_size=target.vocab_size * len(heads))
    names = ("acceptance", "greedy_agreement")
    metrics: Metrics = {name: (sums_C.sum(), count * len(heads)) for name, sums_C in zip(names, sums_MC, strict=True)}
    if len(heads) > 1:
        metrics |= {f"acceptance_{layer}": (sums_MC[0, at], count) for at, layer in enumerate(heads)}
    return metrics


def row_outcomes(
    head: Callable[[Tensor], Tensor], outputs: Sequence[Tensor], batches: Sequence[Batch], target: Target
) -> list[RowOutcomes]:
    """Returns the agreement and confidences of each row; `head` computes logits from `outputs` [B, T, D] of batches."""
    outcomes = []
    for batch, output_BTD in zip(batches, outputs, strict=True):
        for row, mask_T in enumerate(batch.loss_mask_BT[:, 1:]):
            own = head(output_BTD[row, :-1][mask_T][None])[0].float().softmax(-1).max(-1)
            theirs_ND = batch.hidden[target.num_layers][row, :-1][mask_T]
            agrees_N = own.indices == target.logits(theirs_ND[None])[0].argmax(-1)
            outcomes.append((agrees_N.tolist(), own.values.tolist()))
    return outcomes


def fastest(drafters: Sequence[tuple[Any, Sequence[RowOutcomes]]], policy: Callable[[], Policy]) -> int:
    """Returns the index of the drafter, given with its `row_outcomes`, with the most predicted tokens per second.

    The prediction is for chains.
    """
    # Alternating repeats spread the load of other processes over all drafters.
    turns = [[round_costs_ms(drafter, drafter.config.num_draft) for drafter, _ in drafters] for _ in range(NUM_REPEATS)]
    lowest_ms = [[min(times) for times in zip(*of_one, strict=True)] for of_one in zip(*turns, strict=True)]
    plain_ms, rates = min(costs_ms[0] for costs_ms in lowest_ms), []
    for (drafter, outcomes), costs_ms in zip(drafters, lowest_ms, strict=True):
        rounds = simulate(iter(outcomes), policy(), drafter.config.num_draft)
        rates.append(tokens_per_ms(rounds, costs_ms))
        tau = 1 + sum(accepted for _, accepted in rounds) / len(rounds)
        speeds = f"{1e3 * rates[-1]:.0f} tok/s predicted, {1e3 / plain_ms:.0f} without drafts"
        print(f"exit layer {drafter.config.exit_layer}: {tau:.2f} tokens per round, {speeds}")

    return max(range(len(rates)), key=rates.__getitem__)
