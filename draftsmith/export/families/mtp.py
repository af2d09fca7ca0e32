"""Exports MTP heads as engines read them: the target's own checkpoint, with the head's tensors written back into it."""

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from draftsmith.artifacts.published.mtp import from_drafter
from draftsmith.artifacts.published.mtp_forms import Head, find
from draftsmith.export import custom_generate
from draftsmith.export.launch import LAUNCH, SAMPLES_DRAFTS, Launch, python_launch, sglang_launch, vllm_launch
from draftsmith.export.models import FIXED
from draftsmith.export.source import ExportSource

LEFT_OUT = (".bin", ".gguf", ".pt", ".pth", ".h5", ".msgpack", ".onnx")
"""Endings of files with the same weights in other formats, which would lack the trained head."""
READ_NOT_RUN = "vLLM, whose code of several versions was read and not run for heads of this form"
RUN = "vLLM 0.32.0, which served a tiny checkpoint of this form"
FIRST_ONLY = (
    "vLLM drafts with the first head alone, applied to its own output, as its code says: with several heads it accepts"
    " other tokens after a draft's first than draftsmith."
)
SEVERAL_LAYERS = (
    "SGLang drafts with several heads only with --enable-multi-layer-eagle, and only those of models that it knows, as"
    " its code says; else it drafts with the first."
)
BEFORE_NORM = (
    "vLLM's code, as read, hands the output of heads of this form on before its norm, and draftsmith and transformers"
    " after it: vLLM may accept fewer of the tokens after a draft's first."
)


def transformers(source: ExportSource, folder: Path) -> Launch:
    """Writes the checkpoint if transformers reads the head of its architecture, else a folder for custom_generate."""
    heads = find(source.target_info)
    is_read = all(_is_read_by_transformers(source, head) for head in heads)
    if len(heads) < source.config.num_heads or not is_read:
        return custom_generate.write(source, folder)
    write_checkpoint(source, heads, folder)
    one = f"transformers drafts as many tokens as the checkpoint has heads, {len(heads)}, for a batch of one only."
    return python_launch(
        source,
        "model.generate(**inputs, use_mtp=True, max_new_tokens=64, do_sample=False)",
        target=str(source.output),
        notes=(one, *_notes(source, heads)),
        use_mtp=True,
    )


def vllm(source: ExportSource, folder: Path) -> Launch:
    """Writes the checkpoint that vLLM serves, and drafts with by the method `mtp`."""
    heads = _required(source, "vLLM")
    write_checkpoint(source, heads, folder)
    settings = {"method": "mtp", "num_speculative_tokens": source.config.num_draft} | SAMPLES_DRAFTS
    notes = [*_notes(source, heads), *((BEFORE_NORM,) if "shared_head.norm" in heads[0].form.names else ())]
    if source.config.num_heads > 1:
        notes.append(FIRST_ONLY)
    checked_with = RUN if heads[0].form.models == "MiMo-7B" else READ_NOT_RUN
    return vllm_launch(source, settings, target=str(source.output), checked_with=checked_with, notes=tuple(notes))


def sglang(source: ExportSource, folder: Path) -> Launch:
    """Writes the checkpoint that SGLang serves, and drafts with by the algorithm NEXTN."""
    heads = _required(source, "SGLang")
    write_checkpoint(source, heads, folder)
    num_draft = source.config.num_draft
    settings = {"algorithm": "NEXTN", "num-steps": num_draft, "eagle-topk": 1, "num-draft-tokens": num_draft + 1}
    notes = [*_notes(source, heads), *((SEVERAL_LAYERS,) if source.config.num_heads > 1 else ())]
    return sglang_launch(source, settings, target=str(source.output), notes=tuple(notes))


def write_checkpoint(source: ExportSource, heads: Sequence[Head], folder: Path) -> None:
    """Writes the target's checkpoint with the trained tensors in place of the heads', in the same files and dtypes.

    Files of weights that hold none of them are hard links to the target's, where the file system allows that. Raises
    ValueError if the drafter's tensors are not those of the heads, before anything is written.
    """
    if source.config.num_heads > len(heads):
        raise ValueError(
            f"the drafter has {source.config.num_heads} MTP heads, and the checkpoint of {source.target_name}"
            f" {len(heads)} that can be replaced; train with --num-heads {len(heads)}, or export this one --to"
            " transformers as a custom_generate folder"
        )
    tensors = from_drafter(heads[: source.config.num_heads], source.drafter)
    changed = {head.files[name] for head in heads for name in tensors.keys() & head.files.keys()}
    for file in sorted(one for one in heads[0].folder.iterdir() if one.is_file()):
        if file.name in changed:
            _rewrite(file, folder / file.name, tensors)
        elif file.suffix == ".safetensors":
            _link(file.resolve(), folder / file.name)
        elif file.suffix not in LEFT_OUT and file.name != LAUNCH:
            shutil.copyfile(file, folder / file.name)


def _rewrite(file: Path, to: Path, new: dict[str, Tensor]) -> None:
    with safe_open(file, framework="pt") as opened:
        tensors = {name: new[name] if name in new else opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        metadata = opened.metadata()
    save_file(tensors, to, metadata=metadata)
    with safe_open(to, framework="pt") as opened:
        wrong = [name for name in tensors if not torch.equal(opened.get_tensor(name), tensors[name])]
    if wrong:
        raise ValueError(f"{to.name} was not written as it should be: tensor {wrong[0]} differs; check the disk")


def _link(file: Path, to: Path) -> None:
    try:
        os.link(file, to)
    except OSError:  # another disk, or a file system without links
        shutil.copyfile(file, to)


def _required(source: ExportSource, engine: str) -> list[Head]:
    """Returns the heads of the target's checkpoint; raises ValueError if there are none for the engine to read."""
    if heads := find(source.target_info):
        return heads
    architecture = (source.target_config.architectures or [source.target_config.model_type])[0]
    raise ValueError(
        f"the checkpoint of {source.target_name} has no MTP head, and {engine} reads heads of {architecture} from it"
        " only if it brings them; run this one with draftsmith, or export it --to transformers as a custom_generate"
        " folder"
    )


def _is_read_by_transformers(source: ExportSource, head: Head) -> bool:
    """Returns whether `generate(use_mtp=True)` finds the head: by patterns of its tensors' names (`MtpModel`)."""
    config: Any = source.target_config
    if not getattr(config, "num_mtp_layers", None) or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return False
    patterns = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._keys_to_ignore_on_load_unexpected or ()
    return all(any(re.search(pattern, name) for pattern in patterns) for name in head.files)


def _notes(source: ExportSource, heads: Sequence[Head]) -> tuple[str, ...]:
    notes = []
    if source.config.shortlist:
        notes.append("Engines draft from the whole vocabulary, whereas draftsmith drafts from the shortlist.")
    if source.config.length != "fixed":
        notes.append(FIXED)
    if (there := heads[0].num_heads) > source.config.num_heads:
        ours = "the first was" if source.config.num_heads == 1 else f"the first {source.config.num_heads} were"
        notes.append(f"The checkpoint has {there} MTP heads, of which {ours} trained and written.")
    return tuple(notes)


WRITERS = {"transformers": transformers, "vllm": vllm, "sglang": sglang}
