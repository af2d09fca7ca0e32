"""The target's first blocks as a model of its own, or, where they go through the target's own norm and head, a setting.

In a server the blocks lie in memory twice and keep keys and values of their own, as they do not in draftsmith; what is
drafted is the same. transformers shares the blocks where `assistant_early_exit` will do.
"""

from pathlib import Path
from typing import Any

from draftsmith.export import custom
from draftsmith.export.given import Given
from draftsmith.export.launch import Launch, in_python
from draftsmith.export.models import cut, for_draft_model, for_standalone
from draftsmith.export.models import for_transformers as as_assistant


def draft_model(given: Given) -> Any:
    """Returns the blocks up to the exit with the drafter's norm and head; raises ValueError if more lies between."""
    config = given.config
    if config.num_blocks or config.recycling:
        raise ValueError(
            "an exit with blocks of its own or recycling is no prefix of the target, which is what servers can run;"
            " train one without, or run it with draftsmith or exported --to transformers as a custom_generate folder"
        )
    drafter = given.drafter
    head, norm = drafter.output if config.own_head else None, drafter.norm if config.own_norm else None
    return cut(drafter.target, range(config.exit_layer), norm=norm, head=head)


def for_transformers(given: Given, folder: Path) -> Launch:
    """Writes a generation config, an assistant, or a custom_generate folder: the first of them that will do."""
    config = given.config
    if config.num_blocks or config.recycling:
        return custom.write(given, folder)
    if config.own_norm or config.own_head:
        return as_assistant(draft_model)(given, folder)
    assert given.drafter.config == config  # loaded, so that another target's artifact is refused
    settings = given.generation_config
    settings.update(
        assistant_early_exit=config.exit_layer,
        num_assistant_tokens=config.num_draft,
        num_assistant_tokens_schedule="constant",
    )
    settings.save_pretrained(folder)
    given.save_target(folder)
    return in_python(
        given,
        f"settings = GenerationConfig.from_pretrained({str(given.output)!r})",
        "model.generate(**inputs, generation_config=settings, max_new_tokens=64, do_sample=False)",
        notes=("transformers drafts for one row at a time.",),
        assistant_early_exit=config.exit_layer,
    )


WRITERS = {
    "transformers": for_transformers,
    "vllm": for_draft_model(draft_model),
    "sglang": for_standalone(draft_model),
}
