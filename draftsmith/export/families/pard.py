"""Exports PARD's draft models as ordinary models, which vLLM runs in parallel and other engines token by token."""

from typing import Any

from draftsmith.export.models import sglang_draft_model_writer, vllm_draft_model_writer
from draftsmith.export.openvino import draft_model_writer as openvino_draft_model_writer
from draftsmith.export.source import ExportSource

TOKEN_BY_TOKEN = "{} drafts with this model token by token, with as many forwards as tokens."


def draft_model(source: ExportSource) -> Any:
    """Returns the draft model, with the mask token in its configuration; raises ValueError for a tied one."""
    if source.config.rank or source.config.shortlist:
        raise ValueError(
            "a draft model that uses the target's embedding and head (rank) or a shortlist is not an ordinary model;"
            " train one without them, run it with draftsmith, or export it --to transformers as a custom_generate"
            " folder"
        )
    model = source.drafter.model
    model.config.update({"pard_token": source.config.mask_token, "spd_type": "pard"})
    return model


WRITERS = {
    "vllm": vllm_draft_model_writer(draft_model, parallel_drafting=True),
    "sglang": sglang_draft_model_writer(draft_model, TOKEN_BY_TOKEN.format("SGLang")),
    "openvino": openvino_draft_model_writer(draft_model, TOKEN_BY_TOKEN.format("OpenVINO GenAI")),
}
