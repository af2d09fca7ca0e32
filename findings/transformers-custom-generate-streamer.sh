#!/usr/bin/env bash
# `generate(custom_generate=function, streamer=S)` of transformers does not give the streamer to the function.
#
# The prompt is put into the streamer, then the function is called without it: a parameter named `streamer` stays at its
# default and `**kwargs` does not hold it. A decoding loop handed over this way cannot stream, and whoever reads the
# streamer waits for an end that never comes. `assistant_model` is dropped likewise; a keyword that generate itself does
# not know does arrive. Without `custom_generate` each token is streamed.
#
# Versions: torch 2.13.0 (CPU), transformers 5.23.0; a tiny Llama with random weights.
# Seen on 2026-11-29:
#   plain generate: streamer got ['put', 'put', 'put', 'put', 'end']
#   custom_generate: streamer got ['put']; function got streamer=None, assistant_model=None, draft_length=4
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
from transformers.generation import BaseStreamer


class Recorder(BaseStreamer):
    def __init__(self):
        self.calls = []

    def put(self, value):
        self.calls.append("put")

    def end(self):
        self.calls.append("end")


def decode(model, input_ids, streamer=None, assistant_model=None, draft_length=None, **kwargs):
    received.update(streamer=streamer, assistant_model=assistant_model, draft_length=draft_length)
    return input_ids


config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
target = LlamaForCausalLM(config).eval()
ids, received = torch.tensor([[5, 6, 7]]), {}
settings = dict(attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, eos_token_id=None,
                pad_token_id=0)
plain, custom = Recorder(), Recorder()
target.generate(ids, streamer=plain, **settings)
target.generate(ids, streamer=custom, custom_generate=decode, assistant_model=target, draft_length=4, **settings)
print("plain generate: streamer got", plain.calls)
print(f"custom_generate: streamer got {custom.calls}; function got", ", ".join(f"{k}={v}" for k, v in received.items()))
if plain.calls != ["put"] * 4 + ["end"]:
    sys.exit("Changed: plain generate no longer puts the prompt and then each token.")
if custom.calls != ["put"] or received != {"streamer": None, "assistant_model": None, "draft_length": 4}:
    sys.exit("Changed: what reaches a custom_generate function, or its streamer, is another than before.")
PY
