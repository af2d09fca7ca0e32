"""Loads prompts from any source as token ids: `load_prompts`.

Rows are plain text, requests or conversations (data/sources/forms.py); the latter two go through the tokenizer's chat
template, requests only if it has one. For an encoder-decoder also pairs of source and label, {"article": ...,
"highlights": ...} and the others of data/sources/pairs.py; columns with other names are given as
`data.jsonl@body,title`.
"""

import hashlib
import inspect
import itertools
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Literal

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from data.sources import PYTHON_QUESTIONS, Document, LeftOut, Row, RowError, forms, pairs, read_source
from data.sources.chat import REASONING_KEYS, ChatFormat
from data.sources.conversation import Conversation, split_turns
from draftsmith import Target
from draftsmith.artifacts import json_text
from draftsmith.inputs.texts import encode_text
from draftsmith.loading.model_info import NO_LIMIT, TargetInfo

LongPrompts = Literal["auto", "refuse", "drop", "cut"]
CHARACTERS_PER_TOKEN = 32  # more than any tokenizer's average; texts are truncated by it before encoding


OWN_TEMPLATE_KWARGS = {
    *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters,
    *("messages", "strftime_now", "raise_exception"),
} - {"documents", "kwargs"}
"""Names that a template cannot be given: those of transformers' function that renders it, and of what that passes."""


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """Settings for reading rows of text."""

    max_left_out: float = 0.5
    """Largest share of the rows that may be left out because they cannot be read or have nothing to learn."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of the target's chat template, as in {enable_thinking: false}."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_left_out <= 1:
            raise ValueError(f"max_left_out is {self.max_left_out}; it must be 0 to 1")
        for name in self.chat_template_kwargs:
            if name in OWN_TEMPLATE_KWARGS:
                raise ValueError(
                    f"chat_template_kwargs holds {name!r}, which is no argument of the template's own, or is set for"
                    " each row; leave it out"
                )
        kwargs = self.chat_template_kwargs
        try:
            is_json = json_text.parse(json_text.text_of(kwargs)) == kwargs
        except ValueError:
            is_json = False
        if not is_json:
            raise ValueError(f"chat_template_kwargs is {kwargs!r:.80}; names must be text, and values what JSON has")


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
    conversation: Conversation | None = None
    """The conversation that the prompt begins, where its later turns are answered too (data/turns.py)."""
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
    each_turn: bool = False,
    even_categories: bool = False,
    is_encoder_decoder: bool = False,
    end_ids: Sequence[int] = (),
    settings: TextSettings | None = None,
    now: datetime | None = None,
    seed: int = 0,
) -> list[Prompt]:
    """Returns at most `max_prompts` distinct prompts (0: all) of `source` (see data/sources), sampled with `seed`.

    With `even_categories` the rows of each `category` take turns, so that few prompts are spread evenly over them.
    Documents give prompts of `prompt_tokens` tokens that start at the beginning of the file, a function or a paragraph.
    `long_prompts` says whether a row of more than `max_prompt_tokens` (0: no limit) raises an error, is dropped, or is
    cut to its first tokens; "auto" cuts an encoder's input and raises for others. `keep_answers` returns training texts
    instead of prompts: whole conversations with a loss mask, and documents in pieces of at most `max_prompt_tokens`.
    A conversation's prompt ends at its last user turn, with recorded answers as its history; with `each_turn` it ends
    at the first, and `data.turns` continues it with the target's own answers.
    An answer is supervised up to the first of `end_ids`, the generation config's end tokens (empty: the tokenizer's).
    Chat templates that write the date take it from `now`, by default the current time (`data.shards.first_run_time`).
    For an encoder-decoder the prompts are sources, with their labels if `keep_answers`. Rows that cannot be used are
    left out and reported with file and line, as is text in fields that are not used. Raises ValueError for data that
    cannot be read, or if more rows than `settings` allow are left out.
    """
    settings = settings or TextSettings()
    if max_prompts < 0 or prompt_tokens < 1:
        raise ValueError(
            f"max_prompts is {max_prompts} and prompt_tokens {prompt_tokens}; they must be at least 0, for all, and 1"
        )
    if tokenizer is None:
        raise ValueError(f"{source}: prompts need a tokenizer, and the target has none")
    name, columns = pairs.split_columns(source)
    if columns and not is_encoder_decoder:
        raise ValueError(f"{source} names source and label columns, which only an encoder-decoder target can use")
    if keep_answers and name.split(":")[0] == PYTHON_QUESTIONS and tokenizer.chat_template:
        raise ValueError(
            f"{source} has questions without answers; let the target answer them with recipes/pseudo_data.py, and give"
            " its output folder as the data"
        )
    if long_prompts == "auto":
        long_prompts = "cut" if is_encoder_decoder else "refuse"
    found = read_source(name)
    rng = random.Random(seed)
    documents, rows = (
        [one for one in found if isinstance(one, Document)],
        [one for one in found if isinstance(one, Row)],
    )
    readable = next((row for row in rows if not row.fault), None)
    if is_encoder_decoder and readable:
        columns = columns or pairs.infer_columns(readable, forms.KNOWN_KEYS)
    if is_encoder_decoder and keep_answers and not columns:
        raise ValueError(
            f"{source} has no labels: give pairs ({pairs.known_columns()}, or other columns as in"
            f" {name}@source,label), or generate labels with recipes/pseudo_data.py"
        )
    if documents and columns:
        raise ValueError(f"{source} names columns, and {name} contains texts, which have none")
    options = settings.chat_template_kwargs
    chat = ChatFormat(tokenizer=tokenizer, end_ids=frozenset(end_ids), options=options, now=now)
    reader = _RowReader(tokenizer, chat, columns, keep_answers=keep_answers)
    if each_turn and not keep_answers and not is_encoder_decoder:
        reader.each_turn, reader.max_prompt_tokens = True, max_prompt_tokens
    candidates: Iterable[list[Prompt]]
    if documents and keep_answers:
        texts = ((one.name, _with_bos(encode_text(tokenizer, one.text), tokenizer), one.text) for one in documents)
        candidates = ([_prompt(ids, text, name)] for name, ids, text in texts if ids)
    elif documents:
        candidates = ([one] for one in _document_prompts(documents, tokenizer, prompt_tokens, rng))
    else:
        if max_prompts:
            rng.shuffle(rows)
        if even_categories:
            rows = alternate_categories(rows)
        candidates = reader.read(rows)
    prompts: dict[str, Prompt] = {}
    num_repeated = num_dropped = num_cut = num_first_only = 0
    for prompt in tqdm(
        (one for found in candidates for one in found), desc="prompts", total=max_prompts or None, leave=False, delay=2
    ):
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
                if long_prompts == "drop":
                    num_dropped += 1
                    continue
                if prompt.loss_mask is not None and not any(pieces[0].loss_mask or ()):
                    reader.left_out.add(f"{prompt.source}: its answer lies beyond {max_prompt_tokens:,} tokens")
                    continue
                num_cut += prompt.key not in prompts
                num_first_only += prompt.conversation is not None
        num_repeated += prompt.key in prompts
        for piece in pieces:
            prompts.setdefault(piece.key, piece)
        if max_prompts and len(prompts) >= max_prompts:
            break
    reader.report(source, settings.max_left_out)
    if num_repeated or num_dropped:
        print(f"{source}: {num_repeated} repeated and {num_dropped} too long prompts were dropped")
    if num_first_only:
        print(f"{source}: the first turn of {num_first_only} conversations is cut; their later turns are left out")
    if is_encoder_decoder and num_cut:
        print(f"{source}: {num_cut} of {len(prompts)} sources were cut to {max_prompt_tokens:,} tokens")
    if not prompts:
        raise ValueError(f"{source}: no prompts" + (f"; all {num_dropped} were too long" if num_dropped else ""))
    if keep_answers:
        masks = [prompt.loss_mask or [True] * len(prompt.label or prompt.ids) for prompt in prompts.values()]
        print_coverage(source, sum(map(sum, masks)), sum(map(len, masks)))
    return list(prompts.values())


def alternate_categories(rows: Sequence[Row]) -> list[Row]:
    """Returns the rows in turns of one per category, each category's in their order."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str(row.fields.get("category")), []).append(row)
    return [row for turn in itertools.zip_longest(*groups.values()) for row in turn if row is not None]


def prompt_room(target: Target | TargetInfo, max_new_tokens: int, max_prompt_tokens: int = 0) -> int:
    """Returns the largest number of prompt tokens for a target, at most `max_prompt_tokens` unless that is 0.

    A causal model's context also holds `max_new_tokens`; an encoder reads up to the limit of its positions and its
    tokenizer, whatever the decoder writes. Raises ValueError if `max_prompt_tokens` is negative or more than fits.
    """
    room = target.context_length - max_new_tokens
    if target.is_encoder_decoder:
        room = min(target.context_length, getattr(target.tokenizer, "model_max_length", None) or NO_LIMIT)
    if not 0 <= max_prompt_tokens <= room:
        raise ValueError(
            f"the longest prompt is set to {max_prompt_tokens:,} tokens; give 0 for all that fits, or up to {room:,}"
        )
    return max_prompt_tokens or room


def print_coverage(source: str, num_supervised: int, num_tokens: int) -> None:
    """Prints the share of supervised tokens; raises ValueError if there are none."""
    if num_supervised == 0:
        raise ValueError(f"{source}: the loss mask covers none of the {num_tokens:,} tokens; nothing can be trained on")
    share = num_supervised / num_tokens
    print(f"{source}: the loss mask covers {num_supervised:,} of {num_tokens:,} tokens ({share:.1%})")


class _RowReader:
    """Reads rows as prompts, or as training texts if `keep_answers`, and counts their unused parts."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat: ChatFormat,
        columns: pairs.Columns | None,
        *,
        keep_answers: bool,
    ) -> None:
        self.left_out = LeftOut()
        self.each_turn = False
        self.max_prompt_tokens = 0
        self._tokenizer, self._chat, self._columns, self._keep_answers = tokenizer, chat, columns, keep_answers
        self._num_rows = self._num_several = 0
        self._unused: Counter[str] = Counter()

    def read(self, rows: Iterable[Row]) -> Iterator[list[Prompt]]:
        """Yields the prompts of each row that can be used."""
        for row in rows:
            self._num_rows += 1
            try:
                yield self._prompts(row)
            except RowError as error:
                self.left_out.add(error)

    def report(self, source: str, max_left_out: float) -> None:
        """Prints the unused parts; raises ValueError if more than `max_left_out` of the rows were left out."""
        if self._num_several:
            print(
                f"{source}: {self._num_several} of {self._num_rows} rows have several turns; only the first of each is"
                + (" used, since the tokenizer has no chat template" if self.each_turn else " used")
            )
        if self._unused:
            fields = ", ".join(f"{name} ({count:,} rows)" for name, count in self._unused.most_common())
            print(f"{source}: these fields contain text that is not used: {fields}")
        self.left_out.report(source, self._num_rows, max_left_out)

    def _prompts(self, row: Row) -> list[Prompt]:
        category = row.fields.get("category")
        category = None if category is None else str(category)
        if self._columns:
            text, label = pairs.read_pair(row, self._columns, with_label=self._keep_answers)
            ids = pairs.label_ids(self._tokenizer, label) if self._keep_answers else None
            return [replace(_prompt(encode_text(self._tokenizer, text), text, row.where, category=category), label=ids)]
        found = forms.read_text(row, as_chat=bool(self._tokenizer.chat_template))
        if found.messages is None:
            prompts, unused = [self._plain(found, row.where, category)], set(found.unused)
        else:
            prompts = self._conversation(found, row.where, category)
            unused = {*found.unused, *self._not_rendered(found, prompts)}
        self._unused.update(unused)
        self._num_several += bool(found.later_turns) and not (self.each_turn and found.messages)
        return prompts

    def _plain(self, found: forms.RowText, where: str, category: str | None) -> Prompt:
        ids, text, mask = encode_text(self._tokenizer, found.text), found.text, None
        if self._keep_answers and found.answer:
            eos = self._tokenizer.eos_token_id
            answer = self._tokenizer(found.answer, add_special_tokens=False, verbose=False)["input_ids"]
            answer = answer if eos is None else [*answer, eos]
            mask = [False] * len(ids) + [True] * len(answer)
            ids, text = ids + answer, text + found.answer
        return _prompt(ids, text, where, mask=mask, category=category)

    def _conversation(self, found: forms.RowText, where: str, category: str | None) -> list[Prompt]:
        messages, tools = found.messages or [], found.tools
        if self.each_turn:
            return [self._first_turn(found, where, category)]
        if not self._keep_answers:
            ids, text = self._chat.prompt(messages, tools, where)
            return [_prompt(ids, text, where, category=category)]
        texts = [
            _prompt(ids, self._tokenizer.decode(ids), where, mask=mask, category=category)
            for ids, mask in self._chat.answers(messages, tools, where)
        ]
        return [replace(one, key=f"{texts[0].key}.{at}") if at else one for at, one in enumerate(texts)]

    def _first_turn(self, found: forms.RowText, where: str, category: str | None) -> Prompt:
        """Returns the prompt of the first turn, with the conversation if others follow."""
        asked = [{"role": "user", "content": turn} for turn in found.later_turns]
        first, later = split_turns(found.messages or [])
        later = [*later, *([turn] for turn in asked)]
        ids, text = self._chat.prompt(first, found.tools, where)
        prompt = _prompt(ids, text, where, category=category)
        if not later:
            return prompt
        conversation = Conversation(
            messages=first, later=later, tools=found.tools, chat=self._chat, max_prompt_tokens=self.max_prompt_tokens
        )
        return replace(prompt, key=conversation.key(prompt.key), conversation=conversation)

    def _not_rendered(self, found: forms.RowText, prompts: list[Prompt]) -> Iterator[str]:
        """Yields the keys of fields that the chat template leaves out of a conversation."""
        if found.tools and not self._chat.renders_tools:
            yield "tools"
        for key in REASONING_KEYS if self._keep_answers else ():
            written = [message[key].strip() for message in found.messages or () if message.get(key)]
            if any(not any(text in prompt.text for prompt in prompts) for text in written):
                yield key


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
            ids = encode_text(tokenizer, document.text[start : start + length * CHARACTERS_PER_TOKEN])
            if start == 0:
                ids = _with_bos(ids, tokenizer)
            if len(ids) >= length or (start == 0 and ids):
                line = document.text.count("\n", 0, start) + 1
                text = tokenizer.decode(ids[:length], skip_special_tokens=True)
                yield _prompt(ids[:length], text, f"{document.name}:{line}")
        documents = remaining


def _split(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, length: int) -> list[Prompt]:
    """Returns a text in pieces of `length` tokens, whose keys show that they belong together."""
    pieces = []
    # The first token of a piece is not learnt, so that a last piece of one token has nothing to learn.
    for number, begin in enumerate(range(0, max(len(prompt.ids) - 1, 1), length)):
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
        raise RowError(f"{source}: the prompt is empty once tokenized")
    key = hashlib.sha256(np.asarray(ids, dtype="<i8").tobytes()).hexdigest()[:16]
    return Prompt(ids=list(ids), loss_mask=mask, text=text, category=category, key=key, source=source)
