"""Single architectures whose own code counts slots of the cache where a draft needs positions of the text.

Each function returns a copy of a decoder stack that shares every parameter with the model, which stays unchanged.

Shape suffixes: B rows, N nodes of a tree, S cache slots, D hidden width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from draftsmith.core.views import ForwardContext, Wrapper, replaced, shallow_copy


def adapted(stack: Any, context: ForwardContext) -> Any:
    """Returns the stack as it must be run over drafts; itself, if its architecture needs nothing special."""
    if hasattr(stack, "block"):
        return _with_relative_bias(stack, context)
    if stack.config.model_type == "llama4_text" and stack.config.attn_temperature_tuning:
        return _with_temperatures_by_position(stack, context)
    return stack


def _with_relative_bias(stack: Any, context: ForwardContext) -> Any:
    """T5: the position bias follows each row's own positions instead of slot numbers."""
    copied, block = shallow_copy(stack), shallow_copy(stack.block[0])
    sublayer = shallow_copy(block.layer[0])
    attention = shallow_copy(sublayer.SelfAttention)

    def compute_bias(query_length: int, key_length: int, **_: Any) -> Tensor:
        assert context.positions is not None
        keys_S = torch.arange(key_length, device=context.positions.device)
        # The slots of a chain are its positions, so that distances in slots are distances in the text.
        bucket_BNS = attention._relative_position_bucket(
            keys_S - context.positions[:, :, None],
            bidirectional=False,
            num_buckets=attention.relative_attention_num_buckets,
            max_distance=attention.relative_attention_max_distance,
        )
        return attention.relative_attention_bias(bucket_BNS).permute(0, 3, 1, 2)

    attention.compute_bias = compute_bias
    sublayer._modules["SelfAttention"] = attention
    block._modules["layer"] = nn.ModuleList([sublayer, *block.layer[1:]])
    copied._modules["block"] = nn.ModuleList([block, *stack.block[1:]])
    return copied


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
        if not attention.use_rope:
            copied = replaced(attention, {"q_proj": _ScaledQueries(attention.q_proj, context, attention)})
            copied.attn_temperature_tuning = False
            new[f"layers.{index}.self_attn"] = copied
    return replaced(stack, new) if new else stack
