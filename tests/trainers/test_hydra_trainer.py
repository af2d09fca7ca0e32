"""Hydra's trainer: losses against a slow reference, four golden steps, metrics, and the computed tree.

Shape suffixes: B rows, T positions, D hidden width, I tokens read by a head, V vocabulary, K heads.
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
    """Returns rows of 9, 12 and 15 tokens whose loss masks begin at different positions and have a gap."""
    return complete(masked_batch(num_rows), TARGET, (TARGET.num_layers,))


def perturbed_drafter(settings: hydra.Settings = PLAIN) -> hydra.Drafter:
    """Returns heads with perturbed weights."""
    drafter = hydra.build(settings, TARGET)
    generator = torch.Generator().manual_seed(0)
    for weight in drafter.parameters():
        weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    return drafter


def slow_logits(drafter: hydra.Drafter, given: Batch, k: int, b: int, t: int) -> Tensor:
    """Returns head k's logits [V] at one position, given the tokens that follow it."""
    states_BTD = drafter.states(given.hidden[TARGET.num_layers][b : b + 1])
    read_11I = given.tokens_BT[b, t + 1 : t + 2 + k][None, None]
    return drafter.head(k, drafter.features(states_BTD[:, t : t + 1], read_11I))[0, 0]


def supervised_positions(given: Batch, k: int) -> list[tuple[int, int]]:
    """Returns (row, t) of all positions where head k's label is supervised."""
    rows, length = given.tokens_BT.shape
    return [(b, t) for b in range(rows) for t in range(length - 2 - k) if given.loss_mask_BT[b, t + 2 + k]]


@pytest.mark.parametrize("settings", [{"num_heads": 3}, {"num_heads": 3, "own_head": True}, PLUS])
@pytest.mark.parametrize("name", ["ce", "forward_kl", "jsd"])
def test_loss_and_gradients_equal_a_slow_reference(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], name: str
) -> None:
    """The reference goes token by token; values agree to float32's rounding, also with chunks of four positions."""
    settings, given = trainer_settings(hydra, **settings, loss=name, beta=0.3), batch()
    drafter, theirs_BTV = perturbed_drafter(settings), TARGET.logits(given.hidden[TARGET.num_layers]).detach()
    slow = torch.zeros(())
    for k in range(3):
        for b, t in supervised_positions(given, k):
            ours_V = slow_logits(drafter, given, k, b, t).log_softmax(-1)
            probs_V = theirs_BTV[b, t + 1 + k].softmax(-1)
            mixed_V = 0.3 * probs_V + 0.7 * ours_V.exp()
            kl_theirs, kl_ours = ((p_V * (p_V / mixed_V).log()).sum() for p_V in (probs_V, ours_V.exp()))
            slow = (
                slow
                + {
                    "ce": -ours_V[given.tokens_BT[b, t + 2 + k]],
                    "forward_kl": (probs_V * (probs_V.log() - ours_V)).sum(),
                    "jsd": 0.3 * kl_theirs + 0.7 * kl_ours,
                }[name]
            )
    expected = torch.autograd.grad(slow, list(drafter.parameters()))
    whole, _ = hydra.loss(drafter, given, settings, TARGET)
    torch.testing.assert_close(whole, slow)
    monkeypatch.setattr(
        hydra, "sum_in_chunks", lambda *args, **rest: losses.sum_in_chunks(*args, **rest, max_logits=4 * VOCAB_SIZE)
    )
    fast, metrics = hydra.loss(drafter, given, settings, TARGET)
    torch.testing.assert_close(fast, slow)
    found = torch.autograd.grad(fast, list(drafter.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert [count for _, count in metrics.values()] == [len(supervised_positions(given, k)) for k in range(3)]


def test_heads_read_the_tokens_before_their_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 3 4 5 6 7 with labels 6 and 7: head 0 reads 5, then 6; head 1 reads 4 5, then 5 6."""
    given = collate([example([3, 4, 5, 6, 7], [False, False, False, True, True], "row")])
    given = complete(given, TARGET, (TARGET.num_layers,))
    drafter, calls = hydra.build(trainer_settings(hydra, num_heads=4), TARGET), []
    features = drafter.features

    def recorded_features(state_1ND: Tensor, read_1NI: Tensor) -> Tensor:
        calls.append((state_1ND, read_1NI))
        return features(state_1ND, read_1NI)

    monkeypatch.setattr(drafter, "features", recorded_features)
    outputs = list(hydra._head_outputs(drafter, given))
    assert [read_1NI[0].tolist() for _, read_1NI in calls] == [[[5], [6]], [[4, 5], [5, 6]], [[4, 5, 6]], []]
    assert [output.labels_N.tolist() for output in outputs] == [[6, 7], [6, 7], [7], []]
    states_TD = TARGET.norm(given.hidden[TARGET.num_layers])[0]
    for (state_1ND, _), positions in zip(calls, ([1, 2], [0, 1], [0], []), strict=True):
        assert torch.equal(state_1ND[0], states_TD[positions])


def test_dropout_applies_in_training_only() -> None:
    settings, given = dataclasses.replace(PLAIN, dropout=0.5), batch()
    drafter = perturbed_drafter(settings)
    torch.manual_seed(0)
    values = [
        hydra.loss(drafter.train(is_training), given, settings, TARGET)[0].item()
        for is_training in (True, True, False, False)
    ]
    assert values[0] != values[1] and values[1] != values[2] and values[2] == values[3]
    assert values[2] == hydra.loss(perturbed_drafter().train(), given, PLAIN, TARGET)[0].item()


def test_divergence_on_a_shortlist_is_between_distributions_over_it() -> None:
    settings, given = trainer_settings(hydra, num_heads=3, shortlist=30), batch()
    drafter, theirs_BTV = perturbed_drafter(settings), TARGET.logits(given.hidden[TARGET.num_layers])
    ids_W = torch.arange(4, 64, 2)
    drafter.shared_head.shortlist.set_tokens(ids_W)
    slow = torch.zeros(())
    for k in range(3):
        for b, t in supervised_positions(given, k):
            ours_W = slow_logits(drafter, given, k, b, t)[ids_W].log_softmax(-1)
            probs_W = theirs_BTV[b, t + 1 + k, ids_W].softmax(-1)
            slow = slow + (probs_W * (probs_W.log() - ours_W)).sum()
    torch.testing.assert_close(hydra.loss(drafter, given, settings, TARGET)[0], slow)


def test_four_steps_have_golden_losses() -> None:
    """Losses of four AdamW steps equal recorded values to 1e-4, for float32 on other machines."""
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


def test_evaluate_equals_metrics_by_hand() -> None:
    """Acceptance counts correct heads before the first wrong one, at positions where all heads are supervised."""
    drafter, given = perturbed_drafter(), batch()
    # The heads' own tokens are written into the rows, so that some predictions are correct.
    for b, t in supervised_positions(given, 1):
        given.tokens_BT[b, t + 3] = slow_logits(drafter, given, 1, b, t).argmax()
    hits = [
        {(b, t): bool(slow_logits(drafter, given, k, b, t).argmax() == given.tokens_BT[b, t + 2 + k]) for b, t in spots}
        for k, spots in enumerate(supervised_positions(given, k) for k in range(3))
    ]
    whole = [spot for spot in hits[0] if spot in hits[1] and spot in hits[2]]
    runs = [next((k for k in range(3) if not hits[k][spot]), 3) for spot in whole]
    metrics = hydra.evaluate(drafter, given, PLAIN, TARGET)
    assert [int(part) for part in metrics["acceptance"]] == [sum(runs), len(whole)]
    for k in range(3):
        assert [int(part) for part in metrics[f"head{k}_accuracy"]] == [sum(hits[k].values()), len(hits[k])]
    assert sum(hits[1].values()) > len(hits[1]) // 2


def test_finish_keeps_the_heads_and_computes_a_tree() -> None:
    given = batch()
    for tree_nodes in (3, 0):
        settings = trainer_settings(hydra, **PLUS, tree_nodes=tree_nodes, siblings="independent")
        drafter = perturbed_drafter(settings)
        # Half of the text is head 0's first or second token, so that second ranks are sometimes correct.
        for b, t in supervised_positions(given, 0)[::2]:
            given.tokens_BT[b, t + 2] = slow_logits(drafter, given, 0, b, t).topk(2).indices[t % 2]
        finished = hydra.finish(drafter, settings, TARGET, [given])
        assert finished.config.tree[0] == (0,) and not finished.training
        assert finished.config.siblings == "independent"
        assert len(finished.config.tree) == 3 or not tree_nodes
        for name, weight in drafter.state_dict().items():
            assert torch.equal(finished.state_dict()[name], weight)


def test_finish_keeps_a_drafter_of_dynamic_trees() -> None:
    settings = trainer_settings(hydra, width=3, num_nodes=5)
    drafter = hydra.build(settings, TARGET)
    assert hydra.finish(drafter, settings, TARGET, [batch()]) is drafter
    assert drafter.config.width == 3 and drafter.config.num_nodes == 5 and not drafter.config.tree


def test_trees_with_non_increasing_probabilities_have_ranks_without_gaps() -> None:
    """The second rank is correct more often than the first, but counts with the first one's probability."""
    probs = {(): [0.2, 0.5, 0.1], (0,): [0.3, 0.4, 0.0], (1,): [0.9, 0.0, 0.0]}
    nodes = trees.grow(trees.non_increasing(lambda path: probs.get(path, [])), 9)
    assert [path for path, _ in nodes] == [(0,), (1,), (1, 0), (2,), (0, 0), (0, 1)]
    assert [prob for _, prob in nodes] == pytest.approx([0.2, 0.2, 0.18, 0.1, 0.06, 0.06])


def test_invalid_settings_raise() -> None:
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
    with pytest.raises(ValueError, match="tree_nodes is the size of a static tree and width is for dynamic trees"):
        trainer_settings(hydra, width=4, tree_nodes=8)
