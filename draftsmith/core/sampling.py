"""The distribution that tokens are sampled from: temperature, top-k, top-p and further cutoffs, in transformers' order.

Shape suffixes: V vocabulary; `...` any leading dimensions.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import EpsilonLogitsWarper, EtaLogitsWarper, TypicalLogitsWarper

BLOCK = 512
"""Tokens that `draw` sums at a time."""
LEAST_TEMPERATURE = 1e-20
"""Lower temperatures above 0 are taken as this one, by which logits can be divided in float32 without overflow."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The settings that turn logits into the distribution that decoding must reproduce."""

    temperature: float = 0.0
    """0 decodes greedily."""
    top_p: float = 1.0
    """Keeps the smallest set of most likely tokens whose probabilities sum to at least this; 1 keeps all."""
    top_k: int = 0
    """Number of most likely tokens kept; 0 keeps all."""
    min_p: float = 0.0
    """Keeps tokens of at least this share of the most likely token's probability; 0 keeps all."""
    typical_p: float = 1.0
    """Keeps the most typical tokens (2202.00666) whose probabilities sum to at least this; 1 keeps all."""
    epsilon_cutoff: float = 0.0
    """Keeps tokens of at least this probability (2210.15191); 0 keeps all."""
    eta_cutoff: float = 0.0
    """Keeps tokens of a probability that depends on this and on the entropy (2210.15191); 0 keeps all."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or a positive number")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.top_k < 0 or self.top_k != int(self.top_k):
            raise ValueError(f"top_k is {self.top_k}; it must be a whole number, 0 to keep all tokens")
        if not 0 < self.typical_p <= 1:
            raise ValueError(f"typical_p is {self.typical_p}; it must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}; it must be at least 0 and at most 1")
        for name in ("epsilon_cutoff", "eta_cutoff"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0 and below 1")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    def as_arguments(self) -> dict[str, Any]:
        """Returns the arguments of `generate` that ask for these settings."""
        arguments = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k")}
        others = {name: value for name, value in self.as_settings().items() if name not in arguments}
        return arguments | ({"generation_config": others} if others else {})

    def as_settings(self) -> dict[str, float]:
        """Returns the settings that differ from the defaults, called as in transformers' generation config."""
        return {name: value for name, value in vars(self).items() if value != getattr(Sampling, name)}

    def probs(self, logits_V: Tensor) -> Tensor:
        """Returns probabilities [..., V] in float32 (float64 for float64 logits); one-hot when greedy."""
        if self.is_greedy:
            return torch.nn.functional.one_hot(logits_V.argmax(-1), logits_V.shape[-1]).to(torch.float32)
        scores_V = logits_V.to(torch.promote_types(logits_V.dtype, torch.float32))
        if self.temperature != 1:
            scores_V = scores_V / max(self.temperature, LEAST_TEMPERATURE)
        if 0 < self.top_k < scores_V.shape[-1]:
            smallest_kept = scores_V.topk(self.top_k, dim=-1).values[..., -1:]
            scores_V = scores_V.masked_fill(scores_V < smallest_kept, float("-inf"))
        probs_V = scores_V.softmax(-1)
        if self.top_p < 1:
            sorted_V, order_V = probs_V.sort(dim=-1, descending=True, stable=True)
            mass_before_V = sorted_V.cumsum(-1) - sorted_V
            dropped_V = torch.empty_like(mass_before_V, dtype=torch.bool)
            # In float32 a smaller top_p would be 0, and drop the most likely token too.
            least_mass = max(self.top_p, torch.finfo(probs_V.dtype).tiny)
            dropped_V.scatter_(-1, order_V, mass_before_V >= least_mass)
            probs_V = probs_V.masked_fill(dropped_V, 0.0)
            probs_V = probs_V / probs_V.sum(-1, keepdim=True)
        if self.min_p > 0:
            probs_V = probs_V.masked_fill(probs_V < self.min_p * probs_V.amax(-1, keepdim=True), 0.0)
            probs_V = probs_V / probs_V.sum(-1, keepdim=True)
        for warper in self._rare_cutoffs(str(probs_V.device)):
            probs_V = warper(None, probs_V.reshape(-1, probs_V.shape[-1]).log()).softmax(-1).view_as(probs_V)
        return probs_V

    def _rare_cutoffs(self, device: str) -> list[Any]:
        """Returns the cutoffs that transformers applies after top-p and min-p, in its order."""
        cutoffs: list[Any] = [TypicalLogitsWarper(self.typical_p)] if self.typical_p < 1 else []
        cutoffs += [EpsilonLogitsWarper(self.epsilon_cutoff)] if self.epsilon_cutoff > 0 else []
        return cutoffs + ([EtaLogitsWarper(self.eta_cutoff, device=device)] if self.eta_cutoff > 0 else [])


class RowGenerators(torch.Generator):
    """A generator whose `uniforms` depend, row by row, on that row's seed and number of tokens, not on other rows."""

    def begin(self, seeds: list[int], rows: list[list[int]], stage: str) -> None:
        """Begins a stage, "draft" or "verify", of a step of rows with these seeds and tokens."""
        self._keys = [f"{seed}:{len(row)}:{stage}" for seed, row in zip(seeds, rows, strict=True)]
        self._generators: list[torch.Generator] = []

    def uniforms(self, num_rows: int, *size: int) -> Tensor:
        """Returns uniform numbers [num_rows, *size] in float64, those of each row from its own generator."""
        assert num_rows == len(self._keys), "uniforms are drawn for all rows"
        if not self._generators:  # greedy steps need none
            self._generators = [torch.Generator().manual_seed(hashed_seed(key)) for key in self._keys]
        return torch.stack([torch.rand(size, generator=one, dtype=torch.float64) for one in self._generators])


def hashed_seed(key: str) -> int:
    """Returns a seed of 63 bits that depends on a text alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1


def uniforms(generator: torch.Generator, *size: int) -> Tensor:
    """Returns uniform numbers of a size [B, ...] in float64, on the CPU."""
    if isinstance(generator, RowGenerators):
        return generator.uniforms(*size)
    return torch.rand(*size, generator=generator, dtype=torch.float64)


def draw(weights_V: Tensor, uniforms: Tensor) -> Tensor:
    """Returns the token at which the running sum of `weights_V` [..., V] first exceeds `uniforms` [...] of its total.

    Weights need not be normalised; a token of weight 0 is never returned while any weight is positive.
    """
    vocab_size = weights_V.shape[-1]
    if vocab_size < 8 * BLOCK or weights_V.numel() < 128 * BLOCK:
        running_V = weights_V.cumsum(-1)
        return _first_above(running_V, uniforms.to(running_V.dtype) * running_V[..., -1])
    # For large inputs, running sums take several times as long as sums: find the block first, then the token in it.
    whole = vocab_size - vocab_size % BLOCK
    sums = [weights_V[..., :whole].unflatten(-1, (-1, BLOCK)).sum(-1), weights_V[..., whole:].sum(-1, keepdim=True)]
    running = torch.cat(sums, dim=-1).cumsum(-1)
    threshold = uniforms.to(running.dtype) * running[..., -1]
    block = _first_above(running, threshold)[..., None]
    index = block * BLOCK + torch.arange(BLOCK, device=weights_V.device)
    inner = weights_V.gather(-1, index.clamp(max=vocab_size - 1)).masked_fill(index >= vocab_size, 0.0).cumsum(-1)
    before = torch.nn.functional.pad(running, (1, 0)).gather(-1, block)[..., 0]
    return block[..., 0] * BLOCK + _first_above(inner, threshold - before)


def _first_above(running: Tensor, threshold: Tensor) -> Tensor:
    """Returns the first index at which running sums [..., K] exceed the threshold [...], or the last if none does."""
    total = running[..., -1]
    threshold = torch.minimum(threshold, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(running, threshold[..., None], right=True)[..., 0].clamp(max=running.shape[-1] - 1)
