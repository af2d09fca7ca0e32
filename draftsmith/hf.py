"""Use inside transformers: `model.generate(..., custom_generate=draftsmith.custom_generate, drafter=drafter)`."""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerationMode
from transformers.generation import logits_process as processors
from transformers.generation import stopping_criteria as criteria

from draftsmith.core.drafter import Drafter
from draftsmith.core.target import Target
from draftsmith.decoding import generate
from draftsmith.inputs.arguments import check_drafter, token_ids
from draftsmith.length.policies import Policy

WARPERS = (processors.TemperatureLogitsWarper, processors.TopKLogitsWarper, processors.TopPLogitsWarper)
MODE_SETTINGS = (
    "penalty_alpha",
    "dola_layers",
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "use_mtp",
    "constraints",
    "force_words_ids",
)
"""Settings of the generation config by which transformers chooses other decoding modes, beams apart."""
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
CRITERIA = (criteria.MaxLengthCriteria, criteria.EosTokenCriteria)


def custom_generate(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: Any = None,
    drafter: Drafter | None = None,
    verifier: str = "auto",
    length: str | Policy = "auto",
    seed: int | None = None,
    stream_to: Any = None,
    stop_strings: Any = None,
    inputs_tensor: Tensor | None = None,
    **model_kwargs: Any,
) -> Tensor:
    """Returns the sequences of `model.generate`, decoded speculatively with `drafter`; transformers calls it.

    A streamer must be passed as `stream_to`, because transformers does not hand its `streamer` to functions. Raises
    ValueError for logits processors and stopping criteria other than temperature, top-k, top-p, length and
    end-of-sequence, for other decoding modes, such as beam search, for inputs other than token ids with their mask,
    and for a drafter of another model.
    """
    if drafter is not None:
        check_drafter(drafter)
    target = drafter.target if drafter is not None else Target(model)
    if target.model is not model:
        raise ValueError(
            "the drafter was loaded for another model object; load it with Target(model) of this one, or call"
            " drafter.target.model.generate if it fine-tunes its target"
        )
    _check_mode(generation_config, stop_strings)
    _check_dropped(inspect.currentframe())
    _check_inputs(input_ids, inputs_tensor, target, model_kwargs)
    settings = _sampling_settings(logits_processor or [], is_sampling=bool(generation_config.do_sample))
    odd = [type(criterion).__name__ for criterion in stopping_criteria or [] if not isinstance(criterion, CRITERIA)]
    if odd:
        raise ValueError(
            f"stopping criterion {odd[0]} is not supported; draftsmith stops at a length or an end-of-sequence token"
        )
    eos = generation_config.eos_token_id
    ends = () if eos is None else token_ids("eos_token_id", eos)
    prompts = input_ids
    if target.is_encoder_decoder and inputs_tensor is not None:
        # transformers repeats its own inputs for num_return_sequences, but not the sources.
        prompts = inputs_tensor.repeat_interleave(len(input_ids) // len(inputs_tensor), dim=0)
    out = generate(
        target,
        prompts,
        drafter,
        attention_mask=model_kwargs.get("attention_mask"),
        max_new_tokens=generation_config.max_length - input_ids.shape[1],
        # An id outside the vocabulary turns the end off in transformers.
        eos_token_id=[token for token in ends if 0 <= token < target.vocab_size],
        streamer=stream_to,
        verifier=verifier,
        length=length,
        seed=seed,
        **settings,
    )
    if target.is_encoder_decoder:
        return out.sequences
    # transformers returns prompts as given, padding included.
    num_prompt = _prompt_lengths(input_ids, model_kwargs.get("attention_mask"))
    longest = max(int(end) - prompt for end, prompt in zip(out.lengths, num_prompt, strict=True))
    pad = generation_config.pad_token_id
    fill = pad if pad is not None else (target.eos_token_ids or (0,))[0]
    new = torch.full((len(input_ids), longest), fill, device=input_ids.device)
    for row, (end, prompt) in enumerate(zip(out.lengths.tolist(), num_prompt, strict=True)):
        new[row, : end - prompt] = out.sequences[row, prompt:end]
    return torch.cat([input_ids, new], dim=1)


def _check_mode(generation_config: Any, stop_strings: Any) -> None:
    """Rejects decoding modes and outputs that draftsmith does not have."""
    if (generation_config.num_beams or 1) > 1:
        raise ValueError(
            f"num_beams is {generation_config.num_beams}; draftsmith decodes greedily or by sampling, so it must be 1"
        )
    mode = generation_config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        settings = {name: getattr(generation_config, name, None) for name in MODE_SETTINGS}
        given = ", ".join(f"{name}={value!r}" for name, value in settings.items() if value)
        raise ValueError(
            f"the generation config asks for {mode.value.replace('_', ' ')} ({given}), which draftsmith does not do; it"
            " decodes greedily or by sampling"
        )
    if generation_config.return_dict_in_generate:
        raise ValueError(
            "return_dict_in_generate is not supported: only sequences are returned; leave it out, or call"
            " draftsmith.generate"
        )
    if stop_strings is not None:
        raise ValueError("stop_strings is not supported; draftsmith stops at a length or an end-of-sequence token")


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


def _prompt_lengths(input_ids: Tensor, attention_mask: Tensor | None) -> list[int]:
    if attention_mask is None:
        return [input_ids.shape[1]] * len(input_ids)
    return attention_mask.sum(1).tolist()


def _sampling_settings(logits_processor: Any, *, is_sampling: bool) -> dict[str, Any]:
    settings: dict[str, Any] = {"temperature": 1.0 if is_sampling else 0.0}
    for processor in logits_processor:
        if not isinstance(processor, WARPERS):
            name = type(processor).__name__
            raise ValueError(
                f"logits processor {name} is not supported; draftsmith supports temperature, top-k and top-p"
            )
        if isinstance(processor, processors.TemperatureLogitsWarper):
            settings["temperature"] = processor.temperature
        elif isinstance(processor, processors.TopKLogitsWarper):
            settings["top_k"] = processor.top_k
        else:
            settings["top_p"] = processor.top_p
    return settings
