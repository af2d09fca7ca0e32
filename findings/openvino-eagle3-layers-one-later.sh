#!/usr/bin/env bash
# OpenVINO GenAI feeds an EAGLE-3 head hidden states of one block later than the authors' code and vLLM do.
#
# A head that names no layers reads 2, n/2 and n - 3 of a target with n blocks. In the authors' code and in vLLM these
# are the inputs of the blocks of these numbers (transformers' hidden_states[k]); OpenVINO GenAI takes their outputs
# (hidden_states[k + 1]), without a warning: texts stay right, and fewer drafts are accepted. An entry
# `hidden_layers_list` in the converted head ("1 5 8" for n = 12), which optimum-intel does not write, restores them.
#
# A small target with random weights and a random head that drafts one token from eight, so that some drafts are right
# by chance. optimum-intel's own class of the head says, in torch, which drafts are right with either layers.
#
# Versions: openvino-genai 2026.4.1.0, openvino 2026.4.1, optimum-intel 2.2.0, transformers 5.5.4, torch 2.13.0 (CPU).
# Seen on 2026-11-29:
#   OpenVINO GenAI:           12 drafts accepted in 83 steps
#   hidden states (2, 6, 9)   : 2 drafts accepted in 93 steps
#   hidden states (3, 7, 10)  : 12 drafts accepted in 83 steps
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q uv
uv=("$work/venv/bin/python" -m uv pip install -q --python "$work/venv/bin/python" --index-strategy unsafe-best-match)
"${uv[@]}" --find-links "${PIP_FIND_LINKS:-https://download.pytorch.org/whl/cpu/torch/}" torch==2.13.0+cpu \
    optimum-intel==2.2.0 openvino-genai==2026.4.1.0 openvino==2026.4.1 openvino-tokenizers==2026.4.1.0 \
    transformers==5.5.4 nncf==3.4.0 einops==0.8.2 diffusers==0.39.0
"$work/venv/bin/python" -m uv pip uninstall -q --python "$work/venv/bin/python" torchvision # may be one for CUDA
cd "$work"
PATH="$work/venv/bin:$PATH" HF_HUB_OFFLINE=1 nice python - <<'PY'
import subprocess
import sys

import numpy as np
import openvino
import openvino_genai
import torch
from optimum.exporters.openvino.model_patcher import LlamaEagle3ForCausalLM
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

NUM_LAYERS, NUM_TOKENS, NUM_NEW = 12, 8, 96
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
SHAPE |= {"vocab_size": NUM_TOKENS, "tie_word_embeddings": False, "eos_token_id": NUM_TOKENS - 1}
EXACT = {"KV_CACHE_PRECISION": "f32", "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
DEFAULT = (2, NUM_LAYERS // 2, NUM_LAYERS - 3)


@torch.inference_mode()
def scaled(model):
    """Returns the model with larger weights, so that what it predicts depends on what it reads."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.mul_(20 if "lm_head" in name or "embed" in name else 5)
    return model.eval()


def convert(name, *options):
    command = ["optimum-cli", "export", "openvino", "-m", name, "--task", "text-generation-with-past"]
    command += ["--weight-format", "fp32", "--disable-convert-tokenizer", *options, f"{name}-openvino"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return f"{name}-openvino"


def served(prompt):
    """Returns the text of OpenVINO GenAI, and the number of tokens of each of its steps."""
    draft_model = openvino_genai.draft_model("head-openvino", "CPU", **EXACT)
    options = {"draft_model": draft_model, "ATTENTION_BACKEND": "PA", **EXACT}
    pipeline = openvino_genai.LLMPipeline("target-openvino", "CPU", **options)
    ids = openvino.Tensor(np.array([prompt], dtype=np.int64))
    out = pipeline.generate(ids, max_new_tokens=NUM_NEW, num_assistant_tokens=1, do_sample=False, ignore_eos=True)
    return out.tokens[0], list(out.extended_perf_metrics.main_model_metrics.raw_metrics.m_batch_sizes)


@torch.inference_mode()
def computed(text, num_prompt, layers):
    """Returns the steps in which the head drafts one token from these hidden states, as transformers numbers them."""
    states = target(torch.tensor([text]), output_hidden_states=True).hidden_states
    joined = torch.cat([states[layer] for layer in layers], dim=-1)[:, :-1]
    drafted = head(input_ids=torch.tensor([text[1:]]), hidden_states=joined, use_cache=False).logits[0].argmax(-1)
    sizes, end = [1], num_prompt + 1
    while end < len(text):
        # Position t of the head reads token t + 1 and the features of t, and drafts token t + 2.
        is_right = end + 1 < len(text) and drafted[end - 2].item() == text[end]
        sizes.append(1 + is_right)
        end += 1 + is_right
    return sizes


torch.manual_seed(0)
target = scaled(LlamaForCausalLM(LlamaConfig(num_hidden_layers=NUM_LAYERS, **SHAPE)))
head_config = LlamaConfig(num_hidden_layers=1, draft_vocab_size=NUM_TOKENS, **SHAPE)
head = scaled(LlamaEagle3ForCausalLM(head_config))
head.model.embed_tokens.load_state_dict(target.model.embed_tokens.state_dict())  # OpenVINO takes the target's
target.save_pretrained("target")
head_config.architectures = ["LlamaForCausalLMEagle3"]
head_config.save_pretrained("head")
weights = {name.removeprefix("model."): weight.contiguous() for name, weight in head.state_dict().items()}
save_file(weights, "head/model.safetensors", metadata={"format": "pt"})
convert("target")
convert("head", "--trust-remote-code")

prompt = [1, 2, 3, 4, 5]
text, found = served(prompt)
if text != target.generate(torch.tensor([prompt]), max_new_tokens=NUM_NEW, eos_token_id=NUM_TOKENS)[0, 5:].tolist():
    sys.exit("Changed: the text is not the target's.")
later = tuple(layer + 1 for layer in DEFAULT)
expected = {layers: computed(prompt + text, len(prompt), layers) for layers in (DEFAULT, later)}
print(f"OpenVINO GenAI:           {sum(found) - len(found)} drafts accepted in {len(found) - 1} steps")
for layers, sizes in expected.items():
    print(f"hidden states {layers!s:12}: {sum(sizes) - len(sizes)} drafts accepted in {len(sizes) - 1} steps")
if found != expected[later] or found == expected[DEFAULT]:
    sys.exit("Changed: OpenVINO GenAI does not read the outputs of blocks 2, n/2 and n - 3.")
PY
