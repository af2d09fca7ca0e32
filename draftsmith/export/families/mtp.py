"""Exports MTP heads as engines read them: the target's own checkpoint, with the head's tensors written back into it."""

import os
import re
import shutil
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
READ_NOT_RUN = "vLLM, whose code of several versions was read and not run"
BEFORE_NORM = (
    "vLLM's code, as read, hands the output of heads of this form on before its norm, and draftsmith and transformers"
    " after it: vLLM may accept fewer of the tokens after a draft's first."
)


def transformers(source: ExportSource, folder: Path) -> Launch:
    """Writes the checkpoint if transformers reads the head of its architecture, else a folder for custom_generate."""
    head = find(source.target_info)
    if head is None or not _is_read_by_transformers(source, head):
        return custom_generate.write(source, folder)
    write_checkpoint(source, head, folder)
    one = f"transformers drafts as many tokens as the checkpoint has heads, {head.num_heads}, for a batch of one only."
    return python_launch(
        source,
        "model.generate(**inputs, use_mtp=True, max_new_tokens=64, do_sample=False)",
        target=str(source.output),
        notes=(one, *_notes(source, head)),
        use_mtp=True,
    )


def vllm(source: ExportSource, folder: Path) -> Launch:
    """Writes the checkpoint that vLLM serves, and drafts with by the method `mtp`."""
    head = _required(source, "vLLM")
    write_checkpoint(source, head, folder)
    settings = {"method": "mtp", "num_speculative_tokens": source.config.num_draft} | SAMPLES_DRAFTS
    notes = (*_notes(source, head), *((BEFORE_NORM,) if "shared_head.norm" in head.form.names else ()))
    return vllm_launch(source, settings, target=str(source.output), checked_with=READ_NOT_RUN, notes=notes)


def sglang(source: ExportSource, folder: Path) -> Launch:
    """Writes the checkpoint that SGLang serves, and drafts with by the algorithm NEXTN."""
    head = _required(source, "SGLang")
    write_checkpoint(source, head, folder)
    num_draft = source.config.num_draft
    settings = {"algorithm": "NEXTN", "num-steps": num_draft, "eagle-topk": 1, "num-draft-tokens": num_draft + 1}
    return sglang_launch(source, settings, target=str(source.output), notes=_notes(source, head))


def write_checkpoint(source: ExportSource, head: Head, folder: Path) -> None:
    """Writes the target's checkpoint with the trained tensors in place of the head's, in the same files and dtypes.

    Files of weights that hold none of them are hard links to the target's, where the file system allows that. Raises
    ValueError if the drafter's tensors are not those of the head, before anything is written.
    """
    tensors = from_drafter(head, source.drafter)
    changed = {head.files[name] for name in tensors}
    for file in sorted(one for one in head.folder.iterdir() if one.is_file()):
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


def _required(source: ExportSource, engine: str) -> Head:
    """Returns the head of the target's checkpoint; raises ValueError if there is none for the engine to read."""
    if (head := find(source.target_info)) is not None:
        return head
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


def _notes(source: ExportSource, head: Head) -> tuple[str, ...]:
    notes = []
    if source.config.shortlist:
        notes.append("Engines draft from the whole vocabulary, whereas draftsmith drafts from the shortlist.")
    if source.config.length != "fixed":
        notes.append(FIXED)
    if head.num_heads > 1:
        notes.append(f"The checkpoint has {head.num_heads} MTP heads, of which the first was trained and written.")
    return tuple(notes)


WRITERS = {"transformers": transformers, "vllm": vllm, "sglang": sglang}
