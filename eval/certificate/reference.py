"""What the model itself says, by transformers alone: logits by its own forward, laws by transformers' own warpers.

Neither the loop nor the cache, the views or `Sampling.law` of draftsmith have a part in it: they are under test.

Shape suffixes: G texts, T positions, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process

from draftsmith import Target
from draftsmith.core.batching import start_rows
from draftsmith.core.sampling import Sampling

FORWARD_ROWS = 16
"""Texts fed at once: the logits of all their positions are in memory."""


def reference_logits(target: Target, prompt: list[int], texts: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    """Yields for each text the logits [T + 1, V] in float64: after `prompt`, and after each of the text's T tokens."""
    rows, source = start_rows(target, torch.tensor([prompt], device=target.device), None)
    for begin in range(0, len(texts), FORWARD_ROWS):
        part = texts[begin : begin + FORWARD_ROWS]
        longest = max(map(len, part))
        # What follows a shorter text does not change the logits before it.
        filled = [[*rows[0], *text, *[0] * (longest - len(text))] for text in part]
        given: dict[str, Any] = {"input_ids": torch.tensor(filled, device=target.device)}
        if source is not None:
            prompts_GT = source.tokens_BT.expand(len(part), -1)
            given = {"input_ids": prompts_GT, "decoder_input_ids": given["input_ids"]}
        with torch.inference_mode():
            logits_GTV = target.model(**given, use_cache=False).logits[:, len(rows[0]) - 1 :]
        for text, logits_TV in zip(part, logits_GTV, strict=True):
            yield logits_TV[: len(text) + 1].double()


def rounding_error(logits_TV: Tensor, dtype: torch.dtype, factor: float) -> Tensor:
    """Returns by how much logits computed in `dtype` may be off [T]: `factor` times its epsilon times the largest."""
    return factor * torch.finfo(dtype).eps * logits_TV.abs().where(logits_TV.isfinite(), 0.0).amax(-1)


def reference_probs(logits_TV: Tensor, sampling: Sampling, blur_T: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the laws [T, V], and which are clear [T]: not so if logits off by `blur_T` could move an edge.

    Where the edge of top-k or top-p is moved a token is in one law and not in the other.
    """
    scores_TV, tolerance_T = logits_TV / sampling.temperature, 2 * blur_T / sampling.temperature
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
