"""Shared code of composite drafters, whose parts' artifacts are checked before the target's weights load."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from draftsmith import Target
from draftsmith.artifacts.artifact import check_fits, read_manifest
from draftsmith.loading.model_info import TargetInfo
from draftsmith.parts.composites import Part, load_artifact

PLACEHOLDERS: tuple[dict[str, Any], ...] = ({"family": "", "config": {}},) * 2
"""Parts of a composite's Config in its settings, until `fit` has read the artifacts."""


class Settings(Protocol):
    """Settings of a composite."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Folders of the parts' artifacts."""


def check(settings: Settings, target: TargetInfo) -> None:
    """Raises ValueError unless at least two artifacts are named and each was made for this target."""
    if len(settings.parts) < 2:
        raise ValueError(
            f"--parts names {len(settings.parts)} artifact(s); name at least two, as in --parts runs/a runs/b"
        )
    for path in settings.parts:
        check_fits(path, read_manifest(path), target)


def load_parts(paths: Sequence[str], target: Target) -> list[Part]:
    """Returns the drafters of these artifacts."""
    return [load_artifact(Path(path), target) for path in paths]


def prior_train_s(settings: Settings) -> float:
    """Returns the training time of the parts in seconds, as far as their manifests record it."""
    return sum(read_manifest(path).get("train_s") or 0.0 for path in settings.parts)
