"""Decodes the same prompts by several contenders in turn, and counts and times what each did."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

import draftsmith
from draftsmith import Target
from draftsmith.core.stats import GenerationStats
from draftsmith.length import policies

Rows = list[list[int]]


@dataclass(frozen=True, kw_only=True)
class DecodingRequest:
    """What every contender is asked for."""

    prompts: Rows
    temperature: float
    max_new_tokens: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class DecodingResult:
    """What came of it."""

    rows: Rows
    """New tokens of each prompt, an end-of-sequence included."""
    stats: GenerationStats | None = None
    """None where transformers decoded, which keeps none."""


@dataclass(frozen=True, kw_only=True)
class DecodingMethod:
    """One way of decoding, and the name of the one it is compared with."""

    name: str
    decode: Callable[[DecodingRequest], DecodingResult]
    reference: str | None = None
    """None is the first of several."""
    drafter: Any = None
    """What is to forget earlier rounds, in which it met the same prompts."""


@dataclass(kw_only=True)
class Tally:
    """What one contender did in one round, over all prompts."""

    seconds: float = 0.0
    tokens: int = 0
    calls: int = 0
    rounds: int = 0
    """Target forwards over all rows of a batch at once."""
    steps: int = 0
    """Verified drafts, summed over rows."""
    verified: list[list[int]] = field(default_factory=list)
    """Of each kind of round: the block after which the target went on, the nodes drafted, and how many there were."""
    prefill_ms: float = 0.0
    draft_ms: float = 0.0
    verify_ms: float = 0.0
    commit_ms: float = 0.0
    drafted: list[int] = field(default_factory=list)
    """Entry d counts the drafts that reached depth d + 1."""
    accepted: list[int] = field(default_factory=list)
    """Entry d counts those accepted to depth d + 1."""
    is_identical: bool = True
    """Whether every row equals the reference's."""

    def add(self, decoded: DecodingResult, seconds: float, *, is_identical: bool) -> None:
        self.seconds += seconds
        self.tokens += sum(map(len, decoded.rows))
        self.is_identical &= is_identical
        stats = decoded.stats
        if stats is None:
            return
        self.calls += 1
        self.rounds += stats.rounds
        self.steps += stats.steps
        self.verified = merged([self.verified, ([*kind, rounds] for kind, rounds in stats.verified.items())])
        self.prefill_ms += stats.prefill_ms
        self.draft_ms += stats.draft_ms
        self.verify_ms += stats.verify_ms
        self.commit_ms += stats.commit_ms
        self.drafted, self.accepted = add_up([self.drafted, stats.drafted]), add_up([self.accepted, stats.accepted])


def add_up(counts: Iterable[Sequence[int]]) -> list[int]:
    """Returns the sums of lists of counts, short ones taken to end in zeros."""
    lists = list(counts)
    return [sum(one[at] for one in lists if at < len(one)) for at in range(max(map(len, lists), default=0))]


def merged(parts: Iterable[Iterable[Sequence[int]]]) -> list[list[int]]:
    """Returns lists of (layer, nodes, rounds) as one, each kind of round once."""
    found: Counter[tuple[int, int]] = Counter()
    for layer, nodes, rounds in chain.from_iterable(parts):
        found[layer, nodes] += rounds
    return [[*kind, rounds] for kind, rounds in sorted(found.items())]


def draftsmith_method(
    target: Target, drafter: Any = None, *, verifier: str = "auto", policy: str = "auto"
) -> Callable[[DecodingRequest], DecodingResult]:
    """Returns decoding by `draftsmith.generate`, plain without a drafter.

    A `policy` of lengths other than "auto" keeps what it learns, as on a server; each temperature and batch size has
    one of its own.
    """
    policy_of = cache(lambda temperature, num_rows: "auto" if policy == "auto" else policies.make(policy))
    return partial(_own_loop, target, drafter, verifier, policy_of)


def _own_loop(
    target: Target, drafter: Any, verifier: str, policy_of: Callable[..., Any], ask: DecodingRequest
) -> DecodingResult:
    tokens_BT, mask_BT = pad(ask.prompts, target.device, side="right")
    out = draftsmith.generate(
        target,
        tokens_BT,
        drafter,
        attention_mask=mask_BT,
        max_new_tokens=ask.max_new_tokens,
        temperature=ask.temperature,
        seed=ask.seed,
        verifier=verifier,
        length=policy_of(ask.temperature, len(ask.prompts)),
    )
    starts = [1 if target.is_encoder_decoder else len(prompt) for prompt in ask.prompts]
    found = zip(out.sequences.tolist(), starts, out.lengths.tolist(), strict=True)
    return DecodingResult(rows=[row[start:length] for row, start, length in found], stats=out.stats)


def transformers_method(target: Target, assistant: Any = None) -> Callable[[DecodingRequest], DecodingResult]:
    """Returns decoding by transformers' own `generate`, assisted if given a small model."""
    return partial(_transformers_loop, target, assistant)


def _transformers_loop(target: Target, assistant: Any, ask: DecodingRequest) -> DecodingResult:
    tokens_BT, mask_BT = pad(ask.prompts, target.device, side="right" if target.is_encoder_decoder else "left")
    is_sampling = ask.temperature > 0
    config = GenerationConfig(
        do_sample=is_sampling,
        **({"temperature": ask.temperature, "top_k": 0, "top_p": 1.0} if is_sampling else {}),
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=ask.max_new_tokens,
        pad_token_id=_fill(target),
    )
    # transformers draws from the global generator, which is left as it was found.
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(ask.seed)
        options = {} if assistant is None else {"assistant_model": assistant}
        out = target.model.generate(tokens_BT, attention_mask=mask_BT, generation_config=config, **options)
    start = 1 if target.is_encoder_decoder else tokens_BT.shape[1]
    return DecodingResult(rows=[_until_end(row[start:], target.eos_token_ids) for row in out.tolist()])


def warm_up(contender: DecodingMethod, prompts: Rows, temperature: float) -> None:
    """Decodes a few tokens untimed, so that neither first calls nor settings that do not fit fall into a round."""
    contender.decode(DecodingRequest(prompts=prompts, temperature=temperature, max_new_tokens=4, seed=0))


def measure(
    contenders: Sequence[DecodingMethod],
    asks: Sequence[DecodingRequest],
    device: torch.device,
    *,
    first: int = 0,
    done: Callable[[int], Any] = lambda num_rows: None,
) -> dict[str, Tally]:
    """Returns each contender's tally over `asks`; calls `done` with the number of rows after each decoding.

    Contenders take turns at every ask, and another one begins each time (with number `first` at the first ask), so
    that whatever slows the machine for a while slows them all. No drafter knows what it was taught before.
    """
    tallies = {contender.name: Tally() for contender in contenders}
    drafters = [id(contender.drafter) for contender in contenders]
    for contender in contenders:
        if contender.drafter is not None:
            contender.drafter.forget()
    for turn, ask in enumerate(asks, start=first):
        decoded, seconds = {}, {}
        for place in range(len(contenders)):
            contender = contenders[(turn + place) % len(contenders)]
            if contender.drafter is not None and drafters.count(id(contender.drafter)) > 1:
                contender.drafter.forget()  # another contender has told it of these very prompts
            began = _now(device)
            decoded[contender.name] = contender.decode(ask)
            seconds[contender.name] = _now(device) - began
            done(len(ask.prompts))
        for contender in contenders:
            name, reference = contender.name, contender.reference or contenders[0].name
            tallies[name].add(decoded[name], seconds[name], is_identical=decoded[name].rows == decoded[reference].rows)
    return tallies


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def pad(prompts: Rows, device: torch.device, *, side: str) -> tuple[Tensor, Tensor]:
    """Returns token ids and mask [B, T]."""
    rows = [torch.tensor(prompt, device=device) for prompt in prompts]
    masks = [torch.ones_like(row) for row in rows]
    return pad_sequence(rows, True, padding_side=side), pad_sequence(masks, True, padding_side=side)


def _fill(target: Target) -> int:
    pad = target.model.generation_config.pad_token_id
    return pad if pad is not None else (target.eos_token_ids or (0,))[0]


def _until_end(row: list[int], eos: tuple[int, ...]) -> list[int]:
    end = next((at for at, token in enumerate(row) if token in eos), len(row))
    return row[: end + 1]
