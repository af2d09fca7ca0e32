"""Exports the target with whole blocks skipped as a draft model."""

from typing import Any

from draftsmith.export.llama_cpp.draft_models import draft_model_writer as llama_cpp_draft_model_writer
from draftsmith.export.models import reduced_model, sglang_draft_model_writer, vllm_draft_model_writer
from draftsmith.export.openvino import draft_model_writer as openvino_draft_model_writer
from draftsmith.export.source import ExportSource

OWN_CACHE = "It has its own KV cache, whereas in draftsmith it reads the target's: the acceptance rate may be lower."


def draft_model(source: ExportSource) -> Any:
    """Returns the reduced model; raises ValueError if only a part of a block is skipped, or nothing is."""
    config = source.config
    skipped = set(config.attention)
    if skipped != set(config.mlp):
        part = sorted(skipped ^ set(config.mlp))
        raise ValueError(
            f"blocks {part} are skipped in part, which an ordinary model cannot do; run it with draftsmith, or export"
            " it --to transformers as a custom_generate folder"
        )
    if not skipped:
        raise ValueError("no block is skipped, so drafting would cost as much as the target; search a mask first")
    return reduced_model(
        source.drafter.target, [block for block in range(source.target_info.num_layers) if block not in skipped]
    )


WRITERS = {
    "vllm": vllm_draft_model_writer(draft_model, OWN_CACHE),
    "sglang": sglang_draft_model_writer(draft_model, OWN_CACHE),
    "llama.cpp": llama_cpp_draft_model_writer(draft_model, OWN_CACHE),
    "openvino": openvino_draft_model_writer(draft_model, OWN_CACHE),
}
