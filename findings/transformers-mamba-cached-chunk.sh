#!/usr/bin/env bash
# Several tokens after a prefill are computed wrongly by transformers' Mamba, FalconMamba and Jamba, silently.
#
# A forward of one token reads the recurrent state of the cache; a forward of several (drafted tokens to verify, the
# next chunk of a prompt) scans from an empty state, although the same cache is given, and its logits are wrong. Nothing
# is raised. Mamba 2 and Falcon-H1, which has its layers, start from the cached state and are right, so "state-space
# model" alone does not tell whether a draft can be verified in one forward.
#
# Versions: torch 2.13.0 (CPU), transformers 5.23.0, no mamba-ssm or causal-conv1d; tiny models with random weights
# (matrices times five, so that the state matters as in a trained model).
# Seen on 2026-11-29 (largest logit gap to the uncached forward over 8 tokens after a prefill of 12):
#   mamba         one by one 0.0000, all eight at once 11.3170 (standard deviation 3.82)
#   falcon_mamba  one by one 0.0000, all eight at once 11.1311 (standard deviation 4.02)
#   jamba         one by one 0.0000, all eight at once 0.0442 (standard deviation 0.80)
#   mamba2        one by one 0.0000, all eight at once 0.0000 (standard deviation 4.00)
#   falcon_h1     one by one 0.0000, all eight at once 0.0000 (standard deviation 0.79)
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
size = dict(vocab_size=96, hidden_size=64, num_hidden_layers=2)
heads = dict(intermediate_size=128, num_attention_heads=4, num_key_value_heads=2)
mamba2 = dict(mamba_n_heads=8, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=16, mamba_chunk_size=8)
mixture = dict(expert_layer_period=2, expert_layer_offset=1, num_experts=2, num_experts_per_tok=1)
configs = {
    "mamba": dict(state_size=8),
    "falcon_mamba": dict(state_size=8),
    "jamba": heads | mixture | dict(attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8),
    "mamba2": dict(state_size=16, num_heads=8, head_dim=16, n_groups=1, chunk_size=8),
    "falcon_h1": heads | mamba2 | dict(head_dim=16, mamba_d_ssm=128),
}
ids = torch.randint(3, 90, (1, 20), generator=torch.Generator().manual_seed(0))
for name, settings in configs.items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **size, **settings)).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "A_log" not in parameter_name:
            parameter.mul_(5)
    full = model(ids, use_cache=False).logits[:, 12:]

    def gap(chunk):
        """Returns the largest logit gap when the last eight tokens are given `chunk` at a time."""
        outputs = model(ids[:, :12], use_cache=True)
        key = "past_key_values" if getattr(outputs, "past_key_values", None) is not None else "cache_params"
        cache, logits = {key: outputs[key]}, []
        for start in range(12, 20, chunk):
            logits.append(model(ids[:, start : start + chunk], use_cache=True, **cache).logits)
        return (torch.cat(logits, 1) - full).abs().max().item()

    single, several = gap(1), gap(8)
    print(f"{name:<13} one by one {single:.4f}, all eight at once {several:.4f} (standard deviation {full.std():.2f})")
    wrong = name in ("mamba", "falcon_mamba", "jamba")
    if single > 1e-3 or wrong != (several > 1e-2):
        sys.exit(f"Changed: {name} is wrong one by one, or {'right' if wrong else 'wrong'} with eight tokens at once.")
PY
