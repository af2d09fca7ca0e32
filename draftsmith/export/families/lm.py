"""Draft LMs, compressed copies of the target among them, as ordinary models."""

from pathlib import Path
from typing import Any

from draftsmith.export import custom
from draftsmith.export.given import Given
from draftsmith.export.launch import Launch
from draftsmith.export.models import for_draft_model, for_standalone
from draftsmith.export.models import for_transformers as as_assistant


def draft_model(given: Given) -> Any:
    """Returns the model; raises ValueError for one with the target's ends, a short head or packed weights."""
    if not _is_whole(given.config):
        raise ValueError(
            "a draft model whose head is the target's (rank), short (shortlist) or whose weights are packed once loaded"
            " (quantised) is no ordinary model; make one without, or run it with draftsmith, or --to transformers as a"
            " custom_generate folder"
        )
    return given.drafter.model


def for_transformers(given: Given, folder: Path) -> Launch:
    """Writes an assistant if the model is an ordinary one, else a custom_generate folder."""
    return (as_assistant(draft_model) if _is_whole(given.config) else custom.write)(given, folder)


def _is_whole(config: Any) -> bool:
    return not (config.rank or config.shortlist or config.quantised)


WRITERS = {
    "transformers": for_transformers,
    "vllm": for_draft_model(draft_model),
    "sglang": for_standalone(draft_model),
}
