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
from draftsmith.core.tree import Draft
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


def example(target: Target) -> Config:
    """Returns the configuration with both heads, so that these are tried on every architecture."""
    return small(target, markov_rank=3, confidence=True)


EXAMPLE = example


@pytest.mark.slow
def test_family(tmp_path: Path) -> None:
    check_family(dflash, small, tmp_path, trainer=trainer, settings=SETTINGS)


def with_heads(target: Target) -> Config:
    return small(target, markov_rank=3, confidence=True, length="confidence=0.5", shortlist=7)


def test_family_with_both_heads(tmp_path: Path) -> None:
    heads = {"markov_rank": 3, "confidence": True, "shortlist": 40}
    settings = trainer_settings(trainer, num_layers=1, num_kv_heads=2, block_size=4, num_anchors=4, **heads)
    check_family(dflash, with_heads, tmp_path, trainer=trainer, settings=settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"num_nodes": 9}, {"shortlist": 7}, {"markov_rank": 3}, {"markov_rank": 3, "num_nodes": 9}, {"confidence": True}],
    ids=["tree", "shortlist", "bias", "tree with a bias", "confidence"],
)
def test_family_in_other_shapes(changes: dict[str, Any], tmp_path: Path) -> None:
    settings = trainer_settings(trainer, block_size=4, loss="lk", weights="decay", shortlist=40)
    check_family(dflash, lambda target: small(target, **changes), tmp_path, trainer=trainer, settings=settings)


@pytest.mark.parametrize("markov_rank", [0, 3])
def test_trees_keep_the_distribution(markov_rank: int) -> None:
    target = distribution_target()
    drafter = built(dflash, small(target, num_nodes=6, markov_rank=markov_rank), target)
    check_distribution(drafter, target, top_k=6, num_samples=2_000)


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


def naive_block(drafter: Drafter, pending: int, hidden: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns outputs [K, D] and logits [K, V] of the block after a text whose hidden layers [T, D] are given."""
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
    z_KD = naive_norm(drafter.norm, x_ND)[1:]
    return z_KD, target.head(z_KD[None])[0]


def naive_bias(drafter: Drafter, token: int) -> Tensor:
    """Returns what the token before adds to a slot's logits: the sum over the rank of W1[token, r] W2[:, r]."""
    weights_V = torch.zeros(len(drafter.shared_head.shortlist), dtype=drafter.norm.weight.dtype)
    if drafter.markov is not None:
        for rank in range(drafter.config.markov_rank):
            weights_V = weights_V + drafter.markov.previous.weight[token, rank] * drafter.markov.next.weight[:, rank]
    return weights_V


def naive_confidence(drafter: Drafter, z_D: Tensor, token: int) -> Tensor:
    """Returns the predicted acceptance of a slot's token, given the one before it."""
    assert drafter.confidence is not None
    features = [z_D] if drafter.markov is None else [z_D, drafter.markov.previous.weight[token]]
    return (drafter.confidence.weight[0] @ torch.cat(features).detach() + drafter.confidence.bias[0]).sigmoid()


def naive_paths(logits_KV: Tensor, drafter: Drafter, pending: int, num_nodes: int) -> set[tuple[int, ...]]:
    """Returns the likeliest paths of tokens, found among all of them."""
    paths: dict[tuple[int, ...], float] = {}
    level: dict[tuple[int, ...], float] = {(): 0.0}
    for logits_V in logits_KV:
        longer = {}
        for path, score in level.items():
            logs = (logits_V + naive_bias(drafter, path[-1] if path else pending)).log_softmax(-1).tolist()
            longer |= {(*path, token): score + log for token, log in enumerate(logs)}
        paths |= longer
        level = longer
    return set(sorted(paths, key=lambda path: -paths[path])[:num_nodes])


def paths_of(draft: Draft, row: int) -> set[tuple[int, ...]]:
    """Returns the tokens along the path to each node but the first."""
    parents = draft.tree.parents_RN.expand_as(draft.tokens_BN)[row].tolist()
    paths: list[tuple[int, ...]] = [()]
    for node, parent in enumerate(parents[1:], start=1):
        paths.append((*paths[parent], int(draft.tokens_BN[row, node])))
    return set(paths[1:])


@pytest.mark.parametrize(
    "changes", [{}, {"markov_rank": 3}, {"num_nodes": 8}, {"num_nodes": 8, "markov_rank": 3}], ids=str
)
@torch.no_grad()
def test_drafts_are_those_of_a_block_computed_alone(changes: dict[str, int]) -> None:
    """In a ragged batch, after several rounds: every draft is the likeliest tokens, or paths, by `naive_block`."""
    target = tiny_target("llama", dtype=torch.float64)
    drafter = built(dflash, small(target, block_size=3, **changes), target)
    rows = [row for row in prompts(4) if len(row) > 1]
    compared, differs_by_bias = 0, False

    class Compared(Watched):
        def propose(self, budget: int) -> Any:
            nonlocal compared, differs_by_bias
            draft = super().propose(budget)
            for row, ids in enumerate(self._session.rows):
                read = target.read(torch.tensor([ids[:-1]]), drafter.hidden_layers)
                _, logits_KV = naive_block(drafter, ids[-1], {layer: states[0] for layer, states in read.items()})
                logits_KV = logits_KV[: draft.tree.depth]
                if drafter.config.num_nodes:
                    expected = naive_paths(logits_KV, drafter, ids[-1], 8)
                else:
                    text = [ids[-1]]
                    for logits_V in logits_KV:
                        text.append(int((logits_V + naive_bias(drafter, text[-1])).argmax()))
                    expected = {tuple(text[1 : number + 1]) for number in range(1, len(text))}
                assert paths_of(draft, row) == expected
                differs_by_bias |= expected != {
                    tuple(logits_KV.argmax(-1)[:number].tolist()) for number in range(1, len(logits_KV) + 1)
                }
                compared += 1
            return draft

    draftsmith.generate(target, rows, Compared(drafter), max_new_tokens=4)
    assert compared >= 2 * len(rows)
    assert differs_by_bias == bool(changes)


@torch.no_grad()
def test_a_new_bias_changes_no_draft() -> None:
    target = tiny_target("llama")
    plain = built(dflash, small(target), target)
    drafter = Drafter(small(target, markov_rank=3), target)
    assert set(drafter.load_state_dict(plain.state_dict(), strict=False).missing_keys) == {
        "markov.previous.weight",
        "markov.next.weight",
    }
    found = []
    for one in (plain, drafter.eval()):
        watched = Watched(one)
        draftsmith.generate(target, prompts(3), watched, max_new_tokens=12, temperature=1.0, seed=5)
        found.append(watched.drafts)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("temperature", "markov_rank"),
    [(0.0, 0), (1.0, 3), *(pytest.param(*one, marks=pytest.mark.slow) for one in ((0.0, 3), (1.0, 0)))],
)
@torch.no_grad()
def test_a_draft_ends_after_the_first_token_of_low_confidence(temperature: float, markov_rank: int) -> None:
    """The policy is asked about the acceptance predicted before a token is drawn, and not about its probability."""
    target = tiny_target("llama", dtype=torch.float64)
    drafter = built(dflash, small(target, confidence=True, markov_rank=markov_rank, length="confidence=0.5"), target)
    drafter.confidence.weight.mul_(2.0)
    rows, num_new = [row for row in prompts(4) if len(row) > 1], 8
    lengths = set()

    class Compared(Watched):
        def propose(self, budget: int) -> Any:
            draft = super().propose(budget)
            num_nodes = draft.num_nodes or [draft.tree.num_nodes] * len(self._session.rows)
            for row, ids in enumerate(self._session.rows):
                if len(ids) == len(rows[row]) + num_new:
                    continue  # the row has ended, and its draft is not used
                read = target.read(torch.tensor([ids[:-1]]), drafter.hidden_layers)
                z_KD, _ = naive_block(drafter, ids[-1], {layer: states[0] for layer, states in read.items()})
                tokens = draft.tokens_BN[row, : num_nodes[row]].tolist()
                confident = [
                    naive_confidence(drafter, z_D, token) >= 0.5 for z_D, token in zip(z_KD, tokens[:-1], strict=False)
                ]
                assert all(confident[:-1])
                assert not confident[-1] or num_nodes[row] == min(budget, drafter.config.num_draft) + 1
                lengths.add(num_nodes[row] - 1)
            return draft

    draftsmith.generate(target, rows, Compared(drafter), max_new_tokens=num_new, temperature=temperature, seed=0)
    assert len(lengths) > 1, "every draft has the same length"


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
        ({"markov_rank": -1}, "markov_rank is -1; it must be at least 0"),
        ({"confidence": True, "num_nodes": 4}, "confidence is set and num_nodes is 4: only the lengths of chains"),
    ):
        with pytest.raises(ValueError, match=message):
            Drafter(small(target, **changes), target)
    with pytest.raises(ValueError, match="is an encoder-decoder; DFlash needs a causal target"):
        Drafter(small(target), tiny_target("t5"))
