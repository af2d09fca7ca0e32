"""Writes pseudo-data: target-generated text, on which drafters are trained.

    ./launch.sh pseudo_data                                         # pocket target, 300 prompts, into runs/pseudo-data
    ./launch.sh pseudo_data --target T --data prompts.jsonl --temperature 0,1 --output runs/mine
    ./launch.sh pseudo_data --target data/pocket-seq2seq            # encoder-decoder: functions in, summary lines out
    ./launch.sh pseudo_data --target T --server http://localhost:8000    # the server generates, T tokenizes

Prompts: JSONL, Parquet, a `datasets` folder or hub name, text files, conversations; see data/sources. Conversations are
answered turn by turn, with the target's own answers as history; each turn becomes a row. A run that was
killed is continued by the same command. Pocket target in float32: 1,400 tokens/s on one CPU core with batches of 40,
1,800 with 120, and 2,100 on two cores.
"""

from dataclasses import dataclass, field
from pathlib import Path

import draftsmith
from data import POCKET
from data.prompts import LongPrompts, TextSettings, load_prompts, prompt_room
from data.pseudo_data import MARKER, read_pseudo_data, write_pseudo_data
from data.shards import first_run_time
from data.sources import default_source
from data.writers import LocalWriter, PseudoDataSettings, Writer
from data.writers.server import ServerWriter
from draftsmith.artifacts.artifact import check_fits, read_manifest
from draftsmith.artifacts.files import check_replaceable
from draftsmith.loading.model_info import read_target_info
from trainers.training import launchers
from trainers.training.settings import parse_settings


@dataclass(frozen=True, kw_only=True)
class PseudoDataRunSettings:
    """Input and output of the run; the generation settings are PseudoDataSettings."""

    target: str = str(POCKET)
    """A transformers folder, GGUF file, named target (smollm2, pocket) or hub name."""
    data: str = ""
    """Source of the prompts, by default python-source:train, for an encoder-decoder python-docstrings:train."""
    text: TextSettings = field(default_factory=TextSettings)
    """Settings for reading rows of text."""
    output: str = "runs/pseudo-data"
    """Output folder."""
    max_prompts: int = 300
    """Number of prompts sampled from the data, 0 for all; a conversation of several turns counts once."""
    max_steps: int = 0
    """Maximum number of batches, 0 for all."""
    prompt_tokens: int = 64
    """Length of prompts cut from source code or plain text."""
    max_prompt_tokens: int = 0
    """Length of the longest prompt in tokens; 0 uses all that the target's context leaves."""
    long_prompts: LongPrompts = "auto"
    """Treatment of longer prompts; auto truncates an encoder's input, and raises for others."""
    draft: str = ""
    """Artifact of a drafter that speeds up generation."""
    server: str = ""
    """Address of an OpenAI-compatible server that generates instead."""
    server_model: str = ""
    """The server's model, if it serves several."""
    server_text: bool = False
    """Send prompts as text, for servers that do not accept token ids."""
    dtype: str = "auto"
    """Dtype of the target's weights."""


def main(run: PseudoDataRunSettings, settings: PseudoDataSettings) -> None:
    if run.server and run.draft:
        raise ValueError("--draft has no effect with --server; give one of them")
    if run.server and settings.verifier != "auto":
        raise ValueError(f"--verifier {settings.verifier} has no effect with --server, which samples; omit it")
    if run.server and settings.batch_invariant:
        raise ValueError("--batch-invariant has no effect with --server, which decodes in its own way; omit it")
    check_replaceable(Path(run.output), marker=MARKER)
    target_info = read_target_info(run.target)
    if run.server and target_info.is_encoder_decoder:
        raise ValueError(f"--server supports causal targets, and {run.target} is an encoder-decoder; omit it")
    if settings.max_new_tokens >= target_info.context_length:
        raise ValueError(f"--max-new-tokens leaves no room for a prompt in a context of {target_info.context_length}")
    if run.draft:
        check_fits(run.draft, read_manifest(run.draft), target_info)
    limits = [limit for limit in (run.max_prompts, run.max_steps * settings.batch_size) if limit]
    now = first_run_time(Path(run.output), MARKER)
    prompts = load_prompts(
        run.data or default_source("train", is_encoder_decoder=target_info.is_encoder_decoder),
        target_info.tokenizer,
        max_prompts=min(limits, default=0),
        max_prompt_tokens=prompt_room(target_info, settings.max_new_tokens, run.max_prompt_tokens),
        prompt_tokens=run.prompt_tokens,
        long_prompts=run.long_prompts,
        each_turn=True,
        is_encoder_decoder=target_info.is_encoder_decoder,
        end_ids=target_info.eos_token_ids,
        settings=run.text,
        now=now,
        seed=settings.seed,
    )
    writer: Writer
    if run.server:
        writer = ServerWriter(
            run.server,
            target_info.tokenizer,
            model=run.server_model,
            num_in_flight=settings.batch_size,
            as_text=run.server_text,
            end_ids=target_info.eos_token_ids,
        )
    else:
        writer = LocalWriter(draftsmith.Target.from_pretrained(run.target, dtype=run.dtype), draft=run.draft)
    template_kwargs = run.text.chat_template_kwargs
    write_pseudo_data(writer, prompts, Path(run.output), settings, chat_template_kwargs=template_kwargs, now=now)
    written = read_pseudo_data(run.output)
    print(f"{run.output}: {len(written):,} rows, {written.num_supervised:,} tokens generated by {writer.origin.target}")


if __name__ == "__main__":
    with launchers.user_errors():
        main(*parse_settings(PseudoDataRunSettings, PseudoDataSettings, description=__doc__))
