#!/usr/bin/env bash
# Bamba of transformers does not take positions from the cache: without `position_ids` each forward starts at 0.
#
# Llama and another hybrid, Falcon-H1, continue at the cache's length when a forward with a cache is given no
# positions. Bamba counts from 0 again, so its attention layers rotate every further token as if it were the first:
# the first prediction after a prefill is already off, and nothing is raised. `generate` gives `position_ids` and is
# right; a decoding loop of one's own that relies on the default is not.
#
# Versions: torch 2.13.0 (CPU), transformers 5.23.0; tiny models with random weights (matrices times five).
# Seen on 2026-11-29 (largest logit gap to the uncached forward, 8 tokens one by one after a prefill of 12):
#   llama      without position_ids 0.0000, with 0.0000 (standard deviation 0.76)
#   falcon_h1  without position_ids 0.0000, with 0.0000 (standard deviation 0.79)
#   bamba      without position_ids 0.4113, with 0.0000 (standard deviation 0.83)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
nice "$work/venv/bin/python" - <<'PY'
import sys

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

transformers.logging.set_verbosity_error()
torch.set_grad_enabled(False)
size = dict(vocab_size=96, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2)
mamba = dict(mamba_n_heads=8, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=16, mamba_chunk_size=8)
configs = {
    "llama": dict(num_hidden_layers=2),
    "falcon_h1": mamba | dict(num_hidden_layers=2, head_dim=16, mamba_d_ssm=128),
    "bamba": mamba | dict(num_hidden_layers=4, attn_layer_indices=[1, 3]),
}
ids = torch.randint(3, 90, (1, 20), generator=torch.Generator().manual_seed(0))
for name, settings in configs.items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **size, **settings)).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "A_log" not in parameter_name:
            parameter.mul_(5)
    full = model(ids, use_cache=False).logits[:, 12:]

    def gap(with_positions):
        """Returns the largest logit gap when the last eight tokens are given one by one."""
        cache, logits = model(ids[:, :12], use_cache=True).past_key_values, []
        for i in range(12, 20):
            positions = {"position_ids": torch.tensor([[i]])} if with_positions else {}
            logits.append(model(ids[:, i : i + 1], past_key_values=cache, use_cache=True, **positions).logits)
        return (torch.cat(logits, 1) - full).abs().max().item()

    without, given = gap(False), gap(True)
    print(f"{name:<10} without position_ids {without:.4f}, with {given:.4f} (standard deviation {full.std():.2f})")
    if given > 1e-3 or (name == "bamba") != (without > 1e-2):
        sys.exit(f"Changed: {name} handles a cached forward without position_ids in another way than before.")
PY
