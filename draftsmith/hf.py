"""Use inside transformers: `model.generate(..., custom_generate=draftsmith.custom_generate, drafter=drafter)`."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput
from transformers.generation import stopping_criteria as criteria

from draftsmith.core.drafter import Drafter
from draftsmith.core.target import Target
from draftsmith.decoding import Generation, generate
from draftsmith.inputs.arguments import check_drafter, prompt_rows, token_ids
from draftsmith.inputs.generation_config import check_mode, check_outputs
from draftsmith.inputs.processors import NodeProcessors, check_processors, for_rows, is_normalised, split_sampling
from draftsmith.inputs.stopping import check_stop_strings
from draftsmith.length.policies import Policy

KNOWN_INPUTS = {
    "attention_mask",
    "position_ids",
    "past_key_values",
    "encoder_outputs",
    "logits_to_keep",
    "cache_position",
    "use_cache",
}
"""Arguments that transformers adds to every call."""


def custom_generate(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: Any = None,
    drafter: Drafter | None = None,
    verifier: str = "auto",
    length: str | Policy = "auto",
    seed: int | Sequence[int] | None = None,
    stream_to: Any = None,
    stop_strings: Any = None,
    stop_tokenizer: Any = None,
    inputs_tensor: Tensor | None = None,
    batch_invariant: bool | None = None,
    **model_kwargs: Any,
) -> Any:
    """Returns the output of `model.generate`, decoded speculatively with `drafter`; transformers calls it.

    Logits processors and stopping criteria apply as in `model.generate`, each processor to the prefix of every drafted
    token; lengths that they count include a batch's padding, tokens that they read do not. A streamer must be passed as
    `stream_to`, and the tokenizer of `stop_strings`, unless the drafter's target has one, as `stop_tokenizer`, because
    transformers does not hand `streamer` and `tokenizer` to functions. With `return_dict_in_generate` the output holds
    `scores` and `logits` as there, but NaN for rows that have ended. Raises ValueError for processors that cannot be
    applied to drafted tokens, for other decoding modes, such as beam search, for inputs other than token ids with their
    mask, and for a drafter of another model.
    """
    if drafter is not None:
        check_drafter(drafter)
    target = drafter.target if drafter is not None else Target(model)
    if target.model is not model:
        raise ValueError(
            "the drafter was loaded for another model object; load it with Target(model) of this one, or call"
            " drafter.target.model.generate if it fine-tunes its target"
        )
    check_mode(generation_config)
    if generation_config.return_dict_in_generate:
        check_outputs(generation_config)
    _check_dropped(inspect.currentframe())
    _check_inputs(input_ids, inputs_tensor, target, model_kwargs)
    stops, max_length, ends = _stops(stopping_criteria or [], generation_config.max_length)
    if stop_strings is not None:
        stops.append(check_stop_strings(stop_strings, stop_tokenizer or target.tokenizer))
    prompts = input_ids
    if target.is_encoder_decoder and inputs_tensor is not None:
        # transformers repeats its own inputs for num_return_sequences, but not the sources.
        prompts = inputs_tensor.repeat_interleave(len(input_ids) // len(inputs_tensor), dim=0)
    mask = model_kwargs.get("attention_mask")
    own = prompt_rows(prompts, mask)
    num_prompt = [1] * len(own) if target.is_encoder_decoder else list(map(len, own))
    found = check_processors(logits_processor)
    processors, sampling = split_sampling(found, is_sampling=bool(generation_config.do_sample))
    has_scores = bool(generation_config.return_dict_in_generate and generation_config.output_scores)
    settings = {"renormalize_logits": has_scores and is_normalised(found)}
    paddings = [input_ids.shape[1] - num for num in num_prompt]
    out = generate(
        target,
        prompts,
        drafter,
        attention_mask=mask,
        max_new_tokens=max_length - input_ids.shape[1],
        # An id outside the vocabulary turns the end off in transformers.
        eos_token_id=[token for token in ends if 0 <= token < target.vocab_size],
        streamer=stream_to,
        verifier=verifier,
        length=length,
        seed=seed,
        generation_config=sampling.as_settings() | {"do_sample": not sampling.is_greedy} | settings,
        logits_processor=NodeProcessors(for_rows(processors, paddings, own, are_lengths_padded=True)),
        stopping_criteria=stops,
        batch_invariant=batch_invariant,
        output_scores=has_scores,
        output_logits=bool(generation_config.return_dict_in_generate and generation_config.output_logits),
    )
    if target.is_encoder_decoder:
        return _output(target, out, out.sequences, generation_config)
    # transformers returns prompts as given, padding included.
    longest = max(int(end) - prompt for end, prompt in zip(out.lengths, num_prompt, strict=True))
    pad = generation_config.pad_token_id
    fill = pad if pad is not None else (target.eos_token_ids or (0,))[0]
    new = torch.full((len(input_ids), longest), fill, device=input_ids.device)
    for row, (end, prompt) in enumerate(zip(out.lengths.tolist(), num_prompt, strict=True)):
        new[row, : end - prompt] = out.sequences[row, prompt:end]
    return _output(target, out, torch.cat([input_ids, new], dim=1), generation_config)


def _output(target: Target, out: Generation, sequences: Tensor, generation_config: Any) -> Any:
    """Returns what `model.generate` returns: the sequences, or an object with them and with scores and logits."""
    if not generation_config.return_dict_in_generate:
        return sequences
    kind = GenerateEncoderDecoderOutput if target.is_encoder_decoder else GenerateDecoderOnlyOutput
    return kind(sequences=sequences, scores=out.scores, logits=out.logits)


def _stops(stopping_criteria: Any, max_length: int) -> tuple[list[Any], int, list[int]]:
    """Returns the criteria other than lengths and end-of-sequence tokens, the length, padding included, and tokens."""
    stops, ends = [], []
    for criterion in stopping_criteria:
        if isinstance(criterion, criteria.MaxLengthCriteria):
            max_length = min(max_length, criterion.max_length)
        elif isinstance(criterion, criteria.EosTokenCriteria):
            ends += token_ids("eos_token_id", criterion.eos_token_id)
        else:
            stops.append(criterion)
    return stops, max_length, ends


def _check_dropped(frame: Any) -> None:
    """Rejects arguments of `model.generate`, the caller, that transformers does not hand to a function."""
    caller = frame.f_back if frame is not None else None
    given = caller.f_locals if caller is not None and caller.f_code.co_name == "generate" else {}
    if given.get("streamer") is not None:
        raise ValueError(
            "transformers does not hand streamer to a function, so nothing would be streamed; pass it as stream_to"
        )
    if given.get("assistant_model") is not None:
        raise ValueError("assistant_model is not supported together with custom_generate; pass a drafter instead")


def _check_inputs(
    input_ids: Tensor, inputs_tensor: Tensor | None, target: Target, model_kwargs: dict[str, Any]
) -> None:
    """Rejects inputs that draftsmith would ignore: it reads token ids and their mask."""
    for name, value in model_kwargs.items():
        if value is not None and name not in KNOWN_INPUTS:
            raise ValueError(
                f"{name} is not supported by draftsmith, which reads token ids and their mask; leave it out"
            )
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError(
            f"past_key_values holds {int(cache.get_seq_length())} tokens, and draftsmith has a cache of its own; leave"
            " it out and pass all token ids"
        )
    positions = model_kwargs.get("position_ids")
    if positions is not None:
        mask = model_kwargs.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        if positions.ndim == 3 and positions.eq(positions[:1]).all():
            positions = positions[0]  # of time, height and width, which are alike without images
        if positions.ndim != 2 or (positions.ne(mask.cumsum(1) - 1) & mask.bool()).any():
            raise ValueError(
                "position_ids are not those of the prompts, counted from 0 without padding; leave them out"
            )
    if target.is_encoder_decoder:
        start = target.decoder_start_token_id or 0
        if input_ids.shape[1] != 1 or input_ids.ne(start).any():
            raise ValueError(f"decoder_input_ids are not supported; draftsmith begins with token {start}")
        if inputs_tensor is not None and (inputs_tensor.ndim != 2 or (inputs_tensor < 0).all()):
            raise ValueError("the source was given as embeddings or encoder_outputs; pass its token ids as input_ids")
