#!/usr/bin/env bash
# In a batch, a row that has written its stop string is padded only if there is an end token too.
#
# `generate(stop_strings=...)` stops a batch when all its rows have stopped. A row that stopped earlier gets pad tokens
# from there on if any stopping criterion has an end token, whichever that is. Without one (`eos_token_id=None`, as in
# measurements of fixed length) the row goes on with real tokens, and nothing in the output says where it stopped: texts
# past the stop string, and counts of tokens that depend on which rows share the batch. The end token given here occurs
# in neither text.
#
# Versions: torch 2.13.0 (CPU), transformers 5.23.0; a tiny Llama with random weights, whose tokens are letters.
# Seen on 2026-11-29 (`.` is the pad token):
#   stop strings ['C', 'F']
#   no stop strings      gNKCKlscCKsuNSNK NnsSNJsLORIFuNLO
#   each row alone       gNKC             NnsSNJsLORIF
#   batch, no end token  gNKCKlscCKsu     NnsSNJsLORIF
#   batch, an end token  gNKC........     NnsSNJsLORIF
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
nice "$work/venv/bin/python" - <<'PY'
import string
import sys

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

transformers.logging.set_verbosity_error()
SIGNS = "." + string.ascii_letters + "!"  # the first is the pad token, the last the end token
engine = Tokenizer(BPE({sign: number for number, sign in enumerate(SIGNS)}, merges=[]))
engine.decoder = ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=engine)
torch.manual_seed(1)
config = LlamaConfig(vocab_size=len(SIGNS), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                     num_attention_heads=2, initializer_range=0.3, bos_token_id=None, eos_token_id=None)
model = LlamaForCausalLM(config).eval()
prompts = torch.randint(1, len(SIGNS) - 1, (2, 8))


def write(rows, **given):
    """Returns the texts of up to 16 new tokens."""
    ids = prompts[rows]
    new = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, do_sample=False, max_new_tokens=16,
                         **given)[:, ids.shape[1]:]
    return ["".join(SIGNS[token] for token in row) for row in new.tolist()]


plain = write([0, 1])
stops = [plain[0][3], plain[1][11]]
ends = [min(text.index(stop) for stop in stops if stop in text) + 1 for text in plain]
given = {"stop_strings": stops, "tokenizer": tokenizer}
alone = [write([row], **given)[0] for row in (0, 1)]
together = write([0, 1], **given)
with_end = write([0, 1], **given, eos_token_id=len(SIGNS) - 1)
print(f"stop strings {stops}")
for title, texts in {"no stop strings": plain, "each row alone": alone, "batch, no end token": together,
                     "batch, an end token": with_end}.items():
    print(f"{title:<20} {texts[0]:<16} {texts[1]}")
if set("".join(plain)) & {SIGNS[0], SIGNS[-1]} or not ends[0] < ends[1]:
    sys.exit("Changed: the model writes other texts, in which the pad or end token occurs or the rows stop together.")
if alone != [text[:end] for text, end in zip(plain, ends)]:
    sys.exit("Changed: a row alone no longer ends with its stop string.")
if together != [text[: ends[1]] for text in plain]:
    sys.exit("Changed: without an end token, a stopped row no longer goes on until the batch has stopped.")
if with_end != [plain[0][: ends[0]].ljust(ends[1], SIGNS[0]), plain[1][: ends[1]]]:
    sys.exit("Changed: with an end token, a stopped row is no longer padded.")
PY
