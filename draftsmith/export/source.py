"""The source of an export: an artifact, its target, and the path of the output folder."""

import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig

from draftsmith.artifacts import artifact
from draftsmith.core.target import Target
from draftsmith.loading import remote_code
from draftsmith.loading.model_info import TargetInfo, read_target_info
from draftsmith.loading.target_names import model_folder

TARGET = "target"
"""Subfolder of an export with the target that the drafter has fine-tuned."""
PRECISE_TYPES = ("f32", "f16")
"""llama.cpp's types of matrices that can hold more digits than the target's dtype."""


@dataclass(frozen=True, kw_only=True)
class ExportSource:
    """An artifact to be exported; weights are loaded on first use."""

    artifact: Path
    manifest: dict[str, Any]
    config: Any
    """The family's configuration."""
    target_info: TargetInfo
    output: Path
    """Final path of the exported folder, which is written elsewhere first."""
    target_name_there: str = ""
    """The target's folder, hub name or converted files where the export will be used; if empty, as here."""
    quantise: str = ""
    """The engine's type of the drafter's matrices; if empty, one that keeps the target's dtype."""
    quantise_target: str = ""
    """The same for the target, which is written anew if this is set."""

    @property
    def family(self) -> str:
        return self.manifest["family"]

    @property
    def target_name(self) -> str:
        """The target's absolute folder or hub name; of a GGUF file or a named target, the folder it is converted to."""
        folder = model_folder(self.target_info.name)
        return str(Path(folder).resolve()) if Path(folder).is_dir() else folder

    @property
    def verifier_name(self) -> str:
        """The name of the target in an export that may be moved: the one given, a hub name, or a relative folder."""
        if self.target_name_there or not Path(self.target_info.name).is_dir():
            return self.target_name_there or self.target_name
        return os.path.relpath(self.target_name, self.output)

    @property
    def served_model(self) -> str:
        """The model that the server runs: the user's target, or the fine-tuned one in the export."""
        return str(self.output / TARGET) if self.manifest.get("tunes_target") else self.target_name

    @cached_property
    def target_config(self) -> Any:
        """The transformers configuration of the target's text model."""
        name = model_folder(self.target_info.name, needs_weights=False)
        return AutoConfig.from_pretrained(name, trust_remote_code=remote_code.is_allowed()).get_text_config(
            decoder=True
        )

    @cached_property
    def generation_config(self) -> Any:
        """The target's generation configuration, derived from its model configuration if it has none."""
        try:
            return GenerationConfig.from_pretrained(model_folder(self.target_info.name, needs_weights=False))
        except OSError:
            return GenerationConfig.from_model_config(self.target_config)

    @cached_property
    def drafter(self) -> Any:
        """The loaded drafter; raises ValueError if it was made for other weights.

        It has the target's dtype, but float32 if the user names a type that keeps more of the artifact's digits.
        """
        dtype = "float32" if self.quantise in PRECISE_TYPES else "auto"
        return artifact.load(self.artifact, Target.from_pretrained(self.target_info.name, device="cpu", dtype=dtype))

    def copy_artifact(self, folder: Path) -> None:
        """Copies the artifact's own files to `folder`, without other files of the run."""
        for file in artifact.own_files(self.artifact):
            copy = folder / file.relative_to(self.artifact)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)

    def save_target(self, folder: Path) -> None:
        """Writes the target to a subfolder if the drafter has fine-tuned it."""
        if self.manifest.get("tunes_target"):
            self.drafter.target.model.save_pretrained(folder / TARGET)
            self.save_tokenizer(folder / TARGET)

    def save_tokenizer(self, folder: Path) -> None:
        """Writes the target's tokenizer, if it has one."""
        if self.target_info.tokenizer is not None:
            self.target_info.tokenizer.save_pretrained(folder)


def open_source(
    path: Path,
    manifest: dict[str, Any],
    output: Path,
    target: str | None,
    target_name_there: str = "",
    *,
    quantise: str = "",
    quantise_target: str = "",
) -> ExportSource:
    """Returns the source of an export without loading weights; raises ValueError if artifact and target do not fit."""
    name = manifest["target"]["name"] if target is None else target
    try:
        target_info = read_target_info(name)
    except ValueError as error:
        if target is not None:
            raise
        raise ValueError(f"{error}; name the artifact's target with --target") from None
    artifact.check_fits(path, manifest, target_info)
    artifact.own_files(path)
    config = artifact.make_config(
        artifact.family_of(manifest, path).Config, manifest["config"], path / artifact.MANIFEST
    )
    return ExportSource(
        artifact=path,
        manifest=manifest,
        config=config,
        target_info=target_info,
        output=output,
        target_name_there=target_name_there,
        quantise=quantise,
        quantise_target=quantise_target,
    )
