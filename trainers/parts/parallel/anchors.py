"""The random tokens of a text that parallel drafts are trained from.

Shape suffixes: B rows, T positions, M anchors of a row.
"""

import torch
from torch import Tensor

from data.batches import Batch
from draftsmith.core.sampling import hashed_seed
from trainers.parts.heads import shift_left


def draw_anchors(batch: Batch, num_anchors: int, salt: str) -> tuple[Tensor, Tensor]:
    """Returns positions [B, M] before supervised tokens, ascending and none twice, and True where one was left.

    Those of a row depend on its key, its mask and `salt` alone, and not on the rows beside it.
    """
    is_anchor_BT = shift_left(batch.loss_mask_BT, 1).cpu()
    chosen = []
    for key, is_anchor_T in zip(batch.keys, is_anchor_BT, strict=True):
        found = is_anchor_T.nonzero()[:, 0]
        generator = torch.Generator().manual_seed(hashed_seed(f"{key}:{salt}"))
        chosen.append(found[torch.randperm(len(found), generator=generator)[:num_anchors]].sort().values)
    anchors_BM = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=-1)
    device = batch.tokens_BT.device
    return anchors_BM.clamp(min=0).to(device), (anchors_BM >= 0).to(device)
