"""The decoding loop: draft, verify in one forward, commit. Plain decoding is the same loop without a drafter.

Shape suffixes: B rows, T positions, N nodes of a draft, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from draftsmith.core.drafter import Drafter, Session, Step
from draftsmith.core.stats import GenerationStats
from draftsmith.core.target import Source, Target
from draftsmith.inputs.arguments import (
    check_objects,
    real_number,
    row_identities,
    warn_of_unapplied_settings,
    whole_number,
)
from draftsmith.inputs.batching import check_lengths, eos_ids, pack, start_rows, until_end
from draftsmith.inputs.generation_config import Rules, make_rules, num_copies, read_config, with_sampling
from draftsmith.inputs.locks import exclusive, with_parts
from draftsmith.length.controller import with_length_control
from draftsmith.length.costs import Stopwatch
from draftsmith.length.policies import Policy
from draftsmith.verify import verify_draft
from draftsmith.verify.research.position_noise import PositionNoise


@dataclass(frozen=True, kw_only=True, eq=False)
class Generation:
    """The output of `generate`."""

    sequences: Tensor
    """[B, longest]: the prompt (causal) or decoder start (encoder-decoder) and the new tokens, right-padded."""
    lengths: Tensor
    """[B]: number of ids in each row without padding."""
    stats: GenerationStats


@torch.inference_mode()
def generate(
    target: Target,
    input_ids: Any,
    drafter: Drafter | None = None,
    *,
    attention_mask: Any = None,
    max_new_tokens: int = 128,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | Sequence[int] | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    generation_config: Any = None,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    stop_strings: str | Sequence[str] | None = None,
    verifier: str = "auto",
    length: str | Policy = "auto",
    streamer: Any = None,
) -> Generation:
    """Continues `input_ids` [B, T] with tokens of the target's distribution, faster with a drafter than without.

    `input_ids` is a tensor, an array, a list of prompts or the output of a tokenizer; prompts may differ in length and
    be padded left or right, as in `attention_mask` [B, T]. For an encoder-decoder they are the sources. `eos_token_id`
    defaults to the model's own; an empty sequence turns it off. The same `seed` gives the same tokens, unless draft
    lengths depend on measured times or earlier calls; without one it is drawn from torch's global generator. With
    `verifier="coupled"` it gives the same tokens with every drafter and with none, and may be one seed per row, so that
    a row's text does not depend on the other rows. `length` is a draft-length policy (draftsmith/length/policies.py) or
    its name, "auto" for the drafter's own. `generation_config` is "model" for the model's own, a GenerationConfig, or a
    dictionary of its settings; arguments that are given take precedence, and its lengths are not read. Its logits
    processors, and those in `logits_processor`, are applied to each drafted token's own prefix, padding not counted.
    Rows also stop after a text in `stop_strings`, and by transformers' `stopping_criteria`. A `streamer` receives the
    prompt, then each step's tokens. Threads may share a target; calls with the same drafter or policy wait for each
    other. Raises ValueError for invalid settings or prompts.
    """
    check_objects(target, drafter, verifier=verifier, length=length, streamer=streamer)
    if (config := read_config(target, generation_config)) is None:
        warn_of_unapplied_settings(target)
    sampling = with_sampling(
        config,
        None if temperature is None else real_number("temperature", temperature),
        None if top_p is None else real_number("top_p", top_p),
        None if top_k is None else whole_number("top_k", top_k),
    )
    max_new_tokens = whole_number("max_new_tokens", max_new_tokens)
    prompts, rows, source = start_rows(target, input_ids, attention_mask, num_copies(config, sampling))
    check_lengths(target, rows, max_new_tokens)
    if streamer is not None and len(rows) > 1:
        raise ValueError(f"a streamer prints one row, but there are {len(rows)}; stream with batch size 1")
    limits = [len(row) + max_new_tokens for row in rows]
    eos = eos_ids(target, eos_token_id if eos_token_id is not None or config is None else config.eos_token_id)
    rules = make_rules(
        target,
        config,
        sampling,
        prompts,
        rows,
        max_new_tokens=max_new_tokens,
        eos=eos,
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        stop_strings=stop_strings,
    )
    identities = row_identities(seed, len(rows), is_coupled=verifier == "coupled")
    generator = torch.Generator().manual_seed(identities[0][0])
    noise = PositionNoise(identities, rows) if verifier == "coupled" and not sampling.is_greedy else None
    length_control = () if isinstance(length, str) else (length,)
    with exclusive(*(with_parts(drafter) if drafter is not None else ()), *length_control):
        controlled = with_length_control(drafter, length) if drafter is not None else None
        stats = _decode(target, rows, source, limits, eos, controlled, rules, verifier, generator, noise, streamer)
    # Tensors made in inference mode cannot be used in training.
    with torch.inference_mode(False):
        sequences, lengths = pack(target, rows)
    return Generation(sequences=sequences, lengths=lengths, stats=stats)


def _decode(
    target: Target,
    rows: list[list[int]],
    source: Source | None,
    limits: list[int],
    eos: frozenset[int],
    drafter: Drafter | None,
    rules: Rules,
    verifier: str,
    generator: torch.Generator,
    noise: PositionNoise | None,
    streamer: Any,
) -> GenerationStats:
    """Appends new tokens to `rows` until each has reached its limit or an end-of-sequence; returns the statistics."""
    stats, watch = GenerationStats(num_rows=len(rows)), Stopwatch(target.device)
    if streamer is not None:
        streamer.put(torch.tensor(rows[0]))
    cache = target.new_cache(len(rows), source=source)
    wanted = drafter.hidden_layers if drafter is not None else ()
    hidden = target.prefill([row[:-1] for row in rows], cache, layers=wanted) if max(map(len, rows)) > 1 else {}
    session = Session(
        target=target,
        rows=rows,
        cache=cache,
        sampling=rules.sampling,
        generator=generator,
        noise=noise,
        hidden=hidden,
        source=source,
    )
    if drafter is not None:
        drafter.start(session)
    is_running = [True] * len(rows)
    stats.prefill_ms += watch.lap_ms()

    while any(is_running):
        budget = max(limit - len(row) for limit, row, runs in zip(limits, rows, is_running, strict=True) if runs) - 1
        draft = drafter.propose(budget) if drafter is not None and budget > 0 else session.empty_draft()
        stats.draft_ms += (draft_ms := watch.lap_ms())

        out = target.forward_draft(draft, cache, layers=wanted)
        logits_BNV = target.logits(out.hidden_BND)
        if rules.processors is not None:
            logits_BNV = rules.processors(logits_BNV, draft, rows, is_running)
        verdict = verify_draft(logits_BNV, draft, rules.sampling, verifier, generator, noise)
        paths, next_tokens = verdict.to_host()
        stats.verify_ms += (verify_ms := watch.lap_ms())

        stats.count_round(draft)
        tokens = draft.tokens_BN.tolist()
        for row, path in enumerate(paths):
            if not is_running[row]:
                path.clear()  # a finished row stays unchanged while others run
                continue
            new = [*(tokens[row][node] for node in path[1:]), next_tokens[row]]
            kept, is_stopped = rules.cut(row, rows[row], path, until_end(new, limits[row] - len(rows[row]), eos))
            stats.count(draft, row, num_accepted=len(path) - 1, num_kept=len(kept))
            rows[row] += kept
            is_running[row] = len(rows[row]) < limits[row] and kept[-1] not in eos and not is_stopped
            if streamer is not None:
                streamer.put(torch.tensor(kept))
        if rules.is_out_of_time():
            is_running = [False] * len(rows)
        cache.commit(paths)
        if drafter is not None and any(is_running):
            step = Step(
                draft=draft,
                logits_BNV=logits_BNV,
                hidden=out.layers,
                verdict=verdict,
                paths=paths,
                cost_ms=draft_ms + verify_ms,
            )
            drafter.observe(step)
        stats.commit_ms += watch.lap_ms()
    if streamer is not None:
        streamer.end()
    return stats
