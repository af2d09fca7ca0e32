"""Compares the speed of drafters on one target in one table: given artifacts, or every family trained for it first.

    ./launch.sh bakeoff                                             # pocket target, all of recipes/configs/bakeoff.yaml
    ./launch.sh bakeoff --target T --learn-from runs/mine --data prompts.jsonl --line-up mine.yaml --train-steps 2000
    ./launch.sh bakeoff --config recipes/configs/bakeoff-smollm2.yaml   # every family on SmolLM2-135M-Instruct
    ./launch.sh bakeoff --drafts runs/medusa runs/distill           # existing artifacts only, into runs/bakeoff
    ./launch.sh bakeoff --target T --data prompts.jsonl --drafts runs/mine --num-prompts 64 --max-new-tokens 256
    ./launch.sh bakeoff --drafts runs/medusa --temperatures 0,0.7 --batch-sizes 1,4,16 --verifiers typical
    ./launch.sh bakeoff --target T --drafts runs/medusa --dtype bfloat16 --batch-invariant   # the same text, to the bit
    ./launch.sh bakeoff --drafts runs/distill --lengths fixed=4,heuristic,expected_gain --confidence-thresholds 0.5

In every round, plain decoding, transformers and all drafters decode the same prompts in turn; speed-ups are medians
over rounds. The same command continues an interrupted run. Pocket target, two drafters, one CPU core: about 5 minutes.
"""

import sys
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import torch

from data import POCKET, pseudo_data, teacher_store
from data.examples import open_examples, usable_rows
from data.prompts import LongPrompts, TextSettings, load_prompts, prompt_room
from data.pseudo_data import write_pseudo_data
from data.sources import default_source
from data.turns import expand_turns
from data.writers import LocalWriter, PseudoDataSettings
from data.writers.teacher_outputs import store_of_text
from draftsmith import Target
from draftsmith.artifacts.artifact import check_fits, read_manifest
from draftsmith.length.costs import num_threads
from draftsmith.loading.model_info import TargetInfo, read_target_info
from eval import hardware
from eval.bakeoff.results import check_output, claimed
from eval.bakeoff.settings import BakeoffSettings
from eval.compare import compare
from eval.plots.wandb_logging import to_wandb
from eval.report.table import header, table
from trainers.sweeps import lineup
from trainers.training import launchers
from trainers.training.settings import parse_settings

LINE_UP = Path(__file__).resolve().parent / "configs" / "bakeoff.yaml"
MAX_TRAINING_THREADS = 4  # more threads slow small models down


@dataclass(frozen=True, kw_only=True)
class BakeoffRunSettings:
    """The drafters, the prompts, and how they are decoded."""

    target: str = str(POCKET)
    """A transformers folder, GGUF file, named target (smollm2, pocket) or hub name."""
    drafts: tuple[str, ...] = ()
    """Folders of the artifacts to compare; if empty, the drafters of the line-up are trained first."""
    line_up: str = str(LINE_UP)
    """YAML table of the drafters to train, with the same data, seed and budget; see trainers/sweeps/lineup.py."""
    learn_from: str = ""
    """Training data: a folder of pseudo-data, a teacher store, or prompts that the target continues first; if empty,
    source code on this machine."""
    num_texts: int = 720
    """Number of training prompts that the target continues."""
    text_tokens: int = 112
    """New tokens per training prompt."""
    text_prompt_tokens: int = 0
    """Length of the longest training prompt in tokens; 0 uses all that the target's context leaves. Longer ones are
    left out, since a prefill and a training row cost as much as their length."""
    text_batch: int = 120
    """Training prompts that the target continues at a time."""
    teacher_store: bool = False
    """Store once what the drafters of the line-up read of the target on the training data, in place of running it for
    each of them; needs disk space, which is printed first."""
    train_steps: int = 0
    """Optimiser steps of each drafter; 0 uses the line-up's."""
    data: str = ""
    """Source of the prompts (data/sources); if empty, python-source, or python-docstrings for an encoder-decoder."""
    text: TextSettings = field(default_factory=TextSettings)
    """Settings for reading rows of text."""
    output: str = "runs/bakeoff"
    """Folder for bakeoff.html, .json, .md, .csv and .png."""
    num_prompts: int = 8
    """Number of prompts; 0 for all."""
    max_steps: int = 0
    """Maximum number of the largest batches, for a quick trial; 0 for all prompts."""
    all_turns: bool = True
    """Decode every turn of a conversation, with the target's own answers as the history; otherwise the first turns."""
    prompt_tokens: int = 64
    """Length of prompts cut from source code or plain text, in tokens."""
    long_prompts: LongPrompts = "auto"
    """Treatment of prompts too long for the target; auto truncates an encoder's input, and raises for others."""
    max_new_tokens: int = 48
    """New tokens per prompt."""
    rounds: int = 3
    """Number of times that everything is decoded."""
    temperatures: str = "0,1"
    """Sampling temperatures, separated by commas; 0 is greedy."""
    batch_sizes: str = "1,8"
    """Batch sizes, separated by commas."""
    verifiers: str = ""
    """Other verifiers, separated by commas, each in an extra row of every drafter; typical is lossy, for example."""
    lengths: str = ""
    """Draft-length policies (draftsmith/length/policies.py), separated by commas, each in an extra row, as fixed=4."""
    assisted: bool = True
    """Also time transformers' own speculative decoding: with each draft LM among the drafters, and prompt look-up."""
    forecast_sizes: str = "1,2,4,8,16"
    """Batch sizes, separated by commas, for which speed-ups are predicted beside the measured ones; may be empty."""
    generation_config: str = ""
    """'model' applies the target's own generation config in every row, such as its repetition penalty; or JSON such as
    {"min_p": 0.1}, or a JSON file. Its temperature and lengths are not read; speed-ups are not predicted with it."""
    confidence_thresholds: str = ""
    """Target-confidence thresholds, separated by commas, each in an extra row; drafting is skipped below them."""
    continuous_batching: bool = False
    """Keep batches of more than one row full, as servers do: where a text ends, the next prompt takes its place."""
    batch_invariant: bool = False
    """Decode batch-invariantly, and sample by the verifier coupled: each drafter's text is then plain decoding's, token
    for token, in any dtype."""
    seed: int = 0
    """Random seed of the choice of prompts and of sampling."""
    threads: int = 1
    """CPU threads; 0 uses torch's default. A small target is fastest and most stable on one."""
    device: str = "auto"
    """Device of the target."""
    dtype: str = ""
    """Dtype of the target, and of training; if empty, float32 on a CPU, and the stored dtype on a GPU, and training as
    the line-up says."""
    report_to: Literal["files", "wandb"] = "files"
    """Write the results to the output folder only, or log them to wandb too (WANDB_MODE=offline needs no account)."""
    wandb_project: str = "draftsmith"
    """Name of the wandb project."""

    def comparison(self) -> BakeoffSettings:
        """Returns the settings of `compare`; raises ValueError for invalid ones."""
        return BakeoffSettings(
            temperatures=tuple(_numbers("temperatures", self.temperatures, float)),
            batch_sizes=tuple(_numbers("batch_sizes", self.batch_sizes, int)),
            verifiers=tuple(filter(None, self.verifiers.split(","))),
            lengths=tuple(filter(None, self.lengths.split(","))),
            forecast_sizes=tuple(_numbers("forecast_sizes", self.forecast_sizes, int)) if self.forecast_sizes else (),
            confidence_thresholds=tuple(_numbers("confidence_thresholds", self.confidence_thresholds, float))
            if self.confidence_thresholds
            else (),
            generation_config=self.generation_config,
            assisted=self.assisted,
            rounds=self.rounds,
            max_new_tokens=self.max_new_tokens,
            continuous_batching=self.continuous_batching,
            batch_invariant=self.batch_invariant,
            seed=self.seed,
            threads=self.threads,
        )


def main(run: BakeoffRunSettings) -> None:
    settings, output = run.comparison(), Path(run.output)
    check_output(output)
    launchers.require(run.report_to == "wandb", "wandb", "--report-to wandb")
    line_up = [] if run.drafts else lineup.read(Path(run.line_up))
    manifests = [read_manifest(draft) for draft in run.drafts]
    target_info = read_target_info(run.target)
    for draft, manifest in zip(run.drafts, manifests, strict=True):
        check_fits(draft, manifest, target_info)
    num_prompts = run.num_prompts
    if run.max_steps:
        num_prompts = min(num_prompts or sys.maxsize, run.max_steps * max(settings.batch_sizes))
    with claimed(output) as now:
        prompts = load_prompts(
            run.data or default_source("", is_encoder_decoder=target_info.is_encoder_decoder),
            target_info.tokenizer,
            max_prompts=num_prompts,
            max_prompt_tokens=prompt_room(target_info, run.max_new_tokens),
            prompt_tokens=run.prompt_tokens,
            long_prompts=run.long_prompts,
            each_turn=run.all_turns,
            even_categories=True,
            is_encoder_decoder=target_info.is_encoder_decoder,
            settings=run.text,
            now=now,
            seed=run.seed,
        )
        settings.check_prompts(len(prompts))
        dtype = run.dtype or ("auto" if torch.cuda.is_available() and run.device != "cpu" else "float32")
        target = Target.from_pretrained(run.target, dtype=dtype, device=run.device)
        if hardware.emulates(target.device, target.dtype):
            print(
                f"this CPU has no instructions for {run.dtype or target.dtype}, so that verifying several tokens costs"
                " several times as much as decoding one: --dtype float32 is faster here"
            )
        num_conversations = len(prompts)
        if run.all_turns:
            with num_threads(run.threads):
                prompts = expand_turns(target, prompts, run.max_new_tokens)
        artifacts, left_out = [Path(draft) for draft in run.drafts], dict[str, str]()
        if not artifacts:
            artifacts, left_out = _train(line_up, target, target_info, run, now)
            left_out |= lineup.unused_trainers(Path(run.line_up))
        notes = {"left_out": left_out, "data": run.data, "num_conversations": num_conversations}
        target.batch_invariant = run.batch_invariant
        rows = compare(target, prompts, artifacts, output, settings, notes=notes | {"all_turns": run.all_turns})
    if run.report_to == "wandb":
        to_wandb(rows, output, run.wandb_project)
    print("\n".join([header(rows, "terminal"), *table(rows, "terminal")]))
    print(
        f"\nWritten to {run.output}: bakeoff.md, .csv, .json, .png and the report {Path(run.output) / 'bakeoff.html'}"
    )


def _train(
    line_up: list[lineup.DrafterSpec], target: Target, target_info: TargetInfo, run: BakeoffRunSettings, now: datetime
) -> tuple[list[Path], dict[str, str]]:
    """Generates the training data if needed and trains the drafters of the line-up.

    Returns their artifacts, and the reason for each drafter that was skipped.
    """
    output, data = Path(run.output), Path(run.learn_from)
    options: dict[str, Any] = {"target": run.target, "seed": run.seed}
    if run.dtype:
        options["bf16"] = target.dtype == torch.bfloat16
    if run.train_steps:
        options["max_steps"] = run.train_steps
    stored = _stored_outputs(line_up, target) if run.teacher_store else None
    with num_threads(min(MAX_TRAINING_THREADS, torch.get_num_threads())):
        if not any((data / marker).exists() for marker in (pseudo_data.MARKER, teacher_store.MARKER)):
            data = output / "pseudo-data"
            training_prompts = load_prompts(
                run.learn_from or default_source("train", is_encoder_decoder=target_info.is_encoder_decoder),
                target_info.tokenizer,
                max_prompts=run.num_texts,
                max_prompt_tokens=prompt_room(target_info, run.text_tokens, run.text_prompt_tokens),
                long_prompts="drop",
                each_turn=True,
                end_ids=target_info.eos_token_ids,
                is_encoder_decoder=target_info.is_encoder_decoder,
                settings=run.text,
                now=now,
                seed=run.seed,
            )
            print(f"Generating training data with the target: {len(training_prompts)} texts")
            settings = PseudoDataSettings(
                max_new_tokens=run.text_tokens, batch_size=run.text_batch, shard_batches=1, seed=run.seed
            )
            store = store_of_text(output / "teacher-store", stored, data) if stored is not None else None
            if store is not None:
                store.check(target, training_prompts, run.text_tokens)
            writer = LocalWriter(target, store=store.settings if store is not None else None)
            write_pseudo_data(writer, training_prompts, data, settings, store=store, now=now)
            if store is not None:
                data = store.folder
        if stored is not None and not (data / teacher_store.MARKER).exists():
            data = _store_teacher(stored, target, data, output / "teacher-store", run, now)
        print(f"Training {len(line_up)} drafters; the log of each is in {output / 'logs'}", flush=True)
        results = lineup.train_all(line_up, output, is_quiet=True, data=str(data), **options)
        artifacts, skipped = lineup.report(results, len(line_up))
    if not artifacts:
        raise ValueError(f"none of the drafters of {run.line_up} could be trained; see the messages above")
    return artifacts, skipped


def _stored_outputs(line_up: list[lineup.DrafterSpec], target: Target) -> teacher_store.TeacherStoreSettings:
    """Returns what a store holds for the drafters of the line-up."""
    if target.is_encoder_decoder:
        raise ValueError(f"{target.name} is an encoder-decoder, which has no teacher store; set --teacher-store false")
    needs = lineup.needs(line_up, target)
    return teacher_store.TeacherStoreSettings(layers=needs.layers, top_k=needs.top_k)


def _store_teacher(
    settings: teacher_store.TeacherStoreSettings,
    target: Target,
    data: Path,
    folder: Path,
    run: BakeoffRunSettings,
    now: datetime,
) -> Path:
    """Stores outputs of the target on the rows of `data`; returns the store's folder."""
    examples = open_examples(str(data), target, settings=run.text, now=now)
    usable = usable_rows(examples, str(data), max_length=target.context_length, max_left_out=run.text.max_left_out)
    teacher_store.write_teacher_store(target, [examples[index] for index in usable], folder, settings, now=now)
    return folder


def _numbers(name: str, text: str, kind: type) -> list:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{name} is {text!r}; expected numbers separated by commas, as in 0,1") from None


if __name__ == "__main__":
    with launchers.user_errors():
        main(*parse_settings(BakeoffRunSettings, description=__doc__))
