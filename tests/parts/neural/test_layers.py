"""Tests of the drafters' decoder layers against loops over heads and positions, without and with a KV cache.

Shape suffixes: B rows, T positions, N nodes, D hidden width.
"""

import math

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from draftsmith.core.cache import KVCache
from draftsmith.core.tree import Tree, Verdict, chain
from draftsmith.parts.neural.layers import Attention, Block, FeedForward, gather_path, prepare_cache, rotate
from tests.support.models import scramble

WIDTH, LENGTH = 16, 7


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def block(**settings: int) -> Block:
    made = Block(WIDTH, **{"num_heads": 4, "inner_width": 24} | settings)  # type: ignore[arg-type]
    scramble(made, seed=1)
    return made.eval()


def naive_attention(attention: Attention, x_TD: Tensor) -> Tensor:
    """Returns causal attention over one row, computed pair by pair."""
    width, group = attention.head_width, attention.num_heads // attention.num_kv_heads
    out = torch.zeros(len(x_TD), attention.num_heads * width)
    for head in range(attention.num_heads):
        rows = slice(head * width, (head + 1) * width)
        shared = slice(head // group * width, (head // group + 1) * width)
        for t in range(len(x_TD)):
            query = naive_rotation(attention.query.weight[rows] @ x_TD[t], t, attention.theta)
            scores = torch.stack(
                [
                    query @ naive_rotation(attention.key.weight[shared] @ x_TD[s], s, attention.theta) / width**0.5
                    for s in range(t + 1)
                ]
            )
            values = torch.stack([attention.value.weight[shared] @ x_TD[s] for s in range(t + 1)])
            out[t, rows] = scores.softmax(0) @ values
    return out @ attention.output.weight.T


def naive_rotation(x_D: Tensor, position: int, theta: float) -> Tensor:
    half, out = len(x_D) // 2, x_D.clone()
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x_D))
        pair = complex(float(x_D[i]), float(x_D[i + half])) * complex(math.cos(angle), math.sin(angle))
        out[i], out[i + half] = pair.real, pair.imag
    return out


def test_rotate_matches_angles_by_hand() -> None:
    """Position 2 rotates the first pair by two radians and the second by 2 / 100."""
    rotated = rotate(torch.tensor([1.0, 1.0, 0.0, 0.0]).view(1, 1, 1, 4), torch.tensor([[2]]), 10_000.0).flatten()
    assert torch.allclose(rotated, torch.tensor([math.cos(2), math.cos(0.02), math.sin(2), math.sin(0.02)]))


def test_rotate_with_rope_scaling_matches_llama3() -> None:
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=64)
    config.rope_parameters = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
    config.rope_parameters |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.tensor([[0, 3, 50]]))
    x_1HND = random(1, 2, 3, 16)
    expected, _ = apply_rotary_pos_emb(x_1HND, x_1HND, cos, sin)
    found = rotate(x_1HND, torch.tensor([[0, 3, 50]]), 1e4, (8.0, 1.0, 4.0, 16.0))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, rotate(x_1HND, torch.tensor([[0, 3, 50]]), 1e4), atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"num_kv_heads": 2}, {"head_width": 6, "input_width": 20}])
def test_attention_matches_naive_loop(settings: dict[str, int]) -> None:
    attention = Attention(WIDTH, num_heads=4, **settings)  # type: ignore[arg-type]
    scramble(attention, seed=2)
    x_BTE = random(2, LENGTH, settings.get("input_width", WIDTH))
    found_BTD = attention(x_BTE, torch.arange(LENGTH)[None])
    for found_TD, x_TE in zip(found_BTD, x_BTE, strict=True):
        assert torch.allclose(found_TD, naive_attention(attention, x_TE), atol=1e-5)


@torch.no_grad()
def test_block_is_pre_norm_attention_and_feed_forward() -> None:
    one, x_TD = block(), random(LENGTH, WIDTH)

    def norm(module: nn.RMSNorm, value_TD: Tensor) -> Tensor:
        assert module.eps is not None
        return value_TD / (value_TD.square().mean(-1, keepdim=True) + module.eps).sqrt() * module.weight

    middle_TD = x_TD + naive_attention(one.attention, norm(one.attention_norm, x_TD))
    normed_TD = norm(one.feed_forward_norm, middle_TD)
    gate_TD = normed_TD @ one.feed_forward.gate.weight.T
    inner_TD = gate_TD / (1 + (-gate_TD).exp()) * (normed_TD @ one.feed_forward.up.weight.T)
    expected_TD = middle_TD + inner_TD @ one.feed_forward.down.weight.T
    assert torch.allclose(one(x_TD[None], torch.arange(LENGTH)[None])[0], expected_TD, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(4, 4), (4, 2)])
def test_block_with_cache_attends_along_each_nodes_path(lengths: tuple[int, ...]) -> None:
    """A prompt, then a tree in two forwards; each node is compared with a forward over its whole path."""
    one, cache = block(), KVCache(num_layers=1, batch_size=2)
    parents = [-1, 0, 0, 2, 1]
    before_BTD, nodes_BND = random(2, 4, WIDTH), random(2, 5, WIDTH, seed=1)
    positions, mask = prepare_cache(chain(4), cache)
    one(before_BTD, positions, mask_R1NS=mask, cache=cache)
    cache.commit([list(range(length)) for length in lengths])
    parts = []
    for first, stop in ((0, 3), (3, 5)):
        positions, mask = prepare_cache(Tree.from_parents([parents[:stop]]), cache, first=first)
        parts.append(one(nodes_BND[:, first:stop], positions, mask_R1NS=mask, cache=cache))
    found_BND = torch.cat(parts, dim=1)
    for row, length in enumerate(lengths):
        for node in range(5):
            path = [node]
            while path[0]:
                path.insert(0, parents[path[0]])
            text_TD = torch.cat([before_BTD[row, :length], nodes_BND[row, path]])
            alone_TD = one(text_TD[None], torch.arange(len(text_TD))[None])[0]
            assert torch.allclose(found_BND[row, node], alone_TD[-1], atol=1e-5)


def test_gather_path_repeats_last_accepted_node() -> None:
    values_BND = torch.arange(8.0).view(2, 4, 1)
    path_BP, num_accepted_B = torch.tensor([[0, 2, 3], [0, 1, 1]]), torch.tensor([2, 1])
    verdict = Verdict(path_BP=path_BP, num_accepted_B=num_accepted_B, next_token_B=torch.zeros(2, dtype=torch.long))
    assert gather_path(values_BND, verdict)[..., 0].tolist() == [[0, 2, 3], [4, 5, 5]]


def test_attention_rejects_invalid_head_settings() -> None:
    with pytest.raises(ValueError, match="3 heads of width 4 and 2 key-value heads"):
        Attention(12, num_heads=3, num_kv_heads=2)
    with pytest.raises(ValueError, match="the width must be even"):
        Attention(12, num_heads=4)


def test_feed_forward_has_no_bias() -> None:
    assert torch.equal(FeedForward(4, 6)(torch.zeros(1, 1, 4)), torch.zeros(1, 1, 4))
