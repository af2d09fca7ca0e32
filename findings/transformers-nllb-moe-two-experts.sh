#!/usr/bin/env bash
# NLLB-MoE of transformers computes with experts 0 and 1 of each layer alone, however many there are.
#
# The router returns which expert each token chose as a mask of zeros and ones, and the experts take that mask for
# numbers of experts: zeros go to expert 0, ones to expert 1. The weights of all other experts, 126 of 128 in the
# released model, are loaded and never used: written over with NaN they leave every output as it was. Switch
# Transformers, which routes to one expert as well, uses all of its experts.
#
# Versions: torch 2.13.0 (CPU), transformers 5.23.0; tiny models with random weights, 8 experts in every layer with
# experts, 400 tokens.
# Seen on 2026-11-29:
#   nllb-moe: the output depends on experts 0, 1
#   switch_transformers: the output depends on experts 0, 1, 2, 3, 4, 5, 6, 7
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
from transformers import AutoConfig, AutoModel

transformers.logging.set_verbosity_error()
torch.set_grad_enabled(False)
NUM_EXPERTS = 8
size = dict(vocab_size=96, d_model=32, num_experts=NUM_EXPERTS, pad_token_id=0)
configs = {
    "nllb-moe": dict(
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_sparse_step=2,
        decoder_sparse_step=2,
    ),
    "switch_transformers": dict(
        d_ff=48, d_kv=8, num_heads=4, num_layers=2, num_decoder_layers=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1
    ),
}
ids = torch.randint(3, 90, (10, 40), generator=torch.Generator().manual_seed(0))
for name, settings in configs.items():
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(name, **size, **settings)).eval()
    used = []
    for expert in range(NUM_EXPERTS):
        own = [weight for weight_name, weight in model.named_parameters() if f"expert_{expert}." in weight_name]
        kept = [weight.clone() for weight in own]
        for weight in own:
            weight.fill_(float("nan"))
        if model(ids, decoder_input_ids=ids).last_hidden_state.isnan().any():
            used.append(expert)
        for weight, values in zip(own, kept):
            weight.copy_(values)
    print(f"{name}: the output depends on experts {', '.join(map(str, used))}")
    if used != ([0, 1] if name == "nllb-moe" else list(range(NUM_EXPERTS))):
        sys.exit(f"Changed: {name} computes with other experts than before.")
PY
