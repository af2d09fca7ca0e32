"""Acceptance and cost of drafting with a target's sublayers skipped, from texts read in one pass and measured costs.

A mask is a tuple of bits: bits 0 to L - 1 skip attention layers, bits L to 2 L - 1 feed-forward layers.

Shape suffixes: B rows, T positions, N supervised positions, D hidden width.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import numpy as np
import torch
from torch import Tensor

from data.batches import Batch, Example
from draftsmith import Target
from draftsmith.core.tree import chain
from draftsmith.length.costs import CONTEXT, SIZES
from draftsmith.length.policies import Outcome, Policy
from draftsmith.parts.self_drafting.sublayers import Sublayers, draft_hidden, sublayers
from trainers.layer_search.bits import Bits

POSITIONS_AT_ONCE = 1024
ROUNDS = 15


@dataclass(frozen=True, kw_only=True)
class SublayerCosts:
    """Milliseconds of forwards, measured once so that the search does not depend on the machine's load."""

    whole: float
    """One token, whole model."""
    no_attention: float
    """One token, all attention layers skipped."""
    no_mlp: float
    """One token, all feed-forward layers skipped."""
    neither: float
    """One token, both skipped."""
    verify: dict[str, float]
    """Verification by the whole model, by number of drafted tokens; the pending token is verified as well."""

    def draft(self, bits: Bits) -> float:
        """Returns the cost of a drafted token: the mean over blocks of the cost if all blocks were masked alike."""
        pairs = list(zip(bits[: len(bits) // 2], bits[len(bits) // 2 :], strict=True))
        costs = {(0, 0): self.whole, (1, 0): self.no_attention, (0, 1): self.no_mlp, (1, 1): self.neither}
        return sum(costs[pair] for pair in pairs) / len(pairs)

    def verification(self, num_drafted: int) -> float:
        """Returns the cost of a verification, interpolated linearly between the measured sizes."""
        return float(np.interp(num_drafted, list(map(float, self.verify)), list(self.verify.values())))


class CachedTexts:
    """Rows with the whole target's keys and values, which are reread with sublayers skipped in one forward per mask."""

    @torch.inference_mode()
    def __init__(self, target: Target, batch: Batch, num_draft: int) -> None:
        self._target, self._num_draft = target, num_draft
        self._tokens_BT = batch.tokens_BT.to(target.device)
        self._cache = target.new_cache(len(self._tokens_BT))
        out = target.forward(self._tokens_BT, chain(self._tokens_BT.shape[1], target.device), self._cache)
        # The first token is not drafted, as the whole model has read none before it.
        self.mask_BT = batch.loss_mask_BT[:, 2:].to(target.device)
        self._labels_N, _ = self._guesses(out.hidden_BND[:, 1:-1])

    @torch.inference_mode()
    def agreement(self, skipped: Sublayers) -> tuple[Tensor, Tensor]:
        """Returns where the draft's greedy token is the target's [N], and the draft's probability of its token [N]."""
        hidden_BTD = draft_hidden(self._target, self._tokens_BT, self._cache, skipped, self._num_draft)
        guesses_N, confidence_N = self._guesses(hidden_BTD[:, :-1])
        return guesses_N == self._labels_N, confidence_N

    def segments(self, right_N: Tensor, confidence_N: Tensor) -> Iterator[tuple[list[bool], list[float]]]:
        """Yields the values of each run of consecutive supervised positions."""
        values = iter(zip(right_N.tolist(), confidence_N.tolist(), strict=True))
        for row in self.mask_BT.tolist():
            for is_supervised, group in groupby(row):
                if is_supervised:
                    pairs = [next(values) for _ in group]
                    yield [one for one, _ in pairs], [other for _, other in pairs]

    def _guesses(self, hidden_BTD: Tensor) -> tuple[Tensor, Tensor]:
        parts = []
        for hidden_ND in hidden_BTD[self.mask_BT].split(POSITIONS_AT_ONCE):
            best = self._target.logits(hidden_ND[None])[0].float().softmax(-1).max(-1)
            parts.append((best.indices, best.values))
        indices, values = zip(*parts, strict=True)
        return torch.cat(indices), torch.cat(values)


def simulate(
    segments: Iterator[tuple[list[bool], list[float]]], policy: Policy, num_draft: int
) -> list[tuple[int, int]]:
    """Returns (tokens drafted, tokens accepted) of each round of simulated decoding of the text segments.

    A round begins where the last one ended. After a wrong token, the confidences of the text's own tokens are used.
    """
    policy.start(1, num_draft)
    rounds = []
    for right, confidence in segments:
        position = 0
        while position < len(right):
            drafted: list[float] = []
            most = min(num_draft, len(right) - position)
            while len(drafted) < most and policy.should_continue(0, len(drafted), drafted):
                drafted.append(confidence[position + len(drafted)])
            num_matched = next((at for at in range(len(drafted)) if not right[position + at]), len(drafted))
            rounds.append((len(drafted), num_matched))
            if drafted:
                outcome = Outcome(row=0, num_drafted=len(drafted), num_accepted=num_matched, confidences=drafted)
                policy.learn([outcome], len(drafted), 1.0)
            position += num_matched + 1
    return rounds


def speed_up(rounds: Sequence[tuple[int, int]], bits: Bits, costs: SublayerCosts) -> float:
    """Returns the speed-up, sum (accepted + 1) whole / sum (drafted draft + verification)."""
    tokens = sum(num_matched + 1 for _, num_matched in rounds)
    spent = sum(num_drafted * costs.draft(bits) + costs.verification(num_drafted) for num_drafted, _ in rounds)
    return tokens * costs.whole / spent


@torch.inference_mode()
def influence(target: Target, rows: Sequence[Example]) -> list[float]:
    """Returns for each bit 1 - the mean cosine of its block's outputs with and without the sublayer on these rows.

    This is ShortGPT's block influence (2403.03853, equation 1) of half a block; each costs a pass through one block.
    """
    totals, count = [0.0] * (2 * target.num_layers), sum(len(row.tokens_T) for row in rows)
    for row in rows:
        tokens_1T = row.tokens_T[None].to(target.device)
        hidden = target.read(tokens_1T, tuple(range(target.num_layers + 1)))
        cache, whole = target.new_cache(1), chain(tokens_1T.shape[1], target.device)
        for bit in range(len(totals)):
            block = bit % target.num_layers
            out = target.forward(
                tokens_1T,
                whole,
                cache,
                span=(block, block + 1),
                resume_BND=hidden[block],
                skipped=sublayers((block,), ()) if bit == block else sublayers((), (block,)),
            )
            alike_1T = torch.cosine_similarity(hidden[block + 1].float(), out.hidden_BND.float(), dim=-1)
            totals[bit] += (1 - alike_1T).sum().item()
    return [total / count for total in totals]


@torch.inference_mode()
def measure_costs(target: Target, num_draft: int) -> SublayerCosts:
    """Returns costs after a context of `CONTEXT` tokens, each the minimum of `ROUNDS` interleaved measurements.

    On a CPU this is process time, which does not include other processes.
    """
    cache, blocks = target.new_cache(1), tuple(range(target.num_layers))
    target.prefill([[1] * min(CONTEXT, target.context_length // 2)], cache)
    clock = time.process_time if target.device.type == "cpu" else time.perf_counter

    def run_ms(num_tokens: int, skipped: Sublayers) -> float:
        began = clock()
        tokens_1N = torch.ones(1, num_tokens, dtype=torch.long, device=target.device)
        out = target.forward(tokens_1N, chain(num_tokens, target.device), cache, skipped=skipped)
        target.logits(out.hidden_BND).argmax(-1).tolist()  # synchronises with an accelerator
        return 1e3 * (clock() - began)

    kinds = {"whole": ((), ()), "no_attention": (blocks, ()), "no_mlp": ((), blocks), "neither": (blocks, blocks)}
    forwards = {name: (1, sublayers(*skipped)) for name, skipped in kinds.items()}
    sizes = sorted({*(size for size in SIZES if size < num_draft), num_draft})
    forwards |= {str(size): (1 + size, sublayers((), ())) for size in sizes}
    rounds = [{name: run_ms(*one) for name, one in forwards.items()} for _ in range(ROUNDS)]
    least = {name: min(one[name] for one in rounds) for name in forwards}
    verify = accumulate((least[str(size)] for size in sizes), max, initial=least["whole"])
    return SublayerCosts(
        **{name: least[name] for name in kinds}, verify=dict(zip(["0", *map(str, sizes)], verify, strict=True))
    )
