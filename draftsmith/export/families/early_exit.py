"""Exports the target's first blocks as a draft model, or as a setting where the target's own norm and head are used.

Unlike draftsmith, servers keep these blocks in memory twice, with a KV cache of their own; the drafts are the same.
transformers shares the blocks with `assistant_early_exit`.
"""

from pathlib import Path
from typing import Any

from draftsmith.export import custom_generate
from draftsmith.export.launch import Launch, python_launch
from draftsmith.export.llama_cpp.draft_models import draft_model_writer as llama_cpp_draft_model_writer
from draftsmith.export.models import (
    ASSISTED,
    SCIKIT_LEARN,
    assistant_settings,
    assistant_writer,
    length_notes,
    reduced_model,
    sglang_draft_model_writer,
    vllm_draft_model_writer,
)
from draftsmith.export.openvino import draft_model_writer as openvino_draft_model_writer
from draftsmith.export.source import ExportSource


def draft_model(source: ExportSource) -> Any:
    """Returns the blocks up to the exit with the drafter's norm and head; raises ValueError if it has more layers."""
    config = source.config
    if config.shortlist:
        raise ValueError(
            "an exit with a shortlist computes part of the LM head, no prefix of the target; train one without,"
            " or run it with draftsmith or exported --to transformers as a custom_generate folder"
        )
    if config.num_blocks or config.recycling:
        raise ValueError(
            "an exit with its own blocks or recycling is not a prefix of the target, and servers can run only a prefix;"
            " train one without, or run it with draftsmith or exported --to transformers as a custom_generate folder"
        )
    drafter = source.drafter
    head, norm = drafter.output if config.own_head else None, drafter.norm if config.own_norm else None
    return reduced_model(drafter.target, range(config.exit_layer), norm=norm, head=head)


def for_transformers(source: ExportSource, folder: Path) -> Launch:
    """Writes a generation config, an assistant or a custom_generate folder, the first that can express the drafter.

    The assistant of an early exit is the model itself. It reads the draft length from its own generation config, in
    which the exit layer would make the assistant draft for itself without end: that is an argument of `generate`.
    """
    config = source.config
    if config.num_blocks or config.recycling or config.shortlist:
        return custom_generate.write(source, folder)
    if config.own_norm or config.own_head:
        return assistant_writer(draft_model)(source, folder)
    assert source.drafter.config == config  # loading the drafter rejects an artifact of another target
    settings = source.generation_config
    settings.update(**assistant_settings(config))
    settings.save_pretrained(folder)
    source.save_target(folder)
    return python_launch(
        source,
        f"model.generation_config = GenerationConfig.from_pretrained({str(source.output)!r})",
        f"model.generate(**inputs, assistant_early_exit={config.exit_layer}, max_new_tokens=64, do_sample=False)",
        notes=(*_length_notes(config), ASSISTED),
        assistant_early_exit=config.exit_layer,
    )


def _length_notes(config: Any) -> tuple[str, ...]:
    # transformers moves the threshold of assistant models only.
    return tuple(note for note in length_notes(config) if note != SCIKIT_LEARN)


WRITERS = {
    "transformers": for_transformers,
    "vllm": vllm_draft_model_writer(draft_model),
    "sglang": sglang_draft_model_writer(draft_model),
    "llama.cpp": llama_cpp_draft_model_writer(draft_model),
    "openvino": openvino_draft_model_writer(draft_model),
}
