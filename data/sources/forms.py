"""Reads the whole text of a row, in the forms that data sets have: `read_text`.

- conversations: `messages` or `conversations`; lists of messages in `prompt` and `completion` or `chosen`
- requests: `instruction`, `question`, `query`, `turns` or `input`, or a `prompt` beside one of the following; with
  `input`, `context` or `passage` after it, a `system` prompt, and the answer in `output`, `response` or `answer`
- plain text: `prompt` or `text`, continued by `completion` or `chosen`

Lists may also be JSON text, as in the cells of a CSV file.
"""

import json
from dataclasses import dataclass
from typing import Any

from data.sources.chat import Message, normalise
from data.sources.records import Row, RowError, check_row

CHAT_KEYS = ("messages", "conversations", "conversation")
TEXT_KEYS = ("prompt", "instruction", "question", "query", "turns", "input", "text")
CONTEXT_KEYS = ("input", "context", "passage")
SYSTEM_KEYS = ("system", "system_prompt")
ANSWER_KEYS = ("output", "response", "answer", "answers")
CONTINUATION_KEYS = ("completion", "chosen")
EXTRA_KEYS = ("tools", "category", "rejected")
KNOWN_KEYS = (*CHAT_KEYS, *TEXT_KEYS)


@dataclass(frozen=True, kw_only=True)
class RowText:
    """The text of a row: a conversation, or plain text and its continuation."""

    text: str = ""
    """Plain text, which a model without a chat template continues; empty for a conversation."""
    answer: str | None = None
    """Text that continues `text`; None if the row has none."""
    messages: list[Message] | None = None
    """The conversation; None for plain text."""
    tools: list[dict[str, Any]] | None = None
    """Definitions of the tools that the assistant may call."""
    unused: tuple[str, ...] = ()
    """Keys of the row's other fields that contain text."""
    later_turns: tuple[str, ...] = ()
    """The user's turns in `turns` after the first."""


def read_text(row: Row, *, as_chat: bool) -> RowText:
    """Returns the text of a row, a request as a conversation if `as_chat`; raises RowError if it has none."""
    check_row(row)
    fields = {key: value for key, value in row.fields.items() if value is not None}
    messages, used = _conversation(fields, row.where)
    if messages is None:
        return _request(fields, row.where, as_chat=as_chat)
    contents = "\n".join(str(message.get("content")) for message in messages)
    return RowText(messages=messages, tools=_tools(fields, row.where), unused=_unused(fields, used, contents))


def _conversation(fields: dict[str, Any], where: str) -> tuple[list[Message] | None, set[str]]:
    """Returns the messages, None if the row is not a conversation, and the keys that they are from."""
    key = next((key for key in CHAT_KEYS if key in fields), None)
    if key is not None:
        found, used = normalise(_from_json(fields[key]), where), {key}
    else:
        begin = _message_list(fields.get("prompt"))
        key = next((key for key in CONTINUATION_KEYS if _message_list(fields.get(key))), None)
        end = _message_list(fields[key]) if key else None
        if not begin and not end:
            return None, set()
        text = fields.get("prompt")
        if (
            not begin
            and isinstance(text, str)
            and not any(_role(message) in ("user", "human") for message in end or ())
        ):
            begin = [{"role": "user", "content": text}]
        is_whole = not begin or (end is not None and end[: len(begin)] == begin)
        found = normalise(end if is_whole else [*(begin or ()), *(end or ())], where)
        used = {"prompt", *CONTINUATION_KEYS}
    system = _first_text(fields, SYSTEM_KEYS)
    if system and found[0]["role"] != "system":
        found = [{"role": "system", "content": system}, *found]
    return found, {*used, *SYSTEM_KEYS}


def _request(fields: dict[str, Any], where: str, *, as_chat: bool) -> RowText:
    key = next((key for key in TEXT_KEYS if key in fields), None)
    if key is None:
        keys = ", ".join(fields) or "none"
        raise RowError(f"{where}: found the keys {keys}; expected one of {', '.join(KNOWN_KEYS)}")
    value, later_turns = fields[key], ()
    if key == "turns" or (key == "prompt" and isinstance(value, list)):
        value = _from_json(value)
        if not isinstance(value, list) or not value or not all(isinstance(turn, str) for turn in value):
            raise RowError(f"{where}: `{key}` should be a list of texts, found {fields[key]!r:.40}")
        value, later_turns = value[0], tuple(turn for turn in value[1:] if turn.strip())
    if not isinstance(value, str):
        raise RowError(f"{where}: `{key}` should be text, found {value!r:.40}")
    if not value.strip():
        raise RowError(f"{where}: `{key}` is empty")
    contexts = tuple(name for name in CONTEXT_KEYS if name != key and _text(fields.get(name)))
    system, answer = _first_text(fields, SYSTEM_KEYS), _first_text(fields, ANSWER_KEYS)
    used = {key, *CONTINUATION_KEYS}
    if key == "text" or (key == "prompt" and not later_turns and not (contexts or system or answer)):
        continued = _first_text(fields, CONTINUATION_KEYS) if key == "prompt" else None
        return RowText(text=value, answer=continued, unused=_unused(fields, used, value))
    answer = answer or _first_text(fields, CONTINUATION_KEYS)
    content = "\n\n".join([value, *(_text(fields[name]) for name in contexts)])
    unused = _unused(fields, {*used, *contexts, *SYSTEM_KEYS, *ANSWER_KEYS}, content)
    tools = _tools(fields, where)
    if not as_chat:
        text = f"{system}\n\n{content}" if system else content
        continued = f"\n\n{answer}" if answer else None
        return RowText(text=text, answer=continued, tools=tools, unused=unused, later_turns=later_turns)
    messages = [{"role": "user", "content": content}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    if answer:
        messages.append({"role": "assistant", "content": answer})
    return RowText(messages=messages, tools=tools, unused=unused, later_turns=later_turns)


def _first_text(fields: dict[str, Any], keys: tuple[str, ...]) -> str:
    """Returns the text of the first of `keys` that has some, empty if none has."""
    return next(filter(None, (_text(fields.get(key)) for key in keys)), "")


def _text(value: Any) -> str:
    """Returns the text of a field: itself, a number, the first of SQuAD's `answers`, or a list of paragraphs."""
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        value = (value["text"] or [""])[0]
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = "\n\n".join(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    return value if isinstance(value, str) and value.strip() else ""


def _role(message: Message) -> Any:
    return message.get("role", message.get("from"))


def _from_json(value: Any) -> Any:
    """Returns the value of JSON text that is a list or an object, any other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _message_list(value: Any) -> list[Message] | None:
    """Returns a field's messages, None if it is anything else."""
    found = _from_json(value)
    if not isinstance(found, list) or not found or not all(isinstance(one, dict) and _role(one) for one in found):
        return None
    return found


def _tools(fields: dict[str, Any], where: str) -> list[dict[str, Any]] | None:
    tools = _without_none(_from_json(fields.get("tools")))
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError(f"{where}: `tools` should be a list of definitions, found {fields['tools']!r:.40}")
    return tools


def _without_none(value: Any) -> Any:
    """Returns a value without the None that Arrow puts where another row has a key."""
    if isinstance(value, dict):
        return {key: _without_none(one) for key, one in value.items() if one is not None}
    return [_without_none(one) for one in value] if isinstance(value, list) else value


def _unused(fields: dict[str, Any], used: set[str], text: str) -> tuple[str, ...]:
    """Returns the keys of fields with words that are neither used nor part of `text`."""
    names = [key for key in fields if key not in used and key not in EXTRA_KEYS]
    return tuple(key for key in names if any(words not in text for words in _words(fields[key])))


def _words(value: Any) -> list[str]:
    """Returns the strings of several words within a value."""
    if isinstance(value, str):
        return [value.strip()] if len(value.split()) > 1 else []
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [words for part in parts for words in _words(part)]
