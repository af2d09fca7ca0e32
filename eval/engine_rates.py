"""Decoding rates of draftsmith's own loop and of engines on the same prompts, which take turns in every round.

Tokens/s count what comes after a text's first token, since that one is the prompt's work. Texts end where the target
ends them, or go on to the same length in all methods (`past_end`).
"""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

import draftsmith
from data.prompts import load_prompts
from draftsmith import Target
from draftsmith.artifacts.artifact import read_manifest
from draftsmith.loading.model_info import read_target_info

TRANSFORMERS = "transformers"
OWN = "draftsmith"
PLAIN = "plain"
Decoder = Callable[[int, list[int]], tuple[list[int], int]]
"""(number of new tokens, prompt) -> (the new tokens, number of the target's forwards)."""


@dataclass(frozen=True, kw_only=True)
class RateSettings:
    """The target, the drafters and the texts."""

    target: str = "smollm2"
    """A transformers folder, GGUF file or named target."""
    drafts: tuple[str, ...] = ()
    """Artifacts of drafters for it."""
    dtype: str = "float32"
    """Dtype of the target in torch."""
    data: str = "python-questions"
    """Source of the prompts."""
    num_prompts: int = 4
    """Prompts decoded in every round, evenly of all categories."""
    max_prompt_tokens: int = 0
    """Length of the longest prompt in tokens, longer ones are left out; 0 for what the target's context leaves."""
    max_new_tokens: int = 64
    """New tokens per prompt."""
    rounds: int = 2
    """Number of times that all methods decode all prompts."""
    threads: int = 1
    """CPU threads."""

    def __post_init__(self) -> None:
        if self.num_prompts < 1 or self.rounds < 1 or self.threads < 1 or self.max_new_tokens < 2:
            raise ValueError("num_prompts, rounds and threads must be at least 1, max_new_tokens at least 2")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one method wrote in one round."""

    texts: list[list[int]]
    seconds: float
    """Time after the first token of each text."""
    num_accepted: int
    num_rounds: int
    """Number of the target's forwards after the prompt's."""


Method = Callable[[], Measured]


def read_prompts(run: RateSettings) -> list[list[int]]:
    """Returns the prompts' token ids, once all artifacts were found to have a manifest."""
    for draft in run.drafts:
        read_manifest(draft)
    options: dict[str, Any] = {"even_categories": True, "max_prompts": run.num_prompts}
    if run.max_prompt_tokens:
        options |= {"max_prompt_tokens": run.max_prompt_tokens, "long_prompts": "drop"}
    return [prompt.ids for prompt in load_prompts(run.data, read_target_info(run.target).tokenizer, **options)]


def load_drafters(run: RateSettings, target: Target) -> dict[str, Any]:
    """Returns the drafters by the names of their folders."""
    return {Path(draft).resolve().name: draftsmith.load(draft, target) for draft in run.drafts}


def take_turns(methods: Mapping[str, Method], num_rounds: int) -> dict[str, list[Measured]]:
    """Returns what each method measured in every round."""
    found: dict[str, list[Measured]] = defaultdict(list)
    for _ in range(num_rounds):
        for name, method in methods.items():
            found[name].append(method())
    return found


def own_methods(
    run: RateSettings,
    target: Target,
    drafters: Mapping[str, Any],
    prompts: Sequence[list[int]],
    *,
    past_end: bool = False,
) -> dict[str, Method]:
    """Returns plain decoding by transformers, and draftsmith's loop without a drafter and with each.

    With `past_end`, end tokens are written like others, and texts go on after them.
    """
    never = target.vocab_size  # an id that no text contains

    def transformers(num_new: int, prompt: list[int]) -> tuple[list[int], int]:
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": num_new, "pad_token_id": 0, "do_sample": False}
        if past_end:
            options["eos_token_id"] = never
        out = target.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        text = out[0, len(prompt) :].tolist()
        return text, len(text)

    def loop(drafter: Any) -> Decoder:
        def decode(num_new: int, prompt: list[int]) -> tuple[list[int], int]:
            end_ids: list[int] | None = [] if past_end else None
            out = draftsmith.generate(target, [prompt], drafter, max_new_tokens=num_new, eos_token_id=end_ids)
            return out.sequences[0, len(prompt) : int(out.lengths[0])].tolist(), out.stats.steps

        return decode

    decoders = {(TRANSFORMERS, PLAIN): transformers, (OWN, PLAIN): loop(None)}
    decoders |= {(OWN, name): loop(drafter) for name, drafter in drafters.items()}
    return {
        method_name(engine, name): _timed(run.max_new_tokens, decode, prompts)
        for (engine, name), decode in decoders.items()
    }


def method_name(engine: str, drafter: str) -> str:
    """Returns the name of a row of the table."""
    return f"{engine}, {drafter}"


def _timed(num_new_tokens: int, decode: Decoder, prompts: Sequence[list[int]]) -> Method:
    def method() -> Measured:
        texts, seconds, num_rounds = [], 0.0, 0
        for prompt in prompts:
            for num_new, sign in ((1, -1), (num_new_tokens, 1)):
                before_s = time.perf_counter()
                text, steps = decode(num_new, prompt)
                seconds += sign * (time.perf_counter() - before_s)
            texts.append(text)
            num_rounds += steps - 1
        num_accepted = sum(map(len, texts)) - len(texts) - num_rounds
        return Measured(texts=texts, seconds=seconds, num_accepted=num_accepted, num_rounds=num_rounds)

    return method


def print_table(
    run: RateSettings, found: Mapping[str, Sequence[Measured]], compared_with_own_plain: Callable[[str], bool]
) -> None:
    """Prints a row for each method: its rate over transformers' plain decoding and over its engine's own.

    Texts are compared with transformers', or with the engine's own plain decoding where `compared_with_own_plain`
    holds for the engine.
    """
    plain = found[method_name(TRANSFORMERS, PLAIN)]
    print(f"\n{run.target}, {len(plain[0].texts)} prompts of {run.data}, {run.max_new_tokens} new tokens each")
    print("| engine, drafter | tokens/s | over transformers | over its own plain | accepted a round | equal texts |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, rounds in found.items():
        engine = name.partition(",")[0]
        own = found[method_name(engine, PLAIN)]
        expected = own if compared_with_own_plain(engine) else plain
        num_new = sum(len(text) - 1 for text in rounds[0].texts)
        speed = median(num_new / one.seconds for one in rounds)
        over = [
            median(other.seconds / one.seconds for one, other in zip(rounds, base, strict=True))
            for base in (plain, own)
        ]
        same = sum(one == other for one, other in zip(rounds[0].texts, expected[0].texts, strict=True))
        per_round = rounds[0].num_accepted / max(rounds[0].num_rounds, 1)
        print(
            f"| {name} | {speed:.1f} | {over[0]:.2f} | {over[1]:.2f} | {per_round:.2f} | {same} of"
            f" {len(rounds[0].texts)} |"
        )
