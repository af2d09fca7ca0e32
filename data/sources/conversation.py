"""Conversations that the target answers turn by turn: `Conversation`, `split_turns`."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from data.sources.chat import ChatFormat, Message


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A conversation up to a turn that the target answers, and the turns that follow once it has."""

    messages: list[Message]
    """Messages up to the user's turn, the target's earlier answers included."""
    later: list[list[Message]]
    """Messages of each later turn of the user."""
    tools: list[dict[str, Any]] | None
    """Definitions of the tools that the assistant may call."""
    chat: ChatFormat
    """The chat template that renders each turn."""
    max_prompt_tokens: int = 0
    """Largest number of tokens of a later turn's prompt, 0 for no limit."""

    @property
    def num_turns(self) -> int:
        return 1 + len(self.later)

    def key(self, first: str) -> str:
        """Returns a hash of the key of the first turn's prompt and of the later turns."""
        written = json.dumps([first, self.later], ensure_ascii=False, sort_keys=True, default=str)
        return hashlib.sha256(written.encode()).hexdigest()[:16]


def split_turns(messages: list[Message]) -> tuple[list[Message], list[list[Message]]]:
    """Splits a conversation into its messages up to the first user's turn and those of each later turn.

    Recorded answers after the first turn are left out, since the target writes its own. A conversation with calls of
    tools or their results has no later turns: the results answer the recorded calls, which the target may not make.
    """
    if any(message["role"] == "tool" or message.get("tool_calls") for message in messages):
        return messages, []
    turns: list[list[Message]] = [[]]
    is_asked = False
    for message in messages:
        if message["role"] == "assistant" and (is_asked or len(turns) > 1):
            if is_asked:
                turns.append([])
            is_asked = False
            continue
        is_asked |= message["role"] == "user"
        turns[-1].append(message)
    return turns[0], turns[1:] if is_asked else turns[1:-1]
