"""Target-generated training data: `write_pseudo_data`, `read_pseudo_data`.

A folder of Parquet shards, each written atomically. Batches and their seeds depend on the prompts and the settings
alone, so that a run that was killed and continued, by any number of processes, writes the same data as an uninterrupted
one. Every turn of a conversation is a row of its own (data/turns.py), in the shard of its first turn.
"""

import functools
import hashlib
import shlex
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.compute
import pyarrow.parquet
from tqdm import tqdm

from data.batches import Example, example
from data.folder_lock import locked
from data.prompts import Prompt
from data.shards import (
    MAX_SHARDS,
    ORIGIN_TYPES,
    Share,
    check_complete,
    check_origin,
    hash_files,
    missing_shards,
    open_folder,
    read_manifest,
    shards_to_write,
    write_atomically,
)
from data.turns import TurnsLeftOut, complete_turns, num_turns
from data.writers import Completion, GenerationBatch, LocalWriter, PseudoDataSettings, Writer, derive_seed
from data.writers.teacher_outputs import StoreOfText
from draftsmith import Target
from draftsmith.artifacts.provenance import template_hash
from draftsmith.loading.model_info import TargetInfo

__all__ = ["LocalWriter", "PseudoDataSettings", "read_pseudo_data", "write_pseudo_data"]

MARKER = "_pseudo_data.json"  # readers of Parquet folders skip files whose names begin with an underscore
FORMAT = 2
"""1: rows that are sampled share the generator of their batch. 2: every row has its own seed, as with a server."""
SCHEMA = pyarrow.schema(
    {
        "key": pyarrow.string(),
        "ids": pyarrow.list_(pyarrow.int32()),
        "num_prompt_tokens": pyarrow.int32(),
        "text": pyarrow.string(),
        "ended": pyarrow.bool_(),
        "category": pyarrow.string(),
        "source": pyarrow.string(),
        "target": pyarrow.string(),
        "target_fingerprint": pyarrow.string(),
        "tokenizer_hash": pyarrow.string(),
        "temperature": pyarrow.float64(),
        "top_p": pyarrow.float64(),
        "top_k": pyarrow.int32(),
        "max_new_tokens": pyarrow.int32(),
        "seed": pyarrow.uint64(),
        "batch": pyarrow.int32(),
        "is_retokenized": pyarrow.bool_(),
    }
)
WITH_SOURCES = SCHEMA.append(pyarrow.field("source_ids", pyarrow.list_(pyarrow.int32())))
"""Schema of encoder-decoders: `ids` are the decoder's tokens, `source_ids` the encoder's."""


def write_pseudo_data(
    writer: Writer | Target,
    prompts: Sequence[Prompt],
    folder: Path,
    settings: PseudoDataSettings,
    *,
    store: StoreOfText | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    now: datetime | None = None,
    share: Share = Share(),  # noqa: B008 - frozen
) -> None:
    """Writes a completion of every prompt, and of its later turns, to `folder`, generating only the missing shards.

    With a `store` the target's outputs are written with the text. Processes that write to the same folder each have a
    `share`; all return when no shard is missing. `chat_template_kwargs` and the time `now`, with which the prompts were
    rendered, are recorded in the manifest.

    Raises ValueError if the folder was made with other settings, contains other files, or another run is writing to it.
    """
    writer = LocalWriter(writer) if isinstance(writer, Target) else writer
    plan = plan_batches(prompts, settings)
    shards = [plan[begin : begin + settings.shard_batches] for begin in range(0, len(plan), settings.shard_batches)]
    names = _shard_names(len(shards))
    manifest = _manifest(writer, prompts, settings, len(shards), chat_template_kwargs)
    notes: dict[str, Any] = {"target": writer.origin.target, "command": shlex.join(sys.argv)}
    notes["template_hash"] = template_hash(writer.tokenizer)
    notes |= {"template_time": now.isoformat()} if now else {}
    num_planned = num_turns(prompts)

    def num_done() -> int:
        missing = missing_shards(folder, names)
        return num_planned - sum(num_turns(batch.prompts) for index in missing for batch in shards[index])

    def kept() -> str:
        return f"{len(names) - len(missing_shards(folder, names))} of {len(names)} shards"

    with ExitStack() as stack:
        if share.writes:
            stack.enter_context(locked(folder, kept=kept, is_shared=share.is_shared))
        if (folder / MARKER).is_file() and read_manifest(folder, MARKER).get("format") == 1:
            manifest["format"] = 1
            if missing_shards(folder, names) and any(settings.temperatures):
                print(f"{folder}: begun by an earlier version; rows sampled from now on have a seed each")
        if share.writes:
            open_folder(folder, MARKER, manifest, notes=notes, is_shared=share.is_shared)
        if store is not None and share.writes:
            stack.enter_context(locked(store.folder, kept=kept, is_shared=share.is_shared))
            times = {"template_time": notes["template_time"]} if now else {}
            has_text = len(missing_shards(folder, names)) < len(names)
            store.begin(_target_of(writer), manifest, times, has_text=has_text, share=share)
        if num_existing := num_done():
            print(f"{folder}: {num_existing} of {num_planned} rows exist already")
        options = {"initial": num_existing, "unit": "row", "disable": share.rank > 0}
        with tqdm(total=num_planned, desc="pseudo-data", **options) as bar:
            progress, has_failed = _Progress(bar, num_planned, num_done), threading.Event()

            def write(part: Share) -> None:
                for index in shards_to_write(folder, names, part):
                    if has_failed.is_set():
                        return
                    kept_store = store if share.writes else None
                    rows = _write_shard(writer, shards[index], index, settings, kept_store, progress, len(plan))
                    if not share.writes:
                        continue
                    table = pyarrow.Table.from_pylist(rows, schema=_schema(manifest))
                    write_atomically(folder / names[index], functools.partial(pyarrow.parquet.write_table, table))
                    progress.end_shard()

            num_threads = min(_num_shards_at_once(writer, prompts), len(names))
            if num_threads == 1:
                write(share)
            else:
                _in_threads(write, share, num_threads, writer, has_failed)
        progress.left_out.report(str(folder), num_planned)
        if store is not None and share.writes:
            store.finish([pyarrow.parquet.read_metadata(folder / name).num_rows for name in names], folder)


def _num_shards_at_once(writer: Writer, prompts: Sequence[Prompt]) -> int:
    """Returns how many shards are written at once: of conversations more, as each waits at every turn's end."""
    most_turns = max(num_turns([prompt]) for prompt in prompts)
    return writer.num_shards_at_once * (most_turns if writer.num_shards_at_once > 1 else 1)


def _manifest(
    writer: Writer,
    prompts: Sequence[Prompt],
    settings: PseudoDataSettings,
    num_shards: int,
    chat_template_kwargs: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Returns the entries that must be the same for a run to be continued."""
    keys = hashlib.sha256("".join(prompt.key for prompt in prompts).encode()).hexdigest()[:32]
    recorded = writer.origin.recorded()
    del recorded["target"]
    manifest = {"format": FORMAT, "num_shards": num_shards, "num_prompts": len(prompts), "prompts": keys}
    manifest |= recorded | asdict(settings) | {"temperature": settings.temperatures}
    # Left out where there is none: folders made before go on.
    manifest.pop("generation_config")
    if config := writer.recorded_config(settings):
        manifest["generation_config"] = config
    if settings.verifier == "auto":
        del manifest["verifier"]  # folders made before there was a choice have none
    if not settings.batch_invariant:
        del manifest["batch_invariant"]
    if (num_planned := num_turns(prompts)) > len(prompts):
        manifest["num_turns"] = num_planned
    if chat_template_kwargs:
        manifest["chat_template_kwargs"] = dict(chat_template_kwargs)
    return manifest


class _Progress:
    """The progress bar of a run, whose shards threads and other processes write too."""

    def __init__(self, bar: tqdm, num_planned: int, num_done: Callable[[], int]) -> None:
        self.left_out = TurnsLeftOut()
        self._bar, self._num_planned, self._num_done = bar, num_planned, num_done
        self._num_tokens, self._started, self._lock = 0, time.perf_counter(), threading.Lock()

    def add(self, completions: Sequence[Completion]) -> None:
        """Adds the rows of a batch."""
        with self._lock:
            self._num_tokens += sum(len(completion.ids) for completion in completions)
            rate = self._num_tokens / (time.perf_counter() - self._started)
            self._bar.set_postfix_str(f"{rate:,.0f} tokens/s")
            self._bar.total = self._num_planned - self.left_out.num_turns
            self._bar.update(len(completions))

    def end_shard(self) -> None:
        """Counts the rows of other processes too."""
        with self._lock:
            self._bar.n = max(self._bar.n, self._num_done() - self.left_out.num_turns)


def _write_shard(
    writer: Writer,
    batches: Sequence[GenerationBatch],
    index: int,
    settings: PseudoDataSettings,
    store: StoreOfText | None,
    progress: _Progress,
    num_batches: int,
) -> list[dict[str, Any]]:
    """Returns the rows of a shard; the store's files are written."""
    rows: list[dict[str, Any]] = []
    stored = store.shard(index, _target_of(writer)) if store is not None else None
    for batch, completions in complete_turns(writer, batches, settings, progress.left_out, num_batches=num_batches):
        new = _rows(batch, completions, writer, settings)
        for row, completion in zip(new, completions, strict=True):
            if stored is not None:
                assert completion.outputs is not None
                stored.add(row, completion.outputs)
        rows += new
        progress.add(completions)
    if stored is not None:
        stored.flush()
    return rows


def _in_threads(
    write: Callable[[Share], None], share: Share, num_threads: int, writer: Writer, has_failed: threading.Event
) -> None:
    """Calls `write` from several threads with parts of this process's share; after an error all give up."""
    with ThreadPoolExecutor(num_threads) as pool:
        tasks = [pool.submit(write, share.part(index, num_threads)) for index in range(num_threads)]
        try:
            for task in as_completed(tasks):
                task.result()
        except BaseException:
            has_failed.set()
            writer.close()
            raise


def _target_of(writer: Writer) -> Target:
    """Returns the target of a writer; raises ValueError if it is not run in this process."""
    if not isinstance(writer, LocalWriter):
        raise ValueError("a server gives no hidden states; write the store afterwards with recipes/teacher_store.py")
    return writer.target


def plan_batches(prompts: Sequence[Prompt], settings: PseudoDataSettings) -> list[GenerationBatch]:
    """Returns batches of prompts of similar length and one temperature, the longest first.

    This keeps padding small, and a batch too large for memory fails at the start.
    """
    temperatures = settings.temperatures
    groups = []
    for index, temperature in enumerate(temperatures):
        sorted_prompts = sorted(prompts[index :: len(temperatures)], key=lambda prompt: (-len(prompt.ids), prompt.key))
        for begin in range(0, len(sorted_prompts), settings.batch_size):
            groups.append((temperature, sorted_prompts[begin : begin + settings.batch_size]))
    groups.sort(key=lambda group: -len(group[1][0].ids))
    return [
        GenerationBatch(index=index, prompts=batch, temperature=temperature, seed=derive_seed(settings.seed, index))
        for index, (temperature, batch) in enumerate(groups)
    ]


def _shard_names(num_shards: int) -> list[str]:
    return [f"part-{index:05d}.parquet" for index in range(num_shards)]


def _schema(manifest: dict[str, Any]) -> pyarrow.Schema:
    return WITH_SOURCES if _has_sources(manifest) else SCHEMA


def _has_sources(manifest: dict[str, Any]) -> bool:
    return manifest.get("decoder_start_token_id") is not None


class PseudoData(Sequence[Example]):
    """The rows of a finished folder; the loss mask is True on the tokens that the target generated."""

    def __init__(self, table: pyarrow.Table, manifest: dict[str, Any], fingerprint: str) -> None:
        self.table = table
        self.manifest = manifest
        self.fingerprint = fingerprint
        self.keys: list[str] = table["key"].to_pylist()
        self.num_tokens: int = len(pyarrow.compute.list_flatten(table["ids"]))
        self.num_supervised: int = self.num_tokens - pyarrow.compute.sum(table["num_prompt_tokens"]).as_py()

    @property
    def first_supervised(self) -> Sequence[int | None]:
        starts = self.table["num_prompt_tokens"].to_pylist()
        lengths = pyarrow.compute.list_value_length(self.table["ids"]).to_pylist()
        return [max(start, 1) if start < length > 1 else None for start, length in zip(starts, lengths, strict=True)]

    def where(self, index: int) -> str:
        return self.table["source"][index].as_py() or self.keys[index]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        ids = self.table["ids"][index].as_py()
        num_prompt_tokens = self.table["num_prompt_tokens"][index].as_py()
        mask = [position >= num_prompt_tokens for position in range(len(ids))]
        source = self.table["source_ids"][index].as_py() if _has_sources(self.manifest) else None
        return example(ids, mask, self.keys[index], source, where=self.where(index))


def read_pseudo_data(folder: Path | str, target: Target | TargetInfo | None = None) -> PseudoData:
    """Returns the rows of `folder`; raises ValueError if it is unfinished, damaged, or belongs to another target."""
    folder = Path(folder)
    manifest = read_manifest(folder, MARKER, ORIGIN_TYPES | {"num_shards": (int,)})
    if not 1 <= manifest["num_shards"] <= MAX_SHARDS:
        raise ValueError(f"{folder / MARKER} is damaged: num_shards is {manifest['num_shards']}; make it again")
    names = _shard_names(manifest["num_shards"])
    check_complete(folder, names, MARKER)
    if target is not None:
        check_origin(folder, manifest, target)
        if _has_sources(manifest) != target.is_encoder_decoder:
            kind = "an encoder-decoder" if target.is_encoder_decoder else "a causal model"
            raise ValueError(f"{folder} was made by another target ({manifest['target']}), and {target.name} is {kind}")
    tables = []
    for name in names:
        try:
            tables.append(pyarrow.parquet.read_table(folder / name, schema=_schema(manifest), memory_map=True))
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{folder / name} is damaged ({reason}); delete it and run the command again") from None
        if fault := _fault(tables[-1], target):
            raise ValueError(f"{folder / name} is damaged ({fault}); delete it and run the command again")
    return PseudoData(pyarrow.concat_tables(tables), manifest, hash_files([folder / name for name in names]))


def _fault(table: pyarrow.Table, target: Target | TargetInfo | None) -> str | None:
    """Returns what is wrong with the columns of a shard, None if nothing is."""
    columns = ["key", "ids", "num_prompt_tokens", *(["source_ids"] if "source_ids" in table.column_names else [])]
    for name in columns:
        values = table[name]
        if values.null_count:
            return f"{values.null_count} rows have no {name}"
        if name != "key":
            numbers = pyarrow.compute.list_flatten(values) if name != "num_prompt_tokens" else values
            bounds = pyarrow.compute.min_max(numbers).as_py()
            if numbers.null_count or len(numbers) == 0 or bounds["min"] < 0:
                return f"{name} has values that are missing or negative"
            if target is not None and name != "num_prompt_tokens" and bounds["max"] >= target.vocab_size:
                return f"{name} has token {bounds['max']}, and the vocabulary has {target.vocab_size}"
    return None


def _rows(
    batch: GenerationBatch, completions: list[Completion], writer: Writer, settings: PseudoDataSettings
) -> list[dict[str, Any]]:
    shared = {
        "target": writer.origin.target,
        "target_fingerprint": writer.origin.target_fingerprint,
        "tokenizer_hash": writer.origin.tokenizer_hash,
        "temperature": batch.temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k,
        "max_new_tokens": settings.max_new_tokens,
        "seed": batch.seed,
        "batch": batch.index,
    }
    start = writer.origin.decoder_start_token_id
    return [
        {
            "key": prompt.key,
            "ids": (prompt.ids if start is None else [start]) + completion.ids,
            "num_prompt_tokens": len(prompt.ids) if start is None else 1,
            "text": writer.tokenizer.decode(completion.ids),
            "ended": completion.ended,
            "category": prompt.category,
            "source": prompt.source,
            "is_retokenized": completion.is_retokenized,
        }
        | shared
        | ({} if start is None else {"source_ids": prompt.ids})
        for prompt, completion in zip(batch.prompts, completions, strict=True)
    ]
