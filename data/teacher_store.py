"""The teacher store: the target's hidden states and top-k logits on a data set, computed once and cached on disk.

A folder of safetensors shards with concatenated rows: `tokens` [N], `loss_mask` [N], `offsets` [rows + 1], and
optionally `hidden.<layer>` [N, D] (bf16), `top_log_probs` [N, K] (fp16), `top_ids` [N, K] and `log_normaliser` [N].
Log-probabilities are stored rather than logits, because fp16 is most precise near 0, where most of the probability mass
is; the tail mass is 1 minus the sum of their exponentials. Layer 0 is the embedding output, layer i the output of the
i-th block, un-normed. Stores are made of existing rows here, and with the target's text in
data/writers/teacher_outputs.py.

Shape suffixes: T positions, N tokens of a shard, D hidden width, K largest logits kept.
"""

import copy
import functools
import hashlib
import itertools
import json
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
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
    Share,
    check_complete,
    check_origin,
    missing_shards,
    open_folder,
    read_manifest,
    shards_to_write,
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

    def described(self, target: Target | TargetInfo) -> str:
        """Returns what is stored of each token, for messages."""
        layers = " ".join(map(str, self.layers))
        hidden = f", hidden layers {layers} of width {target.hidden_size} in bf16" if layers else ""
        return hidden + (f", top {self.top_k} logits" if self.top_k else "")


def write_teacher_store(
    target: Target,
    rows: Sequence[Example],
    folder: Path,
    settings: TeacherStoreSettings,
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    now: datetime | None = None,
    share: Share = Share(),  # noqa: B008 - frozen
) -> None:
    """Runs the target over `rows` and writes the shards of the store that are missing, or this process's share of them.

    `chat_template_kwargs` and the time `now`, with which the rows were rendered, are recorded in the manifest.
    Prints the size first. Raises ValueError as `plan_teacher_store` does, and if the folder is another store or
    another run is writing to it.
    """
    shards = plan_teacher_store(target, rows, folder, settings)
    names = _shard_names(len(shards))
    lengths = [len(row.tokens_T) for row in rows]
    print(
        f"{folder}: {len(rows):,} rows, {sum(lengths):,} tokens{settings.described(target)}: "
        f"{sum(lengths) * bytes_per_token(target, settings) / 1e9:.3g} GB in {len(shards)} shard(s)",
        flush=True,
    )
    manifest = store_identity(target, settings) | {
        "batch_size": settings.batch_size,
        "data": hash_rows(rows),
        "num_tokens": sum(lengths),
        "num_learnt": int(sum(row.loss_mask_T.sum() for row in rows)),
        "shards": [[shard.start, shard.stop] for shard in shards],
    }
    if chat_template_kwargs:
        manifest["chat_template_kwargs"] = dict(chat_template_kwargs)
    notes = {"target": target.name, "command": shlex.join(sys.argv)}
    notes |= {"template_time": now.isoformat()} if now else {}

    def num_done() -> int:
        missing = missing_shards(folder, names)
        return sum(lengths) - sum(lengths[row] for index in missing for row in shards[index])

    def kept() -> str:
        return f"{len(names) - len(missing_shards(folder, names))} of {len(names)} shards"

    with locked(folder, kept=kept, is_shared=share.is_shared) if share.writes else nullcontext():
        if share.writes:
            open_folder(folder, MARKER, manifest, notes=notes, is_shared=share.is_shared)
        if (num_missing := len(missing_shards(folder, names))) < len(shards):
            print(f"{folder}: {len(shards) - num_missing} of {len(shards)} shards exist already")
        options = {"unit": "token", "unit_scale": True, "disable": share.rank > 0}
        with tqdm(total=sum(lengths), initial=num_done(), desc="teacher store", **options) as bar:
            for index in shards_to_write(folder, names, share):
                found = [rows[row] for row in shards[index]]
                outputs = _read_shard(target, found, settings, bar)
                if share.writes:
                    save_rows(folder / names[index], found, outputs)
                bar.n = num_done()  # other processes write shards too


def store_identity(target: Target, settings: TeacherStoreSettings) -> dict[str, Any]:
    """Returns the entries of a manifest that say whose outputs a store holds, and which."""
    return {
        "format": FORMAT,
        "target_fingerprint": target.fingerprint,
        "tokenizer_hash": target.tokenizer_hash,
        "vocab_size": target.vocab_size,
        "hidden_size": target.hidden_size,
        "layer_index": LAYER_INDEX,
        "layers": list(settings.layers),
        "top_k": settings.top_k,
        "dtype": str(target.dtype).removeprefix("torch."),
    }


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
    token_bytes = bytes_per_token(target, settings)
    shards = _split_rows(lengths, max(1, settings.shard_mb * MEGABYTE // token_bytes))
    missing = missing_shards(folder, _shard_names(len(shards)))
    num_left = sum(lengths[row] for index in missing for row in shards[index])
    check_space(folder, settings, num_bytes=sum(lengths) * token_bytes, num_left_bytes=num_left * token_bytes)
    return shards


def check_space(
    folder: Path, settings: TeacherStoreSettings, *, num_bytes: int, num_left_bytes: int, is_most: bool = False
) -> None:
    """Raises ValueError if a store of `num_bytes` exceeds the limit, or what is left of it to write the free space.

    `is_most` says that the store may become smaller.
    """
    if num_bytes > settings.limit_gb * 1e9:
        raise ValueError(
            f"the store {'may' if is_most else 'would'} take {num_bytes / 1e9:.3g} GB, over the limit of"
            f" {settings.limit_gb:g} GB; store fewer layers, a smaller top_k or fewer rows, or raise --limit-gb"
        )
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    if num_left_bytes > (free := shutil.disk_usage(existing).free):
        raise ValueError(
            f"{'up to ' * is_most}{num_left_bytes / 1e9:.3g} GB are still to be written; {existing} has"
            f" {free / 1e9:.3g} GB free"
        )


class TeacherStore(Sequence[Example]):
    """The rows of a finished teacher store, in their original order, read from memory-mapped files on access."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.manifest = manifest
        self.layers: tuple[int, ...] = tuple(manifest["layers"])
        self.top_k: int = manifest["top_k"]
        self._read_layers, self._reads_top = self.layers, self.top_k > 0
        self.keys: list[str] = []
        self._sources: list[str] = []
        self._slices: list[tuple[int, int, int]] = []
        self._shards = []
        paths = [folder / name for name in _files(manifest)]
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

    def reading(self, layers: Iterable[int], *, top: bool) -> "TeacherStore":
        """Returns the store, whose rows have only those of its hidden layers, and its largest logits if `top` is True.

        The others are not read from disk.
        """
        narrowed, wanted = copy.copy(self), set(layers)
        narrowed._read_layers = tuple(layer for layer in self.layers if layer in wanted)
        narrowed._reads_top = self.top_k > 0 and top
        return narrowed

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
        if self._reads_top:
            normaliser_T = part("log_normaliser")
            top["log_normaliser_T"] = normaliser_T
            top["top_logits_TK"] = part("top_log_probs").float() + normaliser_T[:, None]
            top["top_ids_TK"] = part("top_ids").long()
        return Example(
            tokens_T=part("tokens").long(),
            loss_mask_T=part("loss_mask"),
            key=self.keys[index],
            where=self._sources[index],
            hidden={layer: part(f"hidden.{layer}") for layer in self._read_layers},
            **top,
        )


def open_teacher_store(folder: Path | str, target: Target | TargetInfo) -> TeacherStore:
    """Returns the rows of a finished store; raises ValueError if it is unfinished, damaged, or of another target."""
    folder = Path(folder)
    manifest = read_manifest(folder, MARKER, ORIGIN_TYPES | ENTRY_TYPES)
    if manifest.get("is_unfinished"):
        raise ValueError(f"{folder} is unfinished; run the same recipes/pseudo_data.py command again to finish it")
    _check_manifest(folder / MARKER, manifest)
    check_complete(folder, _files(manifest), MARKER)
    check_origin(folder, manifest, target)
    return TeacherStore(folder, manifest)


@torch.inference_mode()
def _read_shard(
    target: Target, rows: list[Example], settings: TeacherStoreSettings, bar: tqdm
) -> list[dict[str, Tensor]]:
    """Returns the outputs of each row of a shard; rows of similar length share a batch."""
    features: dict[int, dict[str, Tensor]] = {}
    by_length = sorted(range(len(rows)), key=lambda index: -len(rows[index].tokens_T))
    for begin in range(0, len(rows), settings.batch_size):
        chosen = by_length[begin : begin + settings.batch_size]
        batch = collate([rows[index] for index in chosen])
        if settings.layers or settings.top_k:
            batch = complete(batch, target, settings.layers, settings.top_k)
        hidden = {layer: batch.hidden[layer] for layer in settings.layers}
        logits = batch.top_logits_BTK if settings.top_k else None
        stored = stored_outputs(hidden, logits, batch.top_ids_BTK, batch.log_normaliser_BT)
        padded = {name: tensor.cpu() for name, tensor in stored.items()}
        for row, index in enumerate(chosen):
            length = len(rows[index].tokens_T)
            features[index] = {name: tensor[row, :length] for name, tensor in padded.items()}
            bar.update(length)
    return [features[index] for index in range(len(rows))]


def stored_outputs(
    hidden: dict[int, Tensor], top_logits: Tensor | None, top_ids: Tensor | None, log_normaliser: Tensor | None
) -> dict[str, Tensor]:
    """Returns the target's outputs [..., T, D], [..., T, K] and [..., T] under the names and dtypes of a shard."""
    stored = {f"hidden.{layer}": states.bfloat16() for layer, states in hidden.items()}
    if top_logits is not None and top_ids is not None and log_normaliser is not None:
        stored["top_log_probs"] = (top_logits - log_normaliser[..., None]).half()
        stored["top_ids"] = top_ids.int()
        stored["log_normaliser"] = log_normaliser
    return stored


def save_rows(path: Path, rows: Sequence[Example], outputs: Sequence[dict[str, Tensor]]) -> None:
    """Writes a shard of `rows` with each row's `stored_outputs`."""
    lengths = torch.tensor([0, *(len(row.tokens_T) for row in rows)])
    tensors = {
        "tokens": torch.cat([row.tokens_T.int() for row in rows]),
        "loss_mask": torch.cat([row.loss_mask_T for row in rows]),
        "offsets": lengths.cumsum(0),
    }
    tensors |= {name: torch.cat([of_row[name] for of_row in outputs]) for name in outputs[0]}
    # One entry, as safetensors writes several in random order.
    metadata = {"rows": json.dumps([[row.key, row.where] for row in rows])}
    write_atomically(path, functools.partial(save_file, tensors, metadata=metadata))


def read_rows(path: Path) -> Iterator[Example]:
    """Yields the rows of a shard without the target's outputs; raises ValueError if it is damaged."""
    try:
        with safe_open(path, framework="pt") as shard:
            names, tokens, mask = (
                _row_names(shard.metadata()),
                shard.get_tensor("tokens"),
                shard.get_tensor("loss_mask"),
            )
            offsets = shard.get_tensor("offsets").tolist()
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and run the command again") from None
    for (key, source), (begin, end) in zip(names, itertools.pairwise(offsets), strict=True):
        yield Example(tokens_T=tokens[begin:end].long(), loss_mask_T=mask[begin:end], key=key, where=source)


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
    files = manifest.get("files", _shard_names(len(shards)))
    if not isinstance(files, list) or len(files) != len(shards):
        raise ValueError(f"{file} is damaged: files is {files!r:.40}, expected {len(shards)} names; make it again")


def _files(manifest: dict[str, Any]) -> list[str]:
    """Returns the names of a store's shards; a store that was written with its text names them."""
    return manifest.get("files") or _shard_names(len(manifest["shards"]))


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


def bytes_per_token(target: Target | TargetInfo, settings: TeacherStoreSettings) -> int:
    """Returns the size of one token across all tensors, without the small headers and offsets."""
    token_and_mask, bf16, fp16_and_int32, normaliser = 4 + 1, 2, 2 + 4, 4
    hidden = bf16 * target.hidden_size * len(settings.layers)
    return token_and_mask + hidden + (fp16_and_int32 * settings.top_k + normaliser if settings.top_k else 0)


def _check(target: Target | TargetInfo, rows: Sequence[Example], settings: TeacherStoreSettings) -> None:
    check_settings(target, settings)
    if not len(rows):
        raise ValueError("there are no rows to store")
    for row in rows:
        check_batch(collate([row]), target)


def check_settings(target: Target | TargetInfo, settings: TeacherStoreSettings) -> None:
    """Raises ValueError for settings that do not fit the target."""
    if target.is_encoder_decoder:
        raise ValueError(f"target {target.name} is an encoder-decoder; the teacher store is for causal targets")
    check_layers(settings.layers, target)
    if len(set(settings.layers)) < len(settings.layers):
        raise ValueError(f"hidden layers {' '.join(map(str, settings.layers))}: a layer is repeated")
    if not 0 <= settings.top_k <= target.vocab_size:
        raise ValueError(f"top_k is {settings.top_k}; it must be 0 to {target.vocab_size}, the size of the vocabulary")
    for name in ("batch_size", "shard_mb"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} is {getattr(settings, name)}; it must be at least 1")


def _row_names(metadata: dict[str, str]) -> list[tuple[str, str]]:
    """Returns (key, origin) of a shard's rows; shards of earlier versions have no origins."""
    if "keys" in metadata:
        return [(key, "") for key in json.loads(metadata["keys"])]
    return [(key, source) for key, source in json.loads(metadata["rows"])]


def hash_rows(rows: Iterable[Example]) -> str:
    """Returns a hash of the rows' keys, tokens and masks."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.key.encode())
        digest.update(row.tokens_T.numpy().astype("<i8").tobytes())
        digest.update(np.packbits(row.loss_mask_T.numpy()).tobytes())
    return digest.hexdigest()[:32]


def _shard_names(num_shards: int) -> list[str]:
    return [f"shard-{index:05d}.safetensors" for index in range(num_shards)]
