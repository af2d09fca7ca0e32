"""Artifacts: a folder with `draft_config.json`, the drafter's weights or store and a card, bound to one target.

No pickle; written whole or not at all; refused for another target, tokenizer or vocabulary.
"""

import dataclasses
import difflib
import json
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import safetensors
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from draftsmith.artifacts import hub
from draftsmith.artifacts.files import atomic_folder
from draftsmith.artifacts.model_card import CARD, WEIGHTS, card, is_hub_name, keep_edited, warn_of_kept
from draftsmith.artifacts.provenance import made_with
from draftsmith.core.drafter import find, name_of, names
from draftsmith.core.model_info import TargetFacts
from draftsmith.core.target import Target

FORMAT_VERSION = 1
MANIFEST = "draft_config.json"
LAYER_INDEX = "hidden[0] is the embedding output, hidden[i] the output of the i-th block, un-normed"


def save(drafter: Any, path: str | Path, target: Target, *, record: dict[str, Any] | None = None) -> None:
    """Writes `drafter` to the folder `path`, replacing an artifact there; `record` is added to the manifest.

    A drafter with a store of its own defines `save_store(folder)` and, on its class, `load_store(folder, config,
    target)`, after which its weights are read, if it has any. One that has tuned its target is bound to the target as
    it was before. A README.md that was edited by hand is kept beside the new one. Raises ValueError if `path` holds
    something else.
    """
    target = target.base if tunes_target(drafter) and target is drafter.target else target
    family = name_of(drafter)
    assert family in names()
    manifest = (
        {
            "format_version": FORMAT_VERSION,
            "family": family,
            "config": dataclasses.asdict(drafter.config),
            "target": {"name": target.name, "fingerprint": target.fingerprint},
            "tokenizer_hash": target.tokenizer_hash,
            "vocab_size": target.vocab_size,
            "layer_index": LAYER_INDEX,
            "acceptance_mode": "lossless",
            "tunes_target": tunes_target(drafter),
            "made_with": made_with(target),
        }
        | provenance()
        | (record or {})
    )
    with atomic_folder(Path(path), marker=MANIFEST) as folder:
        if isinstance(drafter, nn.Module):
            save_file({name: tensor.contiguous() for name, tensor in own_tensors(drafter).items()}, folder / WEIGHTS)
        if hasattr(drafter, "save_store"):
            drafter.save_store(folder)
        written = (file for file in folder.rglob("*") if file.is_file() and file.name != CARD)
        files = sorted(str(file.relative_to(folder)) for file in written)
        (folder / MANIFEST).write_text(json.dumps(manifest | {"files": files}, indent=1) + "\n")
        kept = keep_edited(Path(path), folder)
        (folder / CARD).write_text(card(manifest, folder / WEIGHTS))
    warn_of_kept(Path(path), kept)


def tunes_target(drafter: Any) -> bool:
    """Returns whether the drafter drafts for a target that it has fine-tuned, and not for the one it was loaded with."""
    return hasattr(drafter, "loaded") and drafter.target.base is not drafter.target


def load(path: str | Path, target: Target, *, made_for: Target | None = None) -> Any:
    """Returns the drafter saved at `path`, ready to draft for `target`, or for `drafter.target` if it has tuned that.

    `path` is a folder, or a repository of the hub (owner/name). With `made_for` it was made for that one, and `target`
    is another of the same vocabulary. Raises ValueError if it was made for another target or tokenizer, or if a file is
    missing, truncated or odd.
    """
    folder = local_folder(path)
    manifest = read_manifest(folder)
    check_fits(folder, manifest, made_for or target)
    module = find(manifest["family"])
    config = make_config(module.Config, manifest["config"], folder / MANIFEST)
    made = getattr(module.Drafter, "load_store", None)
    drafter = made(folder, config, target) if made is not None else module.Drafter(config, target)
    if isinstance(drafter, nn.Module):
        _load_weights(drafter, folder / WEIGHTS)
        drafter.eval().requires_grad_(False)
        getattr(drafter, "loaded", lambda: None)()
    return drafter


def local_folder(path: str | Path) -> Path:
    """Returns the folder, that of a local copy if `path` is no folder but can be a repository of the hub."""
    return hub.download(path) if isinstance(path, str) and is_hub_name(path) else Path(path)


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Returns an artifact's manifest; raises ValueError if there is none or it cannot be understood."""
    folder = local_folder(path)
    file = folder / MANIFEST
    if not folder.is_dir():
        raise ValueError(f"artifact {path}: no such folder")
    if not file.is_file():
        raise ValueError(f"{path} is no draftsmith artifact: it has no {MANIFEST}")
    try:
        manifest = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}); the artifact must be made again") from error
    if not isinstance(manifest, dict):
        raise ValueError(f"{file} holds no JSON object; the artifact must be made again")
    missing = {"format_version", "family", "config", "target", "vocab_size"} - set(manifest)
    if missing:
        raise ValueError(f"{file} lacks {', '.join(sorted(missing))}; the artifact must be made again")
    if manifest["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{file} has format version {manifest['format_version']}, this draftsmith reads {FORMAT_VERSION}"
        )
    return manifest


def own_files(folder: Path) -> list[Path]:
    """Returns an artifact's manifest, weights and store, not its card nor what else lies in its folder."""
    names = read_manifest(folder).get("files")
    if names is None:
        # It was made before manifests named files.
        return sorted(file for file in folder.rglob("*") if file.is_file() and file.name != CARD)
    return [folder / name for name in sorted([*names, MANIFEST])]


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Returns the module's state, each shared tensor under its first name only."""
    seen: set[tuple[int, tuple[int, ...]]] = set()
    tensors = {}
    for name, tensor in module.state_dict().items():
        place = (tensor.data_ptr(), tuple(tensor.shape))
        if place not in seen or tensor.numel() == 0:
            seen.add(place)
            tensors[name] = tensor
    return tensors


def _load_weights(drafter: nn.Module, file: Path) -> None:
    if not file.is_file():
        raise ValueError(f"{file} is missing; the artifact must be made again")
    try:
        tensors = load_file(file)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{file} is truncated or no safetensors file ({error}); the artifact must be made again"
        ) from error
    expected = own_tensors(drafter)
    for name in sorted(expected.keys() ^ tensors.keys()):
        raise ValueError(f"{file}: tensor {name!r} is {'missing' if name in expected else 'not part of this drafter'}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{file}: {name!r} has shape {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}"
            )
    drafter.load_state_dict(tensors, strict=False)


def check_fits(folder: str | Path, manifest: dict[str, Any], target: Target | TargetFacts) -> None:
    """Raises ValueError if the artifact was made for another vocabulary, tokenizer or (where known) other weights."""
    if manifest["vocab_size"] != target.vocab_size:
        raise ValueError(
            f"artifact {folder} was made for a vocabulary of {manifest['vocab_size']}, and target {target.name} has"
            f" {target.vocab_size}; train a drafter for this target"
        )
    if manifest.get("tokenizer_hash") and target.tokenizer_hash and manifest["tokenizer_hash"] != target.tokenizer_hash:
        raise ValueError(f"artifact {folder} was made with another tokenizer than that of target {target.name}")
    if target.fingerprint is not None and manifest["target"]["fingerprint"] != target.fingerprint:
        raise ValueError(
            f"artifact {folder} was made for target {manifest['target']['name']} with weights"
            f" {manifest['target']['fingerprint'][:8]}, and {target.name} has {target.fingerprint[:8]};"
            " train a drafter for this target"
        )


def make_config(kind: Any, values: dict[str, Any], source: str | Path) -> Any:
    """Returns a family's configuration from what JSON holds of it; raises ValueError for what the family lacks."""
    known = [field.name for field in dataclasses.fields(kind)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{source}: unknown setting {key!r}{hint}")
    # JSON has no tuples.
    return kind(**{key: _tuples(value) if isinstance(value, list) else value for key, value in values.items()})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(part) for part in value) if isinstance(value, list) else value


def provenance() -> dict[str, Any]:
    """Returns what any folder says of how it was made: command, commit and versions."""
    return {
        "command": shlex.join(sys.argv),
        "commit": _commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": numpy.__version__,
            "safetensors": safetensors.__version__,
        },
    }


def _commit() -> str | None:
    """Returns the commit of the checkout this file lies in, None outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
