"""Reads texts from a file and joins them to contexts of given lengths.

A file of JSON lines holds a request or conversation a line; any other file is one text.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from draftsmith.artifacts import json_text
from draftsmith.inputs.texts import encode_text

CONVERSATION_KEYS = ("messages", "conversation", "conversations")
REQUEST_KEYS = ("instruction", "question", "query", "turns")
TEXT_KEYS = ("prompt", "text")
ANSWER_KEYS = ("answer", "output", "response", "completion")
KNOWN_KEYS = (*CONVERSATION_KEYS, *REQUEST_KEYS, *TEXT_KEYS)
MAX_BYTES = 256_000_000


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Texts as token ids."""

    prompts: list[list[int]]
    """What the target continues."""
    wholes: list[list[int]]
    """The same with their answers where the file has them."""
    is_document: bool = False
    """True for the single text of a file, which is continued at any token."""

    @property
    def num_tokens(self) -> int:
        """Returns the number of tokens, answers included."""
        return sum(map(len, self.wholes))


def read_texts(path: str, tokenizer: PreTrainedTokenizerBase) -> Texts:
    """Returns the texts of a file; requests and conversations go through the tokenizer's chat template if it has one.

    Raises ValueError, naming the file and the line, for what cannot be read.
    """
    file = Path(path)
    if not file.is_file():
        what = "a folder" if file.is_dir() else "no such file"
        raise ValueError(f"--data {path}: {what}; give a text file, or JSON lines with one of {', '.join(KNOWN_KEYS)}")
    if (size := file.stat().st_size) > MAX_BYTES:
        raise ValueError(f"--data {path} has {size / 1e6:,.0f} MB; at most {MAX_BYTES / 1e6:.0f} MB are read: cut it")
    try:
        content = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--data {path} is not UTF-8 text (byte {error.start})") from None
    if file.suffix not in (".jsonl", ".ndjson"):
        ids = encode_text(tokenizer, content)
        return Texts(prompts=[ids], wholes=[ids], is_document=True)
    prompts, wholes = [], []
    for number, line in enumerate(content.splitlines(), start=1):
        if line.strip():
            prompt, whole = _read_row(f"{path}:{number}", line, tokenizer)
            prompts.append(prompt)
            wholes.append(whole)
    if not prompts:
        raise ValueError(f"--data {path} has no rows; give texts that the target is used for")
    return Texts(prompts=prompts, wholes=wholes)


def contexts(texts: Texts, length: int, number: int) -> list[list[int]]:
    """Returns `number` contexts of `length` tokens, each of which ends with a prompt and begins with texts before it.

    A document is continued at evenly spaced tokens. Raises ValueError for fewer tokens than one context has.
    """
    if texts.num_tokens < length:
        raise ValueError(
            f"--data has {texts.num_tokens:,} tokens, and a context of {length:,} cannot be filled; give more text or"
            " shorter --contexts"
        )
    if texts.is_document:
        (ids,) = texts.wholes
        ends = [length + (len(ids) - length) * at // max(number - 1, 1) for at in range(number)]
        return [ids[end - length : end] for end in ends]
    found = []
    for at in range(number):
        last = at * len(texts.prompts) // number if len(texts.prompts) >= number else at % len(texts.prompts)
        row, before = list(texts.prompts[last]), last
        while len(row) < length:
            before = (before - 1) % len(texts.wholes)
            row = texts.wholes[before] + row
        found.append(row[-length:])
    return found


def _read_row(where: str, line: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Returns the ids of a row's prompt, and of the prompt with its answer."""
    try:
        fields = json_text.parse(line)
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON ({error})") from None
    key = next((key for key in KNOWN_KEYS if isinstance(fields, dict) and fields.get(key)), None)
    if key is None:
        raise ValueError(f"{where} has none of {', '.join(KNOWN_KEYS)}; name the text so")
    value = fields[key]
    answer = next((str(fields[name]) for name in ANSWER_KEYS if fields.get(name)), "")
    if key in TEXT_KEYS and isinstance(value, str):
        prompt = encode_text(tokenizer, value)
        return prompt, encode_text(tokenizer, value + answer) if answer else prompt
    messages = _messages(where, key, value)
    if not tokenizer.chat_template:
        text = "\n\n".join(message["content"] for message in messages if message["role"] != "assistant")
        prompt = encode_text(tokenizer, text)
        return prompt, encode_text(tokenizer, f"{text}\n\n{answer}") if answer else prompt
    if messages[-1]["role"] == "assistant":
        answer = messages.pop()["content"]
    try:
        texts = [str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))]
        if answer:
            whole = [*messages, {"role": "assistant", "content": answer}]
            texts.append(str(tokenizer.apply_chat_template(whole, tokenize=False)))
    except Exception as error:
        raise ValueError(f"{where}: the chat template rejects it ({' '.join(str(error).split())})") from None
    ids = [encode_text(tokenizer, text) for text in texts]
    return ids[0], ids[-1]


def _messages(where: str, key: str, value: Any) -> list[dict[str, str]]:
    """Returns a row's conversation; of several turns without answers the first."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if key == "turns" and isinstance(value, list) and isinstance(value[0], str):
        return [{"role": "user", "content": value[0]}]
    names = {"human": "user", "gpt": "assistant"}
    found = []
    for message in value if isinstance(value, list) else ():
        role = message.get("role", message.get("from")) if isinstance(message, dict) else None
        content = message.get("content", message.get("value")) if isinstance(message, dict) else None
        if isinstance(role, str) and isinstance(content, str):
            found.append({"role": names.get(role, role), "content": content})
    if not found or len(found) < len(value):
        raise ValueError(f"{where}: {key} must be a text, or a list of messages with role and content")
    return found
