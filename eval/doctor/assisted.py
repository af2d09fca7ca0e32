"""Acceptance of a draft model in transformers' assisted generation, counted from the target's forwards."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from draftsmith import Target
from draftsmith.core.drafter import Drafter
from eval.doctor.teacher_forced import DraftCounts


def assistant_of(drafter: Drafter) -> PreTrainedModel | None:
    """Returns the drafter's language model if transformers can use it as an assistant, else None."""
    model = drafter.draft_model.model if isinstance(drafter, nn.Module) and drafter.draft_model is not None else None
    if not isinstance(model, PreTrainedModel) or drafter.target.is_encoder_decoder or not model.can_generate():
        return None
    return model if model.config.vocab_size == drafter.target.vocab_size else None


@torch.inference_mode()
def run_assisted(
    target: Target, assistant: PreTrainedModel, prompts: Sequence[list[int]], num_draft: int, max_new_tokens: int
) -> tuple[DraftCounts, list[list[int]]]:
    """Runs `generate(assistant_model=)` with drafts of `num_draft` tokens; returns counts and new tokens.

    Every forward of the target reads the pending token and the draft, the first one also the prompt. The start of the
    next forward shows how much was accepted. The last draft, cut short by the end of the text, is not counted.
    """
    before = assistant.generation_config
    assistant.generation_config = GenerationConfig(
        num_assistant_tokens=num_draft, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
    )
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=(target.eos_token_ids or (0,))[0]
    )
    counts, texts = DraftCounts(), []
    try:
        for prompt in prompts:
            calls: list[tuple[int, int]] = []

            def record(_: Any, args: Any, kwargs: Any, calls: list[tuple[int, int]] = calls) -> None:
                past = kwargs.get("past_key_values")
                calls.append((0 if past is None else past.get_seq_length(), kwargs["input_ids"].shape[1]))

            hook = target.model.register_forward_pre_hook(record, with_kwargs=True)
            try:
                ids = torch.tensor([prompt], device=target.device)
                out = target.model.generate(
                    ids, attention_mask=torch.ones_like(ids), generation_config=config, assistant_model=assistant
                )
            finally:
                hook.remove()
            texts.append(out[0, len(prompt) :].tolist())
            # A forward that begins at `past` has past + 1 committed tokens before its draft, the first the prompt.
            starts = [len(prompt), *(past + 1 for past, _ in calls[1:])]
            ends = [past + num_read for past, num_read in calls]
            for start, end, following in zip(starts, ends, starts[1:], strict=False):
                counts.add(end - start, following - start - 1)
    finally:
        assistant.generation_config = before
    return counts, texts
