"""The teacher store: the target's hidden states and top-k logits on a data set, computed once and cached on disk.

A folder of safetensors shards with concatenated rows: `tokens` [N], `loss_mask` [N], `offsets` [rows + 1], and
optionally `hidden.<layer>` [N, D] (bf16), `top_log_probs` [N, K] (fp16), `top_ids` [N, K] and `log_normaliser` [N].
Log-probabilities are stored rather than logits, because fp16 is most precise near 0, where most of the probability mass
is; the tail mass is 1 minus the sum of their exponentials. Layer 0 is the embedding output, layer i the output of the
i-th block, un-normed.

Shape suffixes: T positions, N tokens of a shard, D hidden width, K largest logits kept.
"""

import functools
import hashlib
import itertools
import json
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from data.batches import Example, check_batch, check_layers, collate
from data.folder_lock import locked
from data.shards import (
    ORIGIN_TYPES,
    check_complete,
    check_origin,
    missing_shards,
    open_folder,
    read_manifest,
    write_atomically,
)
from data.teacher import complete
from draftsmith import Target
from draftsmith.artifacts.files import check_replaceable
from draftsmith.loading.model_info import TargetInfo

MARKER = "teacher_store.json"
FORMAT = 1
MEGABYTE = 1_000_000
ENTRY_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("layers", "shards"), (list,)),
    **dict.fromkeys(("top_k", "hidden_size", "num_tokens", "num_learnt"), (int,)),
}
"""Types of the entries of the manifest, besides those of `ORIGIN_TYPES`."""
LAYER_INDEX = "0 is the embedding output, i the output of the i-th block, un-normed"


@dataclass(frozen=True, kw_only=True)
class TeacherStoreSettings:
    """Contents of the teacher store."""

    layers: tuple[int, ...] = ()
    """Hidden layers to store: 0 is the embedding output, i the output of the i-th block."""
    top_k: int = 0
    """Number of largest next-token logits to store at every position."""
    limit_gb: float = 20.0
    """Maximum size of the store in GB."""
    batch_size: int = 8
    """Number of rows in a batch."""
    shard_mb: int = 256
    """Size of a shard in MB, the most that a killed run loses."""


def write_teacher_store(
    target: Target,
    rows: Sequence[Example],
    folder: Path,
    settings: TeacherStoreSettings,
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    now: datetime | None = None,
) -> None:
    """Runs the target over `rows` and writes the shards of the store that are missing.

    `chat_template_kwargs` and the time `now`, with which the rows were rendered, are recorded in the manifest.
    Prints the size first. Raises ValueError as `plan_teacher_store` does, and if the folder is another store or
    another run is writing to it.
    """
    shards = plan_teacher_store(target, rows, folder, settings)
    names = _shard_names(len(shards))
    lengths = [len(row.tokens_T) for row in rows]
    layers = " ".join(map(str, settings.layers))
    hidden = f", hidden layers {layers} of width {target.hidden_size} in bf16" if layers else ""
    top = f", top {settings.top_k} logits" if settings.top_k else ""
    print(
        f"{folder}: {len(rows):,} rows, {sum(lengths):,} tokens{hidden}{top}: "
        f"{sum(lengths) * _bytes_per_token(target, settings) / 1e9:.3g} GB in {len(shards)} shard(s)",
        flush=True,
    )
    manifest = {
        "format": FORMAT,
        "target_fingerprint": target.fingerprint,
        "tokenizer_hash": target.tokenizer_hash,
        "vocab_size": target.vocab_size,
        "hidden_size": target.hidden_size,
        "layer_index": LAYER_INDEX,
        "layers": list(settings.layers),
        "top_k": settings.top_k,
        "batch_size": settings.batch_size,
        "dtype": str(target.dtype).removeprefix("torch."),
        "data": _hash_rows(rows),
        "num_tokens": sum(lengths),
        "num_learnt": int(sum(row.loss_mask_T.sum() for row in rows)),
        "shards": [[shard.start, shard.stop] for shard in shards],
    }
    if chat_template_kwargs:
        manifest["chat_template_kwargs"] = dict(chat_template_kwargs)
    notes = {"target": target.name, "command": shlex.join(sys.argv)}
    notes |= {"template_time": now.isoformat()} if now else {}
    with locked(folder, kept=lambda: f"{len(names) - len(missing_shards(folder, names))} of {len(names)} shards"):
        open_folder(folder, MARKER, manifest, notes=notes)
        missing = missing_shards(folder, names)
        if len(missing) < len(shards):
            print(f"{folder}: {len(shards) - len(missing)} of {len(shards)} shards exist already")
        num_done = sum(lengths) - sum(lengths[row] for index in missing for row in shards[index])
        with tqdm(total=sum(lengths), initial=num_done, desc="teacher store", unit="token", unit_scale=True) as bar:
            for index in missing:
                found = [rows[row] for row in shards[index]]
                tensors = _read_shard(target, found, settings, bar)
                # One entry, as safetensors writes several in random order.
                metadata = {"rows": json.dumps([[row.key, row.where] for row in found])}
                write_atomically(folder / names[index], functools.partial(save_file, tensors, metadata=metadata))


def plan_teacher_store(
    target: Target | TargetInfo, rows: Sequence[Example], folder: Path, settings: TeacherStoreSettings
) -> list[range]:
    """Returns the range of rows of each shard, without using the target's weights.

    Raises ValueError if the store would exceed the limit or the free disk space, if the folder contains other files, or
    if layers, tokens or masks do not fit the target.
    """
    _check(target, rows, settings)
    check_replaceable(folder, marker=MARKER)
    lengths = [len(row.tokens_T) for row in rows]
    bytes_per_token = _bytes_per_token(target, settings)
    shards = _split_rows(lengths, max(1, settings.shard_mb * MEGABYTE // bytes_per_token))
    num_bytes = sum(lengths) * bytes_per_token
    if num_bytes > settings.limit_gb * 1e9:
        raise ValueError(
            f"the store would take {num_bytes / 1e9:.3g} GB, over the limit of {settings.limit_gb:g} GB; "
            "store fewer layers, a smaller top_k or fewer rows, or raise --limit-gb"
        )
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    missing = missing_shards(folder, _shard_names(len(shards)))
    left_bytes = bytes_per_token * sum(lengths[row] for index in missing for row in shards[index])
    if left_bytes > free:
        raise ValueError(f"{left_bytes / 1e9:.3g} GB are still to be written; {existing} has {free / 1e9:.3g} GB free")
    return shards


class TeacherStore(Sequence[Example]):
    """The rows of a finished teacher store, in their original order, read from memory-mapped files on access."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.manifest = manifest
        self.layers: tuple[int, ...] = tuple(manifest["layers"])
        self.top_k: int = manifest["top_k"]
        self.keys: list[str] = []
        self._sources: list[str] = []
        self._slices: list[tuple[int, int, int]] = []
        self._shards = []
        paths = [folder / name for name in _shard_names(len(manifest["shards"]))]
        for index, (path, (first, last)) in enumerate(zip(paths, manifest["shards"], strict=True)):
            try:
                shard = safe_open(path, framework="pt")
                names = _row_names(shard.metadata())
                offsets = _offsets(shard, self.layers, self.top_k, manifest["hidden_size"])
                if not len(names) == last - first == len(offsets) - 1:
                    raise ValueError(f"it has {len(names)} names and {len(offsets) - 1} rows, expected {last - first}")
            except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{path} is damaged ({error}); delete it and run the command again") from None
            self.keys += [key for key, _ in names]
            self._sources += [source for _, source in names]
            self._slices += [(index, begin, end) for begin, end in itertools.pairwise(offsets)]
            self._shards.append(shard)

    @property
    def fingerprint(self) -> str:
        """A hash of the manifest, which identifies the target, the data and the stored outputs."""
        kept = {key: value for key, value in self.manifest.items() if key not in ("target", "command", "template_time")}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def first_supervised(self) -> Sequence[int | None]:
        found = []
        for shard, begin, end in self._slices:
            (positions,) = self._shards[shard].get_slice("loss_mask")[begin + 1 : end].nonzero(as_tuple=True)
            found.append(int(positions[0]) + 1 if len(positions) else None)
        return found

    def where(self, index: int) -> str:
        return self._sources[index] or self.keys[index]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        shard_index, begin, end = self._slices[index]
        shard = self._shards[shard_index]

        def part(name: str) -> Tensor:
            return shard.get_slice(name)[begin:end]

        top: dict[str, Tensor] = {}
        if self.top_k:
            normaliser_T = part("log_normaliser")
            top["log_normaliser_T"] = normaliser_T
            top["top_logits_TK"] = part("top_log_probs").float() + normaliser_T[:, None]
            top["top_ids_TK"] = part("top_ids").long()
        return Example(
            tokens_T=part("tokens").long(),
            loss_mask_T=part("loss_mask"),
            key=self.keys[index],
            where=self._sources[index],
            hidden={layer: part(f"hidden.{layer}") for layer in self.layers},
            **top,
        )


def open_teacher_store(folder: Path | str, target: Target | TargetInfo) -> TeacherStore:
    """Returns the rows of a finished store; raises ValueError if it is unfinished, damaged, or of another target."""
    folder = Path(folder)
    manifest = read_manifest(folder, MARKER, ORIGIN_TYPES | ENTRY_TYPES)
    _check_manifest(folder / MARKER, manifest)
    check_complete(folder, _shard_names(len(manifest["shards"])), MARKER)
    check_origin(folder, manifest, target)
    return TeacherStore(folder, manifest)


@torch.inference_mode()
def _read_shard(target: Target, rows: list[Example], settings: TeacherStoreSettings, bar: tqdm) -> dict[str, Tensor]:
    """Returns a shard's tensors; rows of similar length share a batch."""
    features: dict[int, dict[str, Tensor]] = {}
    by_length = sorted(range(len(rows)), key=lambda index: -len(rows[index].tokens_T))
    for begin in range(0, len(rows), settings.batch_size):
        chosen = by_length[begin : begin + settings.batch_size]
        batch = collate([rows[index] for index in chosen])
        if settings.layers or settings.top_k:
            batch = complete(batch, target, settings.layers, settings.top_k)
        padded: dict[str, Tensor] = {f"hidden.{layer}": batch.hidden[layer].bfloat16() for layer in settings.layers}
        if settings.top_k:
            assert batch.top_logits_BTK is not None
            assert batch.top_ids_BTK is not None
            assert batch.log_normaliser_BT is not None
            padded["top_log_probs"] = (batch.top_logits_BTK - batch.log_normaliser_BT[..., None]).half()
            padded["top_ids"] = batch.top_ids_BTK.int()
            padded["log_normaliser"] = batch.log_normaliser_BT
        padded = {name: tensor.cpu() for name, tensor in padded.items()}
        for row, index in enumerate(chosen):
            length = len(rows[index].tokens_T)
            features[index] = {name: tensor[row, :length] for name, tensor in padded.items()}
            bar.update(length)
    lengths = torch.tensor([0, *(len(row.tokens_T) for row in rows)])
    tensors = {
        "tokens": torch.cat([row.tokens_T.int() for row in rows]),
        "loss_mask": torch.cat([row.loss_mask_T for row in rows]),
        "offsets": lengths.cumsum(0),
    }
    for name in features[0]:
        tensors[name] = torch.cat([features[index][name] for index in range(len(rows))])
    return tensors


def _check_manifest(file: Path, manifest: dict[str, Any]) -> None:
    """Raises ValueError for lists that are no layers, or no ranges of rows that follow each other."""
    layers, shards = manifest["layers"], manifest["shards"]
    if not all(type(layer) is int and layer >= 0 for layer in layers):
        raise ValueError(f"{file} is damaged: layers is {layers!r:.40}; make it again")
    ends = [0]
    for shard in shards:
        if (
            not isinstance(shard, list)
            or [type(end) for end in shard] != [int, int]
            or not ends[-1] == shard[0] < shard[1]
        ):
            raise ValueError(f"{file} is damaged: a shard has the rows {shard!r:.40}, after {ends[-1]}; make it again")
        ends.append(shard[1])
    if not shards:
        raise ValueError(f"{file} is damaged: it names no shard; make it again")


def _offsets(shard: Any, layers: Sequence[int], top_k: int, hidden_size: int) -> list[int]:
    """Returns where the rows of a shard begin and the last ends; raises ValueError for tensors that do not fit."""
    offsets = shard.get_tensor("offsets")
    if offsets.dtype != torch.long or offsets.ndim != 1 or offsets[0] != 0 or (offsets.diff() < 1).any():
        raise ValueError("offsets are no numbers that ascend from 0")
    num_tokens, names = int(offsets[-1]), set(shard.keys())
    expected: dict[str, tuple[str, list[int]]] = {"tokens": ("I32", []), "loss_mask": ("BOOL", [])}
    expected |= {f"hidden.{layer}": ("BF16", [hidden_size]) for layer in layers}
    if top_k:
        expected |= {"top_log_probs": ("F16", [top_k]), "top_ids": ("I32", [top_k]), "log_normaliser": ("F32", [])}
    for name, (dtype, shape) in expected.items():
        found = shard.get_slice(name) if name in names else None
        if found is None or (found.get_dtype(), found.get_shape()) != (dtype, [num_tokens, *shape]):
            has = "is missing" if found is None else f"has {found.get_dtype()} {found.get_shape()}"
            raise ValueError(f"{name} {has}, expected {dtype} {[num_tokens, *shape]}")
    return offsets.tolist()


def _split_rows(lengths: list[int], tokens_per_shard: int) -> list[range]:
    """Returns consecutive ranges of rows with at most `tokens_per_shard` tokens, or one longer row."""
    shards, first, num_tokens = [], 0, 0
    for row, length in enumerate(lengths):
        if row > first and num_tokens + length > tokens_per_shard:
            shards.append(range(first, row))
            first, num_tokens = row, 0
        num_tokens += length
    return [*shards, range(first, len(lengths))]


def _bytes_per_token(target: Target | TargetInfo, settings: TeacherStoreSettings) -> int:
    """Returns the size of one token across all tensors, without the small headers and offsets."""
    token_and_mask, bf16, fp16_and_int32, normaliser = 4 + 1, 2, 2 + 4, 4
    hidden = bf16 * target.hidden_size * len(settings.layers)
    return token_and_mask + hidden + (fp16_and_int32 * settings.top_k + normaliser if settings.top_k else 0)


def _check(target: Target | TargetInfo, rows: Sequence[Example], settings: TeacherStoreSettings) -> None:
    if target.is_encoder_decoder:
        raise ValueError(f"target {target.name} is an encoder-decoder; the teacher store is for causal targets")
    if not len(rows):
        raise ValueError("there are no rows to store")
    check_layers(settings.layers, target)
    if len(set(settings.layers)) < len(settings.layers):
        raise ValueError(f"hidden layers {' '.join(map(str, settings.layers))}: a layer is repeated")
    if not 0 <= settings.top_k <= target.vocab_size:
        raise ValueError(f"top_k is {settings.top_k}; it must be 0 to {target.vocab_size}, the size of the vocabulary")
    for name in ("batch_size", "shard_mb"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} is {getattr(settings, name)}; it must be at least 1")
    for row in rows:
        check_batch(collate([row]), target)


def _row_names(metadata: dict[str, str]) -> list[tuple[str, str]]:
    """Returns (key, origin) of a shard's rows; shards of earlier versions have no origins."""
    if "keys" in metadata:
        return [(key, "") for key in json.loads(metadata["keys"])]
    return [(key, source) for key, source in json.loads(metadata["rows"])]


def _hash_rows(rows: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.key.encode())
        digest.update(row.tokens_T.numpy().astype("<i8").tobytes())
        digest.update(np.packbits(row.loss_mask_T.numpy()).tobytes())
    return digest.hexdigest()[:32]


def _shard_names(num_shards: int) -> list[str]:
    return [f"shard-{index:05d}.safetensors" for index in range(num_shards)]
