"""Checks, unpads and packs the inputs and outputs of `generate`.

Shape suffixes: B rows, T positions.
"""

from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from draftsmith.core.fixed_shapes.forwards import Shapes
from draftsmith.core.target import Source, Target
from draftsmith.inputs.arguments import plain, prompt_rows, shown, token_ids
from draftsmith.loading.model_info import TargetInfo


def start_rows(
    target: Target, input_ids: Any, attention_mask: Any, num_copies: int = 1
) -> tuple[list[list[int]], list[list[int]]]:
    """Returns (prompts, rows to continue): each prompt's ids without padding, `num_copies` times.

    The rows of an encoder-decoder are its decoder start ids.
    """
    found = check_prompts(target, input_ids, attention_mask)
    prompts = [prompt for prompt in found for _ in range(num_copies)]
    if not target.is_encoder_decoder:
        return prompts, [list(prompt) for prompt in prompts]
    start = start_token(target)
    return prompts, [[start] for _ in prompts]


def check_prompts(target: Target, input_ids: Any, attention_mask: Any = None, *, first: int = 0) -> list[list[int]]:
    """Returns each prompt's ids without padding; raises ValueError for invalid ones, numbered from `first`."""
    prompts = prompt_rows(input_ids, attention_mask)
    for row, prompt in enumerate(prompts, first):
        if not prompt:
            raise ValueError(f"prompt {row} is empty; give every row at least one token")
        if min(prompt) < 0 or max(prompt) >= target.vocab_size:
            wrong = next(token for token in prompt if not 0 <= token < target.vocab_size)
            raise ValueError(f"prompt {row} holds token {wrong}; the target's vocabulary has {target.vocab_size}")
        if media := target.media_token_ids.keys() & set(prompt):
            token = min(media)
            raise ValueError(
                f"prompt {row} holds token {token}, the target's {target.media_token_ids[token]}; draftsmith decodes"
                " text alone, so leave images, video and sound out"
            )
    return prompts


def check_stream_prompts(prompts: Any) -> Iterable[Any]:
    """Returns the prompts of a stream, those of a tokenizer's batch without padding; an iterator stays as it is.

    Raises ValueError for anything else.
    """
    if isinstance(prompts, str | bytes) or not isinstance(prompts, Iterable):
        raise ValueError(
            f"prompts is {shown(prompts)}; it must be a list or iterator of prompts, each a list of token ids"
        )
    if isinstance(prompts, Mapping) or getattr(prompts, "ndim", 1) != 1:
        return prompt_rows(prompts, None)
    return prompts


def check_stream_prompt(target: Target, prompt: Any, index: int) -> list[int]:
    """Returns the ids of one prompt of a stream; raises ValueError, with its number, for anything else."""
    if isinstance(prompt, Mapping):
        found = check_prompts(target, prompt, first=index)
    elif isinstance(found := plain(prompt), list | tuple):
        found = check_prompts(target, [found], first=index)
    else:
        raise ValueError(f"prompt {index} is {shown(prompt)}; each prompt must be a list of token ids")
    if len(found) != 1:
        raise ValueError(f"prompt {index} holds {len(found)} rows; pass each as a prompt of its own")
    return found[0]


def start_token(target: Target) -> int:
    """Returns the first token of an encoder-decoder's output; raises ValueError if no config names one."""
    start = target.decoder_start_token_id
    if start is None:
        raise ValueError(f"target {target.name} has no decoder_start_token_id in its generation config; set one")
    return start


def encode_sources(target: Target, prompts: list[list[int]], shapes: Shapes | None = None) -> Source:
    """Returns the encoded sources of an encoder-decoder.

    For batch-invariant decoding, in `shapes`, each is encoded alone, and padded as the keys of a text are.
    """
    if shapes is not None:
        alone = [encode_sources(target, [prompt]) for prompt in prompts]
        numbers = range(len(prompts))
        joined = reduce(lambda one, other: one.change_rows([*numbers[: len(one.tokens_BT)], None], other), alone)
        return joined.padded(shapes.num_slots(joined.tokens_BT.shape[1]))
    device, longest = target.device, max(map(len, prompts))
    tokens_BT = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=device)
    lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=device)
    mask_BT = (torch.arange(longest, device=device) < lengths_B[:, None]).long()
    return target.encode(tokens_BT, mask_BT)


def check_lengths(target: Target | TargetInfo, rows: list[list[int]], max_new_tokens: int, *, first: int = 0) -> None:
    """Raises ValueError if the rows with their new tokens do not fit the target's context."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    for row, ids in enumerate(rows, first):
        if len(ids) + max_new_tokens > target.context_length:
            raise ValueError(
                f"prompt {row} has {len(ids)} tokens, and with max_new_tokens={max_new_tokens} it does not fit the"
                f" target's context of {target.context_length}; shorten the prompt or generate fewer tokens"
            )


def eos_ids(target: Target, eos_token_id: Any) -> frozenset[int]:
    """Returns the end-of-sequence ids: those given, or for None the model's own."""
    if eos_token_id is None:
        return frozenset(target.eos_token_ids)
    ids = token_ids("eos_token_id", eos_token_id)
    wrong = [token for token in ids if not 0 <= token < target.vocab_size]
    if wrong:
        raise ValueError(
            f"eos_token_id holds {wrong[0]}; the target's vocabulary has {target.vocab_size}, and () turns it off"
        )
    return frozenset(ids)


def until_end(new: list[int], max_tokens: int, eos: frozenset[int]) -> list[int]:
    """Returns `new` cut to `max_tokens` and after the first end-of-sequence."""
    kept = new[:max_tokens]
    end = next((index for index, token in enumerate(kept) if token in eos), None)
    return kept if end is None else kept[: end + 1]


def pack(target: Target, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Returns (sequences [B, longest], lengths [B]), right-padded with the model's padding or end-of-sequence id."""
    config = target.model.generation_config
    fill = config.pad_token_id if config.pad_token_id is not None else (target.eos_token_ids or (0,))[0]
    longest = max(map(len, rows))
    sequences = torch.tensor([row + [fill] * (longest - len(row)) for row in rows], device=target.device)
    return sequences, torch.tensor([len(row) for row in rows], device=target.device)
