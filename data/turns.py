"""Conversations regenerated turn by turn: the target's own answers stand in the history of the turns that follow.

- next_prompt     the prompt of a conversation's next turn, rendered by the chat template
- complete_turns  completions of a shard's batches, then of its second turns, and so on
- expand_turns    one prompt for each turn, for comparisons in which every drafter decodes the same prompts

An answer enters the history as its text without special tokens, as a chat client would send it; one that ended at
`max_new_tokens` enters as far as it was written. A turn whose prompt would be longer than the limit, or that the chat
template rejects, is left out with those after it.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace

from data.prompts import Prompt
from data.sources import RowError
from data.writers import Completion, GenerationBatch, LocalWriter, PseudoDataSettings, Writer, derive_seed
from draftsmith import Target


class TurnsLeftOut:
    """Counts the turns that are left out, with the reason of the first; threads may share it."""

    def __init__(self) -> None:
        self.num_turns = 0
        self.reason = ""
        self._lock = threading.Lock()

    def add(self, num_turns: int, reason: str) -> None:
        with self._lock:
            self.num_turns += num_turns
            self.reason = self.reason or reason

    def report(self, name: str, num_planned: int) -> None:
        """Prints how many of `num_planned` turns are left out, if any."""
        if self.num_turns:
            print(f"{name}: {self.num_turns:,} of {num_planned:,} turns are left out ({self.reason})")


def num_turns(prompts: Sequence[Prompt]) -> int:
    """Returns the number of turns of all prompts, later turns included."""
    return sum(prompt.conversation.num_turns if prompt.conversation else 1 for prompt in prompts)


def next_prompt(prompt: Prompt, answer_ids: Sequence[int], left_out: TurnsLeftOut) -> Prompt | None:
    """Returns the prompt of the turn after `prompt` and its answer; None if there is none, or if it is left out.

    Its key is the conversation's with the number of the turn, `K.1` after `K`.
    """
    conversation = prompt.conversation
    if conversation is None or not conversation.later:
        return None
    chat = conversation.chat
    while answer_ids and answer_ids[-1] in chat.ends:
        answer_ids = answer_ids[:-1]  # some tokenizers do not mark their end tokens as special
    answer = chat.tokenizer.decode(answer_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    messages = [*conversation.messages, {"role": "assistant", "content": answer}, *conversation.later[0]]
    key, _, number = prompt.key.partition(".")
    turn = int(number or 0) + 1
    where = f"{prompt.source.partition(', turn ')[0]}, turn {turn + 1}"
    try:
        ids, text = chat.prompt(messages, conversation.tools, where)
    except RowError as error:
        left_out.add(len(conversation.later), str(error))
        return None
    if conversation.max_prompt_tokens and len(ids) > conversation.max_prompt_tokens:
        left_out.add(
            len(conversation.later),
            f"{where} has {len(ids):,} tokens with its history, and at most {conversation.max_prompt_tokens:,} fit",
        )
        return None
    return replace(
        prompt,
        ids=ids,
        text=text,
        key=f"{key}.{turn}",
        source=where,
        conversation=replace(conversation, messages=messages, later=conversation.later[1:]),
    )


def complete_turns(
    writer: Writer,
    batches: Sequence[GenerationBatch],
    settings: PseudoDataSettings,
    left_out: TurnsLeftOut,
    *,
    num_batches: int,
) -> Iterator[tuple[GenerationBatch, list[Completion]]]:
    """Yields each batch with its completions, then the batches of the second turns with theirs, and so on.

    The later turns of a shard are put together to batches of one temperature, the longest prompts first, which depend
    on the shard alone. Their indices follow on the `num_batches` of the whole run.
    """
    first, turn = list(batches), 0
    while batches:
        following: dict[float, list[Prompt]] = {}
        for batch, completions in zip(batches, writer.write(batches, settings), strict=True):
            yield batch, completions
            for prompt, completion in zip(batch.prompts, completions, strict=True):
                if found := next_prompt(prompt, completion.ids, left_out):
                    following.setdefault(batch.temperature, []).append(found)
        turn += 1
        batches = _batches(following, settings, first[0].index + turn * num_batches)


def expand_turns(
    target: Target, prompts: Sequence[Prompt], max_new_tokens: int, *, batch_size: int = 16
) -> list[Prompt]:
    """Returns one prompt for each turn of `prompts`, with the target's own greedy answers as the history of later ones.

    `prompts` are from `load_prompts(..., each_turn=True)`; those without later turns are returned as they are. Turns
    stand in order behind their first, with the keys `K`, `K.1`, `K.2`. Answers have at most `max_new_tokens` tokens.
    Turns that are left out are counted and reported.
    """
    several = [prompt for prompt in prompts if prompt.conversation and prompt.conversation.later]
    turns = {prompt.key: [prompt] for prompt in prompts}
    if several:
        settings = PseudoDataSettings(max_new_tokens=max_new_tokens, batch_size=batch_size)
        left_out, writer = TurnsLeftOut(), LocalWriter(target)
        batches = _batches({0.0: several}, settings, 0)
        while batches:
            following = [
                found
                for batch, completions in zip(batches, writer.write(batches, settings), strict=True)
                for prompt, completion in zip(batch.prompts, completions, strict=True)
                if (found := next_prompt(prompt, completion.ids, left_out))
            ]
            for prompt in following:
                turns[prompt.key.partition(".")[0]].append(prompt)
            # The answers of last turns are nobody's history.
            asked_on = [one for one in following if one.conversation and one.conversation.later]
            batches = _batches({0.0: asked_on}, settings, 0) if asked_on else []
        left_out.report("prompts", num_turns(prompts))
    return [prompt for found in turns.values() for prompt in found]


def _batches(
    prompts: dict[float, list[Prompt]], settings: PseudoDataSettings, first_index: int
) -> list[GenerationBatch]:
    """Returns batches of prompts of similar length for each temperature."""
    groups = []
    for temperature in sorted(prompts):
        ordered = sorted(prompts[temperature], key=lambda prompt: (-len(prompt.ids), prompt.key))
        groups += [
            (temperature, ordered[at : at + settings.batch_size]) for at in range(0, len(ordered), settings.batch_size)
        ]
    return [
        GenerationBatch(index=index, prompts=found, temperature=temperature, seed=derive_seed(settings.seed, index))
        for index, (temperature, found) in enumerate(groups, start=first_index)
    ]
