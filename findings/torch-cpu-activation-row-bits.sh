#!/usr/bin/env bash
# On a CPU, SiLU and GELU give a row other bits, depending on how many rows stand in the tensor.
#
# Both are elementwise, so that one would expect a value's result to depend on the value alone. The kernels compute
# whole vectors of elements and the few left over one by one, with another exponential. With rows of 48 numbers and
# AVX-512, an odd number of rows leaves 16 elements over, all of the last row: a token's hidden state then changes with
# the number of tokens fed beside it, and with it, rarely, the token that a verified draft gives. Rows whose elements
# fill whole vectors show nothing, nor does SiLU in bfloat16, where rounding hides the difference. Exact GELU differs
# for a single value only, in float32 and bfloat16, as its kernel leaves fewer elements over.
#
# Versions: torch 2.13.0 (CPU), one thread. Seen on 2026-11-30 on x86-64 with AVX-512:
#   AVX2     silu       torch.float32   other bits in    0 of 4000 groups of 5 rows, 0 of 2500 groups of 8,  838 of 20000 single values
#   AVX2     silu       torch.bfloat16  other bits in    0 of 4000 groups of 5 rows, 0 of 2500 groups of 8,    0 of 20000 single values
#   AVX2     gelu       torch.float32   other bits in    0 of 4000 groups of 5 rows, 0 of 2500 groups of 8, 6621 of 20000 single values
#   AVX2     gelu       torch.bfloat16  other bits in    0 of 4000 groups of 5 rows, 0 of 2500 groups of 8,  664 of 20000 single values
#   AVX2     gelu tanh  torch.float32   other bits in    0 of 4000 groups of 5 rows, 0 of 2500 groups of 8, 1295 of 20000 single values
#   AVX2     gelu tanh  torch.bfloat16  other bits in  327 of 4000 groups of 5 rows, 0 of 2500 groups of 8,  128 of 20000 single values
#   AVX512   silu       torch.float32   other bits in 1909 of 4000 groups of 5 rows, 0 of 2500 groups of 8,  838 of 20000 single values
#   AVX512   silu       torch.bfloat16  other bits in    0 of 4000 groups of 5 rows, 0 of 2500 groups of 8,    0 of 20000 single values
#   AVX512   gelu       torch.float32   other bits in    0 of 4000 groups of 5 rows, 0 of 2500 groups of 8, 6621 of 20000 single values
#   AVX512   gelu       torch.bfloat16  other bits in    0 of 4000 groups of 5 rows, 0 of 2500 groups of 8,  664 of 20000 single values
#   AVX512   gelu tanh  torch.float32   other bits in 2613 of 4000 groups of 5 rows, 0 of 2500 groups of 8, 1295 of 20000 single values
#   AVX512   gelu tanh  torch.bfloat16  other bits in  930 of 4000 groups of 5 rows, 0 of 2500 groups of 8,  128 of 20000 single values
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
export OMP_NUM_THREADS=1
cat > "$work/activation.py" <<'PY'
import sys

import torch
from torch.nn.functional import gelu, silu

torch.manual_seed(0)
capability = torch.backends.cpu.get_cpu_capability()
functions = {"silu": silu, "gelu": gelu, "gelu tanh": lambda x: gelu(x, approximate="tanh")}
changed = {}
for name, function in functions.items():
    for dtype in (torch.float32, torch.bfloat16):
        rows = (4 * torch.randn(20_000, 48)).to(dtype)
        among = function(rows)
        odd = sum(not torch.equal(function(rows[i : i + 5]), among[i : i + 5]) for i in range(0, 20_000, 5))
        whole = sum(not torch.equal(function(rows[i : i + 8]), among[i : i + 8]) for i in range(0, 20_000, 8))
        values = rows.flatten()[:20_000]
        alone = torch.cat([function(value) for value in values.split(1)])
        single = int((alone != function(values)).sum())
        changed[name, dtype] = odd, whole, single
        print(f"{capability:<8} {name:<10} {str(dtype):<15} other bits in {odd:>4} of 4000 groups of 5 rows, "
              f"{whole} of 2500 groups of 8, {single:>4} of 20000 single values")
if not all(changed[name, torch.float32][2] for name in functions) or not changed["gelu", torch.bfloat16][2]:
    sys.exit("Changed: a single value now gets the bits that it has in a tensor of many.")
if any(whole for _, whole, _ in changed.values()) or (capability == "AVX512" and not changed["silu", torch.float32][0]):
    sys.exit("Changed: groups of 5 rows no longer differ, or groups of 8 do.")
PY
for capability in $(grep -ow -e avx2 -e avx512f /proc/cpuinfo | sort -u | sed s/512f/512/); do
    ATEN_CPU_CAPABILITY=$capability nice "$work/venv/bin/python" "$work/activation.py"
done
