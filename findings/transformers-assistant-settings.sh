#!/usr/bin/env bash
# Assisted generation of transformers reads the draft length from the assistant's generation config alone.
#
# `num_assistant_tokens`, `num_assistant_tokens_schedule` and `assistant_confidence_threshold` are accepted by
# `generate(...)` and by the target's generation config, and ignored there without a warning: only the assistant's own
# generation config counts. The defaults are 20 tokens, constant, and a threshold of 0.4 on the drafted token's
# probability. That threshold ends most drafts of a weak drafter after one token; a draft length is reached only where
# the assistant's threshold is set to 0 too. The target drafts for itself here, so every draft is accepted.
#
# Versions: torch 2.13.0 (CPU), transformers 5.23.0; a tiny Llama with random weights.
# Seen on 2026-11-29 (number of drafted tokens per verification, 24 new tokens):
#   defaults                      [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]
#   in generate(...)              [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]
#   in the target's config        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]
#   in the assistant's config     [5, 5, 5, 5]
#   assistant, length alone       [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]
#   assistant, threshold 0 alone  [20, 2]
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
nice "$work/venv/bin/python" - <<'PY'
import copy
import sys

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
model = LlamaForCausalLM(config).eval()
ids = torch.tensor([[5, 6, 7, 8, 9]])
length = {"num_assistant_tokens": 5, "num_assistant_tokens_schedule": "constant"}
threshold = {"assistant_confidence_threshold": 0.0}


def drafted(call=None, target_config=None, assistant_config=None):
    """Returns the number of drafted tokens of each verification forward of the target."""
    target, assistant, forwards = copy.deepcopy(model), copy.deepcopy(model), []
    target.generation_config.update(**(target_config or {}))
    assistant.generation_config.update(**(assistant_config or {}))
    target.register_forward_pre_hook(
        lambda module, args, kwargs: forwards.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    target.generate(ids, attention_mask=torch.ones_like(ids), assistant_model=assistant, do_sample=False,
                    max_new_tokens=24, eos_token_id=None, pad_token_id=0, **(call or {}))
    return [forwards[0] - ids.shape[1]] + [rows - 1 for rows in forwards[1:]]


both = length | threshold
seen = {
    "defaults": drafted(),
    "in generate(...)": drafted(call=both),
    "in the target's config": drafted(target_config=both),
    "in the assistant's config": drafted(assistant_config=both),
    "assistant, length alone": drafted(assistant_config=length),
    "assistant, threshold 0 alone": drafted(assistant_config=threshold),
}
for where, counts in seen.items():
    print(f"{where:<29} {counts}")
if not seen["defaults"] == seen["in generate(...)"] == seen["in the target's config"]:
    sys.exit("Changed: the call's or the target's settings of the assistant have an effect.")
if seen["in the assistant's config"][0] != 5 or seen["assistant, threshold 0 alone"][0] != 20:
    sys.exit("Changed: the assistant's generation config no longer sets the draft length, or its default is not 20.")
if max(seen["assistant, length alone"]) >= 5:
    sys.exit("Changed: the default confidence threshold no longer ends a weak drafter's drafts early.")
PY
