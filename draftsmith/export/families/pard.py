"""Exports PARD's draft models as ordinary models, which vLLM runs in parallel and other engines token by token.

No engine adds the target's features. A model that has them is trained to draft without them too, and is exported so.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from draftsmith.export.launch import Launch
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


def without_features(
    write: Callable[[ExportSource, Path], Launch], engine: str
) -> Callable[[ExportSource, Path], Launch]:
    """Returns a writer whose notes say what a model with features accepts without them."""

    def noted(source: ExportSource, folder: Path) -> Launch:
        launch = write(source, folder)
        if not source.config.features:
            return launch
        note = f"{engine} does not add the target's features, so that fewer tokens are accepted than by draftsmith"
        measured = source.manifest.get("measured_acceptance") or {}
        alone, whole = (measured.get(name) for name in ("acceptance_without_features", "acceptance"))
        if alone is not None and whole is not None:
            note += f": on held-out text {alone:.2f} a draft instead of {whole:.2f}"
        return dataclasses.replace(launch, notes=(f"{note}.", *launch.notes))

    return noted


WRITERS = {
    "vllm": without_features(vllm_draft_model_writer(draft_model, parallel_drafting=True), "vLLM"),
    "sglang": without_features(sglang_draft_model_writer(draft_model, TOKEN_BY_TOKEN.format("SGLang")), "SGLang"),
    "openvino": without_features(
        openvino_draft_model_writer(draft_model, TOKEN_BY_TOKEN.format("OpenVINO GenAI")), "OpenVINO GenAI"
    ),
}
