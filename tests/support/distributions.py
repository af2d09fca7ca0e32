"""Chi-square tests of whole systems: counts of sampled continuations against the target's exact distribution.

Shape suffixes: V vocabulary; C is V to the power of the number of tokens, one cell for each continuation.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

import draftsmith
from draftsmith import Target
from eval.certificate import chi_square
from tests.support.models import SEQ2SEQ, tiny_model

VOCAB_SIZE, NUM_TOKENS = 8, 3
# Contains a repeated phrase, so that look-ups match; it is an encoder-decoder's source.
PROMPT = [1, 4, 2, 7, 4, 1, 4, 2]
FALSE_ALARM = 1e-4
ROWS = 1_000
CUTOFFS: dict[str, Any] = {
    "min_p": MinPLogitsWarper,
    "typical_p": TypicalLogitsWarper,
    "epsilon_cutoff": EpsilonLogitsWarper,
    "eta_cutoff": EtaLogitsWarper,
}


@cache
def distribution_target(architecture: str = "llama") -> Target:
    """Returns a target of eight tokens whose distributions are neither flat nor one-hot."""
    changes = {} if architecture in SEQ2SEQ else {"num_hidden_layers": 2}
    return Target(tiny_model(architecture, seed=5, vocab_size=VOCAB_SIZE, sharpness=1.0, **changes))


def check_distribution(drafter: Any, target: Target, *, num_samples: int, seed: int = 0, **settings: Any) -> None:
    """Asserts that samples follow the target's distribution; a lossless system fails for FALSE_ALARM of all seeds."""
    p_value = distribution_p_value(drafter, target, num_samples=num_samples, seed=seed, **settings)
    assert p_value > FALSE_ALARM, f"{type(drafter).__module__} with {settings}: p-value {p_value:.2g}"


def distribution_p_value(
    drafter: Any, target: Target, *, num_samples: int, seed: int = 0, verifier: str = "auto", **settings: Any
) -> float:
    """Returns the p-value of `num_samples` continuations of PROMPT, sampled with `settings`."""
    probs_C = exact_distribution(target, **settings)
    settings = {"temperature": 1.0} | settings
    counts_C = torch.zeros_like(probs_C)
    for batch in range(-(-num_samples // ROWS)):
        out = draftsmith.generate(
            target,
            torch.tensor([PROMPT] * ROWS),
            drafter,
            # Two tokens more than are tested, so that no draft is cut short among these.
            max_new_tokens=NUM_TOKENS + 2,
            eos_token_id=(),
            seed=seed * 10_000 + batch,
            verifier=verifier,
            **settings,
        )
        start = 1 if target.is_encoder_decoder else len(PROMPT)
        new_BT = out.sequences[:, start : start + NUM_TOKENS]
        counts_C += torch.bincount(cells(new_BT), minlength=len(probs_C))
    return p_value(counts_C, probs_C)


def cells(tokens: Tensor) -> Tensor:
    """Returns the cell of each row of tokens, read as a number to the base VOCAB_SIZE."""
    return (tokens * VOCAB_SIZE ** torch.arange(NUM_TOKENS - 1, -1, -1)).sum(1)


@torch.no_grad()
def exact_distribution(
    target: Target,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    logits_processor: Sequence[Any] = (),
    generation_config: dict[str, float] | None = None,
) -> Tensor:
    """Returns the probability [C] of each continuation of PROMPT by transformers' own forward and processors.

    `generation_config` holds further cutoffs, by name.
    """
    warpers = LogitsProcessorList([*logits_processor, TemperatureLogitsWarper(float(temperature))])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    warpers += [CUTOFFS[name](value) for name, value in (generation_config or {}).items()]
    probs_C = torch.ones(1, dtype=torch.float64)
    is_encoder_decoder = target.is_encoder_decoder
    rows = torch.tensor([[target.model.config.decoder_start_token_id] if is_encoder_decoder else PROMPT])
    for _ in range(NUM_TOKENS):
        sources = torch.tensor([PROMPT] * len(rows))
        given = {"input_ids": sources, "decoder_input_ids": rows} if is_encoder_decoder else {"input_ids": rows}
        logits_CV = target.model(**given).logits[:, -1].double()
        probs_C = (probs_C[:, None] * warpers(rows, logits_CV).softmax(-1)).flatten()
        following = torch.arange(VOCAB_SIZE).repeat(len(rows))[:, None]
        rows = torch.cat([rows.repeat_interleave(VOCAB_SIZE, 0), following], dim=1)
    return probs_C


def p_value(counts_C: Tensor, probs_C: Tensor) -> float:
    """Returns the chi-square test's p-value; cells that expect fewer than five counts are merged."""
    if counts_C[probs_C == 0].any():
        return 0.0
    expected_C = probs_C * counts_C.sum()
    is_rare_C = expected_C < 5
    expected = torch.cat([expected_C[~is_rare_C], expected_C[is_rare_C].sum()[None]])
    counts = torch.cat([counts_C[~is_rare_C], counts_C[is_rare_C].sum()[None]])
    expected, counts = expected[expected > 0], counts[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    return chi_square.p_value(float(statistic), len(expected) - 1)
