"""Losses of self-drafting families with a shortlist: divergences and cross-entropy over its tokens alone.

Shape suffixes: N supervised positions, W tokens of the shortlist, V vocabulary.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from data.batches import example
from data.teacher import complete
from draftsmith.drafters import early_exit as early_exit_family
from draftsmith.drafters import kangaroo as kangaroo_family
from draftsmith.drafters import prophet as prophet_family
from tests.support.family import built, check_greedy
from tests.support.masked_batch import masked_batch
from tests.support.models import tiny_target
from tests.support.runs import trainer_settings
from trainers import early_exit, kangaroo, prophet

TARGET = tiny_target("llama")
LISTED = torch.arange(4, 64, 2)
CASES: list[tuple[ModuleType, ModuleType, dict[str, Any], Callable[[Any], Any]]] = [
    (kangaroo, kangaroo_family, {"exit_layer": 2}, lambda drafter: drafter.head.shortlist),
    (early_exit, early_exit_family, {"exit_layer": 2}, lambda drafter: drafter.shared_head.shortlist),
    (prophet, prophet_family, {"num_layers": 1}, lambda drafter: drafter.shared_head.shortlist),
]
by_family = pytest.mark.parametrize(("trainer", "family", "options", "shortlist_of"), CASES)


def logits_and_labels(drafter: Any, batch: Any, settings: Any) -> tuple[Tensor, Tensor, Tensor, float]:
    """Returns (the drafter's logits, the target's logits, labels) at the positions of the loss, and a scale."""
    last_BTD = batch.hidden[TARGET.num_layers]
    if isinstance(drafter, prophet.Drafter):
        windows = prophet.select_windows(drafter, batch, TARGET.norm(last_BTD), 99, 0.0)
        order_P = torch.arange(windows.labels_WP.shape[1])
        at_WP = (windows.pending_W[:, None] + order_P).clamp(max=last_BTD.shape[1] - 1)
        theirs_WPV = TARGET.logits(last_BTD)[windows.rows_W[:, None], at_WP]
        mask_WP = windows.mask_WP
        own_NV = drafter.head(windows.z_WPE)[mask_WP]
        return own_NV, theirs_WPV[mask_WP], windows.labels_WP[mask_WP], 1 / settings.config.num_draft
    mask_BT = batch.loss_mask_BT[:, 1:]
    hidden_BTD = batch.hidden[2]
    positions = (torch.arange(hidden_BTD.shape[1])[None],) if isinstance(drafter, kangaroo.Drafter) else ()
    own_NV = drafter.head(drafter(hidden_BTD, *positions))[:, :-1][mask_BT]
    return own_NV, TARGET.logits(last_BTD)[:, :-1][mask_BT], batch.tokens_BT[:, 1:][mask_BT], 1.0


@by_family
def test_losses_are_over_the_tokens_of_the_shortlist(
    trainer: ModuleType, family: ModuleType, options: dict[str, Any], shortlist_of: Callable[[Any], Any]
) -> None:
    for loss in ("forward_kl", "ce"):
        if loss == "ce" and trainer is kangaroo:
            continue
        windows = {"windows": 99} if trainer is prophet else {}
        settings = trainer_settings(trainer, loss=loss, shortlist=30, **options, **windows)
        needs = trainer.needs(settings, TARGET)
        batch = complete(masked_batch(), TARGET, (*needs.layers, TARGET.num_layers), needs.top_k)
        torch.manual_seed(0)
        drafters = trainer.build(settings, TARGET)
        drafter = drafters if trainer is prophet else drafters[0]
        shortlist_of(drafter).set_tokens(LISTED)
        found, _ = trainer.loss(drafters, batch, settings, TARGET)
        own_NV, theirs_NV, labels_N, scale = logits_and_labels(drafter, batch, settings)
        logq_NW, probs_NW = own_NV[:, LISTED].log_softmax(-1), theirs_NV[:, LISTED].softmax(-1)
        if loss == "forward_kl":
            slow = (probs_NW * (probs_NW.log() - logq_NW)).sum()
        else:
            is_listed_N = (labels_N[:, None] == LISTED).any(1)
            assert 0 < is_listed_N.sum() < len(labels_N)
            column_N = (labels_N[is_listed_N, None] == LISTED).long().argmax(1)
            slow = -logq_NW[is_listed_N].gather(1, column_N[:, None]).sum()
        torch.testing.assert_close(found, slow * scale)


@by_family
def test_shortlist_holds_the_tokens_most_often_supervised_and_decodes_greedily(
    trainer: ModuleType, family: ModuleType, options: dict[str, Any], shortlist_of: Callable[[Any], Any]
) -> None:
    settings = trainer_settings(trainer, shortlist=7, **options)
    drafters = trainer.build(settings, TARGET)
    rows = [example([5, 9, 9, 60, 61, 62, 63, 58, 5], [True] * 9, "a")]
    trainer.prepare(drafters, settings, TARGET, rows)
    drafter = drafters if trainer is prophet else drafters[0]
    assert shortlist_of(drafter).ids_W.tolist() == [5, 9, 58, 60, 61, 62, 63]
    check_greedy(built(family, family.Config(shortlist=7, **options), TARGET), "llama")
