"""Decoder layers of drafters: attention with rotary position embedding, gated MLP, decoder block, and their KV cache.

The same modules run over whole texts in training and, with a cache, over the nodes of a draft.

Shape suffixes: B rows, N tokens or nodes, M new nodes, P length of the longest accepted path, E width of the input,
D hidden width, H attention heads, S cache slots, R is B or 1.
"""

import math

import torch
from torch import Tensor, nn

from draftsmith.core.cache import KVCache, visible
from draftsmith.core.tree import Tree, Verdict


def rotate(x_BHND: Tensor, positions_RN: Tensor, theta: float, rope_scaling: tuple[float, ...] = ()) -> Tensor:
    """Rotates each half-split pair (x[i], x[i + D/2]) by position * theta^(-2i/D) (RoFormer, 2104.09864).

    `rope_scaling` = (factor, low, high, length) is Llama 3.1's: frequencies with fewer than `low` rotations in `length`
    positions are divided by `factor`, those with more than `high` are unchanged, and those in between interpolated.
    """
    half = x_BHND.shape[-1] // 2
    powers = torch.arange(half, device=x_BHND.device, dtype=torch.float32) / half
    frequencies = theta**-powers
    if rope_scaling:
        factor, low, high, length = rope_scaling
        kept = ((length * frequencies / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / factor)
    angles_RND = positions_RN[:, None, :, None].float() * frequencies
    cos, sin = angles_RND.cos(), angles_RND.sin()
    first, second = x_BHND.float().split(half, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BHND.dtype)


class Attention(nn.Module):
    """Grouped-query self-attention without biases, with rotary position embedding.

    With `head_norm_eps`, each head's queries and keys are normed before they are rotated (Qwen3, 2505.09388).
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_width: int | None = None,
        input_width: int | None = None,
        theta: float = 10_000.0,
        rope_scaling: tuple[float, ...] = (),
        head_norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_kv_heads or num_heads
        head_width = head_width or width // num_heads
        if num_heads % num_kv_heads or head_width % 2:
            raise ValueError(
                f"attention has {num_heads} heads of width {head_width} and {num_kv_heads} key-value heads; the width"
                " must be even, and the number of heads a multiple of the number of key-value heads"
            )
        self.num_heads, self.num_kv_heads, self.head_width = num_heads, num_kv_heads, head_width
        self.theta, self.rope_scaling = theta, rope_scaling
        input_width = input_width or width
        self.query = nn.Linear(input_width, num_heads * head_width, bias=False)
        self.key = nn.Linear(input_width, num_kv_heads * head_width, bias=False)
        self.value = nn.Linear(input_width, num_kv_heads * head_width, bias=False)
        self.output = nn.Linear(num_heads * head_width, width, bias=False)
        has_norms = head_norm_eps is not None
        self.query_norm = nn.RMSNorm(head_width, eps=head_norm_eps) if has_norms else nn.Identity()
        self.key_norm = nn.RMSNorm(head_width, eps=head_norm_eps) if has_norms else nn.Identity()

    def forward(
        self,
        x_BNE: Tensor,
        positions_RN: Tensor,
        *,
        mask_R1NS: Tensor | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """Returns [B, N, D]; causal without a mask. With a cache, new keys and values are written to its `layer`."""
        query_BHND, key_BHND, value_BHND = self.project(x_BNE, positions_RN)
        if cache is not None:
            key_BHND, value_BHND = cache.update(key_BHND, value_BHND, layer)
        out_BHND = nn.functional.scaled_dot_product_attention(
            query_BHND,
            key_BHND,
            value_BHND,
            attn_mask=mask_R1NS,
            is_causal=mask_R1NS is None,
            enable_gqa=self.num_heads != self.num_kv_heads,
        )
        return self.output(out_BHND.transpose(1, 2).flatten(2))

    def project(self, x_BNE: Tensor, positions_RN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns rotated queries, rotated keys, and values, each [B, H, N, D]."""
        return self.queries(x_BNE, positions_RN), *self.keys_and_values(x_BNE, positions_RN)

    def queries(self, x_BNE: Tensor, positions_RN: Tensor) -> Tensor:
        """Returns the rotated queries [B, H, N, D]."""
        query_BHND = self.query_norm(self._split(self.query(x_BNE)))
        return rotate(query_BHND, positions_RN, self.theta, self.rope_scaling)

    def keys_and_values(self, x_BNE: Tensor, positions_RN: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the rotated keys and the values, both [B, H, N, D]."""
        key_BHND = self.key_norm(self._split(self.key(x_BNE)))
        return rotate(key_BHND, positions_RN, self.theta, self.rope_scaling), self._split(self.value(x_BNE))

    def _split(self, joined_BNE: Tensor) -> Tensor:
        """Returns the heads' parts [B, H, N, D]."""
        return joined_BNE.unflatten(-1, (-1, self.head_width)).transpose(1, 2)


def ffn_width(width: int) -> int:
    """Returns the usual inner width of a gated MLP: 8/3 of the hidden width, rounded up to a multiple of 32."""
    return (width * 8 // 3 + 31) // 32 * 32


class FeedForward(nn.Module):
    """A gated MLP without biases: down(silu(gate(x)) * up(x)) (SwiGLU, 2002.05202)."""

    def __init__(self, width: int, inner_width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, inner_width, bias=False)
        self.up = nn.Linear(width, inner_width, bias=False)
        self.down = nn.Linear(inner_width, width, bias=False)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x_BND)) * self.up(x_BND))


class Block(nn.Module):
    """A pre-norm decoder block: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, width: int, *, num_heads: int, inner_width: int, eps: float = 1e-6, theta: float = 1e4) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width, eps=eps)
        self.attention = Attention(width, num_heads=num_heads, theta=theta)
        self.feed_forward_norm = nn.RMSNorm(width, eps=eps)
        self.feed_forward = FeedForward(width, inner_width)

    def forward(
        self,
        x_BND: Tensor,
        positions_RN: Tensor,
        *,
        mask_R1NS: Tensor | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """Returns [B, N, D]; the arguments are those of `Attention.forward`."""
        normed_BND = self.attention_norm(x_BND)
        x_BND = x_BND + self.attention(normed_BND, positions_RN, mask_R1NS=mask_R1NS, cache=cache, layer=layer)
        return x_BND + self.feed_forward(self.feed_forward_norm(x_BND))


def prepare_cache(tree: Tree, cache: KVCache, *, first: int = 0) -> tuple[Tensor, Tensor]:
    """Prepares `cache` for a tree's nodes from `first` on; returns their positions [B, M] and mask [R, 1, M, S]."""
    device = tree.depths_RN.device
    cache.prepare(tree.num_nodes, device, first=first)
    lengths_B1 = torch.tensor(cache.lengths, device=device)[:, None]
    return lengths_B1 + tree.depths_RN[:, first:], visible(tree, cache, first=first)[:, None]


def gather_path(values_BND: Tensor, verdict: Verdict) -> Tensor:
    """Returns the values at each row's accepted nodes [B, P, D], node 0 first; the last one is repeated to fill P."""
    index_BP1 = verdict.path_BP[..., None].expand(-1, -1, values_BND.shape[-1])
    return values_BND.gather(1, index_BP1)
