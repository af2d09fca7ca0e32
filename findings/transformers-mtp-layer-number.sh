#!/usr/bin/env bash
# transformers finds the multi-token prediction head of a DeepSeek-V3 only if it is layer 61: `use_mtp` fails on others.
#
# A checkpoint has the head as the layer behind the model's own, `model.layers.N.*` of N layers, and the configuration
# says N (`num_hidden_layers`) and that there is one head (`num_mtp_layers`). `MtpModel` looks for it by the pattern with
# which the class leaves the head out when it loads the model, and that is `model\.layers\.61.*`, the number of the
# first DeepSeek-V3. A model of the same class with another number of layers loads with all tensors of its head listed
# as unexpected, and `generate(use_mtp=True)` says that the weights of the head are missing. GLM-4.5 has 46 and 92.
#
# Versions: torch 2.13.0 (CPU), transformers 5.23.0; tiny models with random weights.
# Seen on 2026-11-29:
#   61 layers: 0 unexpected tensors, use_mtp writes the text of plain decoding
#    2 layers: 20 unexpected tensors, use_mtp: RuntimeError, weights are missing
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 WORK="$work"
nice "$work/venv/bin/python" - <<'PY'
import os
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_grad_enabled(False)
width = 16
size = dict(vocab_size=64, hidden_size=width, intermediate_size=16, moe_intermediate_size=8, num_attention_heads=2)
size |= dict(num_key_value_heads=2, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8)
size |= dict(n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2, first_k_dense_replace=1)
for num_layers in (61, 2):
    torch.manual_seed(0)
    folder = Path(os.environ["WORK"]) / str(num_layers)
    # The block of the head is an ordinary layer more.
    DeepseekV3ForCausalLM(DeepseekV3Config(**size, num_hidden_layers=num_layers + 1)).save_pretrained(folder)
    DeepseekV3Config(**size, num_hidden_layers=num_layers, num_mtp_layers=1).save_pretrained(folder)
    head = {name: torch.ones(width) for name in ("enorm", "hnorm", "shared_head.norm")}
    head["eh_proj"] = torch.randn(width, 2 * width)
    tensors = load_file(folder / "model.safetensors")
    tensors |= {f"model.layers.{num_layers}.{name}.weight": tensor for name, tensor in head.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    unexpected = len(report["unexpected_keys"])
    ids = torch.arange(3, 11)[None]
    plain = model.generate(ids, do_sample=False, max_new_tokens=8, eos_token_id=None, pad_token_id=0)
    try:
        drafted = model.generate(ids, do_sample=False, max_new_tokens=8, eos_token_id=None, pad_token_id=0, use_mtp=True)
        found = "writes the text of plain decoding" if torch.equal(drafted, plain) else "writes another text"
    except RuntimeError as error:
        found = f": RuntimeError, weights {'are missing' if 'missing' in str(error) else str(error)}"
    print(f"{num_layers:>2} layers: {unexpected} unexpected tensors, use_mtp{'' if found[0] == ':' else ' '}{found}")
    if (num_layers == 61) != (unexpected == 0 and "plain" in found) or (num_layers == 2) != ("are missing" in found):
        sys.exit(f"Changed: the head of a model of {num_layers} layers is found in another way than before.")
PY
