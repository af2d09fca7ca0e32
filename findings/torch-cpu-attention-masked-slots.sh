#!/usr/bin/env bash
# On a CPU, attention's result depends on how many MASKED key slots stand behind the visible ones, bit for bit.
#
# `scaled_dot_product_attention` over n keys, and over the same n keys with further slots that the mask excludes
# (-inf), give different bits, in float32 and bfloat16: the kernel groups its sums by the number of slots, not by the
# visible ones. So the padding of a key-value cache, and the rejected drafts that stand in it, are part of the result,
# and greedy decoding with a drafter can flip a near tie that plain decoding decides the other way. With the number of
# slots rounded up to a multiple of 512 the bits were equal. Shown with each instruction set that torch has kernels for.
#
# Versions: torch 2.13.0 (CPU), one thread. Seen on 2026-11-29 on x86-64 with AVX-512:
#   DEFAULT  torch.float32  differ for 9 of 9 (rows, keys), largest gap 2.1e-07; rounded up to 512: 9 of 9 equal
#   DEFAULT  torch.bfloat16 differ for 1 of 9 (rows, keys), largest gap 7.5e-09; rounded up to 512: 9 of 9 equal
#   AVX2     torch.float32  differ for 9 of 9 (rows, keys), largest gap 2.1e-07; rounded up to 512: 9 of 9 equal
#   AVX2     torch.bfloat16 differ for 4 of 9 (rows, keys), largest gap 9.8e-04; rounded up to 512: 9 of 9 equal
#   AVX512   torch.float32  differ for 9 of 9 (rows, keys), largest gap 2.1e-07; rounded up to 512: 9 of 9 equal
#   AVX512   torch.bfloat16 differ for 9 of 9 (rows, keys), largest gap 9.8e-04; rounded up to 512: 9 of 9 equal
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
export OMP_NUM_THREADS=1
cat > "$work/attention.py" <<'PY'
import sys

import torch
import torch.nn.functional as F

torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16):
    changed, equal, cases, gap = 0, 0, 0, 0.0
    for num_keys in (300, 505, 1020):
        for rows in (2, 5, 16):
            q = torch.randn(1, 9, rows, 64).to(dtype)
            k, v = torch.randn(2, 1, 9, 2048, 64).to(dtype)

            def attend(num_slots):
                """Attends to the first `num_keys` of `num_slots` slots; the mask excludes the others."""
                mask = torch.full((rows, num_slots), float("-inf"), dtype=dtype)
                mask[:, :num_keys] = 0
                return F.scaled_dot_product_attention(q, k[:, :, :num_slots], v[:, :, :num_slots], attn_mask=mask)

            exact = attend(num_keys)
            others = [attend(num_slots) for num_slots in (num_keys + 1, num_keys + 4, num_keys + 16, 2048)]
            cases += 1
            changed += any(not torch.equal(exact, other) for other in others)
            gap = max(gap, *((exact.float() - other.float()).abs().max().item() for other in others))
            rounded = -(-num_keys // 512) * 512
            equal += torch.equal(attend(rounded), attend(rounded + 512))
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"{capability:<8} {str(dtype):<14} differ for {changed} of {cases} (rows, keys), "
          f"largest gap {gap:.1e}; rounded up to 512: {equal} of {cases} equal")
    if dtype == torch.float32 and changed == 0:
        sys.exit("Changed: masked key slots no longer change the bits of attention on a CPU.")
    if equal != cases:
        sys.exit("Changed: the bits differ although the number of slots is rounded up to a multiple of 512.")
PY
for capability in default $(grep -ow -e avx2 -e avx512f /proc/cpuinfo | sort -u | sed s/512f/512/); do
    ATEN_CPU_CAPABILITY=$capability nice "$work/venv/bin/python" "$work/attention.py"
done
