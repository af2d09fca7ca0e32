"""Single architectures whose own code would compute a draft's tokens otherwise than one by one.

Most count slots of the cache where a draft needs positions of the text. Each function returns a copy of a decoder
stack that shares every parameter with the model, which stays unchanged.

Shape suffixes: B rows, N nodes of a tree, S cache slots, T positions, H query heads, D hidden width.
"""

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from draftsmith.core.views import ForwardContext, Wrapper, replaced, shallow_copy


def adapted(stack: Any, context: ForwardContext) -> Any:
    """Returns the stack as it must be run over drafts; itself, if its architecture needs nothing special."""
    if hasattr(stack, "block"):
        stack = _with_relative_bias(stack, context)
    adapt = ADAPTERS.get(getattr(getattr(stack, "config", None), "model_type", ""))
    return adapt(stack, context) if adapt is not None else stack


class _RelativeBias:
    """T5's bias of attention by distance [B, H, N, S], which its code takes from slot numbers.

    The slots of a chain, which alone encoder-decoders verify, are its positions.
    """

    def __init__(self, attention: Any, context: ForwardContext) -> None:
        self._attention, self._context = attention, context

    def __call__(self, query_length: int, key_length: int, device: Any = None, **_: Any) -> Tensor:
        positions_BN = self._context.positions
        assert positions_BN is not None
        newest_HT = self._attention.compute_bias(1, key_length, device=device, past_seen_tokens=key_length - 1)[0, :, 0]
        by_distance_HT = newest_HT.flip(1)
        distances_BNS = positions_BN[:, :, None] - torch.arange(key_length, device=positions_BN.device)
        return by_distance_HT[:, distances_BNS.clamp(min=0)].transpose(0, 1)


def _with_relative_bias(stack: Any, context: ForwardContext) -> Any:
    """T5: the position bias follows each row's own positions; UMT5 has one in each block, others in the first."""
    new: dict[str, nn.Module] = {}
    for index, block in enumerate(stack.block):
        attention = block.layer[0].SelfAttention
        if attention.has_relative_attention_bias:
            copied = shallow_copy(attention)
            copied.compute_bias = _RelativeBias(attention, context)
            new[f"block.{index}.layer.0.SelfAttention"] = copied
    return replaced(stack, new)


class _BiasByPosition:
    """Biases of attention that grow with a key's position (ALiBi, 2108.12409), from the model's own function.

    `make(longest, ...)` returns them for positions 0 to longest - 1, [H, 1, T].
    """

    def __init__(self, context: ForwardContext, make: Callable[..., Tensor]) -> None:
        self._context, self._make = context, make
        self._made: tuple[Any, Tensor] | None = None

    def of_keys(self, **kind: Any) -> Tensor:
        """Returns the biases [B, H, 1, S] of the keys that a forward attends to."""
        keys_BS = self._context.key_positions()
        longest, made = keys_BS.shape[1], self._made  # the token in a slot has at most the slot's position
        if made is None or made[0] != kind or made[1].shape[1] < longest:
            self._made = made = kind, self._make(2 * longest, **kind)[:, 0]
        return made[1][:, keys_BS].transpose(0, 1)[:, :, None]


class _BloomBias:
    """Stands for BLOOM's method that makes biases of a text's mask, where it is handed a draft's."""

    def __init__(self, stack: Any, context: ForwardContext) -> None:
        self._stack, self._biases = stack, _BiasByPosition(context, self._own)

    def _own(self, longest: int, *, num_heads: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self._stack.build_alibi_tensor(torch.ones(1, longest, device=device), num_heads, dtype=dtype)

    def __call__(self, mask: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
        return self._biases.of_keys(num_heads=num_heads, dtype=dtype, device=mask.device).flatten(0, 1)


def _with_bloom_bias(stack: Any, context: ForwardContext) -> Any:
    """BLOOM: biases follow each row's own positions."""
    copied = shallow_copy(stack)
    copied.build_alibi_tensor = _BloomBias(stack, context)
    return copied


class _MptBias:
    """Stands for MPT's method that makes biases by slot."""

    def __init__(self, stack: Any, context: ForwardContext) -> None:
        self._stack, self._biases = stack, _BiasByPosition(context, self._own)

    def _own(self, longest: int, *, num_heads: int, device: torch.device) -> Tensor:
        return self._stack.build_mpt_alibi_tensor(num_heads, longest, device=device)

    def __call__(self, num_heads: int, sequence_length: int, device: torch.device) -> Any:
        return _RowsOfBias(self._biases.of_keys(num_heads=num_heads, device=device))


class _RowsOfBias:
    """Biases [B, H, 1, S] in the shape that MPT's attention asks for: its own have no rows, and are cut to length."""

    def __init__(self, bias_BH1S: Tensor) -> None:
        self._bias_BH1S, self.shape = bias_BH1S, bias_BH1S.shape[1:]

    def size(self, dimension: int) -> int:
        return self.shape[dimension]

    def __getitem__(self, index: Any) -> Tensor:
        return self._bias_BH1S


def _with_mpt_bias(stack: Any, context: ForwardContext) -> Any:
    """MPT: biases follow each row's own positions."""
    copied = shallow_copy(stack)
    copied.build_mpt_alibi_tensor = _MptBias(stack, context)
    return copied


class _FalconAttention(Wrapper):
    """Falcon's attention, whose biases and mask its decoder would join before."""

    def __init__(self, inner: nn.Module, biases: _BiasByPosition) -> None:
        super().__init__(inner)
        self._biases = biases

    def forward(self, hidden_BND: Tensor, *, attention_mask: Tensor, alibi: None, **others: Any) -> Any:
        dtype, num_rows = hidden_BND.dtype, len(hidden_BND)
        bias_BH1S = self._biases.of_keys(num_heads=self.num_heads, dtype=dtype, device=hidden_BND.device)
        bias_BH1S = bias_BH1S.expand(num_rows, -1, -1, -1)
        hidden_from = ~attention_mask if attention_mask.dtype == torch.bool else attention_mask < -1
        mask_BHNS = (bias_BH1S / math.sqrt(self.head_dim)).masked_fill(hidden_from, torch.finfo(dtype).min)
        return self.inner(hidden_BND, attention_mask=mask_BHNS, alibi=bias_BH1S.flatten(0, 1), **others)


def _with_falcon_bias(stack: Any, context: ForwardContext) -> Any:
    """Falcon with ALiBi: biases follow each row's own positions."""
    if not stack.use_alibi:
        return stack
    own = sys.modules[type(stack).__module__].build_alibi_tensor

    def make(longest: int, *, num_heads: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return own(torch.ones(1, longest, dtype=torch.long, device=device), num_heads, dtype)

    biases = _BiasByPosition(context, make)
    new: dict[str, nn.Module] = {}
    for index, block in enumerate(stack.h):
        new[f"h.{index}.self_attention"] = _FalconAttention(block.self_attention, biases)
    copied = replaced(stack, new)
    copied.use_alibi = False  # by the decoder itself, which would join the biases by slot
    return copied


class _LocalAttention(Wrapper):
    """GPT-Neo's attention with a window over positions."""

    def __init__(self, inner: nn.Module, context: ForwardContext, window: int) -> None:
        super().__init__(inner)
        self._context, self._window = context, window

    def forward(self, hidden_BND: Tensor, *, attention_mask: Tensor, **others: Any) -> Any:
        positions_BN = self._context.positions
        assert positions_BN is not None
        is_far_BNS = positions_BN[:, :, None] - self._context.key_positions()[:, None] >= self._window
        lowest = torch.finfo(attention_mask.dtype).min
        return self.inner(hidden_BND, attention_mask=attention_mask.masked_fill(is_far_BNS[:, None], lowest), **others)


def _with_local_attention(stack: Any, context: ForwardContext) -> Any:
    """GPT-Neo: its attention masks by slot, with a window in every other block; the masks that it is handed do."""
    new: dict[str, nn.Module] = {}
    for index, block in enumerate(stack.h):
        attention = shallow_copy(block.attn.attention)
        all_visible = attention.bias.new_ones(1, 1, 1, 1)
        longest = 2 * attention.bias.shape[-1]  # a draft may reach past the context
        attention.__dict__["_buffers"] = {**attention._buffers, "bias": all_visible.expand(1, 1, longest, longest)}
        is_local = attention.attention_type == "local"
        window = stack.config.window_size
        new[f"h.{index}.attn.attention"] = _LocalAttention(attention, context, window) if is_local else attention
    return replaced(stack, new)


class _ScaledQueries(Wrapper):
    """Llama 4's projection of queries, scaled by the temperature of each token's position (2501.19399)."""

    def __init__(self, inner: nn.Module, context: ForwardContext, attention: Any) -> None:
        super().__init__(inner)
        self._context, self._floor_scale, self._scale = context, attention.floor_scale, attention.attn_scale

    def forward(self, hidden_BND: Tensor) -> Tensor:
        assert self._context.positions is not None
        floors_BN = torch.floor((self._context.positions.float() + 1) / self._floor_scale)
        scales_BN1 = (torch.log1p(floors_BN) * self._scale + 1)[:, :, None]
        queries_BND = self.inner(hidden_BND)
        return (queries_BND * scales_BN1).to(queries_BND.dtype)


def _with_temperatures_by_position(stack: Any, context: ForwardContext) -> Any:
    """Llama 4: layers without rotary embedding scale queries by position, which its code counts from the cache.

    Between projection and scaling their queries are only reshaped, so that the projection's output can be scaled.
    """
    new: dict[str, nn.Module] = {}
    for index, layer in enumerate(stack.layers):
        attention = layer.self_attn
        if not attention.use_rope and stack.config.attn_temperature_tuning:
            copied = replaced(attention, {"q_proj": _ScaledQueries(attention.q_proj, context, attention)})
            copied.attn_temperature_tuning = False
            new[f"layers.{index}.self_attn"] = copied
    return replaced(stack, new) if new else stack


class _FlooredTimeSteps(Wrapper):
    """Zamba 2's projection, whose last H outputs become time steps: here none below the floor that texts have."""

    def __init__(self, inner: nn.Module, mixer: Any) -> None:
        super().__init__(inner)
        self._mixer = (mixer,)  # hidden from the module, whose parameters it would become

    def forward(self, hidden_BND: Tensor) -> Tensor:
        (mixer,) = self._mixer
        floor = torch.tensor(mixer.time_step_limit[0], device=hidden_BND.device)
        projected_BND = self.inner(hidden_BND)
        lowest_H = torch.log(torch.expm1(floor)) - mixer.dt_bias  # the steps are softplus(projected + dt_bias)
        steps_BNH, lowest_H = projected_BND[..., -len(lowest_H) :], lowest_H.to(projected_BND.dtype)
        return torch.cat([projected_BND[..., : -len(lowest_H)], torch.maximum(steps_BNH, lowest_H)], dim=-1)


def _with_floored_time_steps(stack: Any, context: ForwardContext) -> Any:
    """Zamba 2: time steps have a floor where a text is read, but transformers forgets it for a single token."""
    mixers = {
        name: module for name, module in stack.named_modules(remove_duplicate=False) if "dt_bias" in module._parameters
    }
    return replaced(
        stack, {f"{name}.in_proj": _FlooredTimeSteps(mixer.in_proj, mixer) for name, mixer in mixers.items()}
    )


def _with_independent_routing(stack: Any, context: ForwardContext) -> Any:
    """Switch and NLLB-MoE: routers leave out tokens that others of the forward crowd out, or that the mask seems to.

    A token that is decoded alone is never left out, and so are a draft's.
    """
    new: dict[str, nn.Module] = {}
    for name, module in stack.named_modules():
        if hasattr(module, "expert_capacity"):
            new[name] = copied = shallow_copy(module)
            copied.expert_capacity, copied.moe_eval_capacity_token_fraction = sys.maxsize, 1.0
            copied.router_ignore_padding_tokens = True
    return replaced(stack, new)


ADAPTERS: dict[str, Callable[[Any, ForwardContext], Any]] = {
    "bloom": _with_bloom_bias,
    "falcon": _with_falcon_bias,
    "gpt_neo": _with_local_attention,
    "llama4_text": _with_temperatures_by_position,
    "mpt": _with_mpt_bias,
    "nllb-moe": _with_independent_routing,
    "switch_transformers": _with_independent_routing,
    "zamba2": _with_floored_time_steps,
}
"""By model type of the decoder."""
