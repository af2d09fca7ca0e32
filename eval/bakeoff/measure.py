"""Timed decoding of the same prompts by several methods in turn, with counts of what each did."""

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
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
from draftsmith.inputs.batching import eos_ids
from draftsmith.inputs.generation_config import read_config, with_sampling
from draftsmith.length.controller import OWN, make_control

Rows = list[list[int]]


@dataclass(frozen=True, kw_only=True)
class DecodingRequest:
    """Prompts to decode."""

    prompts: Rows
    """Token ids."""
    temperature: float
    max_new_tokens: int
    seed: int
    stream_size: int = 0
    """If not 0, this many rows are decoded at a time, and where a text ends the next prompt takes its place; else all
    prompts are one batch."""

    @property
    def num_batches(self) -> float:
        """Returns the number of full batches that the prompts are."""
        return len(self.prompts) / self.stream_size if self.stream_size else 1


@dataclass(frozen=True, kw_only=True)
class DecodingResult:
    """The output of one batch."""

    rows: Rows
    """New tokens after each prompt, including an end-of-sequence token."""
    num_batches: float = 1
    stats: GenerationStats | None = None
    """None for transformers' `generate`, which keeps no statistics."""


@dataclass(frozen=True, kw_only=True)
class DecodingMethod:
    """A named way to decode."""

    name: str
    decode: Callable[[DecodingRequest], DecodingResult]
    reference: str | None = None
    """Name of the method that it is compared with; None means the first in the list."""
    drafter: Any = None
    """Drafter whose state is reset before each measurement, because earlier rounds decoded the same prompts."""


@dataclass(kw_only=True)
class Tally:
    """Counts and times of one method in one measurement round, summed over prompts."""

    seconds: float = 0.0
    """Wall-clock time."""
    tokens: int = 0
    """New tokens."""
    calls: float = 0
    """Batches decoded by draftsmith."""
    rounds: int = 0
    """Target forwards, each over all rows of a batch."""
    steps: int = 0
    """Verification steps, summed over rows."""
    verified: list[list[int]] = field(default_factory=list)
    """Entries (start layer, draft nodes, number of target forwards that verified such drafts)."""
    prefill_ms: float = 0.0
    draft_ms: float = 0.0
    verify_ms: float = 0.0
    commit_ms: float = 0.0
    drafted: list[int] = field(default_factory=list)
    """Entry d counts the drafts that reached depth d + 1."""
    accepted: list[int] = field(default_factory=list)
    """Entry d counts the drafts accepted up to depth d + 1."""
    is_identical: bool = True
    """True if every row equals the reference method's."""
    num_rows: int = 0
    """Rows decoded."""
    num_different: int = 0
    """Rows that are not equal to the reference method's."""
    largest_gap: float | None = None
    """Largest gap of the reference's logits between the two tokens where such a row first differs; None if unread."""

    def add(self, result: DecodingResult, seconds: float, reference: Rows, gaps: Sequence[float] | None = None) -> None:
        """Adds one batch; `gaps` are those of the rows that differ from the reference's, None if they were not read."""
        self.seconds += seconds
        self.tokens += sum(map(len, result.rows))
        num_different = sum(own != other for own, other in zip(result.rows, reference, strict=True))
        self.is_identical &= not num_different
        self.num_rows += len(result.rows)
        self.num_different += num_different
        self.largest_gap = largest([self.largest_gap, *(gaps or ())])
        stats = result.stats
        if stats is None:
            return
        self.calls += result.num_batches
        self.rounds += stats.rounds
        self.steps += stats.steps
        self.verified = merge_forwards([self.verified, ([*kind, rounds] for kind, rounds in stats.verified.items())])
        self.prefill_ms += stats.prefill_ms
        self.draft_ms += stats.draft_ms
        self.verify_ms += stats.verify_ms
        self.commit_ms += stats.commit_ms
        self.drafted = sum_counts([self.drafted, stats.drafted])
        self.accepted = sum_counts([self.accepted, stats.accepted])


def largest(values: Iterable[float | None]) -> float | None:
    """Returns the largest value that is not None, and None if there is none."""
    return max((value for value in values if value is not None), default=None)


def sum_counts(counts: Iterable[Sequence[int]]) -> list[int]:
    """Returns the element-wise sum of lists of counts, padding shorter ones with zeros."""
    lists = list(counts)
    return [sum(one[index] for one in lists if index < len(one)) for index in range(max(map(len, lists), default=0))]


def merge_forwards(parts: Iterable[Iterable[Sequence[int]]]) -> list[list[int]]:
    """Returns lists of (start layer, draft nodes, forwards) as one, summing the forwards of equal entries."""
    totals: Counter[tuple[int, int]] = Counter()
    for layer, nodes, forwards in chain.from_iterable(parts):
        totals[layer, nodes] += forwards
    return [[*kind, forwards] for kind, forwards in sorted(totals.items())]


def draftsmith_method(
    target: Target,
    drafter: Any = None,
    *,
    verifier: str = "auto",
    policy: str = "auto",
    config: str | dict[str, Any] | None = None,
) -> Callable[[DecodingRequest], DecodingResult]:
    """Returns a function that decodes with `draftsmith.generate`; without a drafter that is plain decoding.

    `config` is a generation config, as `parse_config` returns it. A draft-length `policy` other than "auto" and
    "own" keeps its state from call to call, as on a server; each temperature and batch size has its own instance.
    """
    by_drafter = policy in ("auto", OWN)
    policy_of = cache(lambda temperature, num_rows: policy if by_drafter else make_control(policy))
    return partial(_draftsmith_decode, target, drafter, verifier, policy_of, config)


def _draftsmith_decode(
    target: Target, drafter: Any, verifier: str, policy_of: Callable[..., Any], config: Any, request: DecodingRequest
) -> DecodingResult:
    options: dict[str, Any] = {
        "max_new_tokens": request.max_new_tokens,
        "temperature": request.temperature,
        "seed": request.seed,
        "verifier": verifier,
        "generation_config": config,
        "length": policy_of(request.temperature, request.stream_size or len(request.prompts)),
    }
    if request.stream_size:
        stats = GenerationStats(num_rows=0)
        texts = draftsmith.generate_stream(
            target, request.prompts, drafter, batch_size=request.stream_size, stats=stats, **options
        )
        new_ids = {text.index: text.new_ids for text in texts}
        return DecodingResult(
            rows=[new_ids.get(index, []) for index in range(len(request.prompts))],  # a max_time begins no others
            stats=stats,
            num_batches=request.num_batches,
        )
    tokens_BT, mask_BT = pad(request.prompts, target.device, side="right")
    out = draftsmith.generate(target, tokens_BT, drafter, attention_mask=mask_BT, **options)
    starts = [1 if target.is_encoder_decoder else len(prompt) for prompt in request.prompts]
    rows = zip(out.sequences.tolist(), starts, out.lengths.tolist(), strict=True)
    return DecodingResult(rows=[row[start:length] for row, start, length in rows], stats=out.stats)


def transformers_method(
    target: Target, assistant: Any = None, *, prompt_lookup: int = 0, config: str | dict[str, Any] | None = None
) -> Callable[[DecodingRequest], DecodingResult]:
    """Returns a function that decodes with transformers' `generate`.

    It drafts with an assistant model if one is given, or by its prompt look-up of `prompt_lookup` tokens if that is not
    0; both take one prompt at a time. `config` is that of `draftsmith_method`.
    """
    return partial(_transformers_decode, target, assistant, prompt_lookup, config)


def _transformers_decode(
    target: Target, assistant: Any, prompt_lookup: int, given: Any, request: DecodingRequest
) -> DecodingResult:
    tokens_BT, mask_BT = pad(request.prompts, target.device, side="right" if target.is_encoder_decoder else "left")
    config = read_config(target, given if given is not None else {})
    assert config is not None
    with_sampling(config, request.temperature, None, None)
    config.top_k = config.top_k or 0  # else transformers keeps 50 tokens
    eos = eos_ids(target, config.eos_token_id)
    config.update(
        max_new_tokens=request.max_new_tokens,
        max_length=None,
        pad_token_id=_pad_token_id(target),
        eos_token_id=sorted(eos) or None,
        **({"prompt_lookup_num_tokens": prompt_lookup} if prompt_lookup else {}),
    )
    # transformers samples from the global generator, whose state is restored afterwards.
    with _without_own_config(target.model), torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(request.seed)
        options = {} if assistant is None else {"assistant_model": assistant}
        out = target.model.generate(tokens_BT, attention_mask=mask_BT, generation_config=config, **options)
    start = 1 if target.is_encoder_decoder else tokens_BT.shape[1]
    return DecodingResult(rows=[_cut_after_eos(row[start:], eos) for row in out.tolist()])


@contextmanager
def _without_own_config(model: Any) -> Iterator[None]:
    """Keeps transformers from filling what a generation config leaves unset from the model's own one."""
    own = model.generation_config
    model.generation_config = GenerationConfig(decoder_start_token_id=own.decoder_start_token_id)
    try:
        yield
    finally:
        model.generation_config = own


def warm_up(method: DecodingMethod, prompts: Rows, temperature: float) -> None:
    """Decodes a few tokens untimed, so that first calls are not measured and invalid settings raise early."""
    method.decode(DecodingRequest(prompts=prompts, temperature=temperature, max_new_tokens=4, seed=0))


def measure(
    methods: Sequence[DecodingMethod],
    requests: Sequence[DecodingRequest],
    device: torch.device,
    *,
    first: int = 0,
    gaps_of: Callable[[str, Rows, Rows, Rows], list[float]] | None = None,
    on_progress: Callable[[int], Any] = lambda num_rows: None,
) -> dict[str, Tally]:
    """Decodes all requests with every method and returns each method's tally.

    The methods take turns on every request, and the starting method rotates (number `first` starts on the first
    request), so that a temporary slow-down of the machine affects all of them. Drafters' states are reset first.
    `gaps_of` (eval/bakeoff/rounding.py) reads the gaps of logits of greedy rows that differ from the reference's.
    `on_progress` is called with the number of rows after each batch.
    """
    tallies = {method.name: Tally() for method in methods}
    drafters = [id(method.drafter) for method in methods]
    for method in methods:
        if method.drafter is not None:
            method.drafter.forget()
    for turn, request in enumerate(requests, start=first):
        results, seconds = {}, {}
        for offset in range(len(methods)):
            method = methods[(turn + offset) % len(methods)]
            if method.drafter is not None and drafters.count(id(method.drafter)) > 1:
                method.drafter.forget()  # another method has already decoded these prompts with the same drafter
            began = _now(device)
            results[method.name] = method.decode(request)
            seconds[method.name] = _now(device) - began
            on_progress(len(request.prompts))
        for method in methods:
            name, reference = method.name, method.reference or methods[0].name
            expected, rows = results[reference].rows, results[name].rows
            is_read = gaps_of is not None and not request.temperature and rows != expected
            gaps = gaps_of(reference, request.prompts, expected, rows) if is_read and gaps_of else None
            tallies[name].add(results[name], seconds[name], expected, gaps)
    return tallies


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def pad(prompts: Rows, device: torch.device, *, side: str) -> tuple[Tensor, Tensor]:
    """Returns the prompts as padded token ids [B, T] and their attention mask [B, T]."""
    rows = [torch.tensor(prompt, device=device) for prompt in prompts]
    masks = [torch.ones_like(row) for row in rows]
    return pad_sequence(rows, True, padding_side=side), pad_sequence(masks, True, padding_side=side)


def _pad_token_id(target: Target) -> int:
    pad = target.model.generation_config.pad_token_id
    return pad if pad is not None else (target.eos_token_ids or (0,))[0]


def _cut_after_eos(row: list[int], eos: Collection[int]) -> list[int]:
    end = next((index for index, token in enumerate(row) if token in eos), len(row))
    return row[: end + 1]
