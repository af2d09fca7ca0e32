"""Hydra's trainer: its losses against a slow reference, four golden steps, judgement, and the tree it computes.

Shape suffixes: B rows, T positions, D hidden width, I tokens told to a head, V vocabulary, K heads.
"""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from data.batches import Batch, collate, example
from data.teacher import complete
from tests.support.masked_batch import masked_batch
from tests.support.models import VOCAB_SIZE, tiny_target
from tests.support.runs import trainer_settings
from trainers import hydra
from trainers.parts import losses, trees

TARGET = tiny_target("llama")
PLAIN = trainer_settings(hydra, num_heads=3, num_blocks=2)
PLUS: dict[str, Any] = {"num_heads": 3, "num_blocks": 2, "prefix_attention": True, "prefix_width": 48}
SETTINGS = trainer_settings(hydra, **PLUS)


def batch(num_rows: int = 3) -> Batch:
    """Returns rows of 9, 12 and 15 tokens whose loss masks begin at different places and have a hole."""
    return complete(masked_batch(num_rows), TARGET, (TARGET.num_layers,))


def shaken(settings: hydra.Settings = PLAIN) -> hydra.Drafter:
    """Returns heads with weights other than those they begin with."""
    drafter = hydra.build(settings, TARGET)
    generator = torch.Generator().manual_seed(0)
    for weight in drafter.parameters():
        weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    return drafter


def slow_logits(drafter: hydra.Drafter, given: Batch, k: int, b: int, t: int) -> Tensor:
    """Returns head k's logits [V] at one position, told the tokens that follow it."""
    states_BTD = drafter.states(given.hidden[TARGET.num_layers][b : b + 1])
    told_11I = given.tokens_BT[b, t + 1 : t + 2 + k][None, None]
    return drafter.head(k, drafter.features(states_BTD[:, t : t + 1], told_11I))[0, 0]


def places(given: Batch, k: int) -> list[tuple[int, int]]:
    """Returns (row, t) wherever head k's token is supervised."""
    rows, length = given.tokens_BT.shape
    return [(b, t) for b in range(rows) for t in range(length - 2 - k) if given.loss_mask_BT[b, t + 2 + k]]


@pytest.mark.parametrize("settings", [{"num_heads": 3}, {"num_heads": 3, "own_head": True}, PLUS])
@pytest.mark.parametrize("name", ["ce", "forward_kl", "jsd"])
def test_the_loss_against_a_slow_reference(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], name: str
) -> None:
    """Token by token in Python: value and every gradient, to float32's rounding; logits in chunks of four positions."""
    settings, given = trainer_settings(hydra, **settings, loss=name, beta=0.3), batch()
    drafter, theirs_BTV = shaken(settings), TARGET.logits(given.hidden[TARGET.num_layers]).detach()
    slow = torch.zeros(())
    for k in range(3):
        for b, t in places(given, k):
            ours_V = slow_logits(drafter, given, k, b, t).log_softmax(-1)
            probs_V = theirs_BTV[b, t + 1 + k].softmax(-1)
            mixed_V = 0.3 * probs_V + 0.7 * ours_V.exp()
            kl_of_law, kl_of_ours = ((p_V * (p_V / mixed_V).log()).sum() for p_V in (probs_V, ours_V.exp()))
            slow = (
                slow
                + {
                    "ce": -ours_V[given.tokens_BT[b, t + 2 + k]],
                    "forward_kl": (probs_V * (probs_V.log() - ours_V)).sum(),
                    "jsd": 0.3 * kl_of_law + 0.7 * kl_of_ours,
                }[name]
            )
    expected = torch.autograd.grad(slow, list(drafter.parameters()))
    whole, _ = hydra.loss(drafter, given, settings, TARGET)
    torch.testing.assert_close(whole, slow)
    monkeypatch.setattr(
        hydra, "chunked", lambda *args, **rest: losses.sum_in_chunks(*args, **rest, max_logits=4 * VOCAB_SIZE)
    )
    fast, metrics = hydra.loss(drafter, given, settings, TARGET)
    torch.testing.assert_close(fast, slow)
    found = torch.autograd.grad(fast, list(drafter.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert [count for _, count in metrics.values()] == [len(places(given, k)) for k in range(3)]


def test_what_heads_are_told_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 3 4 5 6 7, of which 6 and 7 are to be learnt: head 0 is told 5, then 6; head 1 is told 4 5, then 5 6."""
    given = collate([example([3, 4, 5, 6, 7], [False, False, False, True, True], "row")])
    given = complete(given, TARGET, (TARGET.num_layers,))
    drafter, asked = hydra.build(trainer_settings(hydra, num_heads=4), TARGET), []
    features = drafter.features

    def asked_for(state_1ND: Tensor, told_1NI: Tensor) -> Tensor:
        asked.append((state_1ND, told_1NI))
        return features(state_1ND, told_1NI)

    monkeypatch.setattr(drafter, "features", asked_for)
    parts = list(hydra._parts(drafter, given))
    assert [told_1NI[0].tolist() for _, told_1NI in asked] == [[[5], [6]], [[4, 5], [5, 6]], [[4, 5, 6]], []]
    assert [part.labels_N.tolist() for part in parts] == [[6, 7], [6, 7], [7], []]
    states_TD = TARGET.norm(given.hidden[TARGET.num_layers])[0]
    for (state_1ND, _), positions in zip(asked, ([1, 2], [0, 1], [0], []), strict=True):
        assert torch.equal(state_1ND[0], states_TD[positions])


def test_dropout_is_for_training_alone() -> None:
    settings, given = dataclasses.replace(PLAIN, dropout=0.5), batch()
    drafter = shaken(settings)
    torch.manual_seed(0)
    values = [
        hydra.loss(drafter.train(is_training), given, settings, TARGET)[0].item()
        for is_training in (True, True, False, False)
    ]
    assert values[0] != values[1] and values[1] != values[2] and values[2] == values[3]
    assert values[2] == hydra.loss(shaken().train(), given, PLAIN, TARGET)[0].item()


def test_four_steps() -> None:
    """The losses of four steps of AdamW, as they were when this was written (to 1e-4: one machine's float32)."""
    given, drafter = batch(), hydra.build(PLAIN, TARGET)
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=3e-2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss, _ = hydra.loss(drafter, given, PLAIN, TARGET)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx([173.54636, 124.91005, 106.03172, 79.74010], rel=1e-4)


def test_judgement_by_hand() -> None:
    """Acceptance counts heads right before the first wrong one, at positions where all heads are supervised."""
    drafter, given = shaken(), batch()
    # Rows written by the heads themselves make some of them right, each time told what is written by then.
    for b, t in places(given, 1):
        given.tokens_BT[b, t + 3] = slow_logits(drafter, given, 1, b, t).argmax()
    hits = [
        {(b, t): bool(slow_logits(drafter, given, k, b, t).argmax() == given.tokens_BT[b, t + 2 + k]) for b, t in spots}
        for k, spots in enumerate(places(given, k) for k in range(3))
    ]
    whole = [place for place in hits[0] if place in hits[1] and place in hits[2]]
    runs = [next((k for k in range(3) if not hits[k][place]), 3) for place in whole]
    metrics = hydra.evaluate(drafter, given, PLAIN, TARGET)
    assert [int(part) for part in metrics["acceptance"]] == [sum(runs), len(whole)]
    for k in range(3):
        assert [int(part) for part in metrics[f"head{k}_accuracy"]] == [sum(hits[k].values()), len(hits[k])]
    assert sum(hits[1].values()) > len(hits[1]) // 2


def test_the_finished_drafter_has_the_same_heads_and_a_measured_tree() -> None:
    given = batch()
    for tree_nodes in (3, 0):
        settings = trainer_settings(hydra, **PLUS, tree_nodes=tree_nodes, siblings="independent")
        drafter = shaken(settings)
        # Half of the text is what head 0 would say, so that second guesses are right at times.
        for b, t in places(given, 0)[::2]:
            given.tokens_BT[b, t + 2] = slow_logits(drafter, given, 0, b, t).topk(2).indices[t % 2]
        finished = hydra.finish(drafter, settings, TARGET, [given])
        assert finished.config.tree[0] == (0,) and not finished.training
        assert finished.config.siblings == "independent"
        assert len(finished.config.tree) == 3 or not tree_nodes
        for name, weight in drafter.state_dict().items():
            assert torch.equal(finished.state_dict()[name], weight)


def test_trees_that_grow_need_no_computing() -> None:
    settings = trainer_settings(hydra, width=3, num_nodes=5)
    drafter = hydra.build(settings, TARGET)
    assert hydra.finish(drafter, settings, TARGET, [batch()]) is drafter
    assert drafter.config.width == 3 and drafter.config.num_nodes == 5 and not drafter.config.tree


def test_trees_hold_guesses_in_turn() -> None:
    """The second guess is right more often than the first, and takes no more than the first one's chance."""
    chances = {(): [0.2, 0.5, 0.1], (0,): [0.3, 0.4, 0.0], (1,): [0.9, 0.0, 0.0]}
    nodes = trees.grow(trees.non_increasing(lambda path: chances.get(path, [])), 9)
    assert [path for path, _ in nodes] == [(0,), (1,), (1, 0), (2,), (0, 0), (0, 1)]
    assert [chance for _, chance in nodes] == pytest.approx([0.2, 0.2, 0.18, 0.1, 0.06, 0.06])


def test_what_is_refused() -> None:
    for changes in (
        {"num_heads": 0},
        {"num_blocks": 0},
        {"prefix_heads": 0},
        {"prefix_width": -1},
        {"dropout": 1.0},
        {"tree_nodes": -1},
        {"width": -1},
        {"num_nodes": 0},
        {"loss": "jsd", "beta": 0.0},
    ):
        with pytest.raises(ValueError, match=list(changes)[-1]):
            trainer_settings(hydra, **changes)
    with pytest.raises(ValueError, match="tree_nodes is for a fixed tree and width for trees that grow"):
        trainer_settings(hydra, width=4, tree_nodes=8)
