"""Writes pseudo-data: text by the target itself, which every drafter here learns from.

    ./launch.sh pseudo_data                                         # pocket target, 300 prompts, into runs/pseudo-data
    ./launch.sh pseudo_data --target T --data prompts.jsonl --temperature 0,1 --output runs/mine
    ./launch.sh pseudo_data --target data/pocket-seq2seq            # an encoder-decoder reads functions: a line on each
    ./launch.sh pseudo_data --target T --server http://localhost:8000    # T gives the tokenizer, the server the text

Prompts: JSONL, Parquet, a `datasets` folder or hub name, text files, conversations; see data/sources.py. A run that was
killed is continued by the same command. Pocket target in float32: 1,400 tokens/s on one CPU core with batches of 40,
1,800 with 120, and 2,100 on two cores.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import draftsmith
from data import POCKET
from data.prompts import LongPrompts, load_prompts, prompt_room
from data.pseudo_data import MARKER, read_pseudo_data, write_pseudo_data
from data.sources import default_source
from data.writers import LocalWriter, PseudoDataSettings, Writer
from data.writers.server import ServerWriter
from draftsmith.artifacts.artifact import check_fits, read_manifest
from draftsmith.artifacts.files import check_replaceable
from draftsmith.core.model_info import read_target_info
from trainers.training.settings import parse_settings


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What is read and where it goes; how the target writes is in PseudoDataSettings."""

    target: str = str(POCKET)
    """A transformers folder or hub name."""
    data: str = ""
    """Where the prompts come from; if empty python-source:train, for an encoder-decoder python-docstrings:train."""
    output: str = "runs/pseudo-data"
    """Folder for the shards."""
    max_prompts: int = 300
    """Prompts drawn from the data, 0 for all."""
    max_steps: int = 0
    """Batches to write at most, 0 for all: for a quick trial."""
    prompt_tokens: int = 64
    """Length of prompts cut from source code or plain text."""
    long_prompts: LongPrompts = "auto"
    """What becomes of rows too long for the target; auto cuts what an encoder reads, and refuses others."""
    draft: str = ""
    """Artifact of a drafter to write faster with."""
    server: str = ""
    """Address of an OpenAI-compatible server to write instead."""
    server_model: str = ""
    """Model to ask for there, if it serves several."""
    server_text: bool = False
    """Send prompts as text, to servers that take no token ids."""
    dtype: str = "auto"
    """What its weights are loaded as."""


def main(run: RunSettings, settings: PseudoDataSettings) -> None:
    if run.server and run.draft:
        raise ValueError("--draft has no effect with --server; give one of them")
    check_replaceable(Path(run.output), marker=MARKER)
    facts = read_target_info(run.target)
    if run.server and facts.is_encoder_decoder:
        raise ValueError(f"--server writes for causal targets, and {run.target} is an encoder-decoder; leave it out")
    if settings.max_new_tokens >= facts.context_length:
        raise ValueError(f"--max-new-tokens leaves no room for a prompt in a context of {facts.context_length}")
    if run.draft:
        check_fits(run.draft, read_manifest(run.draft), facts)
    limits = [limit for limit in (run.max_prompts, run.max_steps * settings.batch_size) if limit]
    prompts = load_prompts(
        run.data or default_source("train", is_encoder_decoder=facts.is_encoder_decoder),
        facts.tokenizer,
        max_prompts=min(limits, default=0),
        max_prompt_tokens=prompt_room(facts, settings.max_new_tokens),
        prompt_tokens=run.prompt_tokens,
        long_prompts=run.long_prompts,
        is_encoder_decoder=facts.is_encoder_decoder,
        seed=settings.seed,
    )
    writer: Writer
    if run.server:
        writer = ServerWriter(
            run.server,
            facts.tokenizer,
            model=run.server_model,
            num_in_flight=settings.batch_size,
            as_text=run.server_text,
        )
    else:
        writer = LocalWriter(draftsmith.Target.from_pretrained(run.target, dtype=run.dtype), draft=run.draft)
    write_pseudo_data(writer, prompts, Path(run.output), settings)
    written = read_pseudo_data(run.output)
    print(f"{run.output}: {len(written):,} rows, {written.num_supervised:,} tokens written by {writer.origin.target}")


if __name__ == "__main__":
    try:
        main(*parse_settings(RunSettings, PseudoDataSettings, description=__doc__))
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
