"""Writes the teacher store of pseudo-data while its text is written: `StoreOfText`.

Every shard of text has files of the store of its own, written before it, so that a shard of text that exists has its
outputs. The manifest is completed after the last shard, as the number of tokens is not known before.
"""

import hashlib
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from data.batches import Example, example
from data.folder_lock import claimed
from data.prompts import Prompt
from data.shards import Share, check_folder, open_folder, read_manifest, write_atomically
from data.teacher_store import (
    FORMAT,
    MARKER,
    MEGABYTE,
    TeacherStoreSettings,
    bytes_per_token,
    check_settings,
    check_space,
    hash_rows,
    read_rows,
    save_rows,
    store_identity,
    stored_outputs,
)
from draftsmith import Target
from draftsmith.artifacts import json_text
from draftsmith.artifacts.files import check_replaceable
from draftsmith.inputs.outputs import TextOutputs
from draftsmith.loading.model_info import TargetInfo

FORMAT_OF_TEXT = FORMAT + 1
"""Format of a store that names its files; those of format 1 are numbered."""
ADDED_AT_END: dict[str, Any] = {"data": None, "num_tokens": 0, "num_learnt": 0, "shards": [], "files": []}
"""Entries of the manifest that are known when all text is written, and their values before."""
TEXT_BYTES = 12
"""Bytes of a token in a shard of text: its id, and its letters."""


@dataclass(frozen=True, kw_only=True)
class StoreOfText:
    """The teacher store in `folder` of the text that a run of pseudo-data writes."""

    folder: Path
    settings: TeacherStoreSettings

    def check(self, target: Target | TargetInfo, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
        """Prints the most that the store may take; raises ValueError if that is too much or settings do not fit.

        Uses no weights. Shards that exist already are not subtracted.
        """
        check_settings(target, self.settings)
        check_replaceable(self.folder, marker=MARKER)
        num_tokens = sum(most_tokens(prompt, max_new_tokens) for prompt in prompts)
        num_bytes = num_tokens * bytes_per_token(target, self.settings)
        print(
            f"{self.folder}: at most {num_tokens:,} tokens{self.settings.described(target)}: {num_bytes / 1e9:.3g} GB",
            flush=True,
        )
        written = sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))
        left_bytes = max(num_bytes - written, 0) + num_tokens * TEXT_BYTES
        check_space(self.folder, self.settings, num_bytes=num_bytes, num_left_bytes=left_bytes, is_most=True)

    def begin(
        self, target: Target, text_manifest: dict[str, Any], notes: dict[str, Any], *, has_text: bool, share: Share
    ) -> None:
        """Creates the folder or checks that it is of this text; the caller holds its lock.

        Raises ValueError if it is of another text or other settings, or if text exists that was written without it.
        """
        text_hash = hashlib.sha256(json.dumps(text_manifest, sort_keys=True).encode()).hexdigest()[:32]
        manifest = store_identity(target, self.settings)
        manifest |= {"format": FORMAT_OF_TEXT, "shard_mb": self.settings.shard_mb, "text": text_hash}
        if "chat_template_kwargs" in text_manifest:
            manifest["chat_template_kwargs"] = text_manifest["chat_template_kwargs"]
        notes = {**notes, "target": target.name, "command": shlex.join(sys.argv), **ADDED_AT_END, "is_unfinished": True}
        check_folder(self.folder, MARKER, manifest, notes=notes)
        if has_text and not (self.folder / MARKER).exists():
            raise ValueError(
                f"the text exists already, and was written without the store {self.folder}; make it with"
                " recipes/teacher_store.py, or name another --output"
            )
        open_folder(self.folder, MARKER, manifest, notes=notes, is_shared=share.is_shared)

    def shard(self, index: int, target: Target) -> "ShardOfStore":
        """Returns the writer of one shard's outputs; files that a killed run left of it are removed."""
        for path in self._files_of(index):
            path.unlink()
        max_tokens = self.settings.shard_mb * MEGABYTE // bytes_per_token(target, self.settings)
        return ShardOfStore(store=self, index=index, max_tokens=max(max_tokens, 1))

    def finish(self, num_rows: Sequence[int], text: Path) -> None:
        """Completes the manifest, given the number of rows of each shard of the folder `text`.

        Raises ValueError if outputs of a shard are missing or damaged.
        """
        with claimed(self.folder / MARKER) as is_own:
            if not is_own:
                return
            manifest = read_manifest(self.folder, MARKER)
            found = manifest | ADDED_AT_END | {"files": [], "shards": []}
            found.pop("is_unfinished", None)

            def rows() -> Iterator[Example]:
                num_before = 0
                for index, expected in enumerate(num_rows):
                    first = num_before
                    for path in self._files_of(index):
                        begin = num_before
                        for row in read_rows(path):
                            found["num_tokens"] += len(row.tokens_T)
                            found["num_learnt"] += int(row.loss_mask_T.sum())
                            num_before += 1
                            yield row
                        found["files"].append(path.name)
                        found["shards"].append([begin, num_before])
                    if num_before - first != expected:
                        raise ValueError(
                            f"{self.folder} has outputs of {num_before - first} of the {expected} rows of"
                            f" part-{index:05d}.parquet; delete that file in {text} and run the command again"
                        )

            found["data"] = hash_rows(rows())
            if found != manifest:
                written = json_text.text_of(found, indent=1) + "\n"
                write_atomically(self.folder / MARKER, lambda path: path.write_text(written))

    def _files_of(self, index: int) -> list[Path]:
        return sorted(self.folder.glob(f"shard-{index:05d}-*.safetensors"))


def store_of_text(folder: Path, settings: TeacherStoreSettings, text: Path) -> StoreOfText | None:
    """Returns the store to write with the text of the folder `text`; None if one of both was begun without the other.

    It is None too if nothing of the target is stored.
    """
    if (folder / MARKER).is_file():
        is_apart = "text" not in read_manifest(folder, MARKER)
    else:
        is_apart = next(text.glob("*.parquet"), None) is not None
    if is_apart or not (settings.layers or settings.top_k):
        return None
    return StoreOfText(folder=folder, settings=settings)


def most_tokens(prompt: Prompt, max_new_tokens: int) -> int:
    """Returns about the most tokens that the rows of a prompt, and of its later turns, may have together."""
    length = len(prompt.ids) + max_new_tokens
    total, conversation = length, prompt.conversation
    if conversation is None:
        return total
    for messages in conversation.later:
        length += max_new_tokens + sum(len(conversation.chat.tokenizer.encode(str(one))) for one in messages)
        if conversation.max_prompt_tokens and length > conversation.max_prompt_tokens + max_new_tokens:
            break  # it and those after it are left out
        total += length
    return total


@dataclass(kw_only=True)
class ShardOfStore:
    """Packs the rows of a shard of text, however long, into files of `max_tokens` tokens."""

    store: StoreOfText
    index: int
    max_tokens: int
    _rows: list[Example] = field(default_factory=list)
    _outputs: list[dict[str, Tensor]] = field(default_factory=list)
    _num_files: int = 0

    def add(self, row: dict[str, Any], outputs: TextOutputs) -> None:
        """Adds a row of text and its outputs."""
        length = len(row["ids"])
        if self._rows and sum(len(one.tokens_T) for one in self._rows) + length > self.max_tokens:
            self.flush()
        mask = [position >= row["num_prompt_tokens"] for position in range(length)]
        self._rows.append(example(row["ids"], mask, row["key"], where=row["source"] or row["key"]))
        top = (outputs.top_logits_TK, outputs.top_ids_TK, outputs.log_normaliser_T)
        self._outputs.append(stored_outputs(outputs.hidden, *top))

    def flush(self) -> None:
        """Writes the rows added since the last file."""
        if self._rows:
            name = f"shard-{self.index:05d}-{self._num_files:03d}.safetensors"
            save_rows(self.store.folder / name, self._rows, self._outputs)
            self._rows, self._outputs, self._num_files = [], [], self._num_files + 1
