"""Ranks of labels in the logits of heads."""

import torch
from torch import Tensor

from data.batches import collate, example
from trainers.parts.heads import HeadOutputs, accuracy_metrics, head_outputs, label_ranks

BATCH = collate([example([1, 2, 0, 2], [True] * 4, "row")])


def ranks_of(logits_NV: Tensor) -> list[int]:
    """Returns the ranks of labels 2, 0 and 2 in these logits, for a single head."""
    mask_BT = torch.tensor([[True, True, True, False]])
    outputs = [HeadOutputs(z_ND=logits_NV, labels_N=torch.tensor([2, 0, 2]), mask_BT=mask_BT)]
    ranks_KBT = label_ranks(outputs, lambda k, z_1ND: z_1ND, BATCH)
    assert ranks_KBT[0, 0, 3] == -1
    return ranks_KBT[0, 0, :3].tolist()


def test_label_ranks_hand_worked() -> None:
    assert ranks_of(torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0], [0.0, 3.0, 2.0]])) == [0, 2, 1]


def test_label_ranks_of_nan_are_never_right() -> None:
    nan = torch.nan
    assert ranks_of(torch.full((3, 3), nan)) == [3, 3, 3]
    assert ranks_of(torch.tensor([[0.0, nan, 2.0], [nan, 1.0, 2.0], [0.0, 1.0, 2.0]])) == [1, 3, 0]
    metrics = accuracy_metrics(torch.full((2, 1, 4), 3))
    assert metrics["acceptance"][0] == 0


def test_head_outputs_run_at_positions_with_supervised_labels_only() -> None:
    """Of a prompt of 30 tokens only the last positions are read, from which heads predict the answer."""
    batch = collate([example(list(range(40)), [position >= 30 for position in range(40)], "row")])
    read: list[list[float]] = []

    def features(normed_1TD: Tensor) -> list[Tensor]:
        read.append(normed_1TD[0, :, 0].tolist())
        return [normed_1TD, normed_1TD + 100]

    outputs = list(head_outputs(features, torch.arange(40.0)[None, :, None], batch, 2))
    assert read == [list(range(27, 38))]
    assert [one.labels_N.tolist() for one in outputs] == [list(range(30, 40))] * 2
    assert [one.z_ND[:, 0].tolist() for one in outputs] == [list(range(28, 38)), list(range(127, 137))]
