"""Exports draft models for llama.cpp: a GGUF file of the draft model beside the target's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from draftsmith.export.launch import Launch
from draftsmith.export.llama_cpp import models
from draftsmith.export.llama_cpp.launch import llama_cpp_launch
from draftsmith.export.llama_cpp.targets import drafter_kind, name_values, served_target
from draftsmith.export.models import CHAINS, FIXED, ModelFactory
from draftsmith.export.source import ExportSource
from draftsmith.length import policies
from draftsmith.loading.gguf_contents import write_gguf

DRAFT_FILE = "draft.gguf"
AMONG_TEN = (
    "llama.cpp compares p_min with the drafted token's probability among its ten likeliest, draftsmith with that among"
    " all: a higher threshold drafts about as many tokens."
)
SAMPLED = (
    "--spec-draft-sampling probabilistic accepts more drafts above temperature 0; without it the same seed gives the"
    " text of plain decoding."
)


def draft_model_writer(make_model: ModelFactory, *notes: str) -> Callable[[ExportSource, Path], Launch]:
    """Returns a writer of `make_model`'s model as a draft model of llama.cpp."""

    def write(source: ExportSource, folder: Path) -> Launch:
        served = served_target(source)
        if shape := getattr(source.config, "model", None):  # a draft model of its own, not blocks of the target
            models.check_model(_config_of(shape), f"the draft model in {source.artifact}")
        else:
            models.check_model(source.target_config, source.target_name)
        model = make_model(source)
        values = {
            **name_values(str(source.artifact)),
            **models.model_values(model.config),
            **served.tokenizer,
        }
        architecture = models.ARCHITECTURES[model.config.model_type]
        kind = drafter_kind(source, model.dtype)
        write_gguf(folder / DRAFT_FILE, architecture, values, models.model_tensors(model), kind)
        served.write(folder)
        settings, length_notes = draft_settings(source.config)
        settings = {"spec-draft-model": str(source.output / DRAFT_FILE), **settings}
        settings["spec-draft-sampling"] = "probabilistic"
        return llama_cpp_launch(served, "draft-simple", settings, notes=(*notes, *length_notes, SAMPLED))

    return write


def draft_settings(config: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Returns the flags for a drafter's draft length, and notes on how llama.cpp's drafts differ."""
    settings: dict[str, Any] = {"spec-draft-n-max": config.num_draft}
    notes = (CHAINS,) if getattr(config, "tree", ()) or getattr(config, "width", 0) else ()
    if not config.supports_early_stop or config.length == "fixed":
        return settings, notes
    policy = policies.make(config.length)
    if isinstance(policy, policies.Confidence):
        return settings | {"spec-draft-p-min": policy.threshold}, (*notes, AMONG_TEN)
    return settings, (*notes, FIXED)


def _config_of(shape: dict[str, Any]) -> Any:
    settings = {key: value for key, value in shape.items() if key != "model_type"}
    return AutoConfig.for_model(shape["model_type"], **settings)
