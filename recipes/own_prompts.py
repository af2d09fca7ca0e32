"""Writes prompts for a target that has none: an instruction-tuned target asks itself (Magpie, 2406.08464).

    ./launch.sh own_prompts --target smollm2 --num-prompts 5000      # into runs/own-prompts/prompts.jsonl
    ./launch.sh own_prompts --target T --system "You are a helpful assistant for cooks."
    ./launch.sh own_prompts --target T --server http://a:8000        # a server generates, T tokenizes
    ./launch.sh pseudo_data --target T --data runs/own-prompts       # the target's answers

The target is given its chat template up to the beginning of the user's message, and samples what stands there. Texts
that did not end, that have fewer than three words, or that repeat another are left out and counted. A run that was
killed is continued by the same command.
"""

import functools
import json
import shlex
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet

import draftsmith
from data.prompts import TextSettings
from data.pseudo_data import MARKER, read_pseudo_data, write_pseudo_data
from data.shards import first_run_time, write_atomically
from data.sources.chat import ChatFormat
from data.writers import LocalWriter, Origin, PseudoDataSettings, Writer
from data.writers.own_prompts import UserTurn, sampled_prompts, usable_texts
from data.writers.server import ServerWriter
from draftsmith.artifacts import json_text
from draftsmith.artifacts.files import check_replaceable
from draftsmith.artifacts.provenance import template_hash
from draftsmith.loading.model_info import TargetInfo, read_target_info
from trainers.training import launchers
from trainers.training.settings import parse_settings

SAMPLES = ".samples"
"""Folder in the output folder with all texts; readers of data skip files and folders whose names begin with a point."""
PROMPTS, RECORD = "prompts.jsonl", ".own_prompts.json"


@dataclass(frozen=True, kw_only=True)
class OwnPromptsSettings:
    """Settings of the run."""

    target: str
    """A transformers folder, GGUF file, named target (smollm2) or hub name, with a chat template."""
    num_prompts: int = 5000
    """Number of texts sampled; the prompts are those of them that are usable."""
    output: str = "runs/own-prompts"
    """Output folder."""
    system: str = ""
    """System message that comes before the user's; by default the chat template's own, if it has one."""
    temperature: float = 1.0
    """Sampling temperature."""
    top_p: float = 0.95
    """Nucleus sampling: sample from the smallest set of tokens with this total probability."""
    max_new_tokens: int = 256
    """Length of the longest prompt in tokens."""
    max_left_out: float = 0.5
    """Largest share of the texts that may be left out because they did not end, are too short, or repeat another."""
    batch_size: int = 32
    """Number of texts in a batch; with a server, number of concurrent requests."""
    shard_batches: int = 4
    """Number of batches in a shard, the most that a killed run loses."""
    seed: int = 0
    """Seed from which each text's own seed is derived."""
    server: str = ""
    """Address of an OpenAI-compatible server that generates instead, or several with commas."""
    server_model: str = ""
    """The servers' model, if they serve several."""
    dtype: str = "auto"
    """Dtype of the target's weights."""
    device_map: str = ""
    """Spread the target over devices as transformers does: auto, balanced, sequential, or modules and their devices."""

    def __post_init__(self) -> None:
        TextSettings(max_left_out=self.max_left_out)
        if self.num_prompts < 1:
            raise ValueError(f"num_prompts is {self.num_prompts}; it must be at least 1")
        if self.temperature == 0:
            raise ValueError("temperature is 0, with which all texts are the same; it must be above 0, such as 1")
        self.generation("")

    def generation(self, generation_config: str) -> PseudoDataSettings:
        """Returns the settings with which the texts are generated; raises ValueError for invalid ones."""
        return PseudoDataSettings(
            max_new_tokens=self.max_new_tokens,
            temperature=str(self.temperature),
            top_p=self.top_p,
            batch_size=self.batch_size,
            shard_batches=self.shard_batches,
            generation_config=generation_config,
            seed=self.seed,
        )


def main(run: OwnPromptsSettings) -> None:
    if run.server and run.device_map:
        raise ValueError("--device-map has no effect with --server, which spreads the target itself; omit it")
    share = launchers.begin_share()
    samples = Path(run.output) / SAMPLES
    check_replaceable(Path(run.output), marker=SAMPLES)
    info = read_target_info(run.target)
    now = first_run_time(samples, MARKER, is_shared=share.is_shared)
    turn = user_turn(run, info, now)
    writer: Writer
    if run.server:
        writer = ServerWriter(
            run.server,
            info.tokenizer,
            model=run.server_model,
            num_in_flight=run.batch_size,
            end_ids=info.eos_token_ids,
        )
    else:
        writer = LocalWriter(
            draftsmith.Target.from_pretrained(
                run.target, dtype=run.dtype, device=launchers.device(), device_map=run.device_map
            )
        )
    prompts = sampled_prompts(turn, run.num_prompts, info.tokenizer.decode(turn.begin_ids))
    write_pseudo_data(writer, prompts, samples, run.generation(turn.generation_config), now=now, share=share)
    launchers.end()
    if share.rank == 0:
        write_usable(run, turn, writer.origin, info.tokenizer)


def user_turn(run: OwnPromptsSettings, info: TargetInfo, now: datetime) -> UserTurn:
    """Returns the user's turn of the target's chat template; raises ValueError if it has none, or no room for one."""
    if info.is_encoder_decoder:
        raise ValueError(
            f"target {run.target} is an encoder-decoder, which has no user's turn to write; use an instruction-tuned"
            " causal target, or give prompts of your own"
        )
    if info.tokenizer is None or not info.tokenizer.chat_template:
        lacking = "tokenizer" if info.tokenizer is None else "chat template"
        raise ValueError(
            f"target {run.target} has no {lacking}, so that nothing tells it to write a user's message; use an"
            " instruction-tuned target, or give prompts of your own"
        )
    chat = ChatFormat(tokenizer=info.tokenizer, end_ids=frozenset(info.eos_token_ids), now=now)
    turn = UserTurn.of(chat, run.system, f"target {run.target}")
    if (room := info.context_length - len(turn.begin_ids)) < run.max_new_tokens:
        raise ValueError(
            f"--max-new-tokens is {run.max_new_tokens}; the target's context has room for {max(room, 0)} after the"
            f" {len(turn.begin_ids)} tokens before the user's message"
        )
    return turn


def write_usable(run: OwnPromptsSettings, turn: UserTurn, origin: Origin, tokenizer: Any) -> None:
    """Writes the usable texts as prompts, with a record of their origin; raises ValueError if they are too few."""
    output = Path(run.output)
    num_texts = len(read_pseudo_data(output / SAMPLES))  # raises ValueError for shards that are damaged
    rows = pyarrow.parquet.read_table(output / SAMPLES).to_pylist()
    texts, left_out = usable_texts(rows, turn, tokenizer, run.max_new_tokens)
    counted = f"{output / PROMPTS}: {len(texts):,} prompts of {num_texts:,} texts by {origin.target}"
    if left_out:
        counted += "; left out: " + ", ".join(f"{count:,} {reason}" for reason, count in left_out.most_common())
    if not texts or left_out.total() > run.max_left_out * num_texts:
        raise ValueError(
            f"{counted}; at most a share of {run.max_left_out:g} may be left out: use an instruction-tuned target,"
            " change --temperature, --top-p or --max-new-tokens with another --output, or raise --max-left-out"
        )
    record = origin.recorded() | {
        "num_texts": num_texts,
        "num_prompts": len(texts),
        "left_out": dict(left_out),
        "begin_text": tokenizer.decode(turn.begin_ids),
        "temperature": run.temperature,
        "top_p": run.top_p,
        "max_new_tokens": run.max_new_tokens,
        "seed": run.seed,
        "template_hash": template_hash(tokenizer),
        "command": shlex.join(sys.argv),
    }
    lines = "".join(json.dumps({"turns": [text]}, ensure_ascii=False) + "\n" for text in texts)
    for name, content in ((PROMPTS, lines), (RECORD, json_text.text_of(record, indent=1) + "\n")):
        write_atomically(output / name, functools.partial(Path.write_text, data=content, encoding="utf-8"))
    print(counted)


if __name__ == "__main__":
    with launchers.user_errors():
        main(*parse_settings(OwnPromptsSettings, description=__doc__))
