"""Exports draft LMs, including compressed copies of the target, as ordinary models."""

from pathlib import Path
from typing import Any

from draftsmith.export import custom_generate
from draftsmith.export.launch import Launch
from draftsmith.export.llama_cpp.draft_models import draft_model_writer as llama_cpp_draft_model_writer
from draftsmith.export.models import assistant_writer, sglang_draft_model_writer, vllm_draft_model_writer
from draftsmith.export.openvino import draft_model_writer as openvino_draft_model_writer
from draftsmith.export.source import ExportSource


def draft_model(source: ExportSource) -> Any:
    """Returns the draft model; raises ValueError for one with tied heads, a shortlist or quantised weights."""
    if not _is_ordinary(source.config):
        raise ValueError(
            "a draft model that uses the target's embedding and head (rank), a shortlist or quantised weights is not an"
            " ordinary model; train one without them, run it with draftsmith, or export it --to transformers as a"
            " custom_generate folder"
        )
    return source.drafter.model


def for_transformers(source: ExportSource, folder: Path) -> Launch:
    """Writes an assistant if the draft model is an ordinary one, else a custom_generate folder."""
    return (assistant_writer(draft_model) if _is_ordinary(source.config) else custom_generate.write)(source, folder)


def _is_ordinary(config: Any) -> bool:
    return not (config.rank or config.shortlist or config.quantised)


WRITERS = {
    "transformers": for_transformers,
    "vllm": vllm_draft_model_writer(draft_model),
    "sglang": sglang_draft_model_writer(draft_model),
    "llama.cpp": llama_cpp_draft_model_writer(draft_model),
    "openvino": openvino_draft_model_writer(draft_model),
}
