"""Applies a tokenizer's chat template to conversations, with a loss mask on the assistant's turns."""

import re
from typing import Any

from transformers import PreTrainedTokenizerBase

ROLE_NAMES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")

Message = dict[str, Any]


def normalise(messages: Any, where: str) -> list[Message]:
    """Converts messages to {"role", "content"} from that form or {"from", "value"}; raises ValueError for others."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: a conversation should be a list of at least one message")
    plain = []
    for message in messages:
        if not isinstance(message, dict):
            raise ValueError(f"{where}: a message should be an object with `role` and `content`, found {message!r:.40}")
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(f"{where}: a message needs `role` and `content` (text); its keys are {', '.join(message)}")
        plain.append({"role": ROLE_NAMES.get(role, role), "content": content})
    return plain


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: list[Message], where: str) -> tuple[list[int], str]:
    """Returns (ids, text) of the conversation up to its last user turn, with the generation prompt."""
    user_turns = [index for index, message in enumerate(messages) if message["role"] == "user"]
    if not user_turns:
        raise ValueError(f"{where}: the conversation has no user turn to answer")
    prompt = messages[: user_turns[-1] + 1]
    text = _render(tokenizer, prompt, where, add_generation_prompt=True, tokenize=False)
    return _render(tokenizer, prompt, where, add_generation_prompt=True), text


def answer_ids(tokenizer: PreTrainedTokenizerBase, messages: list[Message], where: str) -> tuple[list[int], list[bool]]:
    """Returns (ids, loss mask) of the whole conversation; the mask is True on the tokens that the assistant generates.

    Raises ValueError if no turn is the assistant's, or if its tokens cannot be determined with this template.
    """
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{where}: the conversation has no assistant turn to train on")
    template = tokenizer.get_chat_template() if tokenizer.chat_template else ""
    if GENERATION_MARK.search(template):
        out = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = list(out["input_ids"]), [bool(flag) for flag in out["assistant_masks"]]
    else:
        ids, mask = _mask_by_prefixes(tokenizer, messages, where)
    if not any(mask):
        raise ValueError(f"{where}: the chat template leaves no token of the assistant's turns to train on")
    return ids, mask


def _mask_by_prefixes(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], where: str
) -> tuple[list[int], list[bool]]:
    """Derives the mask turn by turn: an answer is what its turn adds to the generation prompt before it."""
    ids = _render(tokenizer, messages, where)
    mask = [False] * len(ids)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:index], where, add_generation_prompt=True)
        after = _render(tokenizer, messages[: index + 1], where)
        if ids[: len(after)] != after or after[: len(before)] != before:
            raise ValueError(
                f"{where}: the chat template renders turn {index + 1} differently if later turns follow, so the "
                "assistant's tokens cannot be identified; use a template with {% generation %} marks"
            )
        begin, end = len(before), len(after)
        if tokenizer.eos_token_id in after[begin:]:  # tokens after the end-of-turn token are never generated
            end -= after[::-1].index(tokenizer.eos_token_id)
        mask[begin:end] = [True] * (end - begin)
    return ids, mask


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], where: str, **options: Any) -> Any:
    if not tokenizer.chat_template:
        raise ValueError(
            f"{where}: a conversation, but the tokenizer has no chat template; use an instruction-tuned target, "
            'set `tokenizer.chat_template`, or give rows of plain text under "prompt"'
        )
    try:
        return tokenizer.apply_chat_template(messages, return_dict=False, **options)
    except Exception as error:  # templates can raise any exception, mostly for roles out of order
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{where}: the chat template rejects this conversation: {reason}") from error
