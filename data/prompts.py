"""Prompts from any source, as token ids: `load_prompts`.

Rows understood: {"prompt" or "text": ...} as it stands; {"question", "instruction" or "turns": [...]} as a user's
turn, through the chat template where the tokenizer has one; {"messages" or "conversations": [...]} through it always.
For an encoder-decoder also what it reads beside what it is to write, {"article": ..., "highlights": ...} and the other
pairs of data/sources/pairs.py; pairs of other names as `data.jsonl@body,title`.
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

PLAIN_KEYS = ("prompt", "text")
USER_KEYS = ("question", "instruction", "turns")
CHAT_KEYS = ("messages", "conversations", "conversation")
UNDERSTOOD = (*CHAT_KEYS, *PLAIN_KEYS, *USER_KEYS)
LongPrompts = Literal["auto", "refuse", "drop", "cut"]
CHARACTERS_PER_TOKEN = 32  # more than any tokenizer packs into a token on average; texts are cut so before encoding


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt, or one text to learn from."""

    ids: list[int]
    """Token ids, special tokens included."""
    loss_mask: list[bool] | None
    """True at tokens to be learnt (the assistant's); None for plain text."""
    text: str
    """What the ids were made from."""
    category: str | None
    """The row's own `category`, kept for tables."""
    key: str
    """Hash of the ids: names the prompt whatever file it came from."""
    source: str
    """Where it came from: `file:line`."""
    label: list[int] | None = None
    """What an encoder-decoder is to write having read `ids`, its end included; None where nothing says."""


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
    """Returns at most `max_prompts` prompts (0: all) of `source` (see data/sources.py), drawn by `seed`, each once.

    Documents give prompts of `prompt_tokens` tokens that begin where the file, a function or a paragraph begins. A
    row of more than `max_prompt_tokens` (0: no limit) is refused, dropped, or cut to its first tokens; "auto" cuts what
    an encoder reads, and refuses the rest. With `keep_answers`, conversations stay whole, with a loss mask, and
    documents come whole too, in pieces of at most `max_prompt_tokens`: text to learn from, not prompts. For an
    encoder-decoder the prompts are sources, with their labels if `keep_answers`. Raises ValueError on anything that
    cannot be read, with the place named.
    """
    if tokenizer is None:
        raise ValueError(f"{source}: prompts need a tokenizer and the target has none")
    name, columns = pairs.split_columns(source)
    if columns and not is_encoder_decoder:
        raise ValueError(f"{source} names columns to read and to write, which only an encoder-decoder target can do")
    if long_prompts == "auto":
        long_prompts = "cut" if is_encoder_decoder else "refuse"
    found = read_source(name)
    shuffled = random.Random(seed)
    documents, rows = (
        [one for one in found if isinstance(one, Document)],
        [one for one in found if isinstance(one, Row)],
    )
    if is_encoder_decoder and rows:
        columns = columns or pairs.columns_of(rows[0], UNDERSTOOD)
    if is_encoder_decoder and keep_answers and not columns:
        raise ValueError(
            f"{source} holds no labels to learn from: give pairs ({pairs.in_words()}, or others named as in"
            f" {name}@source,label), or have the target write with recipes/pseudo_data.py"
        )
    if documents and columns:
        raise ValueError(f"{source} names columns, and {name} holds texts, which have none")
    candidates: Iterable[Prompt]
    if documents and keep_answers:
        texts = ((one.name, _begun(_encode(tokenizer, one.text), tokenizer), one.text) for one in documents)
        candidates = (_prompt(ids, text, name) for name, ids, text in texts if ids)
    elif documents:
        candidates = _cut(documents, tokenizer, prompt_tokens, shuffled)
    else:
        rows = pairs.with_text(rows, columns, with_labels=keep_answers) if columns else _understood(rows, source)
        if max_prompts:
            shuffled.shuffle(rows)
        candidates = (_from_row(row, tokenizer, columns, keep_answers=keep_answers) for row in rows)
    prompts: dict[str, Prompt] = {}
    num_repeated = num_dropped = num_cut = 0
    for prompt in tqdm(candidates, desc="prompts", total=max_prompts or None, leave=False, delay=2):
        pieces = [prompt]
        if max_prompt_tokens and len(prompt.ids) > max_prompt_tokens:
            if keep_answers and prompt.loss_mask is None and prompt.label is None:
                pieces = _pieces(prompt, tokenizer, max_prompt_tokens)
            elif long_prompts == "refuse":
                raise ValueError(
                    f"{prompt.source} has {len(prompt.ids):,} tokens and at most {max_prompt_tokens:,} fit in the "
                    "target's context beside what is generated; set --long-prompts to drop or cut, or write less"
                )
            else:
                pieces = [_shortened(prompt, max_prompt_tokens, tokenizer.eos_token_id if is_encoder_decoder else None)]
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
        print(f"{source}: {num_repeated} repeated and {num_dropped} too long prompts left out")
    if is_encoder_decoder and num_cut:
        print(f"{source}: {num_cut} of {len(prompts)} sources were cut to {max_prompt_tokens:,} tokens")
    if not prompts:
        raise ValueError(f"{source}: no prompts" + (f"; all {num_dropped} were too long" if num_dropped else ""))
    if keep_answers:
        masks = [prompt.loss_mask or [True] * len(prompt.label or prompt.ids) for prompt in prompts.values()]
        print_coverage(source, sum(map(sum, masks)), sum(map(len, masks)))
    return list(prompts.values())


def print_coverage(source: str, num_learnt: int, num_tokens: int) -> None:
    """Prints the share of tokens to be learnt; raises ValueError when there are none."""
    if num_learnt == 0:
        raise ValueError(f"{source}: the loss mask covers none of the {num_tokens:,} tokens; nothing could be learnt")
    print(f"{source}: the loss mask covers {num_learnt:,} of {num_tokens:,} tokens ({num_learnt / num_tokens:.1%})")


def _form(row: Row) -> tuple[str, Any]:
    """Returns (key, value) of the row's text; raises ValueError when no key is understood or the value is empty."""
    key = next((key for key in UNDERSTOOD if row.fields.get(key) is not None), None)
    if key is None:
        raise ValueError(f"{row.where}: found the keys {', '.join(row.fields)}; understood are {', '.join(UNDERSTOOD)}")
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


def _understood(rows: list[Row], source: str) -> list[Row]:
    """Returns the rows, all of which can be read, and says what of them is left out."""
    for row in rows:
        _form(row)
    num_longer = sum(len(row.fields.get("turns") or ()) > 1 for row in rows)
    if num_longer:
        print(f"{source}: {num_longer} of {len(rows)} rows have further turns; only the first of each is used")
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
    key, value = _form(row)
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


def _cut(
    documents: list[Document],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    shuffled: random.Random,
) -> Iterator[Prompt]:
    """Yields one prompt of every document in turn, then a second of each, at most `length` tokens long.

    A place where fewer than `length` tokens remain is used only if it is the document's beginning.
    """
    waiting = list(documents)
    shuffled.shuffle(waiting)
    left: dict[str, list[int]] = {}
    while waiting:
        still = []
        for document in waiting:
            if document.name not in left:
                starts = document.starts()
                left[document.name] = shuffled.sample(starts, len(starts))
            if not left[document.name]:
                continue
            start = left[document.name].pop()
            still.append(document)
            ids = _encode(tokenizer, document.text[start : start + length * CHARACTERS_PER_TOKEN])
            if start == 0:
                ids = _begun(ids, tokenizer)
            if len(ids) >= length or (start == 0 and ids):
                line = document.text.count("\n", 0, start) + 1
                text = tokenizer.decode(ids[:length], skip_special_tokens=True)
                yield _prompt(ids[:length], text, f"{document.name}:{line}")
        waiting = still


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, verbose=False)["input_ids"]


def _pieces(whole: Prompt, tokenizer: PreTrainedTokenizerBase, length: int) -> list[Prompt]:
    """Returns a text in pieces of `length` tokens, whose keys say that they belong together."""
    pieces = []
    for number, begin in enumerate(range(0, len(whole.ids), length)):
        ids = whole.ids[begin : begin + length]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        key = f"{whole.key}.{number}" if number else whole.key
        pieces.append(replace(whole, ids=ids, text=text, key=key, source=f"{whole.source}, token {begin}"))
    return pieces


def _begun(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns a document's first ids with the token that texts begin with, if there is one."""
    begin = tokenizer.bos_token_id
    return ids if begin is None or not ids or ids[0] == begin else [begin, *ids]


def _shortened(prompt: Prompt, length: int, end: int | None) -> Prompt:
    ids, mask = prompt.ids[:length], prompt.loss_mask and prompt.loss_mask[:length]
    if end is not None and prompt.ids[-1] == end:
        # Where the tokenizer itself ends a source, that stays: the encoder was trained to meet it.
        ids[-1] = end
    cut = _prompt(ids, prompt.text, prompt.source, mask=mask, category=prompt.category)
    return replace(cut, label=prompt.label)


def _prompt(
    ids: list[int], text: str, source: str, *, mask: list[bool] | None = None, category: str | None = None
) -> Prompt:
    if not ids:
        raise ValueError(f"{source}: the prompt is empty once tokenized")
    key = hashlib.sha256(np.asarray(ids, dtype="<i8").tobytes()).hexdigest()[:16]
    return Prompt(ids=list(ids), loss_mask=mask, text=text, category=category, key=key, source=source)
