#!/usr/bin/env bash
# Rows that transformers' Trainer groups by length come from long to short, four times an epoch, never shuffled.
#
# With `train_sampling_strategy="group_by_length"` a good guess is that only the rows of a batch are chosen by length and
# the batches come in random order. They are sorted: an epoch of at most 200 batches is four sweeps, each from the
# longest rows to the shortest, so that the last optimiser steps, at the smallest learning rate, see short rows alone.
# A draft head trained so ends on short answers, and the loss of a step says more of its rows' length than of training.
#
# Versions: torch 2.13.0 (CPU), transformers 5.23.0, accelerate 1.15.0.
# Seen on 2026-12-01, longest row of each batch, 320 rows of 10 to 499 tokens, 8 rows a batch, one epoch:
#   499 475 398 353 317 284 211 140 98 70
#   499 435 379 357 325 263 223 148 94 61
#   (and two more lines like these; the numbers depend on the seed, the order does not)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 WORK=$work
nice "$work/venv/bin/python" - <<'PY'
import os
import random
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

random.seed(0)
rows = [{"input_ids": [5] * random.randint(10, 499)} for _ in range(320)]
longest = []


def collate(batch):
    longest.append(max(len(row["input_ids"]) for row in batch))
    ids = torch.tensor([row["input_ids"][:4] for row in batch])
    return {"input_ids": ids, "labels": ids}


config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
arguments = TrainingArguments(
    output_dir=os.environ["WORK"], per_device_train_batch_size=8, num_train_epochs=1, report_to=[], use_cpu=True,
    train_sampling_strategy="group_by_length", save_strategy="no", logging_strategy="no", disable_tqdm=True,
)
Trainer(LlamaForCausalLM(config), arguments, train_dataset=rows, data_collator=collate).train()
sweeps = [longest[begin : begin + 10] for begin in range(0, 40, 10)]
for sweep in sweeps:
    print(*sweep)
if len(longest) != 40 or any(sorted(sweep[1:], reverse=True) != sweep[1:] for sweep in sweeps):
    sys.exit("Changed: the batches of an epoch are not four sweeps from long rows to short ones.")
PY
