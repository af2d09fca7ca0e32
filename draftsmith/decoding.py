"""The decoding loop: draft, verify in one forward, commit. Plain decoding is the same loop without a drafter.

Shape suffixes: B rows, T positions, N nodes of a draft, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from draftsmith.core.cache import KVCache
from draftsmith.core.drafter import Drafter, Session, Step
from draftsmith.core.fixed_shapes.chains import likeliest_chain
from draftsmith.core.fixed_shapes.forwards import Shapes
from draftsmith.core.sampling import RowGenerators, hashed_seed
from draftsmith.core.stats import GenerationStats
from draftsmith.core.target import Source, Target
from draftsmith.inputs.arguments import check_objects, plain, row_identities, shown, torch_seed, whole_number
from draftsmith.inputs.batching import (
    check_lengths,
    check_stream_prompt,
    check_stream_prompts,
    encode_sources,
    pack,
    start_rows,
    start_token,
    until_end,
)
from draftsmith.inputs.generation_config import (
    CallSettings,
    Rules,
    make_rules,
    num_copies,
    read_settings,
    stream_rules,
)
from draftsmith.inputs.invariance.self_test import shapes_for
from draftsmith.inputs.locks import exclusive, with_parts
from draftsmith.inputs.outputs import HiddenHistory, OutputRecorder, StreamedText
from draftsmith.inputs.processors import NodeProcessors
from draftsmith.inputs.texts import Text, replace_ended
from draftsmith.length.controller import check_length, cut, stream_control, with_length_control
from draftsmith.length.costs import Stopwatch
from draftsmith.length.node_gain import NodeGain
from draftsmith.length.policies import Policy
from draftsmith.verify import find, verify_draft
from draftsmith.verify.research.position_noise import PositionNoise


@dataclass(frozen=True, kw_only=True, eq=False)
class Generation:
    """The output of `generate`."""

    sequences: Tensor
    """[B, longest]: the prompt (causal) or decoder start (encoder-decoder) and the new tokens, right-padded."""
    lengths: Tensor
    """[B]: number of ids in each row without padding."""
    stats: GenerationStats
    scores: tuple[Tensor, ...] | None = None
    """With `output_scores`: for each new token the logits [B, V] that it was drawn from, after processors, temperature
    and cutoffs, as `model.generate` returns them; NaN for rows that had ended."""
    logits: tuple[Tensor, ...] | None = None
    """With `output_logits`: the same before processors."""


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
    length: str | Policy | NodeGain = "auto",
    streamer: Any = None,
    batch_invariant: bool | None = None,
    output_scores: bool = False,
    output_logits: bool = False,
) -> Generation:
    """Continues `input_ids` [B, T] with tokens of the target's distribution, faster with a drafter than without.

    `input_ids` is a tensor, an array, a list of prompts or the output of a tokenizer; prompts may differ in length and
    be padded left or right, as in `attention_mask` [B, T]. For an encoder-decoder they are the sources. `eos_token_id`
    defaults to the model's own; an empty sequence turns it off. The same `seed` gives the same tokens, unless draft
    lengths depend on measured times or earlier calls; without one it is drawn from torch's global generator. With
    `verifier="coupled"` it gives the same tokens with every drafter and with none, and may be one seed per row, so that
    a row's text does not depend on the other rows. `length` is a draft-length policy (draftsmith/length/policies.py,
    node_gain.py) or its name, "auto" for the drafter's own. `generation_config` is "model" for the model's own, a
    GenerationConfig, or a dictionary of its settings; arguments that are given take precedence, and its lengths are not
    read. Its logits processors, and those in `logits_processor`, are applied to each drafted token's own prefix,
    padding not counted. Rows also stop after a text in `stop_strings`, and by transformers' `stopping_criteria`. A
    `streamer` receives the prompt, then each step's tokens. Threads may share a target; calls with the same drafter or
    policy wait for each other.

    With `batch_invariant` a token's logits have the same bits however it is fed, so that in any dtype plain decoding
    and every drafter give the same text at temperature 0, and with `verifier="coupled"` above; None takes the target's
    own setting. Raises ValueError for invalid settings or prompts, and if the target cannot be run so.
    """
    check_objects(target, drafter, verifier=verifier, length=length, streamer=streamer, batch_invariant=batch_invariant)
    if verifier != "auto":
        find(verifier)
    check_length(drafter, length)
    settings = read_settings(
        target,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        eos_token_id=eos_token_id,
        generation_config=generation_config,
        batch_invariant=batch_invariant,
    )
    max_new_tokens, eos = settings.max_new_tokens, settings.eos
    prompts, rows = start_rows(target, input_ids, attention_mask, num_copies(settings.config, settings.sampling))
    check_lengths(target, rows, max_new_tokens)
    target.check_batch(len(rows))
    if streamer is not None and len(rows) > 1:
        raise ValueError(f"a streamer prints one row, but there are {len(rows)}; stream with batch size 1")
    limits = [len(row) + max_new_tokens for row in rows]
    rules = make_rules(
        target,
        settings.config,
        settings.sampling,
        prompts,
        rows,
        max_new_tokens=max_new_tokens,
        eos=eos,
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        stop_strings=stop_strings,
        output_scores=output_scores,
        output_logits=output_logits,
    )
    identities = row_identities(seed, len(rows), is_coupled=verifier == "coupled")
    generator = torch.Generator().manual_seed(identities[0][0])
    stats = GenerationStats(num_rows=len(rows))
    texts = [
        Text(index=index, ids=row, limit=limit, identity=identity)
        for index, (row, limit, identity) in enumerate(zip(rows, limits, identities, strict=True))
    ]
    shapes = shapes_for(target, len(rows)) if settings.batch_invariant else None
    source = encode_sources(target, prompts, shapes) if target.is_encoder_decoder else None
    length_control = () if isinstance(length, str) else (length,)
    with exclusive(*(with_parts(drafter) if drafter is not None else ()), *length_control):
        controlled = with_length_control(drafter, length) if drafter is not None else None
        for _ in _decode(
            target, texts, source, eos, controlled, rules, verifier, generator, stats, streamer, shapes=shapes
        ):
            pass  # each text has grown in place
    # Tensors made in inference mode cannot be used in training.
    with torch.inference_mode(False):
        sequences, lengths = pack(target, rows)
        scores, logits = rules.scores.steps() if rules.scores is not None else (None, None)
    return Generation(sequences=sequences, lengths=lengths, stats=stats, scores=scores, logits=logits)


def generate_stream(
    target: Target,
    prompts: Iterable[Any],
    drafter: Drafter | None = None,
    *,
    batch_size: int = 32,
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
    length: str | Policy | NodeGain = "auto",
    stats: GenerationStats | None = None,
    batch_invariant: bool | None = None,
    output_layers: Sequence[int] = (),
    output_top_logits: int = 0,
) -> Iterator[StreamedText]:
    """Continues any number of prompts, `batch_size` at a time, and yields each text as it ends (continuous batching).

    Each prompt is a list, array or tensor of ids without padding; a tokenizer's batch is unpadded. Where a text ends,
    the next prompt takes its place: it is prefilled between two steps, and the other rows wait for that alone. Prompts
    of an iterator are taken as places become free. Every text has its own seed: the entry of `seed`, or one derived
    from a single `seed` and the prompt's number, so that a text does not depend on those beside it, up to rounding, and
    bit for bit with `batch_invariant`. A drafter that does not follow rows that come and go (`Drafter.change_rows`)
    starts again with each change. `length` "auto" is the policy "node_gain" for several rows whose text does not depend
    on drafts, at temperature 0 or by the verifier coupled: where drafting does not pay at this batch size, nothing is
    drafted. It is kept as long as the drafter; "own" is the drafter's own policy. Counts are added to `stats`.
    `output_layers` (0: embedding output, i: output of the i-th block) and `output_top_logits` keep the target's outputs
    at every token, from the forwards that write the text, before processors. Other arguments are those of `generate`;
    logits processors of your own are called with the prefixes of all texts, so each must depend on the prefix alone.
    `max_time` counts from the call: it ends the texts being written, and begins no others. An open stream keeps its
    drafter until it is exhausted, closed by its method `close()`, or dropped. Raises ValueError for invalid settings or
    prompts.
    """
    check_objects(target, drafter, verifier=verifier, length=length, batch_invariant=batch_invariant)
    if verifier != "auto":
        find(verifier)
    check_length(drafter, length)
    prompts = check_stream_prompts(prompts)
    if not isinstance(stats, GenerationStats | None):
        raise ValueError(f"stats is {shown(stats)}; it must be GenerationStats or None")
    settings = read_settings(
        target,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        eos_token_id=eos_token_id,
        generation_config=generation_config,
        batch_invariant=batch_invariant,
    )
    batch_size = whole_number("batch_size", batch_size)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    target.check_batch(batch_size)
    rules, processors_of = stream_rules(
        target,
        settings,
        batch_size,
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        stop_strings=stop_strings,
    )
    seeds: list[int] | None
    if isinstance(seed := plain(seed), list):
        seeds, whole = [torch_seed(one) for one in seed], 0
        if isinstance(prompts, Sequence) and len(prompts) != len(seeds):
            raise ValueError(
                f"seed has {len(seeds)} numbers for {len(prompts)} prompts; pass one for each, or a single one"
            )
    else:
        seeds, whole = None, int(torch.randint(2**62, ())) if seed is None else torch_seed(seed)

    def text_of(index: int, prompt: Any) -> tuple[Text, list[int]]:
        ids = check_stream_prompt(target, prompt, index)
        row = ids if not target.is_encoder_decoder else [start_token(target)]
        check_lengths(target, [row], settings.max_new_tokens, first=index)
        if seeds is not None and index >= len(seeds):
            raise ValueError(
                f"seed has {len(seeds)} numbers, and there are more prompts; pass one for each, or a single one"
            )
        text = Text(
            index=index,
            ids=list(row),
            limit=len(row) + settings.max_new_tokens,
            identity=(hashed_seed(f"{whole}:{index}") if seeds is None else seeds[index], 0),
            processors=processors_of(index, row, ids),
        )
        return text, ids

    if isinstance(prompts, Sequence):
        for index, prompt in enumerate(prompts):
            text_of(index, prompt)
    waiting = (text_of(index, prompt) for index, prompt in enumerate(prompts))
    stats = GenerationStats(num_rows=0) if stats is None else stats
    shapes = shapes_for(target, batch_size) if settings.batch_invariant else None

    def admit(number: int) -> tuple[list[Text], Source | None]:
        found = list(islice(waiting, number))
        stats.num_rows += len(found)
        ids_of_prompts = [ids for _, ids in found]
        source = encode_sources(target, ids_of_prompts, shapes) if found and target.is_encoder_decoder else None
        return [text for text, _ in found], source

    recorder = OutputRecorder(target, output_layers, output_top_logits) if output_layers or output_top_logits else None
    return _stream(target, admit, batch_size, settings, drafter, length, rules, verifier, stats, shapes, recorder)


@torch.inference_mode()
def _stream(
    target: Target,
    admit: Callable[[int], tuple[list[Text], Source | None]],
    batch_size: int,
    settings: CallSettings,
    drafter: Drafter | None,
    length: str | Policy | NodeGain,
    rules: Rules,
    verifier: str,
    stats: GenerationStats,
    shapes: Shapes | None,
    recorder: OutputRecorder | None,
) -> Iterator[StreamedText]:
    texts, source = admit(batch_size)
    if not texts:
        return
    if processors := NodeProcessors([text.processors for text in texts]):
        rules = replace(rules, processors=processors)
    length_control, eos = () if isinstance(length, str) else (length,), settings.eos
    with exclusive(*(with_parts(drafter) if drafter is not None else ()), *length_control) as use:
        keeps_text = rules.sampling.is_greedy or verifier == "coupled"
        controlled = stream_control(drafter, length, keeps_text=keeps_text) if drafter is not None else None
        generator = RowGenerators()
        options: dict[str, Any] = {"admit": admit, "shapes": shapes, "recorder": recorder}
        for text in _decode(target, texts, source, eos, controlled, rules, verifier, generator, stats, **options):
            start = text.limit - settings.max_new_tokens
            with use.paused():
                yield StreamedText(
                    index=text.index,
                    prompt_ids=text.ids[:start],
                    new_ids=text.ids[start:],
                    ended=text.ids[-1] in eos,
                    outputs=text.outputs,
                )


def _decode(
    target: Target,
    texts: list[Text],
    source: Source | None,
    eos: frozenset[int],
    drafter: Drafter | None,
    rules: Rules,
    verifier: str,
    generator: torch.Generator,
    stats: GenerationStats,
    streamer: Any = None,
    admit: Callable[[int], tuple[list[Text], Source | None]] | None = None,
    shapes: Shapes | None = None,
    recorder: OutputRecorder | None = None,
) -> Iterator[Text]:
    """Appends new tokens to each text until its limit or an end-of-sequence; yields texts as they end.

    `admit(n)` returns up to `n` new texts to take the places of those that ended; without it there are none.
    """
    watch = Stopwatch(target.device)
    texts = list(texts)
    rows = [text.ids for text in texts]
    if streamer is not None:
        streamer.put(torch.tensor(rows[0]))
    cache = target.new_cache(len(rows), source=source, shapes=shapes)
    wanted = drafter.hidden_layers if drafter is not None else ()
    layers = tuple(sorted({*wanted, *recorder.layers})) if recorder is not None else wanted
    hidden = _prefill(target, rows, cache, layers)
    history = HiddenHistory(rows, hidden, wanted) if admit is not None and wanted else None
    if recorder is not None:
        recorder.start(rows, hidden)
    noise = None
    if verifier == "coupled" and not rules.sampling.is_greedy:
        noise = PositionNoise([text.identity for text in texts], rows)
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
    stats.prefill_ms += watch.lap_ms()

    while any(text.is_running for text in texts):
        _begin(generator, texts, "draft")
        budget = max(text.limit - len(text.ids) for text in texts if text.is_running) - 1
        draft = drafter.propose(budget) if drafter is not None and budget > 0 else session.empty_draft()
        if shapes is not None or not target.takes_trees:
            draft = likeliest_chain(draft)
        if admit is not None and draft.tree.is_chain:
            # Verified deeper than its own limit, a text could depend on the limits of those beside it.
            draft = cut(draft, [max(text.limit - len(text.ids) - 1, 0) for text in texts])
        stats.draft_ms += (draft_ms := watch.lap_ms())

        if recorder is not None and recorder.runs_whole(draft):
            draft = replace(draft, resume_point=None)
        out = target.forward_draft(draft, cache, layers=layers)
        logits_BNV = raw_BNV = target.logits(out.hidden_BND, shapes)
        if rules.processors is not None:
            live = [text.is_running and not text.is_written for text in texts]
            logits_BNV = rules.processors(logits_BNV, draft, rows, live)
        if rules.scores is not None:
            rules.scores.begin(raw_BNV, logits_BNV)
        _begin(generator, texts, "verify")
        verdict = verify_draft(logits_BNV, draft, rules.sampling, verifier, generator, noise)
        paths, next_tokens = verdict.to_host()
        stats.verify_ms += (verify_ms := watch.lap_ms())

        stats.count_round(draft)
        tokens, ended = draft.tokens_BN.tolist(), []
        for row, (text, path) in enumerate(zip(texts, paths, strict=True)):
            if not text.is_running:
                path.clear()  # a finished row stays unchanged while others run
                continue
            if text.is_written:
                del path[1:]  # its last token was fed for the recorder alone
                text.is_running = False
                ended.append(text)
                continue
            new = [*(tokens[row][node] for node in path[1:]), next_tokens[row]]
            new = until_end(new, text.limit - len(text.ids), eos)
            kept, is_stopped = rules.cut(row, text, path, new)
            stats.count(draft, row, num_accepted=len(path) - 1, num_kept=len(kept))
            text.ids += kept
            text.is_written = len(text.ids) >= text.limit or kept[-1] in eos or is_stopped
            text.is_running = not text.is_written or recorder is not None
            if not text.is_running:
                ended.append(text)
            elif text.is_written:
                del path[len(kept) :]  # tokens after the last are not fed
            if streamer is not None:
                streamer.put(torch.tensor(kept))
        if is_out_of_time := rules.is_out_of_time():
            ended += [text for text in texts if text.is_running]
            for text in ended:
                text.is_running = False
        cache.commit(paths)
        if history is not None:
            history.extend(out.layers, paths)
        if recorder is not None:
            recorder.extend(out.layers, raw_BNV, paths)
            for row, text in enumerate(texts):
                text.outputs = recorder.outputs_of(row) if text.is_written and not text.is_running else None
        if drafter is not None and (admit is not None or any(text.is_running for text in texts)):
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
        yield from ended
        watch.lap_ms()  # without the caller's time
        if is_out_of_time:
            break
        # In a call of one batch, a drafter knows rows by their places: those that ended stay.
        if ended and (admit is not None or drafter is None):
            new, source = admit(len(ended)) if admit is not None else ([], None)
            origins = replace_ended(texts, new)
            if not texts:
                break
            rows[:] = [text.ids for text in texts]
            if noise is not None:
                noise.identities[:] = [text.identity for text in texts]
            if rules.processors is not None:
                rules.processors.change_rows(origins, [text.processors for text in new])
            added = target.new_cache(len(new), source=source, shapes=shapes) if new else None
            hidden = _prefill(target, [text.ids for text in new], added, layers) if added is not None else {}
            target.change_rows(cache, origins, added)
            for kept_outputs in (history, recorder):
                if kept_outputs is not None:
                    kept_outputs.change_rows(origins, [text.ids for text in new], hidden)
            alone = None
            if added is not None:
                alone = replace(session, rows=[text.ids for text in new], cache=added, hidden=hidden, source=source)
            if drafter is not None and not drafter.change_rows(origins, alone):
                drafter.start(
                    replace(session, hidden=history.padded() if history is not None else {}, source=cache.source)
                )
            stats.prefill_ms += watch.lap_ms()
    if streamer is not None:
        streamer.end()


def _prefill(target: Target, rows: list[list[int]], cache: KVCache, layers: tuple[int, ...]) -> dict[int, Tensor]:
    """Feeds each row but its pending token; returns the requested hidden layers, none if nothing was to be fed."""
    return target.prefill([row[:-1] for row in rows], cache, layers=layers) if max(map(len, rows)) > 1 else {}


def _begin(generator: torch.Generator, texts: list[Text], stage: str) -> None:
    """Begins a stage of a step, where each row has its own random numbers."""
    if isinstance(generator, RowGenerators):
        generator.begin([text.identity[0] for text in texts], [text.ids for text in texts], stage)
