"""Reference logits and distributions computed by transformers alone: the model's own forward and logits warpers.

Draftsmith's loop, cache, stack views and `Sampling.probs` are under test and not used here.

Shape suffixes: G texts, T positions, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process

from draftsmith import Target
from draftsmith.core.sampling import Sampling
from draftsmith.inputs.batching import start_rows

FORWARD_ROWS = 16
"""Texts per forward; the logits of all their positions are in memory."""


def reference_logits(target: Target, prompt: list[int], texts: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    """Yields for each text the logits [T + 1, V] in float64: after `prompt`, and after each of the text's T tokens."""
    prompts_1T = torch.tensor([prompt], device=target.device)
    _, rows = start_rows(target, prompts_1T, None)
    for begin in range(0, len(texts), FORWARD_ROWS):
        part = texts[begin : begin + FORWARD_ROWS]
        longest = max(map(len, part))
        # Padding after a shorter text does not change the logits before it.
        padded = [[*rows[0], *text, *[0] * (longest - len(text))] for text in part]
        inputs: dict[str, Any] = {"input_ids": torch.tensor(padded, device=target.device)}
        if target.is_encoder_decoder:
            inputs = {"input_ids": prompts_1T.expand(len(part), -1), "decoder_input_ids": inputs["input_ids"]}
        with torch.inference_mode():
            logits_GTV = target.model(**inputs, use_cache=False).logits[:, len(rows[0]) - 1 :]
        for text, logits_TV in zip(part, logits_GTV, strict=True):
            yield logits_TV[: len(text) + 1].double()


def rounding_error(logits_TV: Tensor, dtype: torch.dtype, factor: float) -> Tensor:
    """Returns a bound [T] on the rounding error of logits in `dtype`: `factor` * epsilon * largest absolute logit."""
    return factor * torch.finfo(dtype).eps * logits_TV.abs().where(logits_TV.isfinite(), 0.0).amax(-1)


def reference_probs(logits_TV: Tensor, sampling: Sampling, error_T: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the distributions [T, V], and which positions [T] are clear.

    A position is unclear if an error of `error_T` in the logits could change which tokens top-k or top-p keep.
    """
    scores_TV, tolerance_T = logits_TV / sampling.temperature, 2 * error_T / sampling.temperature
    is_clear_T = torch.ones_like(tolerance_T, dtype=torch.bool)
    if not sampling.top_k and sampling.top_p == 1:
        return scores_TV.softmax(-1), is_clear_T
    kept_TV = scores_TV
    if sampling.top_k:
        kept_TV = logits_process.TopKLogitsWarper(sampling.top_k)(None, kept_TV)
    if sampling.top_p < 1:
        probs_TV = kept_TV.softmax(-1).sort(descending=True).values
        mass_before_TV = probs_TV.cumsum(-1) - probs_TV
        is_clear_T &= ((mass_before_TV - sampling.top_p).abs() > tolerance_T[:, None]).all(-1)
        kept_TV = logits_process.TopPLogitsWarper(sampling.top_p)(None, kept_TV)
    num_kept_T1 = kept_TV.isfinite().sum(-1, keepdim=True)
    sorted_TV = scores_TV.sort(descending=True).values
    first_out_T1 = num_kept_T1.clamp(max=sorted_TV.shape[1] - 1)
    gap_T = (sorted_TV.gather(1, num_kept_T1 - 1) - sorted_TV.gather(1, first_out_T1))[:, 0]
    is_clear_T &= (gap_T > tolerance_T) | (num_kept_T1[:, 0] == sorted_TV.shape[1])
    return kept_TV.softmax(-1), is_clear_T
