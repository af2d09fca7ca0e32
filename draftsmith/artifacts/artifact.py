"""Artifacts: a folder with `draft_config.json`, the drafter's weights or saved state and a model card.

An artifact belongs to one target, tokenizer and vocabulary. It contains no pickle and is written atomically.
"""

import dataclasses
import difflib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, NoneType
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from draftsmith.artifacts import config_values, hub, json_text
from draftsmith.artifacts.families import find, name_of, names, package_of
from draftsmith.artifacts.files import atomic_folder, inside
from draftsmith.artifacts.model_card import CARD, WEIGHTS, card, is_hub_name, keep_edited, warn_of_kept
from draftsmith.artifacts.provenance import run_provenance, target_provenance
from draftsmith.core.drafter import Drafter
from draftsmith.core.target import Target
from draftsmith.inputs.arguments import check_drafter, check_path, check_target
from draftsmith.loading.model_info import TargetInfo
from draftsmith.loading.placement.packed_weights import pack_layers
from draftsmith.loading.text_files import kind_of
from draftsmith.loading.weights import NUM_NAMED, check_finite

FORMAT_VERSION = 1
MANIFEST = "draft_config.json"
REQUIRED = {"format_version", "family", "config", "target", "vocab_size"}
"""Entries of every manifest."""
ENTRY_TYPES: dict[str, tuple[type, ...]] = {
    "family": (str,),
    "family_package": (str, NoneType),
    "target.name": (str,),
    "target.fingerprint": (str,),
    "tokenizer_hash": (str, NoneType),
    "vocab_size": (int,),
    **dict.fromkeys(("settings", "versions", "measured_acceptance", "made_with"), (dict, NoneType)),
    **dict.fromkeys(("command", "commit", "data_fingerprint", "acceptance_mode", "layer_index"), (str, NoneType)),
    "train_s": (int, float, NoneType),
    "tunes_target": (bool, NoneType),
}
"""Types of the manifest's entries that are read."""
IDENTITY = {*REQUIRED, "family_package", "tokenizer_hash"}
"""Entries that say what an artifact is and what target it belongs to."""
LAYER_INDEX = "hidden[0] is the embedding output, hidden[i] the output of the i-th block, un-normed"


def save(drafter: Any, path: str | Path, target: Target, *, record: dict[str, Any] | None = None) -> None:
    """Writes `drafter` to the folder `path`, replacing an artifact there, and adds `record` to its manifest.

    The artifact of a drafter that has fine-tuned its target belongs to the original target. A README.md that was edited
    by hand is kept beside the new one. Raises ValueError if `path` contains other files but no artifact, or if the
    drafter was made for another target.
    """
    check_drafter(drafter)
    check_path(path)
    check_target(target)
    if not isinstance(record, dict | None):
        raise ValueError(f"record is a {type(record).__name__}; it must be a dict of entries for the manifest")
    own = drafter.target.base if drafter.fine_tunes_target else drafter.target
    target = own if target is drafter.target else target
    if target is not own and (target.fingerprint, target.tokenizer_hash) != (own.fingerprint, own.tokenizer_hash):
        raise ValueError(
            f"the drafter was made for target {own.name} with weights {own.fingerprint[:8]}, and {target.name} has"
            f" other weights, {target.fingerprint[:8]}, or another tokenizer; save it with the target it was made for"
        )
    family = name_of(drafter)
    package = package_of(family)
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
            "tunes_target": drafter.fine_tunes_target,
            "made_with": target_provenance(target),
        }
        | ({} if package is None else {"family_package": package})
        | run_provenance()
    )
    for name, value in (record or {}).items():
        # The record of a part of a composite is its whole manifest.
        if name in IDENTITY and value != json_text.parse(json_text.text_of(manifest.get(name))):
            raise ValueError(f"record has {name!r}, an entry that belongs to the manifest itself; call it otherwise")
    manifest |= record or {}
    json_text.text_of(manifest)  # nothing is written if it contains a number that is not finite
    if isinstance(drafter, nn.Module):
        check_finite(f"the drafter to be saved in {path}", own_tensors(drafter).items())
    with atomic_folder(Path(path), marker=MANIFEST) as folder:
        if isinstance(drafter, nn.Module):
            save_file({name: tensor.contiguous() for name, tensor in own_tensors(drafter).items()}, folder / WEIGHTS)
        drafter.save_state(folder)
        written = (file for file in folder.rglob("*") if file.is_file() and file.name != CARD)
        files = sorted(str(file.relative_to(folder)) for file in written)
        (folder / MANIFEST).write_text(json_text.text_of(manifest | {"files": files}, indent=1) + "\n")
        kept = keep_edited(Path(path), folder)
        (folder / CARD).write_text(card(manifest, folder / WEIGHTS))
    warn_of_kept(Path(path), kept)


def load(path: str | Path, target: Target, *, made_for: Target | None = None) -> Any:
    """Returns the drafter saved at `path`, ready to draft for `target`, or for `drafter.target` if it fine-tunes that.

    `path` is a folder or a repository of the hub (owner/name). `made_for` is the target that the artifact was made for,
    if `target` is another one with the same vocabulary. Raises ValueError if the artifact was made for another target
    or tokenizer, or if one of its files is missing, truncated, invalid or a link out of the folder.
    """
    check_path(path)
    check_target(target)
    folder = local_folder(path)
    manifest = read_manifest(folder)
    own_files(folder)
    check_fits(folder, manifest, made_for or target)
    module = family_of(manifest, path)
    config = make_config(module.Config, manifest["config"], folder / MANIFEST)
    try:
        drafter: Drafter = module.Drafter.load_state(folder, config, target)
    except ValueError:
        raise
    except Exception as error:  # torch and transformers raise many kinds for shapes or settings that do not fit
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{folder}: this configuration makes no drafter for {target.name} ({reason})") from error
    if drafter.hidden_layers and target.is_run_whole:
        target.check_splits()
    if isinstance(drafter, nn.Module):
        _load_weights(drafter, inside(folder, WEIGHTS))
        make_ready(drafter, target)
    return drafter


def make_ready(drafter: Any, target: Target) -> None:
    """Makes a drafter whose weights are in place ready to draft: frozen, and packed as its target is."""
    drafter.eval().requires_grad_(False)
    pack_layers(drafter, request=target.pack_weights)
    drafter.on_weights_loaded()


def local_folder(path: str | Path) -> Path:
    """Returns `path` as a folder, downloaded if it does not exist and can be a repository name of the hub."""
    return hub.download(path) if isinstance(path, str) and is_hub_name(path) else Path(path)


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Returns an artifact's manifest; raises ValueError if it is missing, invalid or of an unknown format version."""
    folder = local_folder(path)
    file = folder / MANIFEST
    if kind_of(folder) != "folder":
        raise ValueError(f"artifact {path}: no such folder")
    if not file.is_file():
        raise ValueError(f"{path} is not a draftsmith artifact: it has no {MANIFEST}")
    try:
        manifest = json_text.read(inside(folder, MANIFEST))
    except ValueError as error:
        raise ValueError(f"{error}; the artifact must be made again") from error
    if not isinstance(manifest, dict):
        raise ValueError(f"{file} is not a JSON object; the artifact must be made again")
    missing = REQUIRED - set(manifest)
    if missing:
        raise ValueError(f"{file} lacks {', '.join(sorted(missing))}; the artifact must be made again")
    target = manifest["target"]
    if not isinstance(target, dict) or not {"name", "fingerprint"} <= set(target):
        raise ValueError(f"{file}: target is {target!r}; it must have name and fingerprint")
    entries = {"target.name": target["name"], "target.fingerprint": target["fingerprint"]}
    json_text.check_entries(file, manifest | entries, ENTRY_TYPES)
    measured = manifest.get("measured_acceptance") or {}
    json_text.check_entries(file, measured, dict.fromkeys(measured, (int, float, NoneType)))
    if manifest["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{file} has format version {manifest['format_version']}; this version of draftsmith reads {FORMAT_VERSION}"
        )
    return manifest


def family_of(manifest: dict[str, Any], path: str | Path) -> ModuleType:
    """Returns the module of an artifact's family; raises ValueError naming the package to install if it is missing."""
    family, package = manifest["family"], manifest.get("family_package")
    if package is not None and family not in names():
        raise ValueError(
            f"artifact {path} is of family {family!r}, which the package {package} defines; install that package"
        )
    return find(family)


def own_files(folder: Path) -> list[Path]:
    """Returns the paths of an artifact's manifest, weights and saved state, without its card or unrelated files.

    Raises ValueError if one is missing, or lies outside the folder, also by way of a link.
    """
    names = read_manifest(folder).get("files")
    if names is None:
        # Early manifests have no list of files.
        found = (file for file in folder.rglob("*") if file.is_file() and file.name != CARD)
        names = [str(file.relative_to(folder)) for file in found if file.name != MANIFEST or file.parent != folder]
    if not isinstance(names, list):
        raise ValueError(
            f"{folder / MANIFEST}: files is {names!r}; it must list names; the artifact must be made again"
        )
    files = [inside(folder, name) for name in [*names, MANIFEST]]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} is missing; the artifact must be made again")
    return sorted(files)


def faults_of(folder: Path) -> Iterator[str]:
    """Yields a sentence for each fault of an artifact that can be found without its target, parts of it included."""
    try:
        files = own_files(folder)
    except ValueError as error:
        yield str(error)
        files = [folder / MANIFEST]
    for file in files:
        try:
            if file.name == MANIFEST:
                manifest = read_manifest(file.parent)
                make_config(family_of(manifest, file.parent).Config, manifest["config"], file)
            check_finite(file, read_arrays(file))
        except ValueError as error:
            yield str(error)


def read_arrays(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Yields the name and values of each array of a safetensors or .npy file, none of another file.

    Raises ValueError if the file is truncated.
    """
    try:
        if file.suffix == ".safetensors":
            with safetensors.safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    yield name, opened.get_tensor(name)
        elif file.suffix == ".npy":
            array = np.load(file, allow_pickle=False)
            yield file.stem, torch.from_numpy(array) if array.dtype.kind == "f" else torch.zeros(0)
    except (OSError, ValueError, EOFError, safetensors.SafetensorError) as error:
        raise ValueError(f"{file} is missing or truncated ({error}); the artifact must be made again") from error


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Returns the module's state dict with each shared tensor under its first name only."""
    seen: set[tuple[int, tuple[int, ...]]] = set()
    tensors = {}
    for name, tensor in module.state_dict().items():
        storage = (tensor.data_ptr(), tuple(tensor.shape))
        if storage not in seen or tensor.numel() == 0:
            seen.add(storage)
            tensors[name] = tensor
    return tensors


def _load_weights(drafter: nn.Module, file: Path) -> None:
    if not file.is_file():
        raise ValueError(f"{file} is missing; the artifact must be made again")
    try:
        tensors = load_file(file)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{file} is truncated or not a safetensors file ({error}); the artifact must be made again"
        ) from error
    check_finite(file, tensors.items())
    expected = own_tensors(drafter)
    for name, tensor in tensors.items():
        if name in expected and tensor.is_floating_point() != expected[name].is_floating_point():
            raise ValueError(
                f"{file}: {name!r} holds {tensor.dtype}, expected {expected[name].dtype}; make the artifact again"
            )
        if name in expected and tensor.shape != expected[name].shape:
            raise ValueError(
                f"{file}: {name!r} has shape {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}"
            )
    # A drafter may accept tensors under former names, so the names are compared by `load_state_dict`.
    missing, unexpected = drafter.load_state_dict(tensors, strict=False)
    found = [f"tensor {name!r} is missing" for name in sorted(expected.keys() & missing)]
    found += [f"tensor {name!r} is unknown to this drafter" for name in sorted(unexpected)]
    if found:
        more = f", and {len(found) - NUM_NAMED} more faults" if len(found) > NUM_NAMED else ""
        raise ValueError(f"{file}: {', '.join(found[:NUM_NAMED])}{more}; the artifact must be made again")
    check_finite(f"{file}, in the dtype of the target", own_tensors(drafter).items())


def check_fits(folder: str | Path, manifest: dict[str, Any], target: Target | TargetInfo) -> None:
    """Raises ValueError if the artifact was made for another vocabulary, tokenizer or, where known, other weights."""
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
    """Returns a family's configuration from its JSON values.

    Raises ValueError for an unknown setting, one that is missing, and a value of another type or out of range.
    """
    fields = dataclasses.fields(kind)
    known = [field.name for field in fields]
    if not isinstance(values, dict):
        raise ValueError(
            f"{source}: the configuration is {values!r}; it must be an object of settings and their values"
        )
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{source}: unknown setting {key!r}{hint}")
    no_default = dataclasses.MISSING
    for field in fields:
        if field.name not in values and field.default is no_default and field.default_factory is no_default:
            raise ValueError(f"{source}: the setting {field.name!r} is missing; the artifact must be made again")
    config_values.check_types(kind, values, source)
    try:
        # JSON turns tuples into lists.
        config = kind(**{key: as_tuples(value) for key, value in values.items()})
        config_values.check_numbers(config)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    return config


def as_tuples(value: Any) -> Any:
    """Returns a value read from JSON with tuples in place of lists."""
    return tuple(as_tuples(part) for part in value) if isinstance(value, list) else value
