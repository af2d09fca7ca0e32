"""The law that tokens are drawn from: temperature, then top-k, then top-p, as transformers orders them.

Shape suffixes: V vocabulary; `...` any leading dimensions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the target's logits become the law that must be kept."""

    temperature: float = 0.0
    """0 decodes greedily."""
    top_p: float = 1.0
    """Smallest set of likeliest tokens whose mass reaches this; 1 keeps all."""
    top_k: int = 0
    """The number of likeliest tokens kept; 0 keeps all."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or a positive number")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.top_k < 0 or self.top_k != int(self.top_k):
            raise ValueError(f"top_k is {self.top_k}; it must be a whole number, 0 to keep all tokens")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    def law(self, logits_V: Tensor) -> Tensor:
        """Returns probabilities [..., V] in float32 (float64 for float64 logits); one-hot when greedy."""
        if self.is_greedy:
            return torch.nn.functional.one_hot(logits_V.argmax(-1), logits_V.shape[-1]).to(torch.float32)
        scores_V = logits_V.to(torch.promote_types(logits_V.dtype, torch.float32))
        if self.temperature != 1:
            scores_V = scores_V / self.temperature
        if 0 < self.top_k < scores_V.shape[-1]:
            smallest_kept = scores_V.topk(self.top_k, dim=-1).values[..., -1:]
            scores_V = scores_V.masked_fill(scores_V < smallest_kept, float("-inf"))
        probs_V = scores_V.softmax(-1)
        if self.top_p < 1:
            sorted_V, order_V = probs_V.sort(dim=-1, descending=True, stable=True)
            mass_before_V = sorted_V.cumsum(-1) - sorted_V
            dropped_V = torch.empty_like(mass_before_V, dtype=torch.bool)
            dropped_V.scatter_(-1, order_V, mass_before_V >= self.top_p)
            probs_V = probs_V.masked_fill(dropped_V, 0.0)
            probs_V = probs_V / probs_V.sum(-1, keepdim=True)
        return probs_V


def draw(weights_V: Tensor, uniforms: Tensor) -> Tensor:
    """Returns the token at which the running sum of `weights_V` [..., V] first exceeds `uniforms` [...] of its total.

    Weights need not be normalised; a token of weight zero is never returned while any is positive.
    """
    running_V = weights_V.cumsum(-1)
    total = running_V[..., -1]
    below_total = torch.nextafter(total, torch.zeros_like(total))
    threshold = torch.minimum(uniforms.to(total.dtype) * total, below_total)
    return torch.searchsorted(running_V, threshold[..., None], right=True)[..., 0].clamp(max=weights_V.shape[-1] - 1)
