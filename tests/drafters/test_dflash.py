"""Tests of the DFlash drafter: its blocks against a plain attention over all positions, its drafts, and its trees.

Shape suffixes: B rows, T positions, N tokens of a block, K drafted tokens, D hidden width, V vocabulary.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import draftsmith
from draftsmith import Target
from draftsmith.drafters import dflash
from draftsmith.drafters.dflash import Config, Drafter
from tests.support.distributions import check_distribution, distribution_target
from tests.support.family import Watched, built, check_family
from tests.support.models import VOCAB_SIZE, prompts, tiny_target
from tests.support.runs import trainer_settings
from trainers import dflash as trainer

SETTINGS = trainer_settings(trainer, num_layers=1, num_kv_heads=2, block_size=4, num_anchors=4)


def small(target: Target, **changes: Any) -> Config:
    """Returns the configuration of two small layers that draft chains of four tokens."""
    given: dict[str, Any] = {
        "layers": trainer.default_layers(target.num_layers, 3),
        "mask_token": target.vocab_size - 1,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_width": 6,
        "inner_width": 24,
        "block_size": 5,
    }
    return Config(**given | changes)


EXAMPLE = small


def test_family(tmp_path: Path) -> None:
    check_family(dflash, small, tmp_path, trainer=trainer, settings=SETTINGS)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"num_nodes": 9}, {"shortlist": 7}], ids=["tree", "shortlist"])
def test_family_in_other_shapes(changes: dict[str, int], tmp_path: Path) -> None:
    settings = trainer_settings(trainer, block_size=4, loss="lk", weights="decay", shortlist=40)
    check_family(dflash, lambda target: small(target, **changes), tmp_path, trainer=trainer, settings=settings)


def test_trees_keep_the_distribution() -> None:
    target = distribution_target()
    check_distribution(built(dflash, small(target, num_nodes=6), target), target, top_k=6, num_samples=2_000)


# --- The network --------------------------------------------------------------------------------------------------


def naive_norm(norm: Any, value: Tensor) -> Tensor:
    return value / (value.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight


def naive_rotation(vector_D: Tensor, position: int, theta: float) -> Tensor:
    """Rotates the pairs (x[i], x[i + D / 2]) one by one."""
    half, turned = len(vector_D) // 2, vector_D.clone()
    for i in range(half):
        angle = torch.tensor(position * theta ** (-i / half), dtype=torch.float64)
        first, second = vector_D[i], vector_D[i + half]
        turned[i] = first * angle.cos() - second * angle.sin()
        turned[i + half] = second * angle.cos() + first * angle.sin()
    return turned


def naive_block(drafter: Drafter, pending: int, hidden: dict[int, Tensor]) -> Tensor:
    """Returns the logits [K, V] of the block after a text whose hidden layers [T, D] are given, key by key."""
    config, target = drafter.config, drafter.target
    states_TD = naive_norm(
        drafter.fusion_norm, torch.cat([hidden[i] for i in config.layers], -1) @ drafter.fusion.weight.T
    )
    num_text = len(states_TD)
    tokens = [pending] + [config.mask_token] * (config.block_size - 1)
    x_ND = target.model.get_input_embeddings().weight[tokens]
    for layer in drafter.layers:
        normed_ND = naive_norm(layer.attention_norm, x_ND)
        sources_SD = torch.cat([states_TD, normed_ND])
        outputs = []
        for n in range(config.block_size):
            heads = []
            for head in range(config.num_heads):
                shared = head * config.num_kv_heads // config.num_heads
                rows, kv_rows = (
                    slice(one * config.head_width, (one + 1) * config.head_width) for one in (head, shared)
                )
                attention = layer.attention
                query = naive_norm(attention.query_norm, attention.query.weight[rows] @ normed_ND[n])
                query = naive_rotation(query, num_text + n, config.theta)
                scores, values = [], []
                for position, source_D in enumerate(sources_SD):
                    key = naive_norm(attention.key_norm, attention.key.weight[kv_rows] @ source_D)
                    scores.append(query @ naive_rotation(key, position, config.theta) / config.head_width**0.5)
                    values.append(attention.value.weight[kv_rows] @ source_D)
                heads.append(torch.stack(scores).softmax(0) @ torch.stack(values))
            outputs.append(layer.attention.output.weight @ torch.cat(heads))
        x_ND = x_ND + torch.stack(outputs)
        inner = naive_norm(layer.feed_forward_norm, x_ND)
        gated = torch.nn.functional.silu(inner @ layer.feed_forward.gate.weight.T) * (
            inner @ layer.feed_forward.up.weight.T
        )
        x_ND = x_ND + gated @ layer.feed_forward.down.weight.T
    return target.head(naive_norm(drafter.norm, x_ND)[None])[0, 1:]


@torch.no_grad()
def test_drafts_are_those_of_a_block_computed_alone() -> None:
    """In a ragged batch, after several rounds: every draft is the likeliest tokens of `naive_block`."""
    target = tiny_target("llama", dtype=torch.float64)
    drafter = built(dflash, small(target, block_size=3), target)
    rows = [row for row in prompts(4) if len(row) > 1]
    compared = 0

    class Compared(Watched):
        def propose(self, budget: int) -> Any:
            nonlocal compared
            draft = super().propose(budget)
            for row, ids in enumerate(self._session.rows):
                read = target.read(torch.tensor([ids[:-1]]), drafter.hidden_layers)
                logits_KV = naive_block(drafter, ids[-1], {layer: states[0] for layer, states in read.items()})
                drafted = draft.tokens_BN[row, 1:].tolist()
                assert drafted == logits_KV.argmax(-1)[: len(drafted)].tolist()
                compared += 1
            return draft

    draftsmith.generate(target, rows, Compared(drafter), max_new_tokens=4)
    assert compared >= 2 * len(rows)


def test_wrong_shapes_are_rejected() -> None:
    target = tiny_target("llama")
    for changes, message in (
        ({"layers": (1, 9)}, r"layers is \[1, 9\]; .* has hidden layers 0 to 3"),
        ({"layers": (2, 1)}, "ascending order"),
        ({"mask_token": VOCAB_SIZE}, f"mask_token is {VOCAB_SIZE}; .* so it must be less"),
        ({"block_size": 1}, "block_size is 1; it must be at least 2"),
        ({"num_heads": 3}, "3 heads of width 6 and 2 key-value heads"),
        ({"stretch": (1.0,)}, "it must be empty, or a factor"),
        ({"shortlist": VOCAB_SIZE + 1}, "shortlist is 65"),
    ):
        with pytest.raises(ValueError, match=message):
            Drafter(small(target, **changes), target)
    with pytest.raises(ValueError, match="is an encoder-decoder; DFlash needs a causal target"):
        Drafter(small(target), tiny_target("t5"))
