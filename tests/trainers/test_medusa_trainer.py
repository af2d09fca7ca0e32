"""Medusa's trainer: its loss against a slow reference, four golden steps, metrics, and the computed tree.

Shape suffixes: B rows, T positions, K heads, R ranks.
"""

import pytest
import torch
from torch import Tensor

from data.batches import Batch
from data.teacher import complete
from tests.support.masked_batch import masked_batch
from tests.support.models import tiny_target
from tests.support.runs import trainer_settings
from trainers import medusa

TARGET = tiny_target("llama")
SETTINGS = trainer_settings(medusa, num_heads=3, num_blocks=2)


def batch(num_rows: int = 3) -> Batch:
    """Returns rows of 9, 12 and 15 tokens whose loss masks begin at different positions and have a gap."""
    return complete(masked_batch(num_rows), TARGET, (TARGET.num_layers,))


def perturbed_drafter(settings: medusa.Settings = SETTINGS) -> medusa.Drafter:
    """Returns heads with nonzero weights."""
    drafter = medusa.build(settings, TARGET)
    generator = torch.Generator().manual_seed(0)
    for weight in drafter.parameters():
        weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    return drafter


def slow_logits(drafter: medusa.Drafter, given: Batch) -> Tensor:
    """Returns every head's logits [K, B, T, V]."""
    normed_BTD = TARGET.norm(given.hidden[TARGET.num_layers])
    return torch.stack([drafter.head(k, z_BTD) for k, z_BTD in enumerate(drafter.heads(normed_BTD))])


def supervised_positions(given: Batch, k: int) -> list[tuple[int, int]]:
    """Returns (row, t) of all positions where head k's label is supervised."""
    rows, length = given.tokens_BT.shape
    return [(b, t) for b in range(rows) for t in range(length - 2 - k) if given.loss_mask_BT[b, t + 2 + k]]


@pytest.mark.parametrize(("own_head", "shortlist"), [(False, 0), (True, 0), (False, 30)])
def test_loss_and_gradients_equal_a_slow_reference(own_head: bool, shortlist: int) -> None:
    """The reference goes token by token; values agree to float32's rounding. Labels off the shortlist do not count."""
    options = {"own_head": own_head, "shortlist": shortlist}
    settings, given = trainer_settings(medusa, num_heads=3, num_blocks=2, **options), batch()
    drafter = perturbed_drafter(settings)
    listed = drafter.shared_head.shortlist
    if shortlist:
        listed.set_tokens(torch.arange(4, 64, 2))
    logits_KBTV = slow_logits(drafter, given)
    slow = torch.zeros(())
    for k in range(3):
        for b, t in supervised_positions(given, k):
            label = int(given.tokens_BT[b, t + 2 + k])
            if listed.contains(torch.tensor(label)):
                slow = slow - 0.8 ** (k + 1) * logits_KBTV[k, b, t].log_softmax(-1)[label]
    expected = torch.autograd.grad(slow, list(drafter.parameters()))
    fast, metrics = medusa.loss(drafter, given, settings, TARGET)
    torch.testing.assert_close(fast, slow)
    found = torch.autograd.grad(fast, list(drafter.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    whole = [len(supervised_positions(given, k)) for k in range(3)]
    counts = [count for _, count in metrics.values()]
    assert counts == whole if not shortlist else 0 < sum(counts) < sum(whole)


def test_four_steps_have_golden_losses() -> None:
    """Losses of four AdamW steps equal recorded values to 1e-4, for float32 on other machines."""
    given, drafter = batch(), medusa.build(SETTINGS, TARGET)
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=3e-2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss, _ = medusa.loss(drafter, given, SETTINGS, TARGET)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx([284.63199, 204.13153, 141.75316, 95.85065], rel=1e-4)


def test_new_heads_equal_the_target_and_share_no_weights() -> None:
    drafter, given = medusa.build(SETTINGS, TARGET), batch()
    expected_BTV = TARGET.logits(given.hidden[TARGET.num_layers])
    for logits_BTV in slow_logits(drafter, given):
        torch.testing.assert_close(logits_BTV, expected_BTV)
    pointers = [weight.data_ptr() for weight in drafter.parameters()]
    assert len(set(pointers)) == len(pointers) == 3 * 2 * 2


def test_evaluate_equals_metrics_by_hand() -> None:
    """Acceptance counts correct heads before the first wrong one, at positions where all heads are supervised."""
    drafter, given = perturbed_drafter(), batch()
    predicted_KBT = slow_logits(drafter, given).argmax(-1)
    # The heads' own tokens are written into the rows, so that some are correct.
    for b, t in supervised_positions(given, 0):
        given.tokens_BT[b, t + 2] = predicted_KBT[0, b, t]
    hits = [
        {
            (b, t): bool(predicted_KBT[k, b, t] == given.tokens_BT[b, t + 2 + k])
            for b, t in supervised_positions(given, k)
        }
        for k in range(3)
    ]
    whole = [spot for spot in hits[0] if spot in hits[1] and spot in hits[2]]
    runs = [next((k for k in range(3) if not hits[k][spot]), 3) for spot in whole]
    metrics = medusa.evaluate(drafter, given, SETTINGS, TARGET)
    assert [int(part) for part in metrics["acceptance"]] == [sum(runs), len(whole)]
    for k in range(3):
        assert [int(part) for part in metrics[f"head{k}_accuracy"]] == [sum(hits[k].values()), len(hits[k])]
    assert sum(runs) > 0


def test_finish_keeps_the_heads_and_computes_a_tree() -> None:
    drafter, given = perturbed_drafter(), batch()
    for b, t in supervised_positions(given, 0):
        given.tokens_BT[b, t + 2] = slow_logits(drafter, given)[0, b, t].argmax()
    for tree_nodes in (3, 0):
        settings = trainer_settings(medusa, num_heads=3, num_blocks=2, tree_nodes=tree_nodes)
        finished = medusa.finish(drafter, settings, TARGET, [given])
        assert finished.config.tree[0] == (0,)
        assert len(finished.config.tree) == 3 or not tree_nodes
        for name, weight in drafter.state_dict().items():
            assert torch.equal(finished.state_dict()[name], weight)


def test_invalid_settings_raise() -> None:
    for changes in ({"num_heads": 0}, {"num_blocks": 0}, {"decay": 0.0}, {"tree_nodes": -1}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            trainer_settings(medusa, **changes)
