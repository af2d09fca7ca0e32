"""Loads prompts from any source as token ids: `load_prompts`.

Supported rows: {"prompt" or "text": ...} as plain text; {"question", "instruction" or "turns": [...]} as a user's turn,
through the chat template if the tokenizer has one; {"messages" or "conversations": [...]} always through the template.
For an encoder-decoder also pairs of source and label, {"article": ..., "highlights": ...} and the others of
data/sources/pairs.py; columns with other names are given as `data.jsonl@body,title`.
"""

import hashlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from data.sources import Document, Row, chat, pairs, read_source
from draftsmith import Target
from draftsmith.core.model_info import NO_LIMIT, TargetInfo

PLAIN_KEYS = ("prompt", "text")
USER_KEYS = ("question", "instruction", "turns")
CHAT_KEYS = ("messages", "conversations", "conversation")
TEXT_KEYS = (*CHAT_KEYS, *PLAIN_KEYS, *USER_KEYS)
LongPrompts = Literal["auto", "refuse", "drop", "cut"]
CHARACTERS_PER_TOKEN = 32  # more than any tokenizer's average; texts are truncated by it before encoding


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt, or one training text."""

    ids: list[int]
    """Token ids, special tokens included."""
    loss_mask: list[bool] | None
    """True at supervised tokens (the assistant's); None for plain text."""
    text: str
    """Text of the ids."""
    category: str | None
    """The row's `category`, by which results can be grouped."""
    key: str
    """Hash of the ids, which identifies the prompt independently of its file."""
    source: str
    """Origin of the prompt: `file:line`."""
    label: list[int] | None = None
    """Ids of an encoder-decoder's output for `ids`, with the end token; None if the data has none."""


def load_prompts(
    source: str,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    max_prompts: int = 0,
    max_prompt_tokens: int = 0,
    prompt_tokens: int = 64,
    long_prompts: LongPrompts = "auto",
    keep_answers: bool = False,
    is_encoder_decoder: bool = False,
    seed: int = 0,
) -> list[Prompt]:
    """Returns at most `max_prompts` distinct prompts (0: all) of `source` (see data/sources), sampled with `seed`.

    Documents give prompts of `prompt_tokens` tokens that start at the beginning of the file, a function or a paragraph.
    `long_prompts` says whether a row of more than `max_prompt_tokens` (0: no limit) is refused with an error, dropped,
    or cut to its first tokens; "auto" cuts an encoder's input and refuses others. `keep_answers` returns training texts
    instead of prompts: whole conversations with a loss mask, and documents in pieces of at most `max_prompt_tokens`.
    For an encoder-decoder the prompts are sources, with their labels if `keep_answers`. Raises ValueError, naming file
    and line, for data that cannot be read.
    """
    if tokenizer is None:
        raise ValueError(f"{source}: prompts need a tokenizer, and the target has none")
    name, columns = pairs.split_columns(source)
    if columns and not is_encoder_decoder:
        raise ValueError(f"{source} names source and label columns, which only an encoder-decoder target can use")
    if long_prompts == "auto":
        long_prompts = "cut" if is_encoder_decoder else "refuse"
    found = read_source(name)
    rng = random.Random(seed)
    documents, rows = (
        [one for one in found if isinstance(one, Document)],
        [one for one in found if isinstance(one, Row)],
    )
    if is_encoder_decoder and rows:
        columns = columns or pairs.infer_columns(rows[0], TEXT_KEYS)
    if is_encoder_decoder and keep_answers and not columns:
        raise ValueError(
            f"{source} has no labels: give pairs ({pairs.known_columns()}, or other columns as in"
            f" {name}@source,label), or generate labels with recipes/pseudo_data.py"
        )
    if documents and columns:
        raise ValueError(f"{source} names columns, and {name} contains texts, which have none")
    candidates: Iterable[Prompt]
    if documents and keep_answers:
        texts = ((one.name, _with_bos(_encode(tokenizer, one.text), tokenizer), one.text) for one in documents)
        candidates = (_prompt(ids, text, name) for name, ids, text in texts if ids)
    elif documents:
        candidates = _document_prompts(documents, tokenizer, prompt_tokens, rng)
    else:
        rows = pairs.nonempty_rows(rows, columns, with_labels=keep_answers) if columns else _check_rows(rows, source)
        if max_prompts:
            rng.shuffle(rows)
        candidates = (_from_row(row, tokenizer, columns, keep_answers=keep_answers) for row in rows)
    prompts: dict[str, Prompt] = {}
    num_repeated = num_dropped = num_cut = 0
    for prompt in tqdm(candidates, desc="prompts", total=max_prompts or None, leave=False, delay=2):
        pieces = [prompt]
        if max_prompt_tokens and len(prompt.ids) > max_prompt_tokens:
            if keep_answers and prompt.loss_mask is None and prompt.label is None:
                pieces = _split(prompt, tokenizer, max_prompt_tokens)
            elif long_prompts == "refuse":
                raise ValueError(
                    f"{prompt.source} has {len(prompt.ids):,} tokens and at most {max_prompt_tokens:,} fit in the "
                    "target's context beside the new tokens; set --long-prompts to drop or cut, or generate fewer"
                )
            else:
                pieces = [_truncate(prompt, max_prompt_tokens, tokenizer.eos_token_id if is_encoder_decoder else None)]
                if long_prompts == "drop" or (prompt.loss_mask is not None and not any(pieces[0].loss_mask or ())):
                    num_dropped += 1
                    continue
                num_cut += prompt.key not in prompts
        num_repeated += prompt.key in prompts
        for piece in pieces:
            prompts.setdefault(piece.key, piece)
        if max_prompts and len(prompts) >= max_prompts:
            break
    if num_repeated or num_dropped:
        print(f"{source}: {num_repeated} repeated and {num_dropped} too long prompts were dropped")
    if is_encoder_decoder and num_cut:
        print(f"{source}: {num_cut} of {len(prompts)} sources were cut to {max_prompt_tokens:,} tokens")
    if not prompts:
        raise ValueError(f"{source}: no prompts" + (f"; all {num_dropped} were too long" if num_dropped else ""))
    if keep_answers:
        masks = [prompt.loss_mask or [True] * len(prompt.label or prompt.ids) for prompt in prompts.values()]
        print_coverage(source, sum(map(sum, masks)), sum(map(len, masks)))
    return list(prompts.values())


def prompt_room(target: Target | TargetInfo, max_new_tokens: int) -> int:
    """Returns the largest number of prompt tokens for a target.

    A causal model's context also holds `max_new_tokens`; an encoder reads up to the limit of its positions and its
    tokenizer, whatever the decoder writes.
    """
    if not target.is_encoder_decoder:
        return target.context_length - max_new_tokens
    return min(target.context_length, getattr(target.tokenizer, "model_max_length", None) or NO_LIMIT)


def print_coverage(source: str, num_supervised: int, num_tokens: int) -> None:
    """Prints the share of supervised tokens; raises ValueError if there are none."""
    if num_supervised == 0:
        raise ValueError(f"{source}: the loss mask covers none of the {num_tokens:,} tokens; nothing can be trained on")
    share = num_supervised / num_tokens
    print(f"{source}: the loss mask covers {num_supervised:,} of {num_tokens:,} tokens ({share:.1%})")


def _text_field(row: Row) -> tuple[str, Any]:
    """Returns (key, value) of the row's text; raises ValueError if no key is supported or the value is not text."""
    key = next((key for key in TEXT_KEYS if row.fields.get(key) is not None), None)
    if key is None:
        raise ValueError(f"{row.where}: found the keys {', '.join(row.fields)}; expected one of {', '.join(TEXT_KEYS)}")
    value = row.fields[key]
    if key == "turns":
        if not isinstance(value, list) or not value or not isinstance(value[0], str):
            raise ValueError(f"{row.where}: `turns` should be a list of texts, found {value!r:.40}")
        value = value[0]
    if key == "prompt" and isinstance(value, list):
        key = "messages"
    if key not in CHAT_KEYS:
        if not isinstance(value, str):
            raise ValueError(f"{row.where}: `{key}` should be text, found {value!r:.40}")
        if not value.strip():
            raise ValueError(f"{row.where}: `{key}` is empty")
    return key, value


def _check_rows(rows: list[Row], source: str) -> list[Row]:
    """Returns the rows, checks that all can be read, and prints how many have turns that are not used."""
    for row in rows:
        _text_field(row)
    num_multi_turn = sum(len(row.fields.get("turns") or ()) > 1 for row in rows)
    if num_multi_turn:
        print(f"{source}: {num_multi_turn} of {len(rows)} rows have several turns; only the first of each is used")
    return rows


def _from_row(
    row: Row, tokenizer: PreTrainedTokenizerBase, columns: pairs.Columns | None, *, keep_answers: bool
) -> Prompt:
    category = row.fields.get("category")
    category = None if category is None else str(category)
    if columns:
        text = columns.prefix + row.fields[columns.source]
        label = pairs.label_ids(tokenizer, row.fields[columns.label]) if keep_answers else None
        return replace(_prompt(_encode(tokenizer, text), text, row.where, category=category), label=label)
    key, value = _text_field(row)
    mask = None
    if key in CHAT_KEYS or (key in USER_KEYS and tokenizer.chat_template):
        messages = chat.normalise(value, row.where) if key in CHAT_KEYS else [{"role": "user", "content": value}]
        if keep_answers:
            ids, mask = chat.answer_ids(tokenizer, messages, row.where)
            text = tokenizer.decode(ids)
        else:
            ids, text = chat.prompt_ids(tokenizer, messages, row.where)
    else:
        ids, text = _encode(tokenizer, value), value
    return _prompt(ids, text, row.where, mask=mask, category=category)


def _document_prompts(
    documents: list[Document],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    rng: random.Random,
) -> Iterator[Prompt]:
    """Yields one prompt of every document in turn, then a second of each, at most `length` tokens long.

    A start with fewer than `length` tokens after it is used only if it is the document's beginning.
    """
    documents = list(documents)
    rng.shuffle(documents)
    unused: dict[str, list[int]] = {}
    while documents:
        remaining = []
        for document in documents:
            if document.name not in unused:
                starts = document.starts()
                unused[document.name] = rng.sample(starts, len(starts))
            if not unused[document.name]:
                continue
            start = unused[document.name].pop()
            remaining.append(document)
            ids = _encode(tokenizer, document.text[start : start + length * CHARACTERS_PER_TOKEN])
            if start == 0:
                ids = _with_bos(ids, tokenizer)
            if len(ids) >= length or (start == 0 and ids):
                line = document.text.count("\n", 0, start) + 1
                text = tokenizer.decode(ids[:length], skip_special_tokens=True)
                yield _prompt(ids[:length], text, f"{document.name}:{line}")
        documents = remaining


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, verbose=False)["input_ids"]


def _split(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, length: int) -> list[Prompt]:
    """Returns a text in pieces of `length` tokens, whose keys show that they belong together."""
    pieces = []
    for number, begin in enumerate(range(0, len(prompt.ids), length)):
        ids = prompt.ids[begin : begin + length]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        key = f"{prompt.key}.{number}" if number else prompt.key
        pieces.append(replace(prompt, ids=ids, text=text, key=key, source=f"{prompt.source}, token {begin}"))
    return pieces


def _with_bos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the ids of a document's beginning, with the tokenizer's bos token, if it has one, in front."""
    bos = tokenizer.bos_token_id
    return ids if bos is None or not ids or ids[0] == bos else [bos, *ids]


def _truncate(prompt: Prompt, length: int, end: int | None) -> Prompt:
    ids, mask = prompt.ids[:length], prompt.loss_mask and prompt.loss_mask[:length]
    if end is not None and prompt.ids[-1] == end:
        # An end token added by the tokenizer stays, because the encoder was trained with it.
        ids[-1] = end
    truncated = _prompt(ids, prompt.text, prompt.source, mask=mask, category=prompt.category)
    return replace(truncated, label=prompt.label)


def _prompt(
    ids: list[int], text: str, source: str, *, mask: list[bool] | None = None, category: str | None = None
) -> Prompt:
    if not ids:
        raise ValueError(f"{source}: the prompt is empty once tokenized")
    key = hashlib.sha256(np.asarray(ids, dtype="<i8").tobytes()).hexdigest()[:16]
    return Prompt(ids=list(ids), loss_mask=mask, text=text, category=category, key=key, source=source)
