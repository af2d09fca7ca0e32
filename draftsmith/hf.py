"""Use inside transformers: `model.generate(..., custom_generate=draftsmith.custom_generate, drafter=drafter)`."""

from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process as processors
from transformers.generation import stopping_criteria as criteria

from draftsmith.core.drafter import Drafter
from draftsmith.core.target import Target
from draftsmith.decoding import generate
from draftsmith.length.policies import Policy

WARPERS = (processors.TemperatureLogitsWarper, processors.TopKLogitsWarper, processors.TopPLogitsWarper)
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
    inputs_tensor: Tensor | None = None,
    **model_kwargs: Any,
) -> Tensor:
    """Returns the sequences of `model.generate`, decoded speculatively with `drafter`; transformers calls it.

    Raises ValueError for logits processors and stopping criteria other than temperature, top-k, top-p, length and
    end-of-sequence, for beam search, and for a drafter of another model.
    """
    target = drafter.target if drafter is not None else Target(model)
    if target.model is not model:
        raise ValueError(
            "the drafter was loaded for another model object; load it with Target(model) of this one, or call"
            " drafter.target.model.generate if it fine-tunes its target"
        )
    if (generation_config.num_beams or 1) > 1:
        raise ValueError(
            f"num_beams is {generation_config.num_beams}; draftsmith decodes greedily or by sampling, so it must be 1"
        )
    if generation_config.return_dict_in_generate:
        raise ValueError(
            "return_dict_in_generate is not supported: only sequences are returned; leave it out, or call"
            " draftsmith.generate"
        )
    settings = _sampling_settings(logits_processor or [], is_sampling=bool(generation_config.do_sample))
    odd = [type(criterion).__name__ for criterion in stopping_criteria or [] if not isinstance(criterion, CRITERIA)]
    if odd:
        raise ValueError(
            f"stopping criterion {odd[0]} is not supported; draftsmith stops at a length or an end-of-sequence token"
        )
    eos = generation_config.eos_token_id
    out = generate(
        target,
        inputs_tensor if inputs_tensor is not None and target.is_encoder_decoder else input_ids,
        drafter,
        attention_mask=model_kwargs.get("attention_mask"),
        max_new_tokens=generation_config.max_length - input_ids.shape[1],
        eos_token_id=() if eos is None else eos,
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
