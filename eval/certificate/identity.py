"""Greedy identity: compares greedy texts of several decoding methods and separates numeric ties from errors.

Shape suffixes: V vocabulary.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data.prompts import Prompt
from draftsmith import Target
from eval.bakeoff.measure import DecodingRequest, DecodingResult, draftsmith_method, transformers_method
from eval.certificate.reference import reference_logits, rounding_error
from eval.certificate.same_text import BitsRecorder, first_difference

KIND = "greedy identity"
PLAIN, TRANSFORMERS = "plain decoding", "transformers"
PASSED, FAILED = "passed", "failed"
OTHER_BITS = {
    "is_tie": False,
    "is_of_bits": True,
    "num_not_compared": 0,
    **dict.fromkeys(("gap", "gap_float64", "tolerance")),
}
"""A difference of the bits of logits where the tokens are the same."""
DTYPES = ("float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class GreedySettings:
    """The greedy decoding to compare, and the tolerance of numeric ties."""

    dtypes: tuple[str, ...] = ("float32", "float64")
    """Dtypes of the target in which greedy decoding is compared."""
    batch_sizes: tuple[int, ...] = (1, 8)
    """Prompts per batch."""
    max_new_tokens: int = 32
    """New tokens per prompt."""
    tie_tolerance: float = 8.0
    """Logits are tied if they differ by at most this times the dtype's epsilon times the largest logit."""

    def __post_init__(self) -> None:
        if not self.dtypes or set(self.dtypes) - set(DTYPES):
            raise ValueError(f"dtypes are {list(self.dtypes)}; name one or more of {', '.join(DTYPES)}")
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ValueError(f"batch sizes are {list(self.batch_sizes)}; each must be at least 1")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if not 0 <= self.tie_tolerance < float("inf"):
            raise ValueError(f"tie_tolerance is {self.tie_tolerance}; it must be 0 or a positive number")

    def check_prompts(self, num_prompts: int) -> None:
        """Raises ValueError if there are too few prompts to fill the largest batch."""
        if num_prompts < max(self.batch_sizes):
            raise ValueError(f"batch size {max(self.batch_sizes)} needs as many prompts, but there are {num_prompts}")


def compare_greedy(
    target: Target,
    drafters: Mapping[str, Any],
    prompts: Sequence[Prompt],
    settings: GreedySettings,
    *,
    verifier: str,
    exact: Callable[[], Target],
    on_progress: Callable[[int], Any],
    fine_tuned_by: str = "",
) -> list[dict[str, Any]]:
    """Returns a test for each batch size, drafter and reference: draftsmith's plain decoding, and transformers.

    Plain decoding itself is compared with transformers. `exact()` returns the target in float64 and is called where
    texts differ; `on_progress` is called with the number of tokens after each batch; `fine_tuned_by` is appended to the
    references' names.
    """
    plain, transformers = PLAIN + fine_tuned_by, TRANSFORMERS + fine_tuned_by
    used: dict[str, Any] = {plain: None, **drafters}
    recorders = {name: BitsRecorder(target, one) for name, one in used.items()} if target.batch_invariant else {}
    used |= recorders
    decoders = {plain: draftsmith_method(target, used[plain]), transformers: transformers_method(target)}
    decoders |= {name: draftsmith_method(target, used[name], verifier=verifier) for name in drafters}

    def explain_row(request: DecodingRequest, row: int, found: list[int], expected: list[int]) -> dict[str, Any]:
        prompt, tolerance = request.prompts[row], settings.tie_tolerance
        return explain(target, prompt, found, expected, exact=exact, tie_tolerance=tolerance)

    return compare_texts(
        decoders,
        [(plain, transformers), *itertools.product(drafters, (plain, transformers))],
        prompts,
        settings,
        explain_row,
        conditions={
            "kind": KIND,
            "tuned": bool(fine_tuned_by),
            "verifier": "greedy" if verifier == "auto" else verifier,
            "dtype": str(target.dtype).removeprefix("torch."),
        },
        recorders=recorders,
        on_progress=on_progress,
    )


def compare_texts(
    decoders: Mapping[str, Callable[[DecodingRequest], DecodingResult]],
    pairs: Sequence[tuple[str, str]],
    prompts: Sequence[Prompt],
    settings: GreedySettings,
    explain_row: Callable[[DecodingRequest, int, list[int], list[int]], dict[str, Any]],
    *,
    conditions: dict[str, Any],
    recorders: Mapping[str, BitsRecorder],
    on_progress: Callable[[int], Any],
    temperature: float = 0.0,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Returns a test for each batch size and each of `pairs` of decoders, whose texts must be equal.

    `explain_row` gets a request, a row of it, and that row's two texts where they differ. Between two decoders that
    have `recorders`, no difference is a numeric tie, and the bits of the tokens' logits must be equal too.
    """
    rows = [prompt.ids for prompt in prompts]
    if len(set(map(len, rows))) == 1:
        # Prompts cut from documents have equal lengths; unequal ones test padding too.
        rows = [row[: max(1, len(row) - 3 * number)] for number, row in enumerate(rows)]
    tests = []
    for batch_size in settings.batch_sizes:
        texts: dict[str, list[list[int]]] = {name: [] for name in decoders}
        hashes: dict[str, list[list[str]]] = {name: [] for name in recorders}
        requests = [
            DecodingRequest(
                prompts=rows[begin : begin + batch_size],
                temperature=temperature,
                max_new_tokens=settings.max_new_tokens,
                seed=seed + begin,
            )
            for begin in range(0, len(rows), batch_size)
        ]
        for request in requests:
            for name, decode in decoders.items():
                texts[name] += decode(request).rows
                if name in recorders:
                    hashes[name] += recorders[name].hashes
                on_progress(len(request.prompts) * settings.max_new_tokens)
        for name, reference in pairs:
            differences: list[dict[str, Any]] = [
                {"prompt": prompts[number].key, "num_prompt_tokens": len(rows[number])}
                | explain_row(requests[number // batch_size], number % batch_size, ours, theirs)
                for number, (ours, theirs) in enumerate(zip(texts[name], texts[reference], strict=True))
                if ours != theirs
            ]
            if name in recorders and reference in recorders:
                differences = [difference | {"is_tie": False} for difference in differences] + [
                    {"prompt": prompts[number].key, "num_prompt_tokens": len(rows[number])}
                    | {"position": position, "tokens": [texts[name][number][position]] * 2, **OTHER_BITS}
                    for number, pair in enumerate(zip(hashes[name], hashes[reference], strict=True))
                    if texts[name][number] == texts[reference][number]
                    and (position := first_difference(*pair)) is not None
                ]
            ties = [difference for difference in differences if difference["is_tie"]]
            errors = [difference for difference in differences if not difference["is_tie"]]
            num_not_compared = sum(difference["num_not_compared"] for difference in differences)
            tests.append(
                {
                    "kind": conditions["kind"],
                    "drafter": name,
                    **conditions,
                    "reference": reference,
                    "batch_size": batch_size,
                    "max_new_tokens": settings.max_new_tokens,
                    "tie_tolerance": settings.tie_tolerance,
                    "num_rows": len(rows),
                    "num_samples": sum(map(len, texts[reference])) - num_not_compared,
                    "num_not_compared": num_not_compared,
                    "ties": ties,
                    "errors": errors,
                    "statistic": None,
                    "degrees_of_freedom": None,
                    "p_value": None,
                    "verdict": FAILED if errors else PASSED,
                }
            )
    return tests


def explain(
    target: Target,
    prompt: list[int],
    found: list[int],
    expected: list[int],
    *,
    exact: Callable[[], Target],
    tie_tolerance: float,
) -> dict[str, Any]:
    """Returns where two greedy texts of one prompt first differ, and whether that is a numeric tie.

    It is a tie if the logits of both tokens are within rounding error of the largest logit, both in the model's own
    forward in the run's dtype and in float64. If one text ends before the other, that is an error.
    """
    pairs = list(itertools.zip_longest(found, expected))
    position = next(index for index, (one, other) in enumerate(pairs) if one != other)
    tokens = list(pairs[position])
    difference: dict[str, Any] = {"position": position, "tokens": tokens, "num_not_compared": len(expected) - position}
    if None in tokens:
        return difference | {"is_tie": False, "gap": None, "gap_float64": None, "tolerance": None}
    logits_V, exact_V = (next(reference_logits(one, prompt, [expected[:position]]))[-1] for one in (target, exact()))
    gap, exact_gap = (float(one_V.max() - one_V[tokens].min()) for one_V in (logits_V, exact_V))
    tolerance = float(rounding_error(exact_V, target.dtype, tie_tolerance))
    difference |= {"gap": gap, "gap_float64": exact_gap, "tolerance": tolerance}
    return difference | {"is_tie": max(gap, exact_gap) <= tolerance}
