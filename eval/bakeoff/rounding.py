"""How far rounding alone moves a model's logits, and by how far two greedy texts were apart where they part.

A forward of one token and one of several add the same numbers in another order, so in half precision their logits
differ in the last digits, and two tokens that are nearly equally likely can change places.

Shape suffixes: B rows, N tokens of a forward, K likeliest tokens, V vocabulary.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from draftsmith import Target
from draftsmith.core.tree import Draft, chain
from draftsmith.inputs.batching import eos_ids
from draftsmith.inputs.generation_config import make_rules, read_config, with_sampling
from draftsmith.inputs.processors import NodeProcessors
from eval.bakeoff.measure import Rows, pad

NUM_LIKELIEST = 16
"""Tokens of each position whose logits are compared: only these come near the first."""
MAX_PROMPTS = 8
"""Prompts on which rounding is measured, or one batch if that is larger."""


class GapReader:
    """Returns by how much plain decoding preferred its own token where another text first differs from its text.

    It decodes the plain text again, untimed, with forwards of one token; gaps once read are kept.
    """

    def __init__(self, targets: dict[str, Target], config: Any = None) -> None:
        self._targets, self._config = targets, config
        self._known: dict[tuple[Any, ...], float] = {}

    def __call__(self, reference: str, prompts: Rows, plain: Rows, others: Rows) -> list[float]:
        """Returns the gap of logits for each row that differs, infinite where one text ends before the other.

        `reference` names the method that wrote `plain`, and so its target.
        """
        first = {
            row: position
            for row, (ours, theirs) in enumerate(zip(plain, others, strict=True))
            if (position := first_difference(ours, theirs)) is not None
        }
        wanted = {
            row: (row, position, others[row][position])
            for row, position in first.items()
            if position < min(len(plain[row]), len(others[row]))
        }
        keys = {
            row: (reference, len(prompts), tuple(prompts[row]), tuple(plain[row][: place[1] + 1]), place[2])
            for row, place in wanted.items()
        }
        unread = {row: place for row, place in wanted.items() if keys[row] not in self._known}
        if unread:
            last = max(position for _, position, _ in unread.values())

            def read(begin: int, logits_BNV: Tensor) -> None:
                for row, position, token in unread.values():
                    if position == begin:
                        logits_V = logits_BNV[row, 0].float()
                        self._known[keys[row]] = float(logits_V[plain[row][position]] - logits_V[token])

            _replay(self._targets[reference], prompts, [text[: last + 1] for text in plain], 1, read, self._config)
        return [abs(self._known[keys[row]]) if row in keys else math.inf for row in first]


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """Returns the first position at which two texts differ, which may be the end of the shorter; None if equal."""
    if list(ours) == list(theirs):
        return None
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((position for position, (own, other) in pairs if own != other), min(len(ours), len(theirs)))


def measured_rounding(
    target: Target,
    prompts: Rows,
    texts: Rows,
    widths: Iterable[int],
    config: Any = None,
    on_width: Callable[[], object] = lambda: None,
) -> float:
    """Returns the largest change of a lead between forwards of one token and of several, at the same positions.

    A lead is the logit of a position's likeliest token minus that of another of its `NUM_LIKELIEST`. `texts` are plain
    decoding's; they are read again in forwards of each of `widths` tokens, each before a call of `on_width`, and at
    once by the model's own forward. The logits are those after the logits processors of the generation config `config`.
    """
    found: list[tuple[Tensor, Tensor]] = []

    def keep(_: int, logits_BNV: Tensor) -> None:
        top_BK = logits_BNV[:, 0].float().topk(min(NUM_LIKELIEST, logits_BNV.shape[-1]), dim=-1)
        found.append((top_BK.indices, top_BK.values))

    _replay(target, prompts, texts, 1, keep, config)
    ids_BTK, plain_BTK = (torch.stack(parts, dim=1) for parts in zip(*found, strict=True))
    is_text_BT = torch.zeros(ids_BTK.shape[:2], dtype=torch.bool, device=ids_BTK.device)
    for row, text in enumerate(texts):
        is_text_BT[row, : len(text)] = True
    changes = [0.0]

    def compare(begin: int, logits_BNV: Tensor) -> None:
        end = min(begin + logits_BNV.shape[1], ids_BTK.shape[1])
        wide_BNK = logits_BNV[:, : end - begin].float().gather(-1, ids_BTK[:, begin:end])
        change_BNK = wide_BNK - plain_BTK[:, begin:end]
        lead_BNK = (change_BNK[..., :1] - change_BNK).abs().nan_to_num(0.0)  # of tokens that processors exclude
        changes.append(float(lead_BNK[is_text_BT[:, begin:end]].max()))

    for width in widths:
        _replay(target, prompts, texts, width, compare, config)
        on_width()
    if not target.is_encoder_decoder:
        for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            ids_1T = torch.tensor([prompt + text[:-1]], device=target.device)
            with torch.inference_mode():
                logits_NV = target.model(input_ids=ids_1T, use_cache=False).logits[0, len(prompt) - 1 :].float()
                if (processors := _processors(target, [prompt], config)) is not None:
                    draft = Draft(tokens_BN=ids_1T[:, len(prompt) - 1 :], tree=chain(len(text), target.device))
                    logits_NV = processors(logits_NV[None], draft, [prompt], [True])[0]
            change_NK = logits_NV.gather(-1, ids_BTK[row, : len(text)]) - plain_BTK[row, : len(text)]
            changes.append(float((change_NK[:, :1] - change_NK).abs().nan_to_num(0.0).max()))
    return max(changes)


@torch.inference_mode()
def _replay(
    target: Target,
    prompts: Rows,
    texts: Rows,
    width: int,
    on_logits: Callable[[int, Tensor], None],
    config: Any = None,
) -> None:
    """Reads the texts after their prompts in forwards of `width` tokens, as the decoding loop does.

    Calls `on_logits(position, logits [B, N, V])` for each forward; logits n are those of the token `position` + n of
    each text. Rows that are shorter continue with zeros, which no other row reads.
    """
    source, starts = None, prompts
    if target.is_encoder_decoder:
        tokens_BT, mask_BT = pad(prompts, target.device, side="right")
        source = target.encode(tokens_BT, mask_BT)
        assert target.decoder_start_token_id is not None
        starts = [[target.decoder_start_token_id] for _ in prompts]
    cache = target.new_cache(len(prompts), source=source)
    if max(map(len, starts)) > 1:
        target.prefill([start[:-1] for start in starts], cache)
    longest, processors = max(map(len, texts)), _processors(target, prompts, config)
    rows = [[start[-1], *text, *[0] * (longest - len(text))] for start, text in zip(starts, texts, strict=True)]
    for begin in range(0, longest, width):
        read_BN = torch.tensor([row[begin : min(begin + width, longest)] for row in rows], device=target.device)
        out = target.forward(read_BN, chain(read_BN.shape[1], target.device), cache)
        cache.commit([list(range(read_BN.shape[1])) for _ in rows])
        logits_BNV = target.logits(out.hidden_BND)
        if processors is not None:
            draft = Draft(tokens_BN=read_BN, tree=chain(read_BN.shape[1], target.device))
            before = [start[:-1] + row[: begin + 1] for start, row in zip(starts, rows, strict=True)]
            logits_BNV = processors(logits_BNV, draft, before, [True] * len(rows))
        on_logits(begin, logits_BNV)


def _processors(target: Target, prompts: Rows, given: Any) -> NodeProcessors | None:
    """Returns the logits processors of greedy decoding with a generation config, None if it has none."""
    if (config := read_config(target, given)) is None:
        return None
    starts = [[target.decoder_start_token_id or 0] for _ in prompts] if target.is_encoder_decoder else prompts
    room = target.context_length - max(map(len, starts))
    sampling, eos = with_sampling(config, 0.0, None, None), eos_ids(target, config.eos_token_id)
    return make_rules(target, config, sampling, prompts, starts, max_new_tokens=room, eos=eos).processors
