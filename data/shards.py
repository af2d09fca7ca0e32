"""Folders of shards that can be continued after `kill -9`, with atomically written shards and a manifest.

The manifest is written first and determines the contents of each shard. The same command run again writes only the
missing shards, and a command with other settings is rejected.
"""

import hashlib
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import NoneType
from typing import Any

import torch

from data.folder_lock import CLAIM, claimed
from draftsmith import Target
from draftsmith.artifacts import json_text
from draftsmith.artifacts.files import LOCK, check_replaceable, inside
from draftsmith.loading.model_info import TargetInfo

ORIGIN_TYPES = {"target": (str,), "tokenizer_hash": (str, NoneType), "target_fingerprint": (str, NoneType)}
"""Types of the entries of a manifest that `check_origin` reads."""
WAIT_S = 0.2
"""Seconds between looks at shards that other processes are writing."""
MAX_SHARDS = 1_000_000
"""More shards than this are a damaged manifest."""


def open_folder(
    folder: Path,
    marker: str,
    manifest: dict[str, Any],
    *,
    notes: dict[str, Any],
    disposable: Collection[str] = (),
    is_shared: bool = False,
) -> None:
    """Creates `folder` with `manifest` in its file `marker`, or checks that an existing one has the same manifest.

    `notes` are written in addition to the manifest's keys and not compared. The caller holds the folder's lock
    (`data.folder_lock.locked`); if other processes share it, what a killed run left incomplete stays for now. Raises
    ValueError as `check_folder` does; a folder of another manifest that it accepts starts over, without the files named
    in `disposable`.
    """
    check_folder(folder, marker, manifest, notes=notes, disposable=disposable)
    if not is_shared:
        _clear_leftovers(folder, "*")
    if (folder / marker).exists():
        if not _differences(folder, marker, manifest, notes):
            return
        print(f"{folder}: an earlier run with other settings has left nothing to keep; starting over")
        for path in (folder / name for name in disposable):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    text = json_text.text_of(notes | manifest, indent=1) + "\n"
    write_atomically(folder / marker, lambda path: path.write_text(text))


def check_folder(
    folder: Path,
    marker: str,
    manifest: dict[str, Any],
    *,
    notes: Collection[str],
    disposable: Collection[str] = (),
) -> None:
    """Raises ValueError if `folder` contains other files, or results of a run whose manifest differs, naming the keys.

    Keys in `notes` may differ. Files named in `disposable`, such as logs, do not count as results.
    """
    check_replaceable(folder, marker=marker)
    if not (folder / marker).exists():
        return
    faults = _differences(folder, marker, manifest, notes)
    ignored = {marker, LOCK, *disposable}
    if faults and any(path.name not in ignored and ".part-" not in path.name for path in folder.iterdir()):
        raise ValueError(f"{folder} was made with other settings ({'; '.join(faults)}); name another folder")


def first_run_time(folder: Path, marker: str, *, is_shared: bool = False) -> datetime:
    """Returns the time that the folder's manifest notes as `template_time`, the current time without one.

    Chat templates may write the date: prompts stay the same in a continued run if they are rendered at this time.
    Processes that share a folder take midnight instead of the current time, so that they agree.
    """
    noted = read_manifest(folder, marker).get("template_time") if (folder / marker).is_file() else None
    try:
        if noted:
            return datetime.fromisoformat(noted)
        now = datetime.now().replace(microsecond=0)
        return now.replace(hour=0, minute=0, second=0) if is_shared else now
    except (TypeError, ValueError):
        raise ValueError(f"{folder / marker} is damaged: template_time is {noted!r:.40}, expected a time") from None


def _differences(folder: Path, marker: str, manifest: dict[str, Any], notes: Collection[str]) -> list[str]:
    """Returns the keys that differ from the folder's manifest, with both values."""
    made, manifest = read_manifest(folder, marker), json.loads(json.dumps(manifest))
    return [
        f"{key} was {_short(made.get(key))}, is {_short(manifest.get(key))}"
        for key in sorted({*made, *manifest} - set(notes))
        if made.get(key) != manifest.get(key)
    ]


def read_manifest(folder: Path, marker: str, types: Mapping[str, tuple[type, ...]] | None = None) -> dict[str, Any]:
    """Returns the manifest; raises ValueError if it is missing, invalid, or has entries of other types than `types`."""
    path = folder / marker
    if not path.is_file():
        fault = f"has no {marker}" if folder.is_dir() else "is not a folder"
        raise ValueError(f"{folder} {fault}; make one with recipes/{path.stem.lstrip('_')}.py")
    try:
        manifest = json_text.read(path)
    except ValueError:
        raise ValueError(f"{path} is damaged: not valid JSON") from None
    if not isinstance(manifest, dict):
        raise ValueError(f"{path} is damaged: not a JSON object")
    json_text.check_entries(path, manifest, types or {})
    return manifest


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls `write` with a temporary path and renames that file to `path` once it is on disk."""
    staging = path.with_name(f".{path.name}.part-{_writer_name()}")
    try:
        write(staging)
        staging.chmod(0o644)  # safetensors writes files that only their owner can read
        sync(staging)
        staging.rename(path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file's contents, or the names of a folder's files, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _writer_name() -> str:
    return f"{os.getpid()}-{threading.get_ident()}-{socket.gethostname()}"


@dataclass(frozen=True, kw_only=True)
class Share:
    """The part that this process has in a run of several, on one machine or on several with a common file system."""

    rank: int = 0
    num_ranks: int = 1
    is_lockstep: bool = False
    """True if all processes run one model together (tensor parallelism): each makes every shard, and rank 0 writes."""

    @property
    def is_shared(self) -> bool:
        return self.num_ranks > 1 and not self.is_lockstep

    @property
    def writes(self) -> bool:
        """Whether this process writes to the folder."""
        return self.rank == 0 or not self.is_lockstep

    def part(self, index: int, num_parts: int) -> "Share":
        """Returns the share of one of `num_parts` threads of this process."""
        return Share(rank=self.rank * num_parts + index, num_ranks=self.num_ranks * num_parts)


def shards_to_write(folder: Path, names: list[str], share: Share) -> Iterator[int]:
    """Yields the index of each missing shard that this process is to write, until none is missing.

    Every process begins with each `num_ranks`-th shard, then takes those that no other is writing. It waits for the
    last ones of others, and takes them if their process ends. The file must be written before the next is asked for.
    """
    if not share.is_shared:
        missing = missing_shards(folder, names)
        if share.is_lockstep:
            agreed = [missing]
            torch.distributed.broadcast_object_list(agreed)
            (missing,) = agreed
        yield from missing
        return
    order = sorted(range(len(names)), key=lambda index: ((index - share.rank) % share.num_ranks != 0, index))
    while missing := [index for index in order if not (folder / names[index]).exists()]:
        num_written = 0
        for index in missing:
            if (path := folder / names[index]).exists():
                continue
            with claimed(path) as is_own:
                if is_own and not path.exists():
                    _clear_leftovers(folder, names[index])
                    yield index
                    num_written += 1
        if not num_written:
            time.sleep(WAIT_S)


def missing_shards(folder: Path, names: list[str]) -> list[int]:
    """Returns the indices of the missing shards."""
    return [index for index, name in enumerate(names) if not (folder / name).exists()]


def check_complete(folder: Path, names: list[str], marker: str) -> None:
    """Raises ValueError if shards are missing."""
    num_missing = sum(not inside(folder, name).is_file() for name in names)
    if num_missing:
        raise ValueError(
            f"{folder} is unfinished: {num_missing} of {len(names)} shards are missing; "
            f"run the same recipes/{Path(marker).stem.lstrip('_')}.py command again to finish it"
        )


def check_origin(folder: Path, manifest: dict[str, Any], target: Target | TargetInfo) -> None:
    """Raises ValueError if `folder` was made with another tokenizer or, where both are known, another target."""
    if manifest.get("tokenizer_hash") != target.tokenizer_hash:
        raise ValueError(f"{folder} was made with another tokenizer than that of {target.name}")
    if (
        None not in (made_by := manifest.get("target_fingerprint"), target.fingerprint)
        and made_by != target.fingerprint
    ):
        raise ValueError(f"{folder} was made by another target ({manifest['target']}), not by {target.name}")


def hash_files(paths: Iterable[Path]) -> str:
    """Returns a hash of the files' names and contents, in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode())
        with path.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()[:32]


def _clear_leftovers(folder: Path, name: str) -> None:
    """Removes the incomplete files of a killed run."""
    for leftover in folder.glob(f".{name}.part-*"):
        if name == "*" or leftover.name != CLAIM.format(name):
            leftover.unlink(missing_ok=True)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
