#!/usr/bin/env bash
# Prompt lookup of transformers copies what followed the EARLIEST match of the n-gram, not the latest.
#
# Where the last tokens occur several times in the context with different continuations, look-up decoding of
# transformers takes the first one from the left. Text that repeats itself with changes (edited code, a chat) is
# usually continued like its latest occurrence, so a loop that copies the latest match reaches another acceptance, and
# acceptance measured in one does not carry over to the other. The tokens that the target verifies are recorded here.
#
# Versions: torch 2.13.0 (CPU), transformers 5.23.0; a tiny Llama with random weights.
# Seen on 2026-11-29:
#   context  [7, 8, 11, 12, 13, 1, 7, 8, 21, 22, 23, 2, 7, 8, 31, 32, 33, 3, 7, 8]
#   drafted  [11, 12, 13]
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
nice "$work/venv/bin/python" - <<'PY'
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
target = LlamaForCausalLM(config).eval()
forwards = []
target.register_forward_pre_hook(
    lambda module, args, kwargs: forwards.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
)
context = [7, 8, 11, 12, 13, 1, 7, 8, 21, 22, 23, 2, 7, 8, 31, 32, 33, 3, 7, 8]
target.generate(torch.tensor([context]), attention_mask=torch.ones(1, len(context), dtype=torch.long),
                prompt_lookup_num_tokens=3, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
drafted = forwards[0][len(context):]
print("context ", context)
print("drafted ", drafted)
if drafted != [11, 12, 13]:
    sys.exit(f"Changed: prompt lookup drafts {drafted}, not the continuation of the earliest match, [11, 12, 13].")
PY
