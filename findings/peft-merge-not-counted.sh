#!/usr/bin/env bash
# merge_adapter changes a weight without torch counting the change: the weight's version stays what it was.
#
# torch counts in-place changes of a tensor in `_version`; optimisers, `load_state_dict` and `weight.add_` under no_grad
# are counted. PEFT's merge writes through `weight.data`, so that whatever was computed from a weight and kept until its
# version changes (packed or quantised copies, a fused head) goes on with the weights from before the merge, and nothing
# fails. A safe merge assigns `weight.data` anew: there the address of the values changes, and the version does not.
#
# Versions: torch 2.13.0 (CPU), peft 0.21.2.
# Seen on 2026-12-01:
#   optimiser step: version 1 -> 2, largest change 0.1000, same address True
#   merge_adapter: version 2 -> 2, largest change 0.2497, same address True
#   merge_adapter(safe_merge=True): version 2 -> 2, largest change 0.2497, same address False
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 peft==0.21.2
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
nice "$work/venv/bin/python" - <<'PY'
import sys

import torch
from peft import LoraConfig, get_peft_model


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.projection = torch.nn.Linear(8, 8, bias=False)

    def forward(self, rows):
        return self.projection(rows)


torch.manual_seed(0)
model = get_peft_model(Net(), LoraConfig(target_modules=["projection"], init_lora_weights=False))
weight = model.base_model.model.projection.base_layer.weight


def observe(name, change):
    before, version, address = weight.detach().clone(), weight._version, weight.data_ptr()
    change()
    largest = (weight.detach() - before).abs().max().item()
    print(
        f"{name}: version {version} -> {weight._version}, largest change {largest:.4f},"
        f" same address {weight.data_ptr() == address}"
    )
    return weight._version != version, largest > 0, weight.data_ptr() == address


def step():
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.1).step()


found = [observe("optimiser step", step), observe("merge_adapter", model.merge_adapter)]
model.unmerge_adapter()
found.append(observe("merge_adapter(safe_merge=True)", lambda: model.merge_adapter(safe_merge=True)))
if found != [(True, True, True), (False, True, True), (False, True, False)]:
    sys.exit("Changed: which changes of a weight torch counts, or how PEFT merges.")
PY
