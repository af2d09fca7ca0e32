"""Writes pseudo-data: target-generated text, on which drafters are trained.

    ./launch.sh pseudo_data                                         # pocket target, 300 prompts, into runs/pseudo-data
    ./launch.sh pseudo_data --target T --data prompts.jsonl --temperature 0,1 --output runs/mine
    ./launch.sh pseudo_data --target data/pocket-seq2seq            # encoder-decoder: functions in, summary lines out
    ./launch.sh pseudo_data --target T --server http://a:8000,http://b:8000    # servers generate, T tokenizes
    ./launch.sh pseudo_data --layers 4 8 --store-top-k 16           # with the teacher store, into runs/teacher-store
    ./launch.sh pseudo_data --target T --nproc 8                    # processes share the shards, one to a device
    torchrun --nnodes 2 --nproc-per-node 8 ... recipes/pseudo_data.py --target T    # on several machines too

Prompts: JSONL, Parquet, a `datasets` folder or hub name, text files, conversations; see data/sources. Conversations are
answered turn by turn, with the target's own answers as history; each turn becomes a row. A run that was
killed is continued by the same command, with any number of processes. The teacher store holds what the recipe
teacher_store would write, taken from the forwards that generate. Pocket target in float32: 1,400 tokens/s on one CPU
core with batches of 40, 1,800 with 120, and 2,100 on two cores.
"""

from dataclasses import dataclass, field
from pathlib import Path

import draftsmith
from data import POCKET
from data.prompts import LongPrompts, TextSettings, load_prompts, prompt_room
from data.pseudo_data import MARKER, read_pseudo_data, write_pseudo_data
from data.shards import first_run_time
from data.sources import default_source
from data.teacher_store import TeacherStoreSettings
from data.writers import LocalWriter, PseudoDataSettings, Writer
from data.writers.server import ServerWriter
from data.writers.teacher_outputs import StoreOfText
from draftsmith.artifacts.artifact import check_fits, read_manifest
from draftsmith.artifacts.files import check_replaceable
from draftsmith.loading.model_info import read_target_info
from draftsmith.loading.placement.spread import check_spread
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
    store: TeacherStoreSettings = field(
        default_factory=TeacherStoreSettings,
        metadata={"omit": ("batch_size",), "flags": {"top_k": "store_top_k"}},
    )
    """Contents of a teacher store to be written with the text; none without layers and logits."""
    store_output: str = "runs/teacher-store"
    """Folder of the teacher store."""
    server: str = ""
    """Address of an OpenAI-compatible server that generates instead, or several with commas."""
    server_model: str = ""
    """The servers' model, if they serve several."""
    server_text: bool = False
    """Send prompts as text, for servers that do not accept token ids."""
    dtype: str = "auto"
    """Dtype of the target's weights."""
    device_map: str = ""
    """Spread the target over devices as transformers does: auto, balanced, sequential, or modules and their devices."""
    tensor_parallel: bool = False
    """Spread the target over the processes of the run, which then write the same shards together."""


def main(run: PseudoDataRunSettings, settings: PseudoDataSettings) -> None:
    if run.server and run.draft:
        raise ValueError("--draft has no effect with --server; give one of them")
    if run.server and settings.verifier != "auto":
        raise ValueError(f"--verifier {settings.verifier} has no effect with --server, which samples; omit it")
    if run.server and settings.batch_invariant:
        raise ValueError("--batch-invariant has no effect with --server, which decodes in its own way; omit it")
    store = None
    if run.store.layers or run.store.top_k:
        store = StoreOfText(folder=Path(run.store_output), settings=run.store)
        if run.server:
            raise ValueError(
                "--server cannot be combined with --layers and --store-top-k, as it returns no hidden states; write the"
                " store afterwards with recipes/teacher_store.py"
            )
    if run.tensor_parallel and run.draft:
        raise ValueError(
            "--draft cannot be combined with --tensor-parallel: draft lengths follow times, which differ between ranks"
        )
    if run.server and (run.tensor_parallel or run.device_map):
        flag = "--tensor-parallel" if run.tensor_parallel else "--device-map"
        raise ValueError(f"{flag} has no effect with --server, which spreads the target itself; omit it")
    check_spread(run.device_map, tensor_parallel=run.tensor_parallel)
    share = launchers.begin_share(is_lockstep=run.tensor_parallel)
    check_replaceable(Path(run.output), marker=MARKER)
    target_info = read_target_info(run.target)
    if run.server and target_info.is_encoder_decoder:
        raise ValueError(f"--server supports causal targets, and {run.target} is an encoder-decoder; omit it")
    if settings.max_new_tokens >= target_info.context_length:
        raise ValueError(f"--max-new-tokens leaves no room for a prompt in a context of {target_info.context_length}")
    if run.draft:
        check_fits(run.draft, read_manifest(run.draft), target_info)
    limits = [limit for limit in (run.max_prompts, run.max_steps * settings.batch_size) if limit]
    now = first_run_time(Path(run.output), MARKER, is_shared=share.is_shared)
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
    if store is not None:
        store.check(target_info, prompts, settings.max_new_tokens)
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
        target = draftsmith.Target.from_pretrained(
            run.target,
            dtype=run.dtype,
            device=launchers.device(),
            device_map=run.device_map,
            tensor_parallel=run.tensor_parallel,
        )
        writer = LocalWriter(target, draft=run.draft, store=run.store)
    write_pseudo_data(
        writer,
        prompts,
        Path(run.output),
        settings,
        store=store,
        chat_template_kwargs=run.text.chat_template_kwargs,
        now=now,
        share=share,
    )
    launchers.end()
    if share.rank == 0:
        written = read_pseudo_data(run.output)
        name = writer.origin.target
        print(f"{run.output}: {len(written):,} rows, {written.num_supervised:,} tokens generated by {name}")


if __name__ == "__main__":
    with launchers.user_errors():
        main(*parse_settings(PseudoDataRunSettings, PseudoDataSettings, description=__doc__))
