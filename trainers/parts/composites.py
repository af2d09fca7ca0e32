"""Drafters composed of trained ones: their artifacts, checked before the target's weights load."""

from collections.abc import Sequence
from pathlib import Path

from draftsmith import Target
from draftsmith.artifacts.artifact import check_fits, read_manifest
from draftsmith.core.model_info import TargetFacts
from draftsmith.parts.composites import Part, load


def check_parts(paths: Sequence[str], facts: TargetFacts) -> None:
    """Raises ValueError unless at least two artifacts are named and each was made for this target."""
    if len(paths) < 2:
        raise ValueError(f"--parts names {len(paths)} artifact(s); name at least two, as in --parts runs/a runs/b")
    for path in paths:
        check_fits(path, read_manifest(path), facts)


def load_parts(paths: Sequence[str], target: Target) -> list[Part]:
    """Returns the drafters of these artifacts."""
    return [load(Path(path), target) for path in paths]


def prior_train_s(paths: Sequence[str]) -> float:
    """Returns the seconds that their training took, as far as their manifests say."""
    return sum(read_manifest(path).get("train_s") or 0.0 for path in paths)
