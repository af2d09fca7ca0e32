"""What an export starts from: an artifact, its target, and where the folder will lie."""

import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig

from draftsmith.artifacts import artifact
from draftsmith.core.drafter import find
from draftsmith.core.model_info import TargetFacts, read_facts
from draftsmith.core.target import Target

TARGET = "target"
"""Folder within an export of the target that a drafter has changed."""


@dataclass(frozen=True, kw_only=True)
class Given:
    """An artifact to be exported, which is read as far as it is asked for."""

    artifact: Path
    manifest: dict[str, Any]
    config: Any
    """The family's own."""
    facts: TargetFacts
    output: Path
    """Where the folder will lie when it is whole."""

    @property
    def family(self) -> str:
        return self.manifest["family"]

    @property
    def target_name(self) -> str:
        """The target as a server is told of it: its folder, or its hub name."""
        return str(Path(self.facts.name).resolve()) if Path(self.facts.name).is_dir() else self.facts.name

    @property
    def served(self) -> str:
        """The target that the server runs: the user's, or the changed one in the export."""
        return str(self.output / TARGET) if self.manifest.get("tunes_target") else self.target_name

    @cached_property
    def target_config(self) -> Any:
        """The target's transformers configuration, that of the text model in a larger one."""
        return AutoConfig.from_pretrained(self.facts.name).get_text_config(decoder=True)

    @cached_property
    def generation_config(self) -> Any:
        """The target's generation settings."""
        try:
            return GenerationConfig.from_pretrained(self.facts.name)
        except OSError:
            return GenerationConfig.from_model_config(self.target_config)

    @cached_property
    def drafter(self) -> Any:
        """The drafter with its target, in the target's dtype; raises ValueError if it was made for other weights."""
        return artifact.load(self.artifact, Target.from_pretrained(self.facts.name, device="cpu"))

    def copy_artifact(self, folder: Path) -> None:
        """Writes a copy of the artifact, without what else a run has left beside it."""
        for file in artifact.own_files(self.artifact):
            copy = folder / file.relative_to(self.artifact)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)

    def save_target(self, folder: Path) -> None:
        """Writes the target that the drafter has changed, if it has, beside what else is in the export."""
        if self.manifest.get("tunes_target"):
            self.drafter.target.model.save_pretrained(folder / TARGET)
            self.save_tokenizer(folder / TARGET)

    def save_tokenizer(self, folder: Path) -> None:
        """Writes the target's tokenizer, if it has one."""
        if self.facts.tokenizer is not None:
            self.facts.tokenizer.save_pretrained(folder)


def read_given(path: Path, manifest: dict[str, Any], output: Path, target: str | None) -> Given:
    """Returns what is to be exported, no weights read; raises ValueError if the artifact or its target cannot be."""
    name = manifest["target"]["name"] if target is None else target
    try:
        facts = read_facts(name)
    except ValueError as error:
        if target is not None:
            raise
        raise ValueError(f"{error}; say where the artifact's target lies with --target") from None
    artifact.check_fits(path, manifest, facts)
    config = artifact.make_config(find(manifest["family"]).Config, manifest["config"], path / artifact.MANIFEST)
    return Given(artifact=path, manifest=manifest, config=config, facts=facts, output=output)
