"""Composes a trained draft model and a small drafter that speculates for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.batches import Batch, Example
from draftsmith import Target
from draftsmith.artifacts.artifact import check_fits, read_manifest
from draftsmith.core.model_info import TargetFacts
from draftsmith.drafters.staged import Config, Drafter, draft_model_of
from draftsmith.length import policies
from draftsmith.parts.composites import load, named
from trainers import Metrics, Needs
from trainers.corpora import corpus
from trainers.parts import composites
from trainers.training.run_settings import RunSettings
from trainers.training.settings import part_of


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What it is composed of, and how long its drafts are."""

    parts: tuple[str, ...] = ()
    """Folders of two artifacts: of the draft model, and of the drafter that speculates for it, which was made for the
    draft model or, if it goes by the text alone, for the target."""
    num_draft: int = 8
    """Most tokens that the draft model drafts at a time."""
    length: str = "refit=0.4"
    """How long its chains are: a policy of draftsmith/length/policies.py, and its number."""

    def __post_init__(self) -> None:
        if self.num_draft < 1:
            raise ValueError(f"num_draft is {self.num_draft}; it must be at least 1")
        policies.make(self.length)


def check(settings: Settings, facts: TargetFacts) -> None:
    if len(settings.parts) != 2:
        raise ValueError(f"--parts names {len(settings.parts)} artifact(s); name two, the draft model's first")
    check_fits(settings.parts[0], read_manifest(settings.parts[0]), facts)
    read_manifest(settings.parts[1])


def needs(settings: Settings, target: Target) -> Needs:
    return Needs()


def fit(settings: Settings, target: Target, rows: Sequence[Example], run: RunSettings, output: Path) -> Drafter:
    """Returns the drafter composed of the two artifacts."""
    larger = load(settings.parts[0], target)
    draft_model = draft_model_of(larger)
    is_for_target = read_manifest(settings.parts[1])["target"]["fingerprint"] == target.fingerprint
    small = load(settings.parts[1], draft_model, made_for=target if is_for_target else None)
    names = (named(larger.drafter), named(small.drafter))
    return Drafter(part_of(Config, settings, parts=names), target, [larger, small])


def prior_train_s(settings: Settings) -> float:
    return composites.prior_train_s(settings.parts)


def evaluate(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> Metrics:
    return corpus.evaluate(drafter, batch, target)
