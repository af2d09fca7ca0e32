"""Held-out evaluation, in greedy decoding, of drafters that have no distribution to compare with the target's.

Shape suffixes: B rows, T positions.
"""

from typing import Any

import torch

import draftsmith
from data.batches import Batch
from draftsmith import Target
from trainers import Metrics, Needs


def needs(settings: Any, target: Target) -> Needs:
    """Returns no target outputs: only the text is read."""
    return Needs()


def evaluate(drafter: Any, batch: Batch, settings: Any, target: Target, *, new_tokens: int = 48) -> Metrics:
    """Returns the accepted tokens per round when each row's first half is continued greedily.

    The target's own tokens are not counted. An encoder-decoder reads each row's source and decodes from the start. At
    most `new_tokens` are generated for a row, fewer where the target's context ends.
    """
    if batch.source_BS is None or batch.source_lengths_B is None:
        prompts_BT, lengths_B = batch.tokens_BT, (batch.lengths_B // 2).clamp(min=1)
    else:
        prompts_BT, lengths_B = batch.source_BS, batch.source_lengths_B
    longest = int(lengths_B.max())
    room = target.context_length - (1 if target.is_encoder_decoder else longest)
    stats = draftsmith.generate(
        target,
        prompts_BT[:, :longest].to(target.device),
        drafter,
        attention_mask=(torch.arange(longest, device=lengths_B.device) < lengths_B[:, None]).to(target.device),
        max_new_tokens=min(new_tokens, room),
    ).stats
    return {"acceptance": (torch.tensor(stats.new_tokens - stats.steps), stats.steps)}
