"""Conversations through a tokenizer's chat template, with a loss mask on the assistant's turns."""

import re
from typing import Any

from transformers import PreTrainedTokenizerBase

ROLE_NAMES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")

Message = dict[str, Any]


def normalise(messages: Any, where: str) -> list[Message]:
    """Returns messages as {"role", "content"} from that form or {"from", "value"}; raises ValueError if neither."""
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
    """Returns (ids, text) of the conversation up to its last user turn, with the cue for the assistant to answer."""
    user_turns = [index for index, message in enumerate(messages) if message["role"] == "user"]
    if not user_turns:
        raise ValueError(f"{where}: the conversation has no user turn to answer")
    asked = messages[: user_turns[-1] + 1]
    text = _render(tokenizer, asked, where, add_generation_prompt=True, tokenize=False)
    return _render(tokenizer, asked, where, add_generation_prompt=True), text


def answer_ids(tokenizer: PreTrainedTokenizerBase, messages: list[Message], where: str) -> tuple[list[int], list[bool]]:
    """Returns (ids, loss mask) of the whole conversation; the mask is True on what the assistant itself would write.

    Raises ValueError when no turn is the assistant's, or when the template cannot tell which tokens are.
    """
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{where}: the conversation has no assistant turn to learn from")
    template = tokenizer.get_chat_template() if tokenizer.chat_template else ""
    if GENERATION_MARK.search(template):
        out = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = list(out["input_ids"]), [bool(flag) for flag in out["assistant_masks"]]
    else:
        ids, mask = _mask_by_prefixes(tokenizer, messages, where)
    if not any(mask):
        raise ValueError(f"{where}: the chat template leaves no token of the assistant's turns to learn from")
    return ids, mask


def _mask_by_prefixes(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], where: str
) -> tuple[list[int], list[bool]]:
    """Derives the mask by rendering turn by turn: an answer is what its turn adds to the cue before it."""
    ids = _render(tokenizer, messages, where)
    mask = [False] * len(ids)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        cue = _render(tokenizer, messages[:index], where, add_generation_prompt=True)
        upto = _render(tokenizer, messages[: index + 1], where)
        if ids[: len(upto)] != upto or upto[: len(cue)] != cue:
            raise ValueError(
                f"{where}: the chat template renders turn {index + 1} differently once later turns follow, so the "
                "assistant's tokens cannot be told apart; use a template with {% generation %} marks"
            )
        end = len(upto)
        if tokenizer.eos_token_id in upto[len(cue) :]:  # what follows the end-of-turn token is never generated
            end -= upto[::-1].index(tokenizer.eos_token_id)
        mask[len(cue) : end] = [True] * (end - len(cue))
    return ids, mask


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], where: str, **options: Any) -> Any:
    if not tokenizer.chat_template:
        raise ValueError(
            f"{where}: a conversation, but the tokenizer has no chat template; take an instruction-tuned target, "
            'set `tokenizer.chat_template`, or give rows of plain text under "prompt"'
        )
    try:
        return tokenizer.apply_chat_template(messages, return_dict=False, **options)
    except Exception as error:  # templates raise what they like (roles out of order, mostly), through jinja
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{where}: the chat template refuses this conversation: {reason}") from error
