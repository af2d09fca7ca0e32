"""Composes a trained draft model and a smaller drafter that drafts for it."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoConfig

from data.batches import Example
from draftsmith import Target
from draftsmith.artifacts.artifact import check_fits, family_of, read_manifest
from draftsmith.core.architectures.supported import has_recurrent_layers
from draftsmith.drafters.staged import Config, Drafter, draft_model_of
from draftsmith.loading.model_info import TargetInfo
from draftsmith.parts.composites import load_artifact, part_config
from trainers.corpora import evaluation
from trainers.parts import composites
from trainers.training.run_settings import RunSettings

NOTHING_TO_ESTIMATE = "nothing is trained: it combines drafters that exist"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Parts, and the length of the draft model's drafts."""

    parts: tuple[str, ...] = ()
    """Folders of two artifacts: the draft model, and the smaller drafter, which was made for the draft model or, if it
    reads the text alone, for the target."""
    config: Config = field(default=Config(parts=composites.PLACEHOLDERS), metadata={"omit": ("parts",)})


prior_train_s = composites.prior_train_s
needs, evaluate = evaluation.needs, evaluation.evaluate


def check(settings: Settings, target: TargetInfo) -> None:
    """Raises ValueError unless two artifacts are named and the first has a draft model that fits, for this target."""
    if len(settings.parts) != 2:
        raise ValueError(f"--parts names {len(settings.parts)} artifact(s); name two, the draft model's first")
    first, manifest = settings.parts[0], read_manifest(settings.parts[0])
    check_fits(first, manifest, target)
    if not family_of(manifest, first).Drafter.has_draft_model:
        raise ValueError(
            f"--parts {first} is of family {manifest['family']!r}, which has no draft model; name the artifact of a"
            " draft LM first, made by ./launch.sh distill"
        )
    model = dict(manifest["config"].get("model") or {})
    if "model_type" in model and has_recurrent_layers(AutoConfig.for_model(**model).get_text_config(decoder=True)):
        raise ValueError(
            f"--parts {first} has a draft model with recurrent layers, {model['model_type']}, whose state cannot be set"
            " back; name first one that has attention alone"
        )
    read_manifest(settings.parts[1])


def fit(settings: Settings, target: Target, rows: Sequence[Example], run: RunSettings, output: Path) -> Drafter:
    """Returns the drafter composed of the two artifacts."""
    larger = load_artifact(settings.parts[0], target)
    draft_model = draft_model_of(larger)
    is_for_target = read_manifest(settings.parts[1])["target"]["fingerprint"] == target.fingerprint
    small = load_artifact(settings.parts[1], draft_model, made_for=target if is_for_target else None)
    names = (part_config(larger.drafter), part_config(small.drafter))
    return Drafter(dataclasses.replace(settings.config, parts=names), target, [larger, small])
