#!/usr/bin/env bash
# Assisted generation hides from the assistant every token that equals the pad token, though a mask of ones was given.
#
# `generate` drops an attention mask that is all ones. The target then sees everything, but the assistant's own
# `generate`, called each round without a mask, guesses one from the text so far: it hides every token that equals
# `pad_token_id`, in the prompt and among the new tokens, unless that is an end token too. The drafts get worse and the
# text stays right, so only acceptance tells. With `pad_token_id=0` the token may be an ordinary one (`!` in GPT-2's
# vocabulary). A mask with a zero, as of one padded token on the left, is handed on and hides no more than it says.
# The target drafts for itself here, in float32, so every draft should be accepted: 5 forwards for 24 new tokens.
#
# Versions: torch 2.13.0 (CPU), transformers 5.23.0; a tiny Llama with random weights.
# Seen on 2026-11-29 (drafted tokens that were accepted, and positions hidden from the assistant):
#   pad token is in the prompt                      7 of 62   [3, 7]
#   pad token is not in the text                   19 of 19   []
#   pad token is in the prompt, and the end token  19 of 19   []
#   pad token is in the prompt, one token padded   19 of 19   [0]
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
nice "$work/venv/bin/python" - <<'PY'
import copy
import sys

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
                     num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, eos_token_id=None)
target = LlamaForCausalLM(config).eval()
assistant = copy.deepcopy(target)
settings = {"num_assistant_tokens": 4, "num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.0}
assistant.generation_config.update(**settings)
SEPARATOR, UNUSED, NUM_NEW = 7, 63, 24
prompt = [21, 43, 36, SEPARATOR, 8, 12, 51, SEPARATOR, 30, 44, 19, 5]
seen = {}
target.register_forward_pre_hook(
    lambda module, args, kwargs: seen["forwards"].append(kwargs["input_ids"][0].tolist()), with_kwargs=True
)
assistant.register_forward_pre_hook(
    lambda module, args, kwargs: seen.update(mask=kwargs.get("attention_mask")), with_kwargs=True
)


def draft(name, *, pad, eos=None, padded=0):
    """Prints and returns the number of accepted and of drafted tokens, and what the assistant's last mask hides."""
    ids = torch.tensor([[pad] * padded + prompt])
    mask = torch.ones_like(ids)
    mask[:, :padded] = 0
    given = {"attention_mask": mask, "pad_token_id": pad, "eos_token_id": eos, "do_sample": False,
             "max_new_tokens": NUM_NEW}
    seen["forwards"] = []
    plain = target.generate(ids, **given)
    seen["forwards"] = []
    found = target.generate(ids, assistant_model=assistant, **given)
    if found.tolist() != plain.tolist() or found.shape[1] != ids.shape[1] + NUM_NEW:
        sys.exit(f"Changed: {name}: assisted text differs from plain greedy text, or ends early.")
    if set(found[0, ids.shape[1]:].tolist()) & {SEPARATOR, UNUSED}:
        sys.exit(f"Changed: {name}: the new tokens are others than they were; choose another separator.")
    rounds = len(seen["forwards"])
    drafted = sum(map(len, seen["forwards"])) - ids.shape[1] - (rounds - 1)
    hidden = [] if seen["mask"] is None else (seen["mask"][0] == 0).nonzero().flatten().tolist()
    print(f"{name:<46} {NUM_NEW - rounds:>2} of {drafted:>2}   {hidden}")
    return NUM_NEW - rounds, drafted, hidden


masked = draft("pad token is in the prompt", pad=SEPARATOR)
others = [
    draft("pad token is not in the text", pad=UNUSED),
    draft("pad token is in the prompt, and the end token", pad=SEPARATOR, eos=SEPARATOR),
]
padded = draft("pad token is in the prompt, one token padded", pad=SEPARATOR, padded=1)
if any(accepted != drafted or hidden for accepted, drafted, hidden in others):
    sys.exit("Changed: the target's own drafts are not all accepted where no token can be taken for padding.")
if padded[0] != padded[1] or padded[2] != [0]:
    sys.exit("Changed: a mask with a zero is no longer handed on to the assistant as it is.")
if masked[0] > masked[1] / 2 or masked[2] != [3, 7]:
    sys.exit("Changed: tokens of the prompt that equal the pad token are no longer hidden from the assistant.")
PY
