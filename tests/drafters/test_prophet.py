"""Tests of the prophet drafter: its windows against a decoder written with loops, and their positions.

Shape suffixes: T positions, W slots of a window that are present, D the target's hidden width, E the prophet's,
B rows, N nodes, M new nodes, V vocabulary.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import draftsmith
from data.batches import collate, example
from data.teacher import complete
from draftsmith import Target
from draftsmith.artifacts.artifact import read_manifest
from draftsmith.core.tree import Tree
from draftsmith.drafters import prophet
from draftsmith.drafters.prophet import Config, Drafter
from tests.support.family import built, check_family, check_greedy, check_round_trip, check_training, texts
from tests.support.models import greedy_by_transformers, padded, prompts, tiny_model, tiny_target
from tests.support.runs import trainer_settings
from trainers import prophet as trainer

EXAMPLE = Config(num_layers=1, num_draft=4)
DYNAMIC = Config(num_states=3, num_draft=4, hidden_size=24, own_head=True, width=2, num_nodes=5)
NUM_NEW, EOS = 20, (10, 11, 12)


def test_family(tmp_path: Path) -> None:
    check_family(prophet, EXAMPLE, tmp_path, trainer=trainer, settings=trainer_settings(trainer, num_layers=1))


def test_dynamic_trees_with_own_head_and_other_width() -> None:
    check_greedy(built(prophet, DYNAMIC, tiny_target("mistral")), "mistral")
    check_training(trainer, trainer_settings(trainer, hidden_size=24, own_head=True, num_states=3, loss="forward_kl"))


def test_joint_artifact_holds_the_fine_tuned_target(tmp_path: Path) -> None:
    """The user's target stays unchanged, and `generate` rejects it."""
    target = tiny_target("llama")
    before = {name: weight.clone() for name, weight in target.model.named_parameters()}
    drafter = built(prophet, Config(num_layers=1, own_head=True, joint=True), target)
    check_greedy(drafter, "llama")
    check_round_trip(drafter, target, tmp_path)
    assert read_manifest(tmp_path)["tunes_target"]
    loaded = draftsmith.load(tmp_path, target)
    own = dict(loaded.target.model.named_parameters())
    assert own.keys() == before.keys() and loaded.target.base is target
    for name, weight in target.model.named_parameters():
        assert torch.equal(weight, before[name])
        assert not torch.equal(weight, own[name])
        assert torch.equal(own[name], drafter.target.model.get_parameter(name))
    with pytest.raises(ValueError, match=r"drafter\.target"):
        draftsmith.generate(target, torch.tensor(prompts(1)), loaded, max_new_tokens=2)


def test_fine_tuned_target_keeps_dtype_of_buffers() -> None:
    """Rotary frequencies stay in float32 whatever the dtype of the weights."""
    drafter = Drafter(Config(joint=True), Target(tiny_model("llama"))).to(torch.bfloat16)
    assert {weight.dtype for weight in drafter.tuned_model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in drafter.tuned_model.buffers()} == {torch.float32}


# --- A window ----------------------------------------------------------------------------------------------------


def naive_logits(drafter: Drafter, ids: list[int], drafted: list[int]) -> Tensor:
    """Returns the logits [V] after `ids`, whose last token is pending, and the drafted tokens, from one window."""
    target, num_states = drafter.target, drafter.config.num_states
    pending, slots = len(ids) - 1, []
    for slot in range(2 * num_states + len(drafted)):
        if slot < num_states:
            position = pending - num_states + slot
            slots += [(slot, drafter.state_map.weight @ read(target, ids[:-1])[position])] if position >= 0 else []
        else:
            position = pending - 2 * num_states + 1 + slot
            token = (ids + drafted)[position] if position >= 0 else -1
            embedding = target.model.get_input_embeddings().weight
            slots += [(slot, drafter.token_map.weight @ embedding[token])] if position >= 0 else []
    x_WE = torch.stack([x_E for _, x_E in slots])
    for block in drafter.blocks:
        middle_WE = x_WE + attended(block.attention, normed(block.attention_norm, x_WE), [slot for slot, _ in slots])
        inner_WE = normed(block.feed_forward_norm, middle_WE)
        gate, up, down = (getattr(block.feed_forward, name).weight for name in ("gate", "up", "down"))
        x_WE = middle_WE + (functional.silu(inner_WE @ gate.T) * (inner_WE @ up.T)) @ down.T
    out_D = drafter.output_map.weight @ normed(drafter.norm, x_WE)[-1]
    return drafter.outputs[0].weight @ out_D if drafter.config.own_head else target.head(out_D[None, None])[0, 0]


def read(target: Target, ids: list[int]) -> Tensor:
    """Returns the target's last hidden states [T, D] after its final norm, by the model's own forward."""
    return target.model.get_decoder()(torch.tensor([ids])).last_hidden_state[0]


def normed(module: Any, x_WE: Tensor) -> Tensor:
    return x_WE / (x_WE.square().mean(-1, keepdim=True) + module.eps).sqrt() * module.weight


def attended(attention: Any, x_WE: Tensor, slots: list[int]) -> Tensor:
    """Returns causal attention, pair by pair, with rotations as products of complex numbers."""
    width, out_WE = attention.head_width, x_WE.new_zeros(len(x_WE), attention.output.in_features)
    frequencies = attention.theta ** (-torch.arange(width // 2, dtype=x_WE.dtype) / (width // 2))
    for head in range(attention.num_heads):
        rows = slice(head * width, (head + 1) * width)
        queries, keys, values = (x_WE @ getattr(attention, name).weight[rows].T for name in ("query", "key", "value"))
        for i in range(len(slots)):
            scores = []
            for j in range(i + 1):
                rotation = torch.polar(torch.ones_like(frequencies), (slots[i] - slots[j]) * frequencies)
                one, two = (torch.complex(*x_D.split(width // 2)) for x_D in (queries[i], keys[j]))
                scores.append((one * rotation * two.conj()).real.sum() / width**0.5)
            out_WE[i, rows] = torch.stack(scores).softmax(0) @ values[: i + 1]
    return out_WE @ attention.output.weight.T


class CheckedLogits:
    """Checks the drafter's logits against the naive decoder, row by row and node by node."""

    def __init__(self, drafter: Drafter) -> None:
        self.num_compared, self._logits, self._drafter = 0, drafter._logits, drafter
        drafter._logits = self._check  # type: ignore[method-assign]

    def _check(self, tokens_BN: Tensor, tree: Tree, first: int) -> Tensor:
        found_BMV = self._logits(tokens_BN, tree, first)
        for row, ids in enumerate(self._drafter._session.rows):
            if ids[-1] in EOS:  # the drafts of a finished row are not used
                continue
            parents = tree.parents_RN.expand_as(tokens_BN)[row].tolist()
            for node in range(first, tree.num_nodes):
                path = [node]
                while path[0]:
                    path.insert(0, parents[path[0]])
                expected_V = naive_logits(self._drafter, ids, tokens_BN[row, path[1:]].tolist())
                torch.testing.assert_close(found_BMV[row, node - first], expected_V, atol=1e-5, rtol=1e-5)
                self.num_compared += 1
        return found_BMV


@pytest.mark.parametrize(
    "config",
    [
        Config(num_layers=2, num_draft=3, length="fixed"),
        Config(num_states=1, num_layers=1, num_draft=3, hidden_size=40),
        Config(num_states=4, num_layers=2, num_draft=2, own_head=True, length="confidence=0.2"),
        DYNAMIC,
    ],
)
def test_drafts_match_decoder_without_cache(config: Config) -> None:
    """Ragged rows, two shorter than a window and one without any state, some of which finish early.

    In float64, as float32 alone rounds by more than 1e-5 here.
    """
    drafter = built(prophet, config, Target(tiny_model("llama").double()))
    compared = CheckedLogits(drafter)
    ids, mask = padded(prompts(5))
    settings = {"max_new_tokens": 6, "eos_token_id": EOS, "temperature": 0.0 if config.width else 1.0}
    draftsmith.generate(drafter.target, ids, drafter, attention_mask=mask, seed=1, **settings)
    assert compared.num_compared > 30


# --- Positions ---------------------------------------------------------------------------------------------------


def trained_on(target: Target, text: list[int], **settings: Any) -> Drafter:
    """Returns a prophet that its trainer has fitted to one text."""
    torch.manual_seed(0)
    wanted = trainer_settings(trainer, num_layers=1, num_draft=4, length="fixed", **settings)
    drafter = trainer.build(wanted, target)
    batch = complete(collate([example(text, None, "text")]), target, (target.num_layers,))
    optimizer = torch.optim.Adam(drafter.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        trainer.loss(drafter, batch, wanted, target)[0].backward()
        optimizer.step()
    return drafter.eval()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("num_states", [1, 3])
def test_prophet_fitted_to_the_text_is_always_accepted(architecture: str, num_states: int) -> None:
    """Training windows cover the whole text and drafting windows begin anywhere: every draft is accepted."""
    target = tiny_target(architecture)
    text = greedy_by_transformers(architecture, 1, NUM_NEW)[0]
    drafter = trained_on(target, text, num_states=num_states)
    out = draftsmith.generate(target, torch.tensor(prompts(1)), drafter, max_new_tokens=NUM_NEW)
    assert texts(out) == [text]
    assert out.stats.accepted_per_depth == [1, 1, 1, 1]
    assert out.stats.steps == 4 and out.stats.tau == 5
    ids, mask = padded([text[:1], text[:2], text[:9]])
    out = draftsmith.generate(target, ids, drafter, attention_mask=mask, max_new_tokens=15)
    assert texts(out)[2] == text[:24]


def test_window_positions_pair_states_with_next_tokens() -> None:
    """For s = 2 and a pending token at position 5: the states of positions 3 and 4, the tokens of 4 and 5."""
    states, tokens = prophet.window_positions(torch.tensor([5, 0]), 2)
    assert states.tolist() == [[3, 4], [-2, -1]]
    assert tokens.tolist() == [[4, 5], [-1, 0]]


def test_window_mask_hides_absent_slots_from_all_others() -> None:
    is_present = torch.tensor([[False, True], [True, True]])
    mask = prophet.window_mask(torch.ones(3, 3, dtype=torch.bool).tril()[None, None], is_present)
    assert mask[0, 0].int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    assert mask[1, 0].int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    last = prophet.window_mask(torch.ones(1, 1, 1, 3, dtype=torch.bool), is_present)
    assert last[:, 0, 0].int().tolist() == [[0, 1, 1], [1, 1, 1]]


def test_new_prophet_starts_as_identity() -> None:
    """Maps are the identity where widths are equal, and its own LM head is initialised from the target's."""
    target = tiny_target("llama")
    drafter = Drafter(Config(own_head=True), target)
    x_BND = torch.randn(1, 3, target.hidden_size)
    assert torch.equal(drafter.state_map(x_BND), x_BND)
    assert torch.equal(drafter.head(x_BND), target.head(drafter.norm(x_BND)))
    assert drafter.state_map.weight.shape == (32, 32)
    assert Drafter(Config(hidden_size=24), target).state_map.weight.shape == (24, 32)


def test_target_is_no_submodule() -> None:
    drafter = Drafter(Config(), tiny_target("llama"))
    own = {"state_map", "token_map", "blocks", "norm", "output_map"}
    assert {name.split(".")[0] for name in drafter.state_dict()} == own
    assert drafter.hidden_layers == (3,)


@pytest.mark.parametrize("name", ["num_states", "num_layers", "num_heads", "num_draft"])
def test_config_rejects_zero_counts(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0"):
        Config(**{name: 0})


def test_config_rejects_other_invalid_settings() -> None:
    with pytest.raises(ValueError, match="hidden_size is -1"):
        Config(hidden_size=-1)
    with pytest.raises(ValueError, match="unknown length policy 'long'"):
        Config(length="long")
