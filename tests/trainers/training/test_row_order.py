"""Rows grouped by length: batches have less padding, and runs are accumulated and continued as with other orders."""

from pathlib import Path
from typing import Any

import pytest
import torch

from data.batches import Batch, collate
from tests.support.runs import SMALL, logged, make_data, make_target, run_settings, trainer_settings, weights
from trainers import medusa
from trainers.training import checkpoints, gradient
from trainers.training.loop import train

HEADS = trainer_settings(medusa, num_heads=2, tree_nodes=4)
GROUPED: dict[str, Any] = {**SMALL, "max_steps": 20, "group_by_length": True}
"""More than two epochs of the 38 rows."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    make_data(make_target(root / "target"), root / "data")
    return root


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> Path:
    return train(medusa, HEADS, run_settings(folder, "uninterrupted", **GROUPED))


def test_grouped_rows_need_less_padding(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def padding_share(name: str, **changes: Any) -> float:
        batches: list[Batch] = []

        def kept(rows: Any) -> Batch:
            batches.append(collate(rows))
            return batches[-1]

        monkeypatch.setattr(gradient, "collate", kept)
        train(medusa, HEADS, run_settings(folder, name, **GROUPED | changes))
        assert len({key for batch in batches[:9] for key in batch.keys}) == 36, "each row comes once in an epoch"
        return 1 - sum(int(one.lengths_B.sum()) for one in batches) / sum(one.tokens_BT.numel() for one in batches)

    assert padding_share("grouped") < 0.5 * padding_share("random", group_by_length=False)


def test_accumulated_micro_batches_equal_the_joined_batch(folder: Path, uninterrupted: Path) -> None:
    accumulated = train(
        medusa, HEADS, run_settings(folder, "accumulated", **GROUPED | {"batch_size": 2, "gradient_accumulation": 2})
    )
    # The last step of an epoch may have fewer micro-batches: compared is the first epoch.
    for one, other in zip(logged(uninterrupted, "loss")[:9], logged(accumulated, "loss")[:9], strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_interrupted_run_continues_in_its_epoch(
    folder: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark_complete = checkpoints.mark_complete

    def stop_in_the_second_epoch(checkpoint: Path, facts: dict[str, Any]) -> None:
        mark_complete(checkpoint, facts)
        if checkpoint.name == "checkpoint-12":
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "mark_complete", stop_in_the_second_epoch)
    run = run_settings(folder, "interrupted", **GROUPED)
    with pytest.raises(KeyboardInterrupt):
        train(medusa, HEADS, run)
    monkeypatch.undo()
    train(medusa, HEADS, run)
    assert logged(folder / "interrupted", "loss") == logged(uninterrupted, "loss")
    for name, weight in weights(uninterrupted).items():
        assert torch.equal(weights(folder / "interrupted")[name], weight)
