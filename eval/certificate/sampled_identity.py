"""Sampled identity: text sampled by the verifier "coupled" is that of plain decoding with the same seed.

Shape suffixes: V vocabulary.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import draftsmith
from data.prompts import Prompt
from draftsmith import Target
from draftsmith.core.sampling import Sampling
from draftsmith.verify.research.position_noise import exponentials
from eval.bakeoff.measure import DecodingRequest, DecodingResult, pad
from eval.certificate.identity import PLAIN, GreedySettings, compare_texts
from eval.certificate.reference import reference_logits, reference_probs, rounding_error
from eval.certificate.same_text import BitsRecorder

KIND, COUPLED = "sampled identity", "coupled"
LEAST_PROBABILITY = 1e-30
"""Stands for 0, so that gaps are finite."""


def compare_sampled(
    target: Target,
    drafters: Mapping[str, Any],
    prompts: Sequence[Prompt],
    sampling: Sampling,
    settings: GreedySettings,
    *,
    seed: int,
    exact: Callable[[], Target],
    on_progress: Callable[[int], Any],
    fine_tuned_by: str = "",
) -> list[dict[str, Any]]:
    """Returns a test for each batch size and drafter, against plain decoding by the verifier "coupled".

    Arguments are those of `compare_greedy`; row r of the batch that begins at prompt b is sampled under `seed` + b.
    """
    plain = PLAIN + fine_tuned_by
    used = {plain: None, **drafters}
    recorders = {name: BitsRecorder(target, one) for name, one in used.items()} if target.batch_invariant else {}
    decoders = {name: partial(_decode, target, recorders.get(name, one), sampling) for name, one in used.items()}
    explain = partial(explain_sampled, target, sampling, exact=exact, tie_tolerance=settings.tie_tolerance)
    return compare_texts(
        decoders,
        list(itertools.product(drafters, [plain])),
        prompts,
        settings,
        explain,
        conditions={
            "kind": KIND,
            "tuned": bool(fine_tuned_by),
            "verifier": COUPLED,
            "dtype": str(target.dtype).removeprefix("torch."),
            **asdict(sampling),
            "seed": seed,
        },
        recorders=recorders,
        on_progress=on_progress,
        temperature=sampling.temperature,
        seed=seed,
    )


def explain_sampled(
    target: Target,
    sampling: Sampling,
    request: DecodingRequest,
    row: int,
    found: list[int],
    expected: list[int],
    *,
    exact: Callable[[], Target],
    tie_tolerance: float,
) -> dict[str, Any]:
    """Returns where two sampled texts of one row first differ, and whether that is a numeric tie.

    It is a tie if log-probability plus Gumbel noise of both tokens is within rounding error of the largest, both in the
    model's own forward in the run's dtype and in float64, or if rounding can change what top-k or top-p keep. If one
    text ends before the other, that is an error.
    """
    pairs = list(itertools.zip_longest(found, expected))
    position = next(index for index, (one, other) in enumerate(pairs) if one != other)
    tokens = list(pairs[position])
    difference: dict[str, Any] = {"position": position, "tokens": tokens, "num_not_compared": len(expected) - position}
    if None in tokens:
        return difference | {"is_tie": False, "gap": None, "gap_float64": None, "tolerance": None}
    prompt = request.prompts[row]
    num_before = (1 if target.is_encoder_decoder else len(prompt)) + position
    gaps, is_clear, tolerance = [], True, 0.0
    for one in (target, exact()):
        (logits_TV,) = reference_logits(one, prompt, [expected[:position]])
        error_T = rounding_error(logits_TV[-1:], target.dtype, tie_tolerance)
        probs_TV, is_clear_T = reference_probs(logits_TV[-1:], sampling, error_T)
        variables_V = exponentials([(request.seed, row)], [num_before], probs_TV.shape[-1], probs_TV.device)[0]
        scores_V = probs_TV[0].clamp(min=LEAST_PROBABILITY).log() - variables_V.double().log()
        gaps.append(float(scores_V.max() - scores_V[tokens].min()))
        is_clear, tolerance = is_clear and bool(is_clear_T[0]), float(2 * error_T[0] / sampling.temperature)
    difference |= {"gap": gaps[0], "gap_float64": gaps[1], "tolerance": tolerance}
    return difference | {"is_tie": not is_clear or max(gaps) <= tolerance}


def _decode(target: Target, drafter: Any, sampling: Sampling, request: DecodingRequest) -> DecodingResult:
    tokens_BT, mask_BT = pad(request.prompts, target.device, side="right")
    out = draftsmith.generate(
        target,
        tokens_BT,
        drafter,
        attention_mask=mask_BT,
        max_new_tokens=request.max_new_tokens,
        seed=request.seed,
        verifier=COUPLED,
        **sampling.as_arguments(),
    )
    starts = [1 if target.is_encoder_decoder else len(prompt) for prompt in request.prompts]
    rows = zip(out.sequences.tolist(), starts, out.lengths.tolist(), strict=True)
    return DecodingResult(rows=[row[start:length] for row, start, length in rows], stats=out.stats)
