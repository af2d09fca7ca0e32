"""Target-generated training data: `write_pseudo_data`, `read_pseudo_data`.

A folder of Parquet shards, each written atomically. Batches and their seeds depend on the prompts and the settings
alone, so that a run that was killed and continued writes the same data as an uninterrupted one. Every turn of a
conversation is a row of its own (data/turns.py), in the shard of its first turn.
"""

import functools
import hashlib
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
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
    check_complete,
    check_origin,
    hash_files,
    missing_shards,
    open_folder,
    read_manifest,
    write_atomically,
)
from data.turns import TurnsLeftOut, complete_turns, num_turns
from data.writers import Completion, GenerationBatch, LocalWriter, PseudoDataSettings, Writer, derive_seed
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
    chat_template_kwargs: Mapping[str, Any] | None = None,
    now: datetime | None = None,
) -> None:
    """Writes a completion of every prompt, and of its later turns, to `folder`, generating only the missing shards.

    `chat_template_kwargs` and the time `now`, with which the prompts were rendered, are recorded in the manifest.

    Raises ValueError if the folder was made with other settings, contains other files, or another run is writing to it.
    """
    writer = LocalWriter(writer) if isinstance(writer, Target) else writer
    plan = plan_batches(prompts, settings)
    shards = [plan[begin : begin + settings.shard_batches] for begin in range(0, len(plan), settings.shard_batches)]
    names = _shard_names(len(shards))
    keys = hashlib.sha256("".join(prompt.key for prompt in prompts).encode()).hexdigest()[:32]
    recorded = writer.origin.recorded()
    notes = {"target": recorded.pop("target"), "command": shlex.join(sys.argv)}
    notes["template_hash"] = template_hash(writer.tokenizer)
    notes |= {"template_time": now.isoformat()} if now else {}
    manifest = {"format": FORMAT, "num_shards": len(shards), "num_prompts": len(prompts), "prompts": keys}
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
    with locked(folder, kept=lambda: f"{len(names) - len(missing_shards(folder, names))} of {len(names)} shards"):
        if (folder / MARKER).is_file() and read_manifest(folder, MARKER).get("format") == 1:
            manifest["format"] = 1
            if missing_shards(folder, names) and any(settings.temperatures):
                print(f"{folder}: begun by an earlier version; rows sampled from now on have a seed each")
        open_folder(folder, MARKER, manifest, notes=notes)
        missing = missing_shards(folder, names)
        num_left = sum(num_turns(batch.prompts) for index in missing for batch in shards[index])
        if num_left < num_planned:
            print(f"{folder}: {num_planned - num_left} of {num_planned} rows exist already")
        num_tokens, started, left_out = 0, time.perf_counter(), TurnsLeftOut()
        with tqdm(total=num_planned, initial=num_planned - num_left, desc="pseudo-data", unit="row") as bar:
            for index in missing:
                rows: list[dict[str, Any]] = []
                for batch, completions in complete_turns(
                    writer, shards[index], settings, left_out, num_batches=len(plan)
                ):
                    rows += _rows(batch, completions, writer, settings)
                    num_tokens += sum(len(completion.ids) for completion in completions)
                    bar.set_postfix_str(f"{num_tokens / (time.perf_counter() - started):,.0f} tokens/s")
                    bar.total = num_planned - left_out.num_turns
                    bar.update(len(completions))
                table = pyarrow.Table.from_pylist(rows, schema=_schema(manifest))
                write_atomically(folder / names[index], functools.partial(pyarrow.parquet.write_table, table))
        left_out.report(str(folder), num_planned)


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
