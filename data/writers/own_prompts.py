"""Prompts that a target writes itself (Magpie, 2406.08464): `UserTurn`, `sampled_prompts`, `usable_texts`.

An instruction-tuned model is given its chat template up to the beginning of the user's message, and samples what stands
there.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from data.prompts import Prompt
from data.sources.chat import ChatFormat

MIN_WORDS = 3
WORD = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]|\w+")
"""A word; of scripts without spaces (Thai, Lao, Chinese, Japanese) each letter counts as one."""


@dataclass(frozen=True, kw_only=True)
class UserTurn:
    """Where a user's message begins and ends in a chat template."""

    begin_ids: list[int]
    """Ids before the message."""
    end_ids: frozenset[int]
    """Tokens that end it: the generation config's, and the one that the template writes after it."""
    end_text: str
    """Text after the message, if that is plain text; else empty."""
    generation_config: str
    """JSON of the end tokens and text, where they are not the target's generation config's own; else empty."""

    @classmethod
    def of(cls, chat: ChatFormat, system: str, where: str) -> "UserTurn":
        """Returns the user's turn of a chat template; raises RowError if it cannot be found."""
        begin_ids, after = chat.user_turn(system, where)
        ends, end_text = chat.ends, ""
        config: dict[str, list[int] | list[str]] = {}
        if after := after.strip():
            first = chat.tokenizer(after, add_special_tokens=False)["input_ids"][0]
            if first in special_ids(chat.tokenizer):
                ends |= {first}
            elif first not in ends:
                end_text = after.splitlines()[0].strip()
                config["stop_strings"] = [end_text]
        if ends != chat.end_ids:
            config["eos_token_id"] = sorted(ends)
        return cls(
            begin_ids=begin_ids,
            end_ids=ends,
            end_text=end_text,
            generation_config=json.dumps(config) if config else "",
        )


def sampled_prompts(turn: UserTurn, number: int, text: str) -> list[Prompt]:
    """Returns `number` prompts of the same ids, whose keys differ, so that each has a seed of its own."""
    start = hashlib.sha256(json.dumps(turn.begin_ids).encode()).hexdigest()[:16]
    return [
        Prompt(
            ids=turn.begin_ids,
            loss_mask=None,
            text=text,
            category=None,
            key=f"{start}-{index:08d}",
            source=f"text {index + 1}",
        )
        for index in range(number)
    ]


def usable_texts(
    rows: Iterable[Mapping[str, Any]], turn: UserTurn, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> tuple[list[str], Counter[str]]:
    """Returns the texts of pseudo-data's `rows` that are prompts, and how many are not, by the reason.

    A text ends before its first special token. Left out are those that did not end, those of fewer than `MIN_WORDS`
    words, and all but the first of texts that differ only in case and white space.
    """
    found: dict[str, str] = {}
    left_out: Counter[str] = Counter()
    ends = turn.end_ids | special_ids(tokenizer)
    for row in rows:
        ids = row["ids"][row["num_prompt_tokens"] :]
        length = next((index for index, token in enumerate(ids) if token in ends), len(ids))
        text = tokenizer.decode(ids[:length], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        is_ended = length < len(ids) or len(ids) < max_new_tokens
        if turn.end_text and turn.end_text in text:
            text, is_ended = text.partition(turn.end_text)[0], True
        text = text.strip()
        key = " ".join(text.casefold().split())
        if not is_ended:
            left_out[f"not ended within {max_new_tokens} tokens"] += 1
        elif len(WORD.findall(text)) < MIN_WORDS:
            left_out[f"shorter than {MIN_WORDS} words"] += 1
        elif key in found:
            left_out["repeated"] += 1
        else:
            found[key] = text
    return list(found.values()), left_out


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Returns the tokenizer's special tokens, without that of unknown text."""
    added = {token for token, content in tokenizer.added_tokens_decoder.items() if content.special}
    return frozenset({*added, *tokenizer.all_special_ids} - {tokenizer.unk_token_id})
