"""Applies a tokenizer's chat template to conversations, with a loss mask on what the assistant writes."""

import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property, lru_cache
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from data.sources.records import RowError

ROLE_NAMES = {
    **dict.fromkeys(("gpt", "chatgpt", "bot", "ai", "model", "function_call"), "assistant"),
    "human": "user",
    "observation": "tool",
}
GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
PROBE = [{"role": "user", "content": "a"}]
FIRST_WORDS = ("Zebra", "How", "Please", "What", "1", "the")
"""Beginnings of a user's message that share no token; the first is in no chat template."""

Message = dict[str, Any]


def normalise(messages: Any, where: str) -> list[Message]:
    """Converts messages to {"role", "content"} from that form or {"from", "value"}, with their other fields.

    Content is text or a list of parts with text. Raises RowError for other content and for messages without any.
    """
    if not isinstance(messages, list) or not messages:
        raise RowError(f"{where}: a conversation should be a list of at least one message")
    plain = []
    for message in messages:
        if not isinstance(message, dict):
            raise RowError(f"{where}: a message should be an object with `role` and `content`, found {message!r:.40}")
        name = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        kept = {key: value for key, value in message.items() if value is not None}
        if name == "function_call" and isinstance(content, str):
            kept["tool_calls"], content = [{"type": "function", "function": _parsed(content, where)}], ""
        for key in REASONING_KEYS:
            if not isinstance(kept.get(key, ""), str):
                raise RowError(f"{where}: `{key}` should be text, found {kept[key]!r:.40}")
        calls = kept.get("tool_calls") or []
        if not isinstance(calls, list):
            raise RowError(f"{where}: `tool_calls` should be a list of calls, found {calls!r:.40}")
        if content is None and (calls or any(kept.get(key) for key in REASONING_KEYS)):
            content = ""
        if isinstance(content, list):
            content = [_part(part, where) for part in content]
        if not isinstance(name, str) or not isinstance(content, str | list):
            raise RowError(f"{where}: a message needs `role` and `content` (text); its keys are {', '.join(message)}")
        others = {key: value for key, value in kept.items() if key not in ("role", "from", "content", "value")}
        if calls:
            others["tool_calls"] = [_tool_call(call, where) for call in calls]
        plain.append({"role": ROLE_NAMES.get(name, name), "content": content, **others})
    return plain


@lru_cache
def at_time(template: str, now: datetime) -> str:
    """Returns the template with a `strftime_now` of its own, in place of transformers', that formats the time `now`.

    transformers passes no functions to templates, so that the times are written into a macro, one for each format.
    """
    strings = [text[1:-1] for _, kind, text in jinja2.Environment().lex(template) if kind == "string"]
    times = json.dumps({text: now.strftime(text) for text in strings if "%" in text})
    unknown = "raise_exception('the format of strftime_now is not written out in the template')"
    macro = f"{{{{ {times}[format] if format in {times} else {unknown} }}}}"
    # A newline after the tag is not rendered.
    return f"{{% macro strftime_now(format) %}}{macro}{{% endmacro %}}\n{template}"


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """A tokenizer's chat template with its arguments, and the tokens that end the assistant's turn."""

    tokenizer: PreTrainedTokenizerBase
    end_ids: frozenset[int] = frozenset()
    """The generation config's end tokens; if empty, the tokenizer's."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the template, such as enable_thinking."""
    now: datetime | None = None
    """Time that the template reads; None for the current one."""

    def prompt(self, messages: list[Message], tools: Any, where: str) -> tuple[list[int], str]:
        """Returns (ids, text) of the conversation up to its last user turn, with the generation prompt."""
        user_turns = [index for index, message in enumerate(messages) if message["role"] == "user"]
        if not user_turns:
            raise RowError(f"{where}: the conversation has no user turn to answer")
        prompt = self._checked(messages[: user_turns[-1] + 1], tools, where)
        text = self._render(prompt, tools, where, add_generation_prompt=True)
        return self._encode(text), text

    def user_turn(self, system: str, where: str) -> tuple[list[int], str]:
        """Returns (ids, text): the ids before the first message of a user, and what the template writes after it.

        `system` is the system message; empty for the template's own. A token that spans the border to the message, such
        as a space joined to its first word, is not in the ids. Raises RowError if the template rejects the
        conversation, leaves out a message, or writes nothing before the user's.
        """
        word = FIRST_WORDS[0]
        messages = [{"role": "user", "content": word}]
        if system:
            messages.insert(0, {"role": "system", "content": system})
        text = self._render(messages, None, where, add_generation_prompt=True)
        before, found, after = text.partition(word)
        if not found or word in after:
            raise RowError(
                f"{where}: the chat template writes a user's message {text.count(word)} times, so that its beginning"
                " cannot be found; expected once"
            )
        if system.strip() not in before:
            raise RowError(f"{where}: the chat template leaves out the system message; omit --system")
        encoded = [self._encode(before + one + after) for one in FIRST_WORDS]
        shared = zip(*encoded, strict=False)
        ids = [tokens[0] for tokens in itertools.takewhile(lambda tokens: len(set(tokens)) == 1, shared)]
        if not ids:
            raise RowError(
                f"{where}: the chat template writes nothing before the user's message, so that the model cannot know"
                " that it is to write one; use a target whose template marks the user's turn, or give prompts"
            )
        return ids, after

    def answers(self, messages: list[Message], tools: Any, where: str) -> list[tuple[list[int], list[bool]]]:
        """Returns texts as (ids, loss mask), whose mask is True on the tokens that the assistant would generate.

        One text of the whole conversation; or one per answer, where the template renders an answer differently once
        others follow, as reasoning templates do. The mask ends at the first end token of an answer. Raises RowError if
        no turn is the assistant's, or if its tokens cannot be determined with this template.
        """
        indices = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if not indices:
            raise RowError(f"{where}: the conversation has no assistant turn to train on")
        messages = self._checked(messages, tools, where)
        for index in indices:
            message = messages[index]
            if not message["content"] and not any(message.get(key) for key in ("tool_calls", *REASONING_KEYS)):
                raise RowError(f"{where}: turn {index + 1}, the assistant's, is empty")
        whole = self._whole(messages, indices, tools, where)
        found = [whole] if whole else [self._last_answer(messages[: index + 1], tools, where) for index in indices]
        if not any(any(mask) for _, mask in found):
            raise RowError(f"{where}: the chat template leaves no token of the assistant's turns to train on")
        return found

    @cached_property
    def renders_tools(self) -> bool:
        """True if definitions of tools change the prompt."""
        tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
        return self._render(PROBE, [tool], "tools") != self._render(PROBE, None, "tools")

    @cached_property
    def _reads_parts(self) -> bool:
        parts = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
        try:
            return self._render(parts, None, "parts") == self._render(PROBE, None, "parts")
        except RowError:
            return False

    @cached_property
    def ends(self) -> frozenset[int]:
        """The tokens that end an answer."""
        eos = self.tokenizer.eos_token_id
        return self.end_ids or frozenset(() if eos is None else (eos,))

    @cached_property
    def turn_end(self) -> int | None:
        """The end token that the template writes after an answer; the tokenizer's if it writes none."""
        if self.tokenizer.chat_template:
            try:
                ids, _ = self._last_answer([*PROBE, {"role": "assistant", "content": "b"}], None, "answer")
            except RowError:
                ids = []
            if ids and ids[-1] in self.ends:
                return ids[-1]
        return self.tokenizer.eos_token_id

    def _checked(self, messages: list[Message], tools: Any, where: str) -> list[Message]:
        """Returns the messages as the template reads them; raises RowError if it leaves out a call or its result."""
        if any(isinstance(one["content"], list) for one in messages) and not self._reads_parts:
            messages = [one | {"content": _joined(one["content"])} for one in messages]
        for index, message in enumerate(messages):
            if message.get("tool_calls"):
                changed = message | {"tool_calls": [_renamed(call) for call in message["tool_calls"]]}
            elif message["role"] == "tool":
                changed = message | {"content": "x"}
            else:
                continue
            if self._render(messages, tools, where) == self._render(
                [*messages[:index], changed, *messages[index + 1 :]], tools, where
            ):
                raise RowError(f"{where}: the chat template leaves out the tool call or result of turn {index + 1}")
        return messages

    def _whole(
        self, messages: list[Message], indices: list[int], tools: Any, where: str
    ) -> tuple[list[int], list[bool]] | None:
        """Returns (ids, mask) of the whole conversation, None if its answers do not follow their generation prompts."""
        ids, marked = self._marked(messages, tools, where)
        mask = [False] * len(ids)
        for index in indices:
            before = self._encode(self._render(messages[:index], tools, where, add_generation_prompt=True))
            after = self._encode(self._render(messages[: index + 1], tools, where))
            if ids[: len(after)] != after or (marked is None and after[: len(before)] != before):
                return None
            if marked is None:
                end = self._end(ids, len(before), len(after))
                mask[len(before) : end] = [True] * (end - len(before))
        return ids, mask if marked is None else self._trimmed(ids, marked)

    def _last_answer(self, messages: list[Message], tools: Any, where: str) -> tuple[list[int], list[bool]]:
        """Returns (ids, mask) of a conversation that ends with an answer, with the mask on that answer."""
        before = self._render(messages[:-1], tools, where, add_generation_prompt=True)
        after = self._render(messages, tools, where)
        answer = after[len(before) :] if after.startswith(before) else _with_reasoning(before, after, messages[-1])
        if answer is None:
            raise RowError(
                f"{where}: the chat template renders turn {len(messages)} differently from its generation prompt, "
                f"which ends with {before[-20:]!r}; give the answer's reasoning as `reasoning_content`, or set "
                "--chat-template-kwargs as the answer was written with"
            )
        ids, begin = self._encode(before + answer), len(prompt := self._encode(before))
        if ids[:begin] != prompt:  # a token spans the border, which generating cannot give
            ids = prompt + self._encode(answer)
        end = self._end(ids, begin, len(ids))
        return ids[:end], [index >= begin for index in range(end)]

    def _marked(self, messages: list[Message], tools: Any, where: str) -> tuple[list[int], list[bool] | None]:
        """Returns (ids, mask) of a conversation, with the mask of the template's generation marks, None without any."""
        template = self.tokenizer.get_chat_template(tools=tools) if self.tokenizer.chat_template else ""
        if not GENERATION_MARK.search(template):
            return self._encode(self._render(messages, tools, where)), None
        out = self._apply(messages, tools, where, return_dict=True, return_assistant_tokens_mask=True)
        return list(out["input_ids"]), [bool(flag) for flag in out["assistant_masks"]]

    def _trimmed(self, ids: list[int], mask: list[bool]) -> list[bool]:
        """Returns the mask without the tokens after an end token in each answer."""
        kept, has_ended = [], False
        for token, flag in zip(ids, mask, strict=True):
            has_ended = has_ended and flag
            kept.append(flag and not has_ended)
            has_ended = has_ended or (flag and token in self.ends)
        return kept

    def _end(self, ids: list[int], begin: int, end: int) -> int:
        """Returns the position after the first end token in ids[begin:end], `end` if there is none."""
        return next((index + 1 for index in range(begin, end) if ids[index] in self.ends), end)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _render(self, messages: list[Message], tools: Any, where: str, **options: Any) -> str:
        return self._apply(messages, tools, where, tokenize=False, **options)

    def _apply(self, messages: list[Message], tools: Any, where: str, **options: Any) -> Any:
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"{where}: a conversation, but the tokenizer has no chat template; use an instruction-tuned target, "
                'set `tokenizer.chat_template`, or give rows of plain text under "prompt"'
            )
        given = {**self.options, **options}
        if self.now and "strftime_now" in (template := self.tokenizer.get_chat_template(tools=tools)):
            given = {"chat_template": at_time(template, self.now), **given}
        try:
            return self.tokenizer.apply_chat_template(messages, tools=tools, **given)
        except Exception as error:  # templates can raise any exception, mostly for roles out of order
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RowError(f"{where}: the chat template rejects this conversation: {reason}") from error


def _with_reasoning(before: str, after: str, message: Message) -> str | None:
    """Returns the answer with the reasoning that a template leaves out, None if the row has none.

    The generation prompt `before` ends with an opening tag such as <think> that `after` does not have.
    """
    shared = next(index for index, (one, other) in enumerate(zip(before, after + "\0", strict=False)) if one != other)
    tag = before[shared:].strip()
    if not re.fullmatch(r"<[^<>/]+>", tag):
        return None
    closing, content = tag.replace("<", "</", 1), _joined(message["content"])
    reasoning = next((message[key] for key in REASONING_KEYS if message.get(key)), None)
    final = content.rpartition(closing)[2].strip()
    position = after.find(final, shared)
    if position < 0 or (reasoning is None and closing not in content):
        return None
    if reasoning is None:
        written = content.partition(tag)[2] if content.lstrip().startswith(tag) else content
    else:
        written = f"{reasoning.strip()}\n{closing}\n\n{final}"
    return written.strip() + after[position + len(final) :]


def _part(part: Any, where: str) -> Message:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict) or not isinstance(part.get("text"), str):
        kind = part.get("type") if isinstance(part, dict) else part
        raise RowError(f"{where}: a part of a message is {kind!r:.40}; only parts with text are supported")
    return {"type": "text", "text": part["text"]}


def _joined(content: str | list[Message]) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _tool_call(call: Any, where: str) -> Any:
    """Returns a tool call whose arguments are an object, as templates expect, rather than JSON text."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError(f"{where}: a tool call should have a function with `name` and `arguments`, found {call!r:.40}")
    if isinstance(function.get("arguments"), str):
        function = function | {"arguments": _parsed(function["arguments"], where)}
    return call | {"function": function} if "function" in call else function


def _renamed(call: Any) -> Any:
    """Returns a tool call with another function name."""
    if "function" in call:
        return call | {"function": _renamed(call["function"])}
    return call | {"name": call["name"] + "x"}


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise RowError(f"{where}: the arguments of a tool call are not valid JSON: {text!r:.40}") from None
