"""Compares small draft models trained on human-written text with those trained on target-generated text.

    ./launch.sh forgotten_small_models                      # into runs/forgotten_small_models
    ./launch.sh forgotten_small_models --targets T --train-steps 4000 --num-texts 20000

The comparison of "LLM needs forgotten small LMs" under equal conditions: a draft LM, an LSTM, a CNN and an n-gram
model, each trained on the original text (baseline) and on the target's continuations of the same prompts or sources
(distilled), by the two line-ups recipes/configs/forgotten-*.yaml. Speed is measured on held-out prompts of both pocket
targets. The same command continues an interrupted run.

A busy CPU core, `--rounds 2 --num-prompts 12 --num-texts 1000`: 50 minutes. On the encoder-decoder all four distilled
drafters are better (greedy tau of the LSTM 1.72 against 1.34, of n-grams 2.56 against 1.40); on the causal target,
which was trained on the baseline's text, they are worse. LOG.md has the table and the reasons.
"""

import json
import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data import POCKET, POCKET_SEQ2SEQ
from data.prompts import load_prompts, prompt_room
from data.pseudo_data import write_pseudo_data
from data.shards import write_atomically
from data.sources import Row, default_source, read_source
from data.writers import LocalWriter, PseudoDataSettings
from draftsmith import Target
from draftsmith.length.costs import num_threads
from draftsmith.loading.model_info import TargetInfo, read_target_info
from eval.bakeoff.results import claimed
from eval.bakeoff.settings import BakeoffSettings
from eval.compare import compare
from eval.plots.pairs import draw_pairs, pair_table, pairs_of
from trainers.sweeps import lineup
from trainers.training import launchers
from trainers.training.settings import parse_settings

WAYS = ("baseline", "distilled")
LINE_UPS = {way: Path(__file__).resolve().parent / "configs" / f"forgotten-{way}.yaml" for way in WAYS}
NAME = "forgotten_small_models"
PROMPT_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class SmallModelsSettings:
    """The targets, and the amount of training and measurement."""

    targets: tuple[str, ...] = (str(POCKET), str(POCKET_SEQ2SEQ))
    """Transformers folders, GGUF files, named targets or hub names, causal or encoder-decoder."""
    output: str = f"runs/{NAME}"
    """Folder for the training data, the drafters, the tables and the plot."""
    num_texts: int = 1200
    """Number of prompts that each target continues, or of sources for an encoder-decoder."""
    text_tokens: int = 112
    """Maximum number of new tokens for each."""
    train_steps: int = 0
    """Optimiser steps of each drafter; 0 uses the line-ups'."""
    num_prompts: int = 16
    """Number of held-out prompts to compare on."""
    max_new_tokens: int = 48
    """New tokens per prompt."""
    rounds: int = 3
    """Number of times that these are decoded."""
    seed: int = 0
    """Random seed."""


def main(run: SmallModelsSettings) -> None:
    output, line_ups = Path(run.output), {way: lineup.read(path) for way, path in LINE_UPS.items()}
    rows = [row for target in run.targets for row in _compare(target, output / Path(target).name, line_ups, run)]
    pairs = pairs_of(rows, WAYS)
    if not pairs:
        raise ValueError("no drafter could be trained in both ways; see the messages above")
    text = "\n".join([*pair_table(pairs, WAYS), "", f"![{' against '.join(WAYS)}]({NAME}.png)", ""])
    write_atomically(output / f"{NAME}.json", lambda path: path.write_text(json.dumps(pairs, indent=1) + "\n"))
    write_atomically(output / f"{NAME}.md", lambda path: path.write_text(text))
    write_atomically(output / f"{NAME}.png", lambda path: draw_pairs(pairs, WAYS, path))
    print(text)
    print(f"Written to {output}: {NAME}.md, .json and the plot {output / NAME}.png")


def _originals(target_info: TargetInfo, output: Path, run: SmallModelsSettings) -> tuple[Path, Path]:
    """Writes the human-written texts, and the prompts or sources for the target; returns both files."""
    source = default_source("train", is_encoder_decoder=target_info.is_encoder_decoder)
    labels, sources = output / "labels.jsonl", output / "sources.jsonl"
    if target_info.is_encoder_decoder:
        pairs = [row.fields for row in read_source(source) if isinstance(row, Row)]
        originals = random.Random(run.seed).sample(pairs, min(run.num_texts, len(pairs)))
        prompt_rows = originals
    else:
        length, tokenizer = PROMPT_TOKENS + run.text_tokens, target_info.tokenizer
        assert tokenizer is not None
        texts = load_prompts(source, tokenizer, max_prompts=run.num_texts, prompt_tokens=length, seed=run.seed)
        originals = [{"text": text.text} for text in texts]
        ids = [text.ids[:PROMPT_TOKENS] for text in texts]
        prompt_rows = [{"text": tokenizer.decode(one, skip_special_tokens=True)} for one in ids]
    for path, rows in ((labels, originals), (sources, prompt_rows)):
        write_atomically(path, partial(_write_rows, rows))
    return labels, sources


def _write_rows(rows: list[dict[str, Any]], path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _compare(
    name: str, output: Path, line_ups: dict[str, list[lineup.DrafterSpec]], run: SmallModelsSettings
) -> list[dict[str, Any]]:
    """Trains every drafter for one target in both ways; returns the rows of its bake-off."""
    target_info = read_target_info(name)
    is_encoder_decoder = target_info.is_encoder_decoder
    common: dict[str, Any] = {"is_encoder_decoder": is_encoder_decoder, "seed": run.seed}
    held_out = load_prompts(
        default_source("", is_encoder_decoder=is_encoder_decoder),
        target_info.tokenizer,
        max_prompts=run.num_prompts,
        max_prompt_tokens=prompt_room(target_info, run.max_new_tokens),
        **common,
    )
    with claimed(output):
        labels, sources = _originals(target_info, output, run)
        training_prompts = load_prompts(
            str(sources), target_info.tokenizer, max_prompt_tokens=prompt_room(target_info, run.text_tokens), **common
        )
        target = Target.from_pretrained(name, dtype="float32")
        options: dict[str, Any] = {"target": name, "seed": run.seed} | (
            {"max_steps": run.train_steps} if run.train_steps else {}
        )
        print(
            f"\n{Path(name).name}: generating {len(training_prompts)} texts; training logs are in {output}/*/logs",
            flush=True,
        )
        with num_threads(min(4, torch.get_num_threads())):
            # Greedy text alone would train drafters for greedy decoding only.
            data_settings = PseudoDataSettings(
                temperature="0,1", max_new_tokens=run.text_tokens, batch_size=120, shard_batches=1, seed=run.seed
            )
            write_pseudo_data(LocalWriter(target), training_prompts, output / "pseudo-data", data_settings)
            artifacts = []
            for way, data in zip(WAYS, (str(labels), str(output / "pseudo-data")), strict=True):
                print(f"{way}: training on {data}", flush=True)
                results = lineup.train_all(line_ups[way], output / way, is_quiet=True, data=data, **options)
                artifacts += lineup.report(results, len(line_ups[way]))[0]
        settings = BakeoffSettings(
            rounds=run.rounds, max_new_tokens=run.max_new_tokens, batch_sizes=(1,), seed=run.seed, forecast_sizes=()
        )
        return compare(target, held_out, artifacts, output, settings)


if __name__ == "__main__":
    with launchers.user_errors():
        main(*parse_settings(SmallModelsSettings, description=__doc__))
