"""The target as llama.cpp runs it: the GGUF file it came from, one that the user names, or one that is written."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from draftsmith.export.llama_cpp import models
from draftsmith.export.llama_cpp.tokenizers import check_tokenizer, tokenizer_values
from draftsmith.export.source import ExportSource
from draftsmith.loading.gguf_contents import DTYPE_KINDS, Value, check_kind, check_tokens, read_values, text, write_gguf
from draftsmith.loading.gguf_files import check_installed, read_header
from draftsmith.loading.target_names import original_gguf

TARGET_FILE = "target.gguf"


@dataclass(frozen=True)
class ServedTarget:
    """The target's GGUF file, found or still to be written."""

    source: ExportSource
    given: Path | None
    """The file that is used as it is; None if the export writes one."""

    @property
    def path(self) -> Path:
        """The file's path once the export is complete."""
        return self.given or self.source.output / TARGET_FILE

    @cached_property
    def architecture(self) -> str:
        """llama.cpp's name of the target's architecture."""
        if self.given is None:
            return models.ARCHITECTURES[self.source.target_config.model_type]
        return read_header(self.given).architecture

    @cached_property
    def tokenizer(self) -> dict[str, Value]:
        """The tokenizer's metadata, which every drafter's file repeats."""
        source = self.source
        if self.given is not None:
            return read_values(self.given, "tokenizer.")
        return tokenizer_values(
            source.target_info.tokenizer, source.target_name, source.target_info.vocab_size, _end_ids(source)
        )

    def write(self, folder: Path) -> None:
        """Writes the target's file, unless one is given."""
        if self.given is None:
            model = self.source.drafter.target.model
            values = {**name_values(self.source.target_name), **models.model_values(model.config), **self.tokenizer}
            # The model's own dtype is float32 where the drafter is written with all its digits.
            kind = self.source.quantise_target or DTYPE_KINDS[self.source.target_config.dtype or model.dtype]
            write_gguf(folder / TARGET_FILE, self.architecture, values, models.model_tensors(model), kind)


def served_target(source: ExportSource) -> ServedTarget:
    """Returns the target's file; raises ValueError, before weights load, if it does not fit or cannot be written."""
    for option, kind in (("--quantise", source.quantise), ("--quantise-target", source.quantise_target)):
        if kind:
            check_kind(kind, option)
    check_installed(source.output)
    tunes_target = source.manifest.get("tunes_target")
    given: Path | None = None
    if source.target_name_there:
        if source.quantise_target or tunes_target:
            why = "the drafter has fine-tuned its target" if tunes_target else "--quantise-target writes one"
            raise ValueError(f"--target-name is {source.target_name_there!r}, and {why}; drop one of the two")
        given = Path(source.target_name_there).resolve()
        if not given.is_file():
            raise ValueError(f"--target-name is {source.target_name_there!r}; for llama.cpp it must be a GGUF file")
        _check_named(source, given)
    elif not source.quantise_target and not tunes_target:
        given = original_gguf(source.target_info.name)
    served = ServedTarget(source, given)
    if given is None:
        models.check_model(source.target_config, source.target_name)
        check_tokenizer(source.target_info.tokenizer, source.target_name)
    return served


def drafter_kind(source: ExportSource, dtype: Any) -> str:
    """Returns the type of the drafter's matrices: the one that the user wants, or that of `dtype`."""
    return source.quantise or DTYPE_KINDS[dtype]


def name_values(name: str) -> dict[str, Value]:
    """Returns the metadata that names a model."""
    return {"general.name": text(Path(name).name)}


def _end_ids(source: ExportSource) -> tuple[int, ...]:
    found = source.generation_config.eos_token_id
    return tuple(found) if isinstance(found, list | tuple) else () if found is None else (found,)


def _check_named(source: ExportSource, path: Path) -> None:
    """Raises ValueError if a GGUF file that the user names is of another model than the target."""
    header, info = read_header(path), source.target_info
    architecture = header.architecture
    for key, expected in (("embedding_length", info.hidden_size), ("block_count", info.num_layers)):
        found = header.metadata.get(f"{architecture}.{key}")
        # Files of targets with layers for multi-token prediction count those too.
        found = found - header.metadata.get(f"{architecture}.nextn_predict_layers", 0) if found else found
        if found != expected:
            raise ValueError(
                f"{path}: {architecture}.{key} is {found}, and target {source.target_name} has {expected}; name a GGUF"
                " file of that target"
            )
    check_tokens(read_values(path, "tokenizer."), path, info)
